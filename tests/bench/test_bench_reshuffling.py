"""Reshuffled data against fresh draws: the batches, the problem's constants, the first-order formula, and what a short run shows."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from bench.papers import reshuffling
from bench.papers.context import Context
from bench.papers.experiment import TOLERANCE
from sam_kernels import theory

pytestmark = pytest.mark.usefixtures("one_thread")
M, N, TAU = reshuffling.M, reshuffling.N, reshuffling.TAU


def epochs_of(sampling: str, epochs: int, streams: int = 3) -> np.ndarray[Any, Any]:
    """(epochs, M, streams, TAU) samples."""
    drawn = list(islice(reshuffling.batches(sampling, streams, np.random.default_rng(5)), epochs * M))
    assert all((weights == 1 / TAU).all() for _, weights in drawn)
    return np.array([rows for rows, _ in drawn]).reshape(epochs, M, streams, TAU)


@pytest.mark.parametrize("sampling", reshuffling.SAMPLINGS)
def test_an_epoch_is_what_its_name_says(sampling: str) -> None:
    epochs = epochs_of(sampling, 6)
    sees_all = [len(set(epoch[:, stream].ravel().tolist())) == N for epoch in epochs for stream in range(3)]
    distinct = [len(set(rows.tolist())) == TAU for rows in epochs.reshape(-1, TAU)]
    assert all(sees_all) == (sampling in ("reshuffled", "once"))
    assert any(sees_all) == all(sees_all)
    assert all(distinct) == (sampling != "with_replacement")
    assert (epochs == epochs[0]).all() == (sampling == "once")
    assert not (epochs[:, :, 0] == epochs[:, :, 1]).all(-1).any()  # streams have draws of their own
    assert np.bincount(epochs_of(sampling, 60, streams=20).ravel(), minlength=N).std() < 60  # of a mean of 1200; all samples alike


def test_the_radii_are_admitted_with_every_sampling() -> None:
    problem = reshuffling.make_problem()
    hessian = problem.a.T @ problem.a / N
    assert torch.linalg.eigvalsh(hessian)[[0, -1]].tolist() == pytest.approx([1, 4])
    for sampling in reshuffling.SAMPLINGS:
        for lambd in reshuffling.LAMBDS:
            rho = reshuffling.radius_of(problem, lambd, "fixed", 8.0)
            gamma = reshuffling.admitted(problem, sampling, lambd)[1]
            bound = reshuffling.bound_of(problem, sampling, lambd, rho, gamma)
            assert bound is not None
            assert 0 < bound < 10
            assert reshuffling.bound_of(problem, sampling, lambd, rho, 100 * gamma) is None
            assert reshuffling.radius_of(problem, lambd, "proportional", 0.25) == rho / 4


def test_the_batches_of_a_permutation_have_the_residual_that_is_assumed_of_them() -> None:
    """Shuffled once, the constants are those of the batches, not of tau-nice draws."""
    problem, generator = reshuffling.make_problem(), torch.Generator().manual_seed(3)
    c = reshuffling.constants_of(problem, "once")
    for trial in range(20):
        rows = torch.randperm(N, generator=generator).reshape(M, TAU)
        x = problem.minimum + 10.0 ** (trial % 4 - 2) * torch.randn(reshuffling.D, generator=generator, dtype=torch.float64)
        gradients = ((problem.a @ x - problem.b)[:, None] * problem.a + 0.1 * x)[rows].mean(1)
        square, gap = gradients.square().sum(1).mean().item(), problem.f(x).item() - problem.f_inf
        assert square <= 2 * c["A"] * gap + c["B"] * gradients.mean(0).square().sum().item() + c["C"]


def test_drifts_are_means_over_batches() -> None:
    problem, x = reshuffling.make_problem(), reshuffling.make_problem().minimum
    plain, normalised = reshuffling.drifts(problem)
    rows = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(k))[:TAU] for k in range(20_000)])
    each = torch.func.vmap(torch.func.grad(lambda y, a, b: (a @ y - b).square().mean() / 2 + 0.05 * y.square().sum()), (None, 0, 0))
    g = each(x, problem.a[rows], problem.b[rows])
    curved = torch.einsum("std,st->sd", problem.a[rows], torch.einsum("std,sd->st", problem.a[rows], g)) / TAU + 0.1 * g
    for found, samples in ((plain, curved), (normalised, curved / g.norm(dim=1, keepdim=True))):
        error = samples.std(0) / len(samples) ** 0.5
        assert ((found - samples.mean(0)).abs() < 5 * error).all()
        assert samples.mean(0).norm() > 10 * error.norm()


@pytest.fixture(scope="module")
def short() -> dict[str, Any]:
    measured = reshuffling.measure(Context(quick=True))
    return {"settings": measured.settings, "rows": measured.rows, "points": measured.points}


def test_a_quick_run_is_the_optimizer_s_and_reshuffling_has_the_lower_floor(short: dict[str, Any]) -> None:
    for step in (reshuffling.STEPS[0], reshuffling.STEPS[-1]):
        assert short["settings"][f"step_{step:g}"]["largest_deviation"] <= TOLERANCE
    rows = {(row["radii"], row["lambd"], row["sampling"]): row for row in short["rows"]}
    assert len(rows) == 24
    for (radii, lambd, sampling), row in rows.items():
        assert row["bound"] is None or row["last"] < row["bound"]
        if sampling in ("reshuffled", "once"):
            assert row["first"] < rows[radii, lambd, "tau_nice"]["first"] / 5


def test_runs_stay_where_the_first_order_says() -> None:
    """Long enough to settle, at a learning rate that is long enough for that to be soon."""
    problem, step = reshuffling.make_problem(), 1.0
    found = np.array(reshuffling.floors(step, 3, 7, 6.0)["floors"]).mean(1)  # (samplings, runs)
    gamma = reshuffling.plan(problem, step)[1]
    for k, (lambd, radii) in enumerate(reshuffling.RUNS):
        rho = reshuffling.radius_of(problem, lambd, radii, step)
        expected = reshuffling.first_order(problem, *reshuffling.drifts(problem), lambd, rho, gamma)
        assert 0.95 < found[0, k] / expected < 1.4
        assert found[0, k] < found[1, k] < found[2, k]
    assert (
        gamma
        == theory.reshuffling_steps(
            **{key: reshuffling.constants_of(problem, "reshuffled")[key] for key in ("mu", "L", "A", "B")}, lambd=0.0, batches=M
        )[1]
    )
