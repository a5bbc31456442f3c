"""Lightning and Fabric on two processes: both ranks have the same bits, and the weights of the formula on all ranks' batches."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.conftest import Compared
from tests.frameworks.formula import error_of

pytest.importorskip("lightning")
from tests.frameworks.lightning_ranks import RANKS, SCENARIOS, batches_of
from tests.frameworks.lightning_runs import Batch, net, steps_of, train_by_formula
from tests.frameworks.test_lightning_precision import SCALE
from tests.helpers.ranks import one_at_a_time

pytestmark = one_at_a_time
CLOSE = 1e-12
ROOT = Path(__file__).parents[2]
Ascents = list[list[Batch]]  # of a step: the batches from which each perturbation is made


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has returned of every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [*torchrun, "-m", "tests.frameworks.lightning_ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[max(0, done.stderr.find("Traceback")) :][:6000]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def together(batches: list[Batch]) -> Ascents:
    """One perturbation for each batch of all ranks. ``batches``: the ranks' batches of the step, rank by rank within each of them."""
    return [batches[i : i + RANKS] for i in range(0, len(batches), RANKS)]


def apart(batches: list[Batch]) -> Ascents:
    """A perturbation for each batch of each rank."""
    return [[batch] for batch in batches]


def in_halves(batches: list[Batch]) -> list[Batch]:
    """Halves of the ranks' batches: first halves of all ranks, then second ones."""
    found = []
    for i in range(0, len(batches), RANKS):
        for part in (slice(2), slice(2, 4)):
            found += [(x[part], y[part]) for x, y in batches[i : i + RANKS]]
    return found


def of_all_ranks(dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [batch for both in zip(*(batches_of(rank, dtype) for rank in range(RANKS)), strict=True) for batch in both]


def step_with(accumulation: int, ascents: Any, pieces: Any = list) -> list[Ascents]:
    return [ascents(pieces(step)) for step in steps_of(of_all_ranks(), accumulation * RANKS)]


A, L = "SAM, averaged", "m-SAM over ranks"
EXPECTED: dict[str, tuple[str, list[Ascents], float]] = {  # scenario: algorithm, steps, clip
    **{f"accumulation {k}, clip {clip}": (A, step_with(k, together), clip) for k in (1, 3) for clip in (0.0, 0.3)},
    "agreeing": (A, step_with(3, together), 0.0),
    "local, accumulation 1": (L, step_with(1, apart), 0.0),
    "local, accumulation 3": (L, step_with(3, apart), 0.0),
    "micro-batches": ("m-SAM, averaged", step_with(3, together, in_halves), 0.0),
    "local, micro-batches": (L, step_with(3, apart, in_halves), 0.0),
    "bucket views": (A, step_with(3, together), 0.0),
    "unused parameters": (A, step_with(3, together), 0.0),
    "static graph": (A, step_with(1, together), 0.0),
    "sharded": (A, step_with(3, together), 0.0),
    "manual, backward": (A, step_with(1, together), 0.0),
    "manual, first_step, second_step": (A, step_with(1, together), 0.0),
    "manual, micro-batches": ("m-SAM, averaged", step_with(1, together, in_halves), 0.0),
    "manual, local": (L, step_with(1, apart), 0.0),
    "manual, local, accumulation": (L, step_with(3, apart), 0.0),
    "Fabric": (A, step_with(1, together), 0.0),
    "Fabric, first_step, second_step": (A, step_with(1, together), 0.0),
    "Fabric, accumulation 3": (A, step_with(3, together), 0.0),
    "Fabric, no_backward_sync": (A, step_with(3, together), 0.0),
    "Fabric, local, accumulation 3": (L, step_with(3, apart), 0.0),
}


def model_of(weights: list[Tensor]) -> nn.Module:
    model = net(weights[0].dtype)
    with torch.no_grad():
        for param, value in zip(model.parameters(), weights, strict=True):
            param.copy_(value)
    return model


def have_the_same_bits(ranks: list[dict[str, Any]], name: str) -> bool:
    return all(map(torch.equal, *(rank[name]["weights"] for rank in ranks)))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_scenario_is_the_formula(name: str, ranks: list[dict[str, Any]], compared: Compared) -> None:
    algorithm, steps, clip = EXPECTED[name]
    assert have_the_same_bits(ranks, name)
    assert ranks[0][name]["steps"] == len(steps)
    error = error_of(model_of(ranks[0][name]["weights"]), train_by_formula(net(), steps, clip=clip))
    where = "" if name.startswith(("manual", "Fabric")) else "automatic, "
    compared("lightning", algorithm, f"2 processes, {where}{name}: weights after {len(steps)} steps", error, CLOSE)


@pytest.mark.parametrize("name", ["skipped, float64", "skipped, 16-mixed"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_both(
    name: str, ranks: list[dict[str, Any]], compared: Compared
) -> None:
    is_half = name == "skipped, 16-mixed"
    assert have_the_same_bits(ranks, name)
    dtype, accumulation = (torch.float32, 1) if is_half else (torch.float64, 2)
    steps = [together(step) for step in steps_of(of_all_ranks(dtype), accumulation * RANKS)]
    del steps[2 // accumulation]
    how: dict[str, Any] = {"clip": 0.1, "context": partial(torch.autocast, "cpu", torch.float16), "scale": SCALE} if is_half else {}
    expected = train_by_formula(net(dtype), steps, **how)
    what = f"2 processes, automatic, {name}: weights after {len(steps)} steps, one skipped"
    error = error_of(model_of(ranks[0][name]["weights"]), expected)
    compared("lightning", A, what, error, 1e-5 if is_half else CLOSE)
    for rank in ranks:
        assert rank[name]["skipped"] == 1
        assert rank[name]["scale"] == (0.5 if is_half else None)


def test_a_run_is_resumed_bit_for_bit(ranks: list[dict[str, Any]], compared: Compared) -> None:
    assert have_the_same_bits(ranks, "resumed")
    are_same = all(map(torch.equal, ranks[0]["resumed"]["weights"], ranks[0]["resumed"]["whole"]))
    compared("lightning", A, "2 processes, automatic, a schedule per step: resumed and whole run", 0.0 if are_same else 1.0, 0.0)


def test_a_static_graph_whose_passes_differ_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "static_graph=True) with passes of which only some are averaged" in rank["static graph, accumulation"]["error"]


@pytest.mark.parametrize(("name", "a_step"), [("all-reduces", 3 + 1), ("all-reduces, micro-batches", 6 + 1), ("all-reduces, local", 1)])
def test_how_often_gradients_are_averaged(name: str, a_step: int, ranks: list[dict[str, Any]]) -> None:
    """Each first pass, and the sum of the second ones; with a local ascent the latter alone. There are two steps."""
    assert ranks[0][name]["count"] == ranks[1][name]["count"] == 2 * a_step


def test_every_scenario_is_compared(ranks: list[dict[str, Any]]) -> None:
    others = {"skipped, float64", "skipped, 16-mixed", "static graph, accumulation", "Fabric, no_backward_sync"}
    counted = {name for name in SCENARIOS if name.startswith("all-reduces")}
    assert SCENARIOS.keys() == EXPECTED.keys() | others | counted == ranks[0].keys() - {"resumed"}
