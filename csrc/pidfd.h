/* pidfd.h: the process calls that Python's os, signal and fcntl modules lack.
 *
 * Linux only. Three things: start a process and hold a pidfd of it from its first instant
 * (clone3(2)), ask how a process ended that need not be a child (PIDFD_GET_INFO), and tell
 * whether two pidfds name the same process (pidfs inode numbers).
 *
 * The part between the two "cffi" lines is read by build_pidfd.py as the declaration of the
 * Python module fluxres_shell._pidfd: no preprocessor lines there.
 */
#ifndef FLUXRES_PIDFD_H
#define FLUXRES_PIDFD_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* Where a start failed. The order is that of the attempt. */
enum fluxres_stage {
    FLUXRES_STAGE_NONE,    /* it did not fail */
    FLUXRES_STAGE_CHANNEL, /* the socket pair that carries the child's report */
    FLUXRES_STAGE_CLONE,   /* clone3(2), fork(2) */
    FLUXRES_STAGE_PIDFD,   /* pidfd_open(2), fallback only */
    FLUXRES_STAGE_GUARD,   /* prctl(PR_SET_PDEATHSIG) */
    FLUXRES_STAGE_CGROUP,  /* joining the cgroup */
    FLUXRES_STAGE_SESSION, /* setsid(2) */
    FLUXRES_STAGE_DUP,     /* putting descriptors in place */
    FLUXRES_STAGE_GROUPS,  /* setgroups(2) */
    FLUXRES_STAGE_SETGID,  /* setresgid(2) */
    FLUXRES_STAGE_SETUID,  /* setresuid(2) */
    FLUXRES_STAGE_CHDIR,   /* chdir(2), with the new credentials */
    FLUXRES_STAGE_EXEC     /* execve(2), of every candidate */
};

enum fluxres_flag {
    FLUXRES_NEW_SESSION = 1,   /* setsid(2) */
    FLUXRES_SET_GROUPS = 2,    /* use groups, ngroups */
    FLUXRES_SET_GID = 4,       /* use gid */
    FLUXRES_SET_UID = 8,       /* use uid */
    FLUXRES_FORCE_FALLBACK = 16 /* behave as on a kernel that has fork(2) and pidfd_open(2) only */
};

/* What to start. Every pointer belongs to the caller and is only read, but for script_argv[1]. */
struct fluxres_spawn {
    char *const *paths;  /* candidates for execve(2), tried in order; ends with NULL */
    char *const *argv;   /* ends with NULL */
    char **script_argv;  /* "/bin/sh", (a slot), argv[1]...; ends with NULL: for ENOEXEC, as execvp(3) */
    char *const *envp;   /* ends with NULL */
    const char *cwd;     /* NULL: stay */
    const int *sources;  /* sources[i] becomes targets[i] in the child; all others close at exec */
    const int *targets;
    size_t nfds;
    const uint32_t *groups;
    size_t ngroups;
    uint32_t uid;
    uint32_t gid;
    int cgroup_fd;       /* a cgroup v2 directory, or -1 */
    int flags;           /* enum fluxres_flag */
};

struct fluxres_child {
    int pid;
    int pidfd;  /* close-on-exec */
    int stage;  /* enum fluxres_stage: where it failed */
    int errnum; /* and why */
};

/* Start a process; return when it has called execve(2), or failed to.
 *
 * 0: child->pid and child->pidfd are set. -1: child->stage and child->errnum are set, and nothing
 * is left behind, neither a process nor a zombie. The child is killed when the calling thread
 * ends, so call this from the main thread. The wait is as long as chdir(2) and execve(2) take,
 * which on a dead network file system has no end. */
int fluxres_spawn(const struct fluxres_spawn *spawn, struct fluxres_child *child);

struct fluxres_exit {
    int status;         /* as wait(2) has it */
    int has_cgroupid;
    uint64_t cgroupid;  /* of the cgroup it was in: the inode number of the directory */
};

/* How the process of pidfd ended: 1, and *info is set. 0: the kernel cannot say, or not yet (the
 * process lives, or is a zombie). -1: errno is set. */
int fluxres_exit_info(int pidfd, struct fluxres_exit *info);

/* The number of the process of pidfd, used once in a boot: 1, and *inode is set. 0: this kernel has
 * no pidfs (before 6.9, or 32 bits wide). -1: errno is set. */
int fluxres_pidfs_inode(int pidfd, uint64_t *inode);

/* cffi: end */

#endif
