"""Fixtures of the system tests: instances that are cleaned up, and whose logs are looked through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from kit import Instance
from netkit import Network
from treekit import Tree

Settings = Mapping[str, Mapping[str, str | int | bool]]


class MakeInstance(Protocol):
    """What the `make_instance` fixture is: makes an instance, not started yet."""

    def __call__(
        self,
        name: str = "instance",
        *,
        cores: int = 4,
        settings: Settings | None = None,
        env: Mapping[str, str] | None = None,
        state: Path | None = None,
    ) -> Instance:
        """Make it."""
        ...


class MakeTree(Protocol):
    """What the `make_tree` fixture is: makes an instance of several brokers, none of them started yet."""

    def __call__(
        self, name: str = "tree", *, size: int, fanout: int = 2, cores: int = 4, settings: Settings | None = None
    ) -> Tree:
        """Make it."""
        ...


class MakeNetwork(Protocol):
    """What the `make_network` fixture is: makes a tree that others try to join, or of several hosts, not started."""

    def __call__(
        self,
        name: str = "network",
        *,
        size: int,
        fanout: int = 2,
        hosts: str = "",
        cert: Path | None = None,
        settings: Settings | None = None,
    ) -> Network:
        """Make it."""
        ...


def end_all(made: Sequence[Instance]) -> None:
    """Kill what is left of all of them, and only then fail for what is in their logs."""
    for each in made:
        each.clean_up()
    for each in made:
        each.check_log()


@pytest.fixture
def make_instance(tmp_path: Path) -> Iterator[MakeInstance]:
    """Makes instances; at the end all their processes are killed and their logs checked."""
    made: list[Instance] = []

    def make(
        name: str = "instance",
        *,
        cores: int = 4,
        settings: Settings | None = None,
        env: Mapping[str, str] | None = None,
        state: Path | None = None,
    ) -> Instance:
        made.append(Instance(tmp_path / name, cores=cores, settings=settings, env=env, state=state))
        return made[-1]

    yield make
    end_all(made)


@pytest.fixture
def make_tree(tmp_path: Path) -> Iterator[MakeTree]:
    """Makes trees of brokers; at the end all their processes are killed and their logs checked."""
    made: list[Tree] = []

    def make(
        name: str = "tree", *, size: int, fanout: int = 2, cores: int = 4, settings: Settings | None = None
    ) -> Tree:
        made.append(Tree(tmp_path / name, size=size, fanout=fanout, cores=cores, settings=settings))
        return made[-1]

    yield make
    end_all(made)


@pytest.fixture
def make_network(tmp_path: Path) -> Iterator[MakeNetwork]:
    """Makes networks; at the end all their processes are killed and their logs checked."""
    made: list[Network] = []

    def make(
        name: str = "network",
        *,
        size: int,
        fanout: int = 2,
        hosts: str = "",
        cert: Path | None = None,
        settings: Settings | None = None,
    ) -> Network:
        made.append(Network(tmp_path / name, size=size, fanout=fanout, hosts=hosts, cert=cert, settings=settings))
        return made[-1]

    yield make
    end_all(made)


@pytest.fixture
def instance(make_instance: MakeInstance) -> Instance:
    """An instance with four cores whose broker runs."""
    made = make_instance()
    made.start()
    return made
