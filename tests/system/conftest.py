"""Fixtures of the system tests: instances that are cleaned up, and whose logs are looked through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest
from kit import Instance


class MakeInstance(Protocol):
    """What the `make_instance` fixture is: makes an instance, not started yet."""

    def __call__(
        self,
        name: str = "instance",
        *,
        cores: int = 4,
        settings: Mapping[str, Mapping[str, str | int | bool]] | None = None,
        env: Mapping[str, str] | None = None,
        state: Path | None = None,
    ) -> Instance:
        """Make it."""
        ...


@pytest.fixture
def make_instance(tmp_path: Path) -> Iterator[MakeInstance]:
    """Makes instances; at the end all their processes are killed and their logs checked."""
    made: list[Instance] = []

    def make(
        name: str = "instance",
        *,
        cores: int = 4,
        settings: Mapping[str, Mapping[str, str | int | bool]] | None = None,
        env: Mapping[str, str] | None = None,
        state: Path | None = None,
    ) -> Instance:
        made.append(Instance(tmp_path / name, cores=cores, settings=settings, env=env, state=state))
        return made[-1]

    yield make
    for instance in made:
        instance.clean_up()
    for instance in made:
        instance.check_log()


@pytest.fixture
def instance(make_instance: MakeInstance) -> Instance:
    """An instance with four cores whose broker runs."""
    made = make_instance()
    made.start()
    return made
