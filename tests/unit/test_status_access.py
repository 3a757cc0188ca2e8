"""Who may see what: tables of requests and what becomes of them."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.status.access import BEARER_PROTOCOL, Rules, has_token, is_forwarded, judge, token_of, wants_uid
from fluxres.status.http import Need, Request

OWNER = 1000
TOKEN = b"0123456789abcdef!/"
LOCAL = Rules(local=True, owner=OWNER, names=frozenset({"127.0.0.1", "n1"}))
LOCAL_TOKEN = Rules(local=True, owner=OWNER, names=frozenset({"127.0.0.1"}), token=TOKEN)
REMOTE = Rules(
    local=False,
    owner=OWNER,
    token=TOKEN,
    names=frozenset({"10.0.0.1", "n1"}),
    origins=frozenset({"https://flux.example.org", "http://[2001:db8::1]:8080"}),
)


def asked(host: str = "localhost:8080", **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(method="GET", path="/", headers={"host": host, **named})


def status(request: Request, need: Need, rules: Rules, uid: int | None = None) -> int:
    refused = judge(request, need, rules, uid=uid)
    return 200 if refused is None else refused.status


def encoded(token: bytes = TOKEN) -> str:
    return BEARER_PROTOCOL + base64.urlsafe_b64encode(token).decode().rstrip("=")


@pytest.mark.parametrize(
    ("host", "rules", "expected"),
    [
        ("localhost", LOCAL, 200),
        ("LocalHost:1", LOCAL, 200),
        ("localhost.:1", LOCAL, 200),
        ("127.0.0.1:8080", LOCAL, 200),
        ("127.9.9.9", LOCAL, 200),
        ("[::1]:8080", LOCAL, 200),
        ("[0:0:0:0:0:0:0:1]", LOCAL, 200),
        ("n1:9", LOCAL, 200),
        ("n1.evil.example", LOCAL, 403),
        ("localhost.evil.example", LOCAL, 403),
        ("127.0.0.1.evil.example", LOCAL, 403),
        ("evil.example:8080", LOCAL, 403),
        ("10.0.0.1", LOCAL, 403),
        ("", LOCAL, 403),
        (":80", LOCAL, 403),
        ("a b", LOCAL, 403),
        ("user@localhost", LOCAL, 403),
        ("[localhost]", LOCAL, 403),
        ("localhost:999999", LOCAL, 403),
        ("10.0.0.1:443", REMOTE, 200),
        ("flux.example.org", REMOTE, 200),
        ("FLUX.example.org:8443", REMOTE, 200),
        ("[2001:db8:0::1]", REMOTE, 200),
        ("flux.example.org.evil.example", REMOTE, 403),
    ],
)
def test_a_request_must_name_us(host: str, rules: Rules, expected: int) -> None:
    assert status(asked(host), Need.OPEN, rules) == expected


def test_probes_need_no_name() -> None:
    assert status(Request(method="GET", path="/healthz", headers={}), Need.REACH, REMOTE) == 200
    assert status(asked("evil.example", origin="http://evil.example"), Need.REACH, LOCAL) == 200


@pytest.mark.parametrize(
    ("host", "origin", "rules", "expected"),
    [
        ("localhost:8080", "http://localhost:8080", LOCAL, 200),
        ("localhost:8080", "https://localhost:8080", LOCAL, 200),  # TLS ends in front of us
        ("localhost", "http://localhost", LOCAL, 200),
        ("localhost:80", "http://localhost", LOCAL, 200),
        ("localhost", "http://localhost:80", LOCAL, 200),
        ("LOCALHOST:8080", "http://localhost:8080", LOCAL, 200),
        ("localhost:8080", "http://localhost:8081", LOCAL, 403),
        ("localhost:8080", "http://localhost", LOCAL, 403),
        ("localhost:8080", "http://127.0.0.1:8080", LOCAL, 403),
        ("localhost:8080", "http://evil.example", LOCAL, 403),
        ("localhost:8080", "null", LOCAL, 403),
        ("localhost:8080", "", LOCAL, 403),
        ("localhost:8080", "file://", LOCAL, 403),
        ("localhost:8080", "moz-extension://localhost:8080", LOCAL, 403),
        ("10.0.0.1:8080", "https://flux.example.org", REMOTE, 200),
        ("10.0.0.1:8080", "HTTPS://Flux.example.org", REMOTE, 200),
        ("10.0.0.1:8080", "http://flux.example.org", REMOTE, 403),
        ("10.0.0.1:8080", "https://flux.example.org:444", REMOTE, 403),
        ("10.0.0.1:8080", "https://flux.example.org.evil.example", REMOTE, 403),
    ],
)
def test_a_page_must_be_ours(host: str, origin: str, rules: Rules, expected: int) -> None:
    authorization = {"authorization": f"Bearer {TOKEN.decode()}"}
    assert status(asked(host, origin=origin, **authorization), Need.READER, rules, OWNER) == expected
    assert status(asked(host, origin=origin), Need.OPEN, rules) == expected


@pytest.mark.parametrize(
    ("site", "need", "expected"),
    [
        ("none", Need.READER, 200),  # typed, or a bookmark
        ("same-origin", Need.READER, 200),
        ("same-site", Need.READER, 403),  # another port of this host
        ("cross-site", Need.READER, 403),
        ("cross-site", Need.LOCAL, 403),
        ("cross-site", Need.OPEN, 200),  # a link to the page
    ],
)
def test_a_page_of_another_site_without_an_origin(site: str, need: Need, expected: int) -> None:
    assert status(asked(sec_fetch_site=site), need, LOCAL, OWNER) == expected


@pytest.mark.parametrize(
    ("need", "rules", "uid", "expected"),
    [
        (Need.OPEN, LOCAL, None, 200),
        (Need.OPEN, REMOTE, None, 200),
        (Need.LOCAL, LOCAL, None, 200),
        (Need.LOCAL, LOCAL_TOKEN, None, 200),
        (Need.LOCAL, REMOTE, None, 401),
        (Need.READER, LOCAL, OWNER, 200),
        (Need.READER, LOCAL, 0, 200),
        (Need.READER, LOCAL, OWNER + 1, 403),
        (Need.READER, LOCAL, None, 403),
        (Need.READER, LOCAL_TOKEN, OWNER, 200),
        (Need.READER, LOCAL_TOKEN, OWNER + 1, 401),
        (Need.READER, LOCAL_TOKEN, None, 401),
        (Need.READER, REMOTE, OWNER, 401),  # what a uid says on another machine means nothing here
        (Need.READER, REMOTE, 0, 401),
    ],
)
def test_without_a_token(need: Need, rules: Rules, uid: int | None, expected: int) -> None:
    assert status(asked(), need, rules, uid) == expected


@pytest.mark.parametrize("need", [Need.LOCAL, Need.READER])
@pytest.mark.parametrize("rules", [LOCAL_TOKEN, REMOTE])
def test_with_the_token(need: Need, rules: Rules) -> None:
    for headers in ({"authorization": f"bearer  {TOKEN.decode()}"}, {"sec_websocket_protocol": f"x, {encoded()}"}):
        assert status(asked(**headers), need, rules, OWNER + 1) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "Basic " + TOKEN.decode()},
        {"authorization": TOKEN.decode()},
        {"authorization": "Bearer é" + TOKEN.decode()},
        {"sec_websocket_protocol": encoded(b"wrong")},
        {"sec_websocket_protocol": BEARER_PROTOCOL + "A"},
        {"sec_websocket_protocol": BEARER_PROTOCOL + "é"},
        {"sec_websocket_protocol": BEARER_PROTOCOL},
    ],
)
def test_with_another_token(headers: dict[str, str]) -> None:
    assert status(asked(**headers), Need.READER, REMOTE, OWNER) == 401
    assert status(asked(**headers), Need.READER, LOCAL_TOKEN, OWNER + 1) == 401
    assert status(asked(**headers), Need.READER, LOCAL_TOKEN, OWNER) == 200, "who it is still counts"


def test_where_there_is_no_token_none_is_right() -> None:
    assert not has_token(asked(authorization="Bearer "), LOCAL)
    assert status(asked(authorization="Bearer " + TOKEN.decode()), Need.READER, LOCAL, OWNER + 1) == 403


@pytest.mark.parametrize("name", ["forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip"])
@pytest.mark.parametrize("need", [Need.LOCAL, Need.READER])
def test_a_proxy_is_not_who_asks(name: str, need: Need) -> None:
    assert is_forwarded(asked(**{name: "x"}))
    assert status(asked(**{name: "x"}), need, LOCAL, OWNER) == 403
    assert status(asked(**{name: "x"}), need, LOCAL_TOKEN, OWNER) == 401
    assert status(asked(**{name: "x"}, authorization=f"Bearer {TOKEN.decode()}"), need, LOCAL_TOKEN) == 200


@pytest.mark.parametrize(
    ("need", "rules", "headers", "expected"),
    [
        (Need.READER, LOCAL, {}, True),
        (Need.READER, LOCAL_TOKEN, {}, True),
        (Need.READER, LOCAL_TOKEN, {"authorization": f"Bearer {TOKEN.decode()}"}, False),
        (Need.READER, LOCAL, {"via": "x"}, False),
        (Need.READER, REMOTE, {}, False),
        (Need.LOCAL, LOCAL, {}, False),
        (Need.OPEN, LOCAL, {}, False),
    ],
)
def test_when_the_uid_is_looked_up(need: Need, rules: Rules, headers: dict[str, str], expected: bool) -> None:
    assert wants_uid(asked(**headers), need, rules) is expected


@given(st.binary(min_size=1, max_size=60))
def test_a_token_survives_the_subprotocol(token: bytes) -> None:
    assert token_of(asked(sec_websocket_protocol=encoded(token))) == token


def test_refusals_say_what_to_do() -> None:
    def why(rules: Rules, uid: int | None, **headers: str) -> str:
        refused = judge(asked(**headers), Need.READER, rules, uid=uid)
        assert refused is not None
        return refused.why

    assert "uid 1000" in why(LOCAL, 7)
    assert "you are uid 7" in why(LOCAL, 7)
    assert "cannot be told who you are" in why(LOCAL, None)
    assert "status.token-file" in why(LOCAL, 7, via="x")
    assert why(LOCAL_TOKEN, None) == "this needs the token"
    assert why(LOCAL_TOKEN, None, authorization="Bearer x") == "this is not the token"
