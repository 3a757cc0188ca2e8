/* pidfd.c: see pidfd.h. Needs Linux 5.3 (pidfd_open); uses what newer kernels have.
 *
 * Between clone and exec the child is a copy of a Python process: it only makes system calls, and
 * takes no lock and no memory, so that it works whatever state Python was in. It has its own memory
 * (no CLONE_VM): sharing the parent's would be faster by some hundred microseconds, but needs a
 * stack and assembly for each architecture, and must not be done by a child that changes its uid.
 */
#define _GNU_SOURCE
#include "pidfd.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

/* Numbers that headers older than the running kernel lack; the same on every architecture. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#define FLUXRES_CLONE_CLEAR_SIGHAND 0x100000000ULL
#define FLUXRES_CLONE_INTO_CGROUP 0x200000000ULL
#define FLUXRES_CLOSE_RANGE_CLOEXEC (1U << 2)

/* clone(2), struct clone_args: linux/sched.h has it without the last member before 5.7. */
struct fluxres_clone_args {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
    uint64_t set_tid, set_tid_size;
    uint64_t cgroup;
};
#define CLONE_ARGS_SIZE_VER0 64

/* linux/pidfd.h of Linux 6.15; Debian 12's has none of it. The size is part of the ioctl's number:
 * the kernel takes this first size as well as any later one. */
struct fluxres_pidfd_info {
    uint64_t mask, cgroupid;
    uint32_t pid, tgid, ppid;
    uint32_t ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    int32_t exit_code;
};
#define FLUXRES_PIDFD_GET_INFO _IOWR(0xFF, 11, struct fluxres_pidfd_info)
#define FLUXRES_PIDFD_INFO_CGROUPID (1ULL << 2)
#define FLUXRES_PIDFD_INFO_EXIT (1ULL << 3)
#define FLUXRES_PID_FS_MAGIC 0x50494446 /* linux/magic.h: "PIDF" */

_Static_assert(sizeof(struct fluxres_pidfd_info) == 64, "PIDFD_INFO_SIZE_VER0");
_Static_assert(sizeof(struct fluxres_clone_args) == 88, "CLONE_ARGS_SIZE_VER2");

/* Where ids were once 16 bits wide the calls that take all 32 have other names. */
#ifdef SYS_setresuid32
#define FLUXRES_SETRESUID SYS_setresuid32
#define FLUXRES_SETRESGID SYS_setresgid32
#define FLUXRES_SETGROUPS SYS_setgroups32
#else
#define FLUXRES_SETRESUID SYS_setresuid
#define FLUXRES_SETRESGID SYS_setresgid
#define FLUXRES_SETGROUPS SYS_setgroups
#endif

/* What the child sends when it fails; exec closes the channel, and the end of it is success. */
struct report {
    int stage;
    int errnum;
};

/* ---- the child, between clone and exec ---------------------------------------------------- */

static _Noreturn void child_fail(int channel, enum fluxres_stage stage, int errnum)
{
    struct report report = {.stage = stage, .errnum = errnum};
    /* Fails only where the parent is gone, and then nobody is there to be told. */
    (void)send(channel, &report, sizeof report, MSG_NOSIGNAL);
    _exit(127);
}

/* PR_SET_PDEATHSIG(2const): die with the parent. A parent that died before this call is noticed by
 * the second half: another parent pid, or, where the parent is in another pid namespace (0), the
 * channel, whose other end nobody else has. A change of credentials clears the setting. */
