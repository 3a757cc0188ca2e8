"""fluxres.base.eventlog: the lines of RFC 18, and the strictness that replay relies on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.eventlog import Event, decode, encode
from fluxres.base.json import JsonValue

json_values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
events = st.builds(
    Event,
    timestamp=st.floats(1e-3, 1e12) | st.integers(1, 10**12),
    name=st.text(min_size=1),
    context=st.dictionaries(st.text(), json_values, max_size=3),
)

SUBMIT = '{"timestamp":1552593348.073045,"name":"submit","context":{"urgency":16,"userid":5588,"flags":0}}\n'


def test_encode_is_one_compact_line() -> None:
    event = Event(1552593348.073045, "submit", {"urgency": 16, "userid": 5588, "flags": 0})
    assert encode(event) == SUBMIT
    assert encode(Event(1.5, "free")) == '{"timestamp":1.5,"name":"free"}\n'
    assert encode(Event(1.5, "free", {})) == '{"timestamp":1.5,"name":"free"}\n'


def test_newlines_in_values_are_escaped() -> None:
    event = Event(1.5, "exception", {"note": "two\nlines\u2028and a half"})
    assert encode(event).count("\n") == 1
    assert decode(encode(event)) == [event]


@pytest.mark.parametrize("log", [SUBMIT, SUBMIT.encode()])
def test_decode_text_and_bytes(log: str | bytes) -> None:
    assert decode(log) == [Event(1552593348.073045, "submit", {"urgency": 16, "userid": 5588, "flags": 0})]


def test_decode_keeps_order_and_counts() -> None:
    log = SUBMIT + '{"name":"free","timestamp":1}\n' + '{ "timestamp": 2.5, "name": "clean", "context": {} }\n'
    assert [(event.name, event.timestamp, dict(event.context)) for event in decode(log)[1:]] == [
        ("free", 1, {}),
        ("clean", 2.5, {}),
    ]
    assert decode("") == []
    assert decode(b"") == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "it is not JSON"),
        ("x", "it is not JSON"),
        (' {"timestamp":1,"name":"a"}', "it is not JSON"),
        ('{"timestamp":1,"name":"a"} ', "something follows"),
        ('{"timestamp":1,"name":"a"}\r', "something follows"),
        ('{"timestamp":1,"name":"a"},{"timestamp":1,"name":"b"}', "something follows"),
        ("[]", "it is not a JSON object"),
        ('"a"', "it is not a JSON object"),
        ("{}", "the timestamp must be a number above zero, not None"),
        ('{"name":"a"}', "the timestamp must be"),
        ('{"timestamp":0,"name":"a"}', "above zero, not 0"),
        ('{"timestamp":-1.5,"name":"a"}', "above zero, not -1.5"),
        ('{"timestamp":true,"name":"a"}', "above zero, not True"),
        ('{"timestamp":"1","name":"a"}', "above zero, not '1'"),
        ('{"timestamp":NaN,"name":"a"}', "NaN is not JSON"),
        ('{"timestamp":1e999,"name":"a"}', "above zero, not inf"),
        ('{"timestamp":1' + "0" * 400 + ',"name":"a"}', "above zero, not 1000"),
        ('{"timestamp":1}', "the name must be a string"),
        ('{"timestamp":1,"name":""}', "the name must be a string that is not empty"),
        ('{"timestamp":1,"name":7}', "the name must be a string"),
        ('{"timestamp":1,"name":"a","context":null}', "the context must be an object, not None"),
        ('{"timestamp":1,"name":"a","context":[]}', "the context must be an object, not []"),
        ('{"timestamp":1,"name":"a","contxt":{}}', "unknown key 'contxt'"),
        ('{"timestamp":1,"name":"a","context":{"n":Infinity}}', "Infinity is not JSON"),
        ('{"timestamp":1,"name":"a","context":{"n":' + "[" * 100_000, "recursion"),
    ],
)
def test_bad_lines_are_refused_with_the_line_and_the_reason(line: str, why: str) -> None:
    for log in (line + "\n", SUBMIT + line + "\n" + SUBMIT):
        with pytest.raises(ValueError, match=r"^cannot decode event") as caught:
            decode(log)
        assert repr(line[:100])[:-1] in str(caught.value)
        assert why in str(caught.value)
        assert len(str(caught.value)) < 800


@given(st.integers(1, len(SUBMIT) - 1))
def test_a_torn_last_line_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="the last line does not end in a newline"):
        decode(SUBMIT + SUBMIT[:cut])


def test_bytes_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^cannot decode event .*x80"):
        decode(SUBMIT.encode() + b'{"timestamp":1,"name":"\x80"}\n')


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (Event(0.0, "a"), "the timestamp must be a number above zero"),
        (Event(float("inf"), "a"), "the timestamp must be a number above zero"),
        (Event(float("nan"), "a"), "the timestamp must be a number above zero"),
        (Event(1.0, ""), "the name must be a string"),
        (Event(1.0, "a", {"n": float("nan")}), ".* not JSON"),
    ],
)
def test_bad_events_are_not_written(event: Event, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^cannot encode event {event.name!r}: {why}"):
        encode(event)


@given(st.lists(events, max_size=5))
def test_logs_round_trip(log: list[Event]) -> None:
    text = "".join(map(encode, log))
    assert decode(text) == log
    assert decode(text.encode()) == log
    assert [json.loads(line)["name"] for line in text.splitlines()] == [event.name for event in log]
