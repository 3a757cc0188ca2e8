"""Frames, messages and payloads: what goes in comes out, and no bytes of a peer do anything but raise ProtocolError."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.errors import ProtocolError
from fluxres.wire import messages
from fluxres.wire.cbor import load
from fluxres.wire.codec import MAX_ROUTE, MAX_TOPIC, decode, encode
from fluxres.wire.framing import LENGTH, MAX_FRAME, FrameDecoder, frame
from fluxres.wire.messages import (
    NODEID_ANY,
    NODEID_UPSTREAM,
    Message,
    MessageFlag,
    MessageType,
    request,
    response_to,
)
from fluxres.wire.payload import MAX_DEPTH, Wire, pack, unpack, unpack_map

WORDS = st.integers(0, 0xFFFFFFFF)
TOPICS = st.text(max_size=MAX_TOPIC)
FLAGS = st.sampled_from([value for value in range(0x80) if not value & ~MessageFlag.ALL])
MESSAGES = st.builds(
    Message,
    st.sampled_from(MessageType),
    TOPICS,
    st.none() | st.binary(max_size=200),
    FLAGS,
    WORDS,
    WORDS,
    WORDS,
    WORDS,
    st.lists(st.text(max_size=40), max_size=MAX_ROUTE).map(tuple),
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
)
PAYLOADS: st.SearchStrategy[Wire] = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)

# -- frames


@given(st.lists(st.binary(max_size=50), max_size=8), st.data())
def test_frames_come_out_whole_however_they_are_cut(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(frame, bodies))
    decoder = FrameDecoder()
    got = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += decoder.feed(stream[:size])
        stream = stream[size:]
    assert got == bodies
    assert decoder.pending == 0


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_frames_come_out_as_soon_as_they_are_complete(bodies: list[bytes]) -> None:
    decoder = FrameDecoder()
    for body in bodies:
        *most, last = (bytes([byte]) for byte in frame(body))
        for count, byte in enumerate(most, 1):
            assert decoder.feed(byte) == []
            assert decoder.pending == count
        assert decoder.feed(last) == [body]
        assert decoder.pending == 0


def test_a_frame_over_the_bound_is_refused_by_its_length_alone() -> None:
    decoder = FrameDecoder()
    assert decoder.feed(LENGTH.pack(1 << 30)[:3]) == []
    with pytest.raises(ProtocolError, match=f"frame of {1 << 30} bytes: the bound is {MAX_FRAME}"):
        decoder.feed(LENGTH.pack(1 << 30)[3:])


def test_the_bound_itself_is_allowed() -> None:
    assert FrameDecoder(4).feed(frame(b"1234")) == [b"1234"]
    with pytest.raises(ProtocolError, match="frame of 5 bytes: the bound is 4"):
        FrameDecoder(4).feed(frame(b"12345"))
    assert len(frame(bytes(MAX_FRAME))) == LENGTH.size + MAX_FRAME
    with pytest.raises(ProtocolError, match="cannot send a frame"):
        frame(bytes(MAX_FRAME + 1))


# -- messages


@given(MESSAGES)
def test_a_message_survives_the_wire(message: Message) -> None:
    again = decode(encode(message))
    assert again == message
    assert [type(field) for field in again] == [type(field) for field in message]


@given(st.lists(MESSAGES, max_size=5))
def test_messages_survive_byte_by_byte(sent: list[Message]) -> None:
    decoder = FrameDecoder()
    stream = b"".join(frame(encode(message)) for message in sent)
    got = [decode(body) for byte in stream for body in decoder.feed(bytes([byte]))]
    assert got == sent


@given(st.binary(max_size=100))
def test_no_bytes_do_anything_but_raise_protocol_error(body: bytes) -> None:
    for read in (decode, unpack, unpack_map):
        try:
            read(body)
        except ProtocolError:
            continue


@given(MESSAGES, st.data())
def test_a_damaged_message_is_refused_or_is_another_valid_one(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(message))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= data.draw(st.integers(1, 255))
    try:
        got = decode(bytes(body))
    except ProtocolError:
        return
    assert decode(encode(got)) == got


@given(MESSAGES, st.data())
def test_a_truncated_or_prolonged_message_is_refused(message: Message, data: st.DataObject) -> None:
    body = encode(message)
    with pytest.raises(ProtocolError):
        decode(body[: data.draw(st.integers(0, len(body) - 1))])
    with pytest.raises(ProtocolError, match="ends at byte"):
        decode(body + data.draw(st.binary(min_size=1, max_size=3)))


GOOD: list[object] = [1, 1, 0, 5, 1, 2, 3, "kvs.get", ["client"], b"payload"]


def changed(index: int, value: object) -> bytes:
    fields = list(GOOD)
    fields[index] = value
    return cbor2.dumps(fields)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "cannot decode a message of 0 bytes"),
        (cbor2.dumps(1), "not an array of 10"),
        (cbor2.dumps({}), "not an array of 10"),
        (cbor2.dumps(GOOD[:9]), "not an array of 10"),
        (cbor2.dumps([*GOOD, 1]), "not an array of 10"),
        (changed(0, 2), "version 2 is not 1"),
        (changed(0, True), "version True is not 1"),
        (changed(0, 1.0), "version 1.0 is not 1"),
        (changed(1, 3), "unknown type 3"),
        (changed(1, True), "unknown type True"),
        (changed(1, "1"), "unknown type '1'"),
        (changed(2, 1), "unknown flags 1"),
        (changed(2, 0x80), "unknown flags 128"),
        (changed(2, None), "unknown flags None"),
        (changed(3, -1), "userid -1"),
        (changed(4, 1 << 32), "rolemask 4294967296"),
        (changed(5, 1.5), "aux 1.5"),
        (changed(6, False), "matchtag False"),
        (changed(7, b"topic"), "its topic"),
        (changed(7, "x" * (MAX_TOPIC + 1)), "its topic"),
        (changed(8, "abc"), "its route"),
        (changed(8, {}), "its route"),
        (changed(8, ["x"] * (MAX_ROUTE + 1)), "its route"),
        (changed(8, ["x", 1]), "1 in its route"),
        (changed(9, "text"), "its payload"),
        (changed(9, [1]), "its payload"),
        (changed(9, [[[1]]]), "depth"),
        (b"\x81" * 100_000, "depth"),
        (b"\x9b" + b"\xff" * 8, "cannot decode a message of 9 bytes"),
        (b"\x5b\x00\x00\x00\xff" + b"\xff" * 4, "cannot decode a message of 9 bytes"),
    ],
)
def test_malformed_messages_are_refused_with_what_is_wrong(body: bytes, why: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(body)
    assert why in str(caught.value)
    assert decode(cbor2.dumps(GOOD)).topic == "kvs.get"


def test_names_of_the_header_fields() -> None:
    asked = request("job-manager.raise", b"x", matchtag=7, nodeid=3, flags=MessageFlag.STREAMING)
    assert (asked.service, asked.method, asked.nodeid) == ("job-manager", "raise", 3)
    assert asked.is_streaming
    assert asked.wants_response
    assert not request("a.b").wants_response
    assert request("a.b").nodeid == NODEID_ANY
    assert request("a.b", nodeid=NODEID_UPSTREAM).nodeid == NODEID_UPSTREAM
    assert request("nodot").service == ""
    told = response_to(asked._replace(route=("c1", "b2"), userid=4, rolemask=1), payload=b"y", errnum=2)
    assert (told.type, told.topic, told.matchtag, told.route) == (MessageType.RESPONSE, asked.topic, 7, ("c1", "b2"))
    assert (told.errnum, told.payload, told.is_streaming, told.userid) == (2, b"y", True, 4)
    published = messages.event("job-state", None, sequence=9, userid=1, rolemask=1)
    assert (published.type, published.sequence) == (MessageType.EVENT, 9)
    beat = messages.control(1, 2, b"z")
    assert (beat.type, beat.control, beat.matchtag, beat.payload) == (MessageType.CONTROL, 1, 2, b"z")


# -- payloads


@given(PAYLOADS)
def test_a_payload_survives_the_wire(value: Wire) -> None:
    assert unpack(pack(value)) == value


@given(st.dictionaries(st.text(), PAYLOADS, max_size=4))
def test_a_map_survives_the_wire(value: dict[str, Wire]) -> None:
    assert unpack_map(pack(value)) == value


def test_no_payload_is_the_empty_map() -> None:
    assert unpack_map(None) == {}


def nested(depth: int) -> bytes:
    return b"\x81" * depth + b"\x01"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        pack(1) + b"\x00",
        pack({"a": 1}) + pack({"a": 2}),
        nested(MAX_DEPTH + 1),
        b"\xa2\x61a\x01\x61a\x02",  # the same key twice
        b"\xa1\x01\x02",  # a key that is a number
        b"\xa1\x80\x01",  # a key that is a list
        b"\x9f\x01\xff",  # a list of unknown length
        b"\xbf\xff",
        b"\x7f\x61a\xff",
        b"\x61\xff",  # no UTF-8
        b"\x63\xed\xa0\x80",  # half a surrogate pair
        b"\xff",
        b"\x7b" + b"\x7f" + b"\xff" * 7,  # a text of 2^63 bytes
        b"\xbb" + b"\xff" * 8,
    ],
)
def test_bad_payloads_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"cannot decode a payload of {len(data)} bytes"):
        unpack(data)


def test_a_payload_may_be_as_deep_as_its_bound() -> None:
    assert pack(unpack(nested(MAX_DEPTH))) == nested(MAX_DEPTH)


@pytest.mark.parametrize("value", [1, "text", [], None, {b"a": 1}])
def test_a_map_is_wanted(value: Wire | dict[bytes, int]) -> None:
    with pytest.raises(ProtocolError, match="not a map with text keys"):
        unpack_map(cbor2.dumps(value))


def head(tag: int) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(tag, 0))[:-1]


@pytest.mark.parametrize(
    "body", [b"\x00", b"\x60", b"\x40", b"\x80", b"\xa0", b"\x82\x01\x02", b"\x81\x00", b"\x41\x01"]
)
def test_no_tag_is_taken(body: bytes) -> None:
    """Also the test that the table of the library's own tags is complete."""
    for tag in [*range(1100), 43000, 55799, 55800, 1 << 20, 2**64 - 1]:
        with pytest.raises(ProtocolError):
            load(head(tag) + body, what="a payload", max_depth=MAX_DEPTH)


def test_a_payload_cannot_refer_to_itself() -> None:
    """Shared references make a cycle, or of a few hundred bytes a tree that no memory holds (tags 28 and 29)."""
    cycle = b"\xd8\x1c\x81\xd8\x1d\x00"
    assert isinstance(cbor2.loads(cycle), list)
    with pytest.raises(ProtocolError, match="tag"):
        unpack(cycle)
