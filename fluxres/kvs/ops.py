"""Values of the KVS: the operations that make up a commit, and what reads and commits give back. Pure.

A commit is a sequence of operations that take effect together, in order, or not at all. Keys are RFC 11
paths: components separated by dots; see `fluxres.kvs.keys` for what is allowed. Operations of one commit
may name several namespaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from fluxres.base.errors import FluxresError, Refusal, RpcError

PRIMARY: Final = "primary"
"""The namespace that every instance has; it cannot be removed."""


@dataclass(frozen=True, slots=True)
class Put:
    """Set `key` to a value; what it was before, a directory included, is replaced."""

    namespace: str
    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Append:
    """Add `data` to the end of the value `key`, which is made where it is missing. EISDIR for a directory."""

    namespace: str
    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Unlink:
    """Remove `key`, a directory with all that is in it. A missing key is no error."""

    namespace: str
    key: str


@dataclass(frozen=True, slots=True)
class Mkdir:
    """Set `key` to an empty directory; what it was, a full directory included, is replaced, as in Flux."""

    namespace: str
    key: str


@dataclass(frozen=True, slots=True)
class Link:
    """Set `key` to a symbolic link to another key, in this or another namespace; neither has to exist."""

    namespace: str
    key: str
    target_namespace: str
    target_key: str


@dataclass(frozen=True, slots=True)
class CreateNamespace:
    """Make an empty namespace that belongs to the user `owner` (a uid). EEXIST where there is one."""

    name: str
    owner: int


@dataclass(frozen=True, slots=True)
class RemoveNamespace:
    """Remove a namespace and all that is in it. ENOENT where there is none."""

    name: str


@dataclass(frozen=True, slots=True)
class Require:
    """A guard: the commit fails with EEXIST when `key` exists, or, with `absent=False`, with ENOENT when not.

    It sees what the operations before it in the commit did. A link at `key` itself counts as existing.
    """

    namespace: str
    key: str
    absent: bool = True


Op: TypeAlias = Put | Append | Unlink | Mkdir | Link | CreateNamespace | RemoveNamespace | Require


@dataclass(frozen=True, slots=True)
class CommitResult:
    """How a commit ended: durable, with the new version of each namespace it changed, or not applied at all.

    `error` is EINVAL (key), ENOENT (namespace, or a guard), EEXIST, EISDIR, ELOOP, ENOSPC, EAGAIN (queue
    full), EIO, or ECANCELED (the store was closed before the commit began).
    """

    versions: Mapping[str, int]
    error: RpcError | None = None


class Kind(IntEnum):
    """What a key is. The numbers are stored."""

    VALUE = 1
    DIR = 2
    LINK = 3


@dataclass(frozen=True, slots=True)
class Chunk:
    """One put's or append's worth of a value.

    `seq` grows with every put and append in the namespace, also across an unlink, and is never used twice
    there; a cursor into a value is the `seq` of the last chunk taken. `first` says that the value begins
    here: a reader that had earlier chunks forgets them.
    """

    seq: int
    data: bytes
    first: bool


@dataclass(frozen=True, slots=True)
class DirEntry:
    """One name in a directory; `last` is the `seq` of the last chunk of a value."""

    name: str
    kind: Kind
    last: int = 0


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """A namespace: `owner` is a uid, `version` counts its commits, `id` tells it from a later namesake."""

    name: str
    owner: int
    version: int
    id: int


class StoreFailed(FluxresError):
    """Nobody can tell whether a transaction is in the store: open it anew to find out."""


class StoreRefused(Refusal):
    """The store cannot be used as it is; the text says why and what to do."""
