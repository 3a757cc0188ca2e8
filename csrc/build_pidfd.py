"""Build the extension module `fluxres_shell._pidfd` from pidfd.c, with cffi in API mode.

setup.py names `ffibuilder`. Run as a program, this builds in place, into shell/fluxres_shell/, with
every warning an error, which is for development only: another compiler's new warning must not
stop a user's installation.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import cffi

HERE = Path(__file__).parent
DEVELOPMENT = __name__ == "__main__"
INSTALLED = "_pidfd.abi3.so"
PACKAGE = HERE.resolve().parent / "shell" / "fluxres_shell"


def declarations() -> str:
    """The part of pidfd.h that cffi can read: one text says it to C and to Python."""
    header = (HERE / "pidfd.h").read_text(encoding="utf-8")
    return header.split("/* cffi: begin */")[1].split("/* cffi: end */")[0]


def make_builder() -> cffi.FFI:
    """The builder. Paths are relative, as setuptools wants them, except in a development build,
    which compiles elsewhere."""
    source_dir = HERE.resolve() if DEVELOPMENT else HERE
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if DEVELOPMENT else [])]
    builder = cffi.FFI()
    builder.cdef(declarations())
    builder.set_source(
        "fluxres_shell._pidfd",
        '#include "pidfd.h"',
        sources=[str(source_dir / "pidfd.c")],
        include_dirs=[str(source_dir)],
        extra_compile_args=["-std=gnu11", *warnings],
    )
    return builder


ffibuilder = make_builder()

if DEVELOPMENT:
    with tempfile.TemporaryDirectory() as build:
        built = shutil.copy(ffibuilder.compile(tmpdir=build), PACKAGE / f"{INSTALLED}.new")
        # The name that setuptools gives it, or two of them would be there. In one step: some process may
        # have the old one mapped.
        Path(built).replace(PACKAGE / INSTALLED)
