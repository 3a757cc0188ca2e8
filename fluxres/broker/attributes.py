"""The `attr` service: what a broker says about itself (RFC 3 attributes, flux-broker-attributes(7))."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from fluxres.base.errors import RpcError
from fluxres.rpc.router import Router
from fluxres.rpc.server import Request, Service
from fluxres.wire.payload import WireMap

IMMUTABLE: Final = 1
"""Flag of an attribute that cannot be set."""
MAX_USER_ATTRIBUTES: Final = 1024


class _Name(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class _Setting(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: str


class Attributes:
    """Serves `attr.*`. `fixed` are functions, so that what changes is told as it is."""

    def __init__(self, router: Router, fixed: Mapping[str, Callable[[], str]]) -> None:
        self._fixed = dict(fixed)
        self._set: dict[str, str] = {}
        self.service = Service("attr", router)
        self.service.method("get", self._get)
        self.service.method("set", self._set_value)
        self.service.method("list", self._list)

    def _get(self, request: Request) -> WireMap:
        name = request.parse(_Name).name
        if name in self._fixed:
            return {"value": self._fixed[name](), "flags": IMMUTABLE}
        if name in self._set:
            return {"value": self._set[name], "flags": 0}
        raise RpcError(errno.ENOENT, f"there is no attribute {name!r}")

    def _set_value(self, request: Request) -> None:
        request.require_owner()
        ask = request.parse(_Setting)
        if ask.name in self._fixed:
            raise RpcError(errno.EPERM, f"attribute {ask.name} cannot be set")
        if ask.name not in self._set and len(self._set) >= MAX_USER_ATTRIBUTES:
            raise RpcError(errno.ENOSPC, f"cannot set {ask.name}: {MAX_USER_ATTRIBUTES} attributes are set")
        self._set[ask.name] = ask.value

    def _list(self, request: Request) -> WireMap:
        every = {name: (value(), IMMUTABLE) for name, value in self._fixed.items()}
        every |= {name: (value, 0) for name, value in self._set.items()}
        return {
            "attrs": [{"name": name, "value": value, "flags": flags} for name, (value, flags) in sorted(every.items())]
        }
