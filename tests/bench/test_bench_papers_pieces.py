"""The papers' experiments in pieces: an interrupted one goes on where it stopped, and pieces give what one piece gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bench import batched
from bench.papers import drift, lambda_digits, lambda_problems, log, schedules, stall, unified
from bench.papers.context import Context
from bench.papers.experiment import difference, together
from bench.papers.experiments import EXPERIMENTS
from bench.papers.lambda_choice import SGD, Chosen, of_json, to_json

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS: dict[str, tuple[tuple[ModuleType, str], ...]] = {
    "stall": ((stall, "piece"),),
    "unified": ((unified, "piece"),),
    "log": ((log, "piece"),),
    "schedules": ((schedules, "one_run"),),
    "drift": ((drift, "piece"),),
    "lambda": ((lambda_problems, "piece"), (lambda_digits, "one_run")),
}


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_experiment_goes_on_where_it_stopped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []
    cut_at = [2]  # in the second run

    def counted(module: ModuleType, function: str) -> Callable[..., Any]:
        original = getattr(module, function)

        @wraps(original)
        def run(**job: Any) -> Any:
            made.append((module.__name__, repr(sorted(job.items()))))
            if len(made) == cut_at[0]:
                raise PowerCut
            return original(**job)

        return run

    for module, function in RUNS[name]:
        monkeypatch.setattr(module, function, counted(module, function))
    context = Context(False, cache=tmp_path, processes=1)
    context.quick = True  # of the size of a quick run, but kept
    with pytest.raises(PowerCut):
        EXPERIMENTS[name].measure(context)
    cut_at[0] = 0
    measured = EXPERIMENTS[name].measure(context)
    assert made[1] == made[2], "the run that was cut is made again"
    assert len(set(made)) == len(made) - 1, "no other is"
    assert len(set(made)) > 1
    before = len(made)
    assert EXPERIMENTS[name].measure(context) == measured
    assert len(made) == before, "nothing is left to do"


def test_two_blocks_of_instances_give_what_one_gives() -> None:
    size: dict[str, Any] = {"times": batched.times_of(120, 20), "compared": 3}
    whole, *blocks = (log.piece(20, first, last, **size) for first, last in ((0, 10), (0, 5), (5, 10)))
    seen = np.concatenate([np.array(block["seen"]) for block in blocks], axis=2)
    assert (seen == np.array(whole["seen"])).all()
    assert seen.shape == (len(size["times"]), 2, 10, len(log.WAYS))


def test_two_learning_rates_of_the_cycle_give_what_one_piece_gives() -> None:
    size: dict[str, Any] = {"times": batched.times_of(300, 20), "compared": 3}
    whole, *pieces = (stall.piece(ways, **size) for ways in (tuple(stall.WAYS), *stall.PIECES))
    assert {way: found for piece in pieces for way, found in piece["norms"].items()} == whole["norms"]


def test_each_sampling_draws_what_both_draw_together() -> None:
    problem = unified.make_problem("mixed")
    both = list(unified.draws(list(unified.samplers_of(problem).values()), unified.SEEDS, 5, unified.TAU))
    parts = [list(unified.batches(sampling, 5)) for sampling in unified.SAMPLINGS[1:]]
    for draw, *own in zip(both, *parts, strict=True):
        for k in range(2):  # samples, weights
            assert (np.concatenate([each[k] for each in own]) == draw[k]).all()


def test_every_piece_is_compared_with_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "EPS", 1e-3)  # in the batched steps alone
    pieces: tuple[tuple[Callable[..., Any], dict[str, Any]], ...] = (
        (stall.piece, {"ways": stall.PIECES[0], "times": [0, 1]}),
        (log.piece, {"n": 2, "first": 5, "last": 10, "times": [0, 1]}),
        (unified.piece, {"sampling": "importance", "times": [0, 1]}),
        (lambda_problems.piece, {"name": "log", "steps": 5, "tuning": 1, "evaluation": 1}),
    )
    for piece, job in pieces:
        with pytest.raises(RuntimeError, match="away from those of"):
            piece(**job, compared=3)


def test_comparisons_of_pieces_are_put_together_on_the_safe_side() -> None:
    pieces = [{"compared_runs": 3, "compared_steps": 30 + k, "largest_deviation": k * 1e-16} for k in range(3)]
    assert together(pieces) == {"compared_runs": 9, "compared_steps": 30, "largest_deviation": 2e-16}


def test_what_was_chosen_comes_back_from_json() -> None:
    chosen = {SGD: Chosen(0.0, 0.1, 1 / 3, np.array([0.1, np.inf])), "1/t": Chosen(0.3, 0.2, 0.5, np.array([1e-300, 2.0]))}
    found = of_json(to_json(chosen))
    assert list(found) == list(chosen)
    for lambd, each in found.items():
        assert (each.rho, each.gamma, each.tuned) == (chosen[lambd].rho, chosen[lambd].gamma, chosen[lambd].tuned)
        assert (each.values == chosen[lambd].values).all()


def test_what_rounds_to_zero_has_one_sign() -> None:
    assert [difference([mean, 0.1]) for mean in (-0.004, 0.0, 0.004, -0.006)] == ["+0.00 ± 0.10"] * 3 + ["-0.01 ± 0.10"]
