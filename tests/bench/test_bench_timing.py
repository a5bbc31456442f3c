import gc
import itertools

import pytest

from bench.timing import interleave, quantiles


def test_every_round_gives_each_call_one_turn() -> None:
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    samples = interleave(calls, rounds=5, warmup=2)
    assert log[:6] == list("aabbcc")
    rounds = [log[i : i + 3] for i in range(6, len(log), 3)]
    assert len(rounds) == 5
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1, "nobody always follows the same other"
    assert {name: len(values) for name, values in samples.items()} == {"a": 5, "b": 5, "c": 5}


def test_settling_calls_are_not_timed() -> None:
    log: list[str] = []
    ticks = itertools.count(0, 1_000_000)

    def clock() -> int:
        log.append("clock")
        return next(ticks)

    samples = interleave({"a": lambda: log.append("a")}, rounds=2, warmup=0, settle=1, inner=2, clock=clock)
    assert log == ["a", "clock", "a", "clock", "clock", "a", "clock"] * 2
    assert samples == {"a": [1.0] * 4}


def test_a_sample_is_the_mean_of_a_block_whose_calls_are_prepared_untimed() -> None:
    log: list[str] = []
    ticks = itertools.count(0, 1_000_000)

    def clock() -> int:
        log.append("clock")
        return next(ticks)

    calls = {name: (lambda name=name: log.append(name)) for name in ("a", "b")}
    before = {"b": lambda: log.append("before")}
    samples = interleave(calls, rounds=1, warmup=0, blocks={"a": 4, "b": 2}, before=before, clock=clock)
    assert samples == {"a": [0.25], "b": [1.0]}
    turns = [["clock", "a", "a", "a", "a", "clock"], ["before", "clock", "b", "clock"] * 2]
    assert log in (turns[0] + turns[1], turns[1] + turns[0])


@pytest.mark.parametrize("enabled", [True, False])
def test_no_collection_while_timing_and_the_collector_is_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        seen: list[bool] = []
        interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=2)
        assert not any(seen)
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError):
            interleave({"a": lambda: 1 / 0}, rounds=2)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_quantiles() -> None:
    q = quantiles([float(i) for i in range(11)])
    assert (q.ms_20, q.ms_50, q.ms_80) == (2.0, 5.0, 8.0)