static void child_guard(int channel, pid_t parent)
{
    char byte;
    pid_t now;

    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
        child_fail(channel, FLUXRES_STAGE_GUARD, errno);
    now = getppid();
    if (now != parent && now != 0)
        _exit(127);
    if (now == 0 && recv(channel, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0)
        _exit(127);
}

/*
 * signal(7): handlers end at exec, but what is ignored stays ignored (Python ignores SIGPIPE, and whoever was
 * started by posix_spawn(3) may ignore the C library's own two signals, which its sigaction() refuses to
 * touch). So the system call itself: a structure of zeros is SIG_DFL without flags in every layout of it.
 */
static void child_default_signals(void)
{
    static const unsigned long zeros[8];

    /* Refused for SIGKILL and SIGSTOP: they are as they should be. */
    for (int signum = 1; signum < _NSIG; signum++)
        (void)syscall(SYS_rt_sigaction, signum, zeros, NULL, (size_t)(_NSIG / 8));
}

static void child_join_cgroup(int channel, int cgroup_fd)
{
    int fd = openat(cgroup_fd, "cgroup.procs", O_WRONLY | O_CLOEXEC);

    /* cgroups(7): 0 is the writing process. */
    if (fd < 0 || write(fd, "0", 1) != 1)
        child_fail(channel, FLUXRES_STAGE_CGROUP, errno);
    (void)close(fd);
}

/* close_range(2) has CLOSE_RANGE_CLOEXEC since 5.11. */
static void child_close_at_exec(int first, int force_fallback)
{
    struct rlimit limit;
    int end = INT_MAX;

    if (!force_fallback
        && syscall(SYS_close_range, first, UINT_MAX, FLUXRES_CLOSE_RANGE_CLOEXEC) == 0)
        return;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < INT_MAX)
        end = (int)limit.rlim_cur;
    for (int fd = first; fd < end; fd++)
        (void)fcntl(fd, F_SETFD, FD_CLOEXEC); /* EBADF: not open */
}

/* Move every source out of the way of every target first, so that they may be given in any order
 * and overlap. Returns the channel's new descriptor, out of the way too. */
static int child_place_fds(int channel, const struct fluxres_spawn *spawn)
{
    int above = STDERR_FILENO + 1;
    int moved;

    for (size_t i = 0; i < spawn->nfds; i++)
        if (spawn->targets[i] >= above)
            above = spawn->targets[i] + 1;
    moved = fcntl(channel, F_DUPFD_CLOEXEC, above);
    if (moved < 0)
        child_fail(channel, FLUXRES_STAGE_DUP, errno);
    channel = moved;
    int sources[spawn->nfds + 1]; /* bounded by the face: MAX_FDS */
    for (size_t i = 0; i < spawn->nfds; i++) {
        sources[i] = fcntl(spawn->sources[i], F_DUPFD_CLOEXEC, above);
        if (sources[i] < 0)
            child_fail(channel, FLUXRES_STAGE_DUP, errno);
    }
    child_close_at_exec(STDERR_FILENO + 1, spawn->flags & FLUXRES_FORCE_FALLBACK);
    for (size_t i = 0; i < spawn->nfds; i++)
        if (dup2(sources[i], spawn->targets[i]) < 0) /* clears close-on-exec */
            child_fail(channel, FLUXRES_STAGE_DUP, errno);
    return channel;
}

/* credentials(7). System calls, not the C library's functions of these names: those would ask all
 * threads of the parent, which are not here, to do the same. */
static void child_credentials(int channel, const struct fluxres_spawn *spawn)
{
    if (spawn->flags & FLUXRES_SET_GROUPS
        && syscall(FLUXRES_SETGROUPS, spawn->ngroups, spawn->groups) < 0)
        child_fail(channel, FLUXRES_STAGE_GROUPS, errno);
    if (spawn->flags & FLUXRES_SET_GID
        && syscall(FLUXRES_SETRESGID, spawn->gid, spawn->gid, spawn->gid) < 0)
        child_fail(channel, FLUXRES_STAGE_SETGID, errno);
    if (spawn->flags & FLUXRES_SET_UID
        && syscall(FLUXRES_SETRESUID, spawn->uid, spawn->uid, spawn->uid) < 0)
        child_fail(channel, FLUXRES_STAGE_SETUID, errno);
}

/* exec(3), execvp: a candidate that is not there, or out of reach, lets the next one try; one that
 * is there and may not be run is what is reported if no other does better. */
