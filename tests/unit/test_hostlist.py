"""fluxres.base.hostlist: RFC 29's test vectors, the compact form, and its bounds."""

from __future__ import annotations

from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxres.base.hostlist import MAX_HOSTS, Hostlist

host_names = st.from_regex(r"[a-c]{0,2}[0-9]{0,3}(-[ab]?[0-9]{0,2})?", fullmatch=True).filter(bool)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        # the vectors of RFC 29
        ("", ""),
        ("foox,fooy,fooz", "foox,fooy,fooz"),
        ("[1-3,5-6]", "1,2,3,5,6"),
        ("foo[1-5]", "foo1,foo2,foo3,foo4,foo5"),
        ("foo[0-4]-eth2", "foo0-eth2,foo1-eth2,foo2-eth2,foo3-eth2,foo4-eth2"),
        ("foo1,foo1,foo1", "foo1,foo1,foo1"),
        ("[00-02]", "00,01,02"),
        ("[00-2]", "00,01,02"),
        ("foo[1,1,2,1]", "foo1,foo1,foo2,foo1"),
        ("[005,4,11-13]", "005,004,011,012,013"),
        # more of the same
        ("node[00-03,7],login1", "node00,node01,node02,node03,node07,login1"),
        ("node[8-11]", "node8,node9,node10,node11"),
        ("node[098-101]", "node098,node099,node100,node101"),
        ("n[45,015]", "n45,n015"),
        ("n[3-3]", "n3"),
        ("foo[1,3]7", "foo17,foo37"),
        (",a,,b,", "a,b"),
        ("a.b-c_d:1", "a.b-c_d:1"),
    ],
)
def test_expansion(text: str, hosts: str) -> None:
    assert list(Hostlist.parse(text)) == (hosts.split(",") if hosts else [])


@pytest.mark.parametrize(
    ("hosts", "compact"),
    [
        ("", ""),
        ("login", "login"),
        ("node7", "node7"),
        ("foo-1a-2,foo-1a-3", "foo-1a-[2-3]"),
        ("foo1,fooi,foo2,foo3", "foo1,fooi,foo[2-3]"),
        ("fooi,foo1,foo2,foo3,foo5,foo7,foo8", "fooi,foo[1-3,5,7-8]"),
        ("1,2,3,4,5,9", "[1-5,9]"),
        ("foo12,foo4,foo1,foo2", "foo[12,4,1-2]"),
        ("foo1,foo1,foo2,foo1", "foo[1,1-2,1]"),
        ("node08,node09,node10", "node[08-10]"),
        ("node8,node9,node10", "node[8-10]"),
        ("node9,node010", "node9,node010"),
        ("node09,node9", "node09,node9"),
        ("foo0-eth2,foo1-eth2", "foo[0-1]-eth2"),
        ("rack1-node1,rack1-node2,rack2-node1,rack2-node2", "rack1-node[1-2],rack2-node[1-2]"),
        ("login1,node00,node01", "login1,node[00-01]"),
    ],
)
def test_compact_form(hosts: str, compact: str) -> None:
    hostlist = Hostlist(hosts.split(",") if hosts else [])
    assert str(hostlist) == compact
    assert Hostlist.parse(compact) == hostlist


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "no host expression at '[]'"),
        ("foo[]", "no host expression"),
        ("foo[", "no host expression"),
        ("foo]", "no host expression"),
        ("foo[1,3", "no host expression"),
        ("foo[[1,3]", "no host expression"),
        ("foo[1]x[2]", "no host expression"),
        ("a,foo[x-y]", "no host expression at 'foo[x-y]'"),
        ("foo bar", "no host expression"),
        ("foo\n", "no host expression"),
        ("fòo", "no host expression"),
        ("foo[0-1,2--5]", "'2--5' is no id or range"),
        ("foo[1,]", "'' is no id or range"),
        ("foo[-1]", "'-1' is no id or range"),
        ("a" * 256, "no host expression"),
        (f"foo[{'1' * 19}]", "at most 18 digits"),
        ("foo[5-1]", "the range '5-1' descends"),
        (f"foo[0-{MAX_HOSTS}]", f"more than {MAX_HOSTS} hosts"),
        ("foo[0-999999999999999999]", f"more than {MAX_HOSTS} hosts"),
        (f"a[1-{MAX_HOSTS}],b[1-2]", f"more than {MAX_HOSTS} hosts"),
    ],
)
def test_bad_strings_are_refused_by_value_and_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot parse hostlist") as caught:
        Hostlist.parse(text)
    assert repr(text[:100])[:-1] in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize("host", ["", "a b", "a,b", "a[1]", "ä", "a\n", "a" * 256])
def test_bad_host_names_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot make a hostlist with"):
        Hostlist([host])


def test_construction_is_bounded() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_HOSTS} hosts"):
        Hostlist(repeat("a"))


@pytest.mark.parametrize(
    ("text", "host", "index"),
    [
        ("tst0,tst", "tst", 1),
        ("tst0", "tst", None),
        ("foo[1-5]-eth0", "foo3-eth0", 2),
        ("foo[1-5]", "foo3-eth0", None),
        ("i[0-5]", "i00", None),
        ("i[00-05]", "i04", 4),
        ("a,b,a", "a", 0),
        ("", "a", None),
    ],
)
def test_find(text: str, host: str, index: int | None) -> None:
    hostlist = Hostlist.parse(text)
    assert hostlist.find(host) == index
    assert (host in hostlist) == (index is not None)


def test_is_a_sequence_and_a_value() -> None:
    hostlist = Hostlist.parse("node[1-3,1]")
    assert len(hostlist) == 4
    assert hostlist[0] == "node1"
    assert hostlist[-1] == "node1"
    assert hostlist[1:3] == Hostlist(["node2", "node3"])
    with pytest.raises(IndexError):
        hostlist[4]
    assert hash(hostlist) == hash(Hostlist.parse("node1,node2,node3,node1"))
    assert hostlist != Hostlist.parse("node[1,1-3]")
    assert hostlist != ["node1", "node2", "node3", "node1"]
    assert 1 not in hostlist
    assert repr(hostlist) == "Hostlist.parse('node[1-3,1]')"


@given(st.lists(host_names, max_size=12))
def test_strings_round_trip(hosts: list[str]) -> None:
    hostlist = Hostlist(hosts)
    assert list(Hostlist.parse(str(hostlist))) == hosts
    assert list(Hostlist.parse(",".join(hosts))) == hosts
