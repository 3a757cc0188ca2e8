"""fluxres.base.idset: the string form of RFC 22, and sets of ids against Python's own."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.idset import MAX_ID, MAX_ID_COUNT, IdSet

id_sets = st.frozensets(st.integers(0, 60))


@pytest.mark.parametrize(
    ("text", "ids", "written"),
    [
        ("", [], ""),
        ("[]", [], ""),
        ("0", [0], "0"),
        ("[2]", [2], "2"),
        ("7-9", [7, 8, 9], "7-9"),
        ("[0-3,7]", [0, 1, 2, 3, 7], "0-3,7"),
        ("1,2,3,5,6,42", [1, 2, 3, 5, 6, 42], "1-3,5-6,42"),
        ("0-1,2-3", [0, 1, 2, 3], "0-3"),
        (str(MAX_ID), [MAX_ID], str(MAX_ID)),
    ],
)
def test_string_forms(text: str, ids: list[int], written: str) -> None:
    idset = IdSet.parse(text)
    assert list(idset) == ids
    assert str(idset) == written
    assert len(idset) == len(ids)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "'x' is no id or range"),
        ("1,,2", "'' is no id or range"),
        (",", "'' is no id or range"),
        ("1,", "'' is no id or range"),
        ("-1", "'-1' is no id or range"),
        ("1-", "'1-' is no id or range"),
        ("1-2-3", "'1-2-3' is no id or range"),
        ("+1", "no id or range"),
        (" 1", "no id or range"),
        ("01", "leading zeros"),
        ("0-03", "leading zeros"),
        ("٣", "no id or range"),
        ("[1", "no id or range"),
        ("1]", "no id or range"),
        ("[[1]]", "no id or range"),
        ("9-7", "does not ascend"),
        ("3-3", "does not ascend"),
        ("2,1", "'1' is out of order"),
        ("1,1", "'1' is out of order"),
        ("0-5,5", "'5' is out of order"),
        (str(MAX_ID + 1), "above the largest id"),
        ("9" * 5000, "no id or range"),
        (f"0-{MAX_ID_COUNT}", f"more than {MAX_ID_COUNT} ids"),
        (f"0-{MAX_ID}", f"more than {MAX_ID_COUNT} ids"),
    ],
)
def test_bad_strings_are_refused_by_value_and_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot parse idset") as caught:
        IdSet.parse(text)
    assert repr(text[:50])[:-1] in str(caught.value)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_largest_set_is_read() -> None:
    assert len(IdSet.parse(f"0-{MAX_ID_COUNT - 1}")) == MAX_ID_COUNT


@pytest.mark.parametrize("ids", [[-1], [MAX_ID + 1], [True], [1, "2"], [1.0]])
def test_bad_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids are integers from 0 to"):
        IdSet(ids)


def test_construction_is_bounded() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_ID_COUNT} ids"):
        IdSet(repeat(1))
    half = MAX_ID_COUNT // 2 + 1
    with pytest.raises(ValueError, match=f"more than {MAX_ID_COUNT} ids"):
        IdSet(range(half)) | IdSet(range(half, 2 * half))


def test_first() -> None:
    assert IdSet([9, 4, 7]).first() == 4
    with pytest.raises(ValueError, match="the idset is empty"):
        IdSet().first()


def test_is_a_value() -> None:
    idset = IdSet([3, 1, 2, 3])
    assert idset == IdSet.parse("1-3")
    assert hash(idset) == hash(IdSet.parse("1-3"))
    assert idset != IdSet([1])
    assert idset != {1, 2, 3}
    assert 2 in idset
    assert "2" not in idset
    assert bool(idset)
    assert not IdSet()
    assert repr(idset) == "IdSet.parse('1-3')"
    assert copy.deepcopy(idset) == idset


@given(id_sets)
def test_strings_round_trip(ids: frozenset[int]) -> None:
    idset = IdSet(ids)
    assert IdSet.parse(str(idset)) == idset
    assert IdSet.parse(f"[{idset}]") == idset
    assert IdSet.parse(",".join(map(str, sorted(ids)))) == idset
    assert [i for low, high in idset.ranges() for i in range(low, high + 1)] == sorted(ids)


@pytest.mark.parametrize("operate", [operator.or_, operator.and_, operator.sub])
@given(left=id_sets, right=id_sets)
def test_set_operations(
    operate: Callable[[IdSet | frozenset[int], IdSet | frozenset[int]], IdSet | frozenset[int]],
    left: frozenset[int],
    right: frozenset[int],
) -> None:
    assert list(operate(IdSet(left), IdSet(right))) == sorted(operate(left, right))


@given(id_sets, id_sets)
def test_comparisons(left: frozenset[int], right: frozenset[int]) -> None:
    assert (IdSet(left) <= IdSet(right)) == (left <= right)
    assert IdSet(left).isdisjoint(IdSet(right)) == left.isdisjoint(right)
