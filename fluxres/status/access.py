"""Who may see what: the decisions of the status endpoint, as functions of what is known of a request. Pure.

- A request must name us: a page of another site whose name leads to this address (DNS rebinding) does not.
- A page that asks must be ours, or of a site in `status.origins`.
- What is shown of jobs is for the instance owner and root, known by the uid of the process at the other end of a
  loopback connection, and for who has the token. A proxy is not the one who asks: what it passes on needs the token.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from fluxres.overlay.address import is_loopback
from fluxres.status.http import MAX_SHOWN, Need, Request

ROOT: Final = 0
BEARER: Final = "bearer "
BEARER_PROTOCOL: Final = "fluxres.bearer."
"""The WebSocket subprotocol that carries a token, in base64url without padding."""
_HOST: Final = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^\s:/?#@\[\]]+))(?::[0-9]{1,5})?")
_FORWARDED: Final = frozenset({"forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip"})
"""Headers by which a proxy says that it is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the endpoint asks of those who come. `local`: only this machine can reach it."""

    local: bool
    owner: int
    token: bytes | None = None
    names: frozenset[str] = frozenset()
    """Names and addresses of this host, in lower case, beside those of the loopback."""
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why something is not answered: 401 where a token would help, else 403."""

    status: int
    why: str


def is_forwarded(request: Request) -> bool:
    """Whether a proxy passes the request on."""
    return not _FORWARDED.isdisjoint(request.headers)


def token_of(request: Request) -> bytes | None:
    """The token that comes with a request."""
    authorization = request.headers.get("authorization", "")
    if authorization[: len(BEARER)].lower() == BEARER:
        return authorization[len(BEARER) :].strip().encode("latin-1")
    for word in request.words("sec-websocket-protocol"):
        if word.startswith(BEARER_PROTOCOL):
            encoded = word.removeprefix(BEARER_PROTOCOL)
            try:
                return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            except (binascii.Error, ValueError):
                return b""
    return None


def has_token(request: Request, rules: Rules) -> bool:
    """Whether the right token comes with a request."""
    given = token_of(request)
    return given is not None and rules.token is not None and hmac.compare_digest(given, rules.token)


def wants_uid(request: Request, need: Need, rules: Rules) -> bool:
    """Whether the decision hangs on who the peer is."""
    return rules.local and need is Need.READER and not is_forwarded(request) and not has_token(request, rules)


def judge(request: Request, need: Need, rules: Rules, *, uid: int | None) -> Refused | None:
    """Why a request is refused, None where it is not; `uid` is the peer's where that is known and `wants_uid`."""
    if need is Need.REACH:
        return None
    return (
        _judge_host(request, rules) or _judge_origin(request, need, rules) or _judge_reader(request, need, rules, uid)
    )


def _judge_host(request: Request, rules: Rules) -> Refused | None:
    host = request.headers.get("host", "")
    name = _name(host)
    if name is None:
        return Refused(status=403, why=f"cannot tell what host {host[:MAX_SHOWN]!r} is")
    if is_loopback(name) or name in rules.names or any(name == _name(_authority(origin)) for origin in rules.origins):
        return None
    return Refused(
        status=403,
        why=f"this is not {name[:MAX_SHOWN]!r}: use the address that the broker listens on, or name "
        "the site in status.origins",
    )


def _judge_origin(request: Request, need: Need, rules: Rules) -> Refused | None:
    """A browser says in `Origin` whose page asks, or in `Sec-Fetch-Site` that it is another site's."""
    origin = request.headers.get("origin")
    if origin is None:
        foreign = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign and need is not Need.OPEN:
            return Refused(status=403, why="pages of other sites may not ask for this")
        return None
    if origin.lower() in rules.origins or _is_same(origin.lower(), request.headers.get("host", "").lower()):
        return None
    return Refused(status=403, why=f"pages of {origin[:MAX_SHOWN]!r} may not ask: they are not in status.origins")


def _judge_reader(request: Request, need: Need, rules: Rules, uid: int | None) -> Refused | None:
    if need is Need.OPEN or has_token(request, rules):
        return None
    direct = rules.local and not is_forwarded(request)
    if direct and (need is Need.LOCAL or uid in (rules.owner, ROOT)):
        return None
    if rules.token is not None:
        wrong = token_of(request) is not None
        return Refused(status=401, why="this is not the token" if wrong else "this needs the token")
    if not direct:
        return Refused(status=403, why="a proxy does not say who asks: set status.token-file, and send the token")
    who = "it cannot be told who you are" if uid is None else f"you are uid {uid}"
    return Refused(
        status=403,
        why=f"this is for the instance owner (uid {rules.owner}) and root, and {who}: set status.token-file to let "
        "others in",
    )


def _name(host: str) -> str | None:
    """The name or number of a `Host`, in one form; None where it is none."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    name = (match["v6"] or match["name"]).lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return None if match["v6"] else name


def _authority(origin: str) -> str:
    return origin.partition("://")[2]


def _is_same(origin: str, host: str) -> bool:
    """Whether the page comes from the host that it asks."""
    scheme, _, authority = origin.partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme)
    return default is not None and authority.removesuffix(default) == host.removesuffix(default) != ""
