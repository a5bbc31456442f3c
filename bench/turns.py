"""Rounds of turns within a time: in blocks of calls, and on several sets, because where small tensors lie in memory moves their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from time import monotonic

from bench.masters.clock import best_clock
from bench.timing import Call, block_of, interleave, rounds_within

__all__ = ["LEAST_ROUNDS", "MOST_ROUNDS", "Turns", "timed_turns"]

LEAST_ROUNDS, MOST_ROUNDS = 6, 100  # of all sets together
MOST_CALLS = 512  # of a turn


@dataclass(frozen=True)
class Turns:
    """One set: the calls by name, each warm, and what runs before each of them, untimed."""

    calls: Mapping[str, Call]
    before: Mapping[str, Call] = field(default_factory=dict)


def timed_turns(
    make: Callable[[], Turns], *, sets: int, seconds: float, rounds: int | None, warmup: int = 1, settle: int = 0
) -> dict[str, list[float]]:
    """Return milliseconds of a call by round: the k-th samples of all names are of one round.

    With one thread, times are the thread's own on a processor.

    Args:
        make: makes a set. It is called ``sets`` times, and a set is dropped before the next is made.
        seconds: the time for everything; it is exceeded where LEAST_ROUNDS take longer.
        rounds: as many of all sets together, whatever they take. None: as many as the time allows, up to MOST_ROUNDS.
        warmup, settle: as :func:`bench.timing.interleave` has them.
    """
    start = monotonic()
    sets = sets if rounds is None else min(sets, rounds)
    samples: dict[str, list[float]] = {}
    for number in range(sets):
        left = (seconds - (monotonic() - start)) / (sets - number)
        for name, values in _timed_set(make(), sets, left, rounds, warmup, settle).items():
            samples.setdefault(name, []).extend(values)
    return samples


def _timed_set(turns: Turns, sets: int, seconds: float, rounds: int | None, warmup: int, settle: int) -> dict[str, list[float]]:
    """One round is timed to choose blocks and the number of rounds. It counts where every block is a single call."""
    start, clock = monotonic(), best_clock()
    found = interleave(turns.calls, rounds=1, warmup=warmup, settle=settle, before=turns.before, clock=clock)
    blocks = {name: block_of(values[0], MOST_CALLS) for name, values in found.items()}
    round_seconds = sum((blocks[name] + settle) * values[0] for name, values in found.items()) / 1e3
    left = seconds - (monotonic() - start)
    if rounds is None:
        count = rounds_within(left + round_seconds, round_seconds, least=ceil(LEAST_ROUNDS / sets), most=ceil(MOST_ROUNDS / sets))
    else:
        count = ceil(rounds / sets)
    kept = found if set(blocks.values()) == {1} else {name: [] for name in found}
    more = count - len(next(iter(kept.values()), []))
    if more > 0:
        measured = interleave(turns.calls, rounds=more, warmup=0, settle=settle, blocks=blocks, before=turns.before, clock=clock)
        for name, values in measured.items():
            kept[name] = kept[name] + values
    return kept
