"""Standard descriptors for processes that may be started without them."""

from __future__ import annotations

import os


def hold_standard_descriptors() -> None:
    """Open /dev/null on those of 0, 1 and 2 that are closed, so that no file or socket of ours gets their numbers.

    Whatever is redirected or inherited later would else land in it. To be called before anything is opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            os.set_inheritable(descriptor, True)
