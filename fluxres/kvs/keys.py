"""Keys of the KVS (RFC 11): paths whose components are separated by dots. Pure.

A key is used in normal form: no dot at its ends, none twice in a row; "." is the root, in normal form "".
A component may hold anything else that UTF-8 can encode, except NUL.
"""

from __future__ import annotations

import errno
from functools import lru_cache
from typing import Final

from fluxres.base.errors import RpcError

MAX_KEY: Final = 1024
"""Bytes of a key, in UTF-8."""
MAX_DEPTH: Final = 32
"""Components of a key."""
MAX_NAMESPACE_NAME: Final = 256
"""Bytes of a namespace's name, in UTF-8."""
KEY_CACHE: Final = 4096
"""Keys whose normal form is remembered."""
ROOT: Final = ""
"""The root directory's key in normal form."""


@lru_cache(maxsize=KEY_CACHE)
def normalise(key: str) -> str:
    """Return `key` in normal form. Raises RpcError EINVAL for what is no key."""
    problem = _problem(key, MAX_KEY)
    if problem:
        raise RpcError(errno.EINVAL, f"cannot use the key {shown(key)}: {problem}")
    parts = [part for part in key.split(".") if part]
    if len(parts) > MAX_DEPTH:
        raise RpcError(
            errno.EINVAL,
            f"cannot use the key {shown(key)}: it has {len(parts)} components, {MAX_DEPTH} are allowed",
        )
    return ".".join(parts)


@lru_cache(maxsize=KEY_CACHE)
def check_namespace(name: str) -> str:
    """Return `name` when a namespace can be called that. Raises RpcError EINVAL."""
    problem = _problem(name, MAX_NAMESPACE_NAME)
    if problem:
        raise RpcError(errno.EINVAL, f"cannot use the namespace name {shown(name)}: {problem}")
    return name


def split(key: str) -> tuple[str, str]:
    """Split a key in normal form, not the root, into its directory and its last component."""
    parent, _, name = key.rpartition(".")
    return parent, name


def join(parent: str, name: str) -> str:
    """Join two keys in normal form, either of which may be the root."""
    return f"{parent}.{name}" if parent and name else parent or name


def below(key: str) -> tuple[str, str]:
    """The directories strictly inside `key` are those with `low <= directory < high` ("/" follows ".")."""
    return f"{key}.", f"{key}/"


def shown(key: str) -> str:
    """`key` for an error text, shortened where it is very long."""
    return repr(key if len(key) <= 80 else key[:77] + "...")


def _problem(text: str, limit: int) -> str:
    if not text:
        return "it is empty"
    if "\0" in text:
        return "it contains NUL"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode text"
    return f"it is {size} bytes long, {limit} are allowed" if size > limit else ""
