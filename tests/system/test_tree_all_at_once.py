"""SIGKILL of all brokers at the same instant, ten times in a row, with the same jobs running through it.

They are started in random order, and killed again at random instants while they come up, or when they are. The seed is
printed, and `FLUXRES_KILL_SEED` gives it again.
"""

from __future__ import annotations

import os
import random
import time
from typing import Final

from conftest import MakeTree
from kit import eventually
from treework import Work

SIZE: Final = 16
ROUNDS: Final = 10
SEED: Final = int(os.environ.get("FLUXRES_KILL_SEED", "0")) or time.time_ns() % 1_000_000


def test_all_are_killed_at_once_again_and_again(make_tree: MakeTree) -> None:
    print(f"FLUXRES_KILL_SEED={SEED}")
    rng = random.Random(SEED)
    tree = make_tree(size=SIZE, fanout=2, cores=2)
    tree.start_all()
    work = Work(tree)
    for ranks in ([0], [1], [6], [15], [2, 5, 11], [0, 7, 12, 14]):
        work.begin(*ranks)
    work.wait_running()
    for rank in (0, 6, 15):
        work.queue(rank, cores=2)
    work.queue(nodes=SIZE)
    states = work.states()
    before = tree.uuids()
    for _ in range(ROUNDS):
        tree.kill_rank(*range(SIZE))
        tree.spawn(*rng.sample(range(SIZE), SIZE))
        enough = rng.choice([1, 4, 10, SIZE])
        eventually(lambda enough=enough: len(tree.online()) >= enough, what=f"{enough} brokers online")  # type: ignore[misc]
        work.check_same()
    tree.wait_renewed(before)
    assert work.states() == states
    work.wait_progress()
    work.finish()
