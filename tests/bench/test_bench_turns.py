"""Rounds within a time, in blocks, on several sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import turns
from bench.timing import BLOCK_MS, block_of, rounds_within
from bench.turns import LEAST_ROUNDS, MOST_CALLS, MOST_ROUNDS, Turns, timed_turns


class Clock:
    """Time that passes in calls alone, and a log of these."""

    def __init__(self) -> None:
        self.now, self.log = 0, list[str]()

    def call(self, name: str, ms: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += round(1e6 * ms)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(turns, "best_clock", lambda: lambda: found.now)
    return found


def test_rounds_are_those_that_fit() -> None:
    assert rounds_within(10.0, 1.0, least=2, most=100) == 9, "one has been taken"
    assert rounds_within(-3.0, 1.0, least=2, most=100) == 2
    assert rounds_within(1e9, 1.0, least=2, most=100) == 100
    assert rounds_within(1.0, 0.0, least=2, most=100) == 100


def test_blocks_fill_a_turn() -> None:
    assert block_of(2 * BLOCK_MS) == 1
    assert block_of(BLOCK_MS / 2.5) == 3
    assert block_of(0.0, MOST_CALLS) == MOST_CALLS


def test_samples_are_means_of_blocks_and_pairs_of_a_round(clock: Clock) -> None:
    made: list[int] = []

    def make() -> Turns:
        made.append(len(clock.log))
        return Turns({"long": clock.call("long", 30.0), "short": clock.call("short", 10.0)})

    samples = timed_turns(make, sets=2, seconds=0.0, rounds=4)
    assert samples == {"long": [30.0] * 4, "short": [10.0] * 4}, "milliseconds of a call, not of a block"
    assert len(made) == 2
    warmup_and_estimate = 2 * 2
    assert clock.log.count("long") == warmup_and_estimate + 4
    assert clock.log.count("short") == warmup_and_estimate + 4 * 3
    assert made[1] == len(clock.log) // 2, "a set is made when its turn comes"


def test_a_round_of_single_calls_counts_though_it_was_timed_first(clock: Clock) -> None:
    samples = timed_turns(lambda: Turns({"long": clock.call("long", 30.0)}), sets=1, seconds=0.0, rounds=None)
    assert samples == {"long": [30.0] * LEAST_ROUNDS}
    assert len(clock.log) == 1 + LEAST_ROUNDS
    assert MOST_ROUNDS >= LEAST_ROUNDS


def test_every_call_is_prepared_untimed(clock: Clock) -> None:
    made = Turns({"a": clock.call("a", 12.5)}, {"a": clock.call("before", 7.0)})
    samples = timed_turns(lambda: made, sets=1, seconds=0.0, rounds=1, warmup=0, settle=1)
    assert samples == {"a": [12.5]}
    assert clock.log == ["before", "a"] * (2 + 3)
