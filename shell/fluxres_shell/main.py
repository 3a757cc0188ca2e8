"""`fluxres-shell`: runs the tasks of one job on one node, or, as the launcher, becomes such shells by
forking.

    fluxres-shell DIR             be the shell of the directory DIR
    fluxres-shell --launcher FD [CGROUP]   be the launcher on the socket FD, for shells below the cgroup CGROUP

Brokers start it; see `run` and `launcher`. Exit status 0 for a shell that did its work, or found that it is
another's; 1 where it could not; 2 for wrong usage.
"""

from __future__ import annotations

import os
import sys

from fluxres.base.stdio import hold_standard_descriptors
from fluxres_shell.run import NAME, run_shell

USAGE = f"usage: {NAME} DIR | {NAME} --launcher FD [CGROUP]"


def main() -> int:
    """Run the program; its exit status."""
    hold_standard_descriptors()
    match sys.argv[1:]:
        case ["--launcher", fd, *parent] if fd.isdecimal() and len(parent) <= 1:
            from fluxres_shell import cgroup, launcher  # a shell of its own does not need them

            if parent:
                cgroup.join_shells(parent[0])
            return launcher.serve(int(fd))
        case [path] if not path.startswith("-"):
            try:
                dirfd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                print(f"{NAME}: cannot open the directory {path!r}: {error.strerror}", file=sys.stderr)
                return 1
            return run_shell(dirfd, lambda: None)
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