static _Noreturn void child_exec(int channel, const struct fluxres_spawn *spawn)
{
    int errnum = ENOENT;
    int denied = 0;

    for (char *const *path = spawn->paths; *path != NULL; path++) {
        execve(*path, spawn->argv, spawn->envp);
        if (errno == ENOEXEC) { /* a script without #! */
            spawn->script_argv[1] = *path;
            execve(spawn->script_argv[0], spawn->script_argv, spawn->envp);
            child_fail(channel, FLUXRES_STAGE_EXEC, ENOEXEC);
        }
        errnum = errno;
        if (errnum == EACCES)
            denied = 1;
        else if (errnum != ENOENT && errnum != ENOTDIR && errnum != ENODEV && errnum != ESTALE
                 && errnum != ETIMEDOUT && errnum != ENAMETOOLONG && errnum != ELOOP)
            child_fail(channel, FLUXRES_STAGE_EXEC, errnum);
    }
    child_fail(channel, FLUXRES_STAGE_EXEC, denied ? EACCES : errnum);
}

static _Noreturn void child_main(int channel, pid_t parent, int join_cgroup,
                                 const struct fluxres_spawn *spawn)
{
    sigset_t none;

    child_default_signals();
    child_guard(channel, parent);
    if (join_cgroup)
        child_join_cgroup(channel, spawn->cgroup_fd);
    if (spawn->flags & FLUXRES_NEW_SESSION && setsid() < 0)
        child_fail(channel, FLUXRES_STAGE_SESSION, errno);
    channel = child_place_fds(channel, spawn);
    child_credentials(channel, spawn);
    child_guard(channel, parent);
    if (spawn->cwd != NULL && chdir(spawn->cwd) < 0)
        child_fail(channel, FLUXRES_STAGE_CHDIR, errno);
    sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    child_exec(channel, spawn);
}

/* ---- the parent ---------------------------------------------------------------------------- */

static int fail(struct fluxres_child *child, enum fluxres_stage stage, int errnum)
{
    child->pid = -1;
    child->pidfd = -1;
    child->stage = stage;
    child->errnum = errnum;
    return -1;
}

static void reap(pid_t pid)
{
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        continue;
}

/* clone(2), clone3: a fork with a pidfd, in the cgroup from its first instant. */
static pid_t clone_child(const struct fluxres_spawn *spawn, int *pidfd)
{
    struct fluxres_clone_args args = {
        /* CLEAR_SIGHAND: not even a fault before child_default_signals runs Python's handler. */
        .flags = CLONE_PIDFD | FLUXRES_CLONE_CLEAR_SIGHAND,
        .pidfd = (uint64_t)(uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
    };
    size_t size = CLONE_ARGS_SIZE_VER0;

    if (spawn->cgroup_fd >= 0) {
        args.flags |= FLUXRES_CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)spawn->cgroup_fd;
        size = sizeof args;
    }
    return (pid_t)syscall(SYS_clone3, &args, size);
}

/* No clone3, no such flag, or no leave to use it (a container's seccomp filter). */
static int wants_fallback(int errnum)
{
    return errnum == ENOSYS || errnum == EINVAL || errnum == E2BIG || errnum == EPERM;
}

static enum fluxres_stage clone_stage(const struct fluxres_spawn *spawn, int errnum)
{
    int of_process = errnum == EAGAIN || errnum == ENOMEM || errnum == EMFILE || errnum == ENFILE;

    return spawn->cgroup_fd >= 0 && !of_process ? FLUXRES_STAGE_CGROUP : FLUXRES_STAGE_CLONE;
}

/* Read the child's report: 1, and *report is set. 0: none, it is past exec (or was killed: then
 * that is how it ended, and wait(2) has it). */
static int read_report(int channel, struct report *report)
{
    ssize_t length;

    do {
        length = recv(channel, report, sizeof *report, MSG_WAITALL);
    } while (length < 0 && errno == EINTR);
    return length == (ssize_t)sizeof *report;
}

