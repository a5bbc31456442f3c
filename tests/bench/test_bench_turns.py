"""Rounds within a time, in blocks, on several sets."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bench.timing import BLOCK_MS, block_of, rounds_within
from bench.turns import LEAST_ROUNDS, MOST_CALLS, MOST_ROUNDS, Turns, timed_turns


def _sleeping(log: list[str], name: str, seconds: float) -> Callable[[], None]:
    def call() -> None:
        log.append(name)
        time.sleep(seconds)

    return call


def test_rounds_are_those_that_fit() -> None:
    assert rounds_within(10.0, 1.0, least=2, most=100) == 9, "one has been taken"
    assert rounds_within(-3.0, 1.0, least=2, most=100) == 2
    assert rounds_within(1e9, 1.0, least=2, most=100) == 100
    assert rounds_within(1.0, 0.0, least=2, most=100) == 100


def test_blocks_fill_a_turn() -> None:
    assert block_of(2 * BLOCK_MS) == 1
    assert block_of(BLOCK_MS / 2.5) == 3
    assert block_of(0.0, MOST_CALLS) == MOST_CALLS


def test_samples_are_means_of_blocks_and_pairs_of_a_round() -> None:
    log: list[str] = []
    made: list[int] = []

    def make() -> Turns:
        made.append(len(log))
        return Turns({"long": _sleeping(log, "long", 0.03), "short": _sleeping(log, "short", 0.01)})

    samples = timed_turns(make, sets=2, seconds=0.0, rounds=4)
    assert len(made) == 2, "every set is made when its turn comes"
    assert {name: len(values) for name, values in samples.items()} == {"long": 4, "short": 4}
    assert all(values > 30.0 for values in samples["long"])
    assert all(10.0 < value < 30.0 for value in samples["short"]), "of a call, not of a block"
    warmup_and_estimate = 2 * 2
    assert log.count("long") == warmup_and_estimate + 4
    assert log.count("short") >= warmup_and_estimate + 4 * 2


def test_a_round_of_single_calls_counts_though_it_was_timed_first() -> None:
    log: list[str] = []
    samples = timed_turns(lambda: Turns({"long": _sleeping(log, "long", 0.03)}), sets=1, seconds=0.0, rounds=None)
    assert len(samples["long"]) == LEAST_ROUNDS
    assert len(log) == 1 + LEAST_ROUNDS
    assert MOST_ROUNDS >= LEAST_ROUNDS


@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_every_call_is_prepared_untimed(seconds: float) -> None:
    log: list[str] = []
    turns = Turns({"a": _sleeping(log, "a", 0.0)}, {"a": _sleeping(log, "before", seconds)})
    samples = timed_turns(lambda: turns, sets=1, seconds=0.0, rounds=1, warmup=0, settle=1)
    assert log == ["before", "a"] * (len(log) // 2)
    assert all(value < 1.0 for value in samples["a"]), "milliseconds of the call alone"