/* fork(2), then pidfd_open(2). The child waits for a byte, so that nothing is run of which no pidfd
 * could be had; it is not reaped meanwhile, so its pid is still its own. */
static int start_by_fork(const struct fluxres_spawn *spawn, const int channel[2], pid_t parent,
                         struct fluxres_child *child)
{
    char go = 1;
    pid_t pid = fork();

    if (pid < 0)
        return fail(child, FLUXRES_STAGE_CLONE, errno);
    if (pid == 0) {
        (void)close(channel[0]);
        if (recv(channel[1], &go, 1, MSG_WAITALL) != 1)
            _exit(127);
        child_main(channel[1], parent, spawn->cgroup_fd >= 0, spawn);
    }
    child->pid = pid;
    child->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (child->pidfd < 0) {
        int errnum = errno;
        (void)kill(pid, SIGKILL);
        reap(pid);
        return fail(child, FLUXRES_STAGE_PIDFD, errnum);
    }
    /* Fails only where the child is dead, which its wait status will tell. */
    (void)send(channel[0], &go, 1, MSG_NOSIGNAL);
    return 0;
}

static int start(const struct fluxres_spawn *spawn, const int channel[2],
                 struct fluxres_child *child)
{
    pid_t parent = getpid();
    pid_t pid;

    if (spawn->flags & FLUXRES_FORCE_FALLBACK)
        return start_by_fork(spawn, channel, parent, child);
    pid = clone_child(spawn, &child->pidfd);
    if (pid == 0) {
        (void)close(channel[0]);
        child_main(channel[1], parent, 0, spawn);
    }
    if (pid < 0) {
        if (wants_fallback(errno))
            return start_by_fork(spawn, channel, parent, child);
        return fail(child, clone_stage(spawn, errno), errno);
    }
    child->pid = pid;
    return 0;
}

int fluxres_spawn(const struct fluxres_spawn *spawn, struct fluxres_child *child)
{
    struct report report;
    sigset_t all, before;
    int channel[2];
    int failed;

    child->stage = FLUXRES_STAGE_NONE;
    child->errnum = 0;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) < 0)
        return fail(child, FLUXRES_STAGE_CHANNEL, errno);
    /* Python's handlers write to a descriptor that the child shares: none may run in the child. */
    sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    failed = start(spawn, channel, child);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    (void)close(channel[1]);
    if (!failed && read_report(channel[0], &report)) {
        (void)close(child->pidfd);
        reap(child->pid);
        failed = fail(child, report.stage, report.errnum);
    }
    (void)close(channel[0]);
    return failed;
}

int fluxres_exit_info(int pidfd, struct fluxres_exit *info)
{
    struct fluxres_pidfd_info raw = {.mask = FLUXRES_PIDFD_INFO_EXIT | FLUXRES_PIDFD_INFO_CGROUPID};

    if (ioctl(pidfd, FLUXRES_PIDFD_GET_INFO, &raw) < 0)
        /* ENOTTY, EINVAL: before 6.13, or not a pidfd. ESRCH: reaped, and nothing was kept;
         * EREMOTE: of a pid namespace that is out of sight. */
        return errno == ENOTTY || errno == EINVAL || errno == ESRCH || errno == EREMOTE ? 0 : -1;
    if (!(raw.mask & FLUXRES_PIDFD_INFO_EXIT))
        return 0;
    info->status = raw.exit_code;
    info->has_cgroupid = (raw.mask & FLUXRES_PIDFD_INFO_CGROUPID) != 0;
    info->cgroupid = raw.cgroupid;
    return 1;
}

int fluxres_pidfs_inode(int pidfd, uint64_t *inode)
{
    struct statfs fs;
    struct stat file;

    if (fstatfs(pidfd, &fs) < 0)
        return -1;
    if (fs.f_type != FLUXRES_PID_FS_MAGIC || sizeof file.st_ino < sizeof *inode
        || sizeof(long) < sizeof *inode)
        return 0;
    if (fstat(pidfd, &file) < 0)
        return -1;
    *inode = file.st_ino;
    return 1;
}
