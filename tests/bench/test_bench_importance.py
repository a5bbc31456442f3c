"""The benchmark of importance sampling: its problems, that its steps are the optimizer's, what its page says."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import sam_kernels
from bench.batched import times_of
from bench.importance import report
from bench.importance.__main__ import main
from bench.importance.problem import PROBLEMS, RIDGE, make_problem
from bench.importance.run import LAMBDS, WAYS, rate_of, steps_of, trajectories
from sam_kernels.sampling import ImportanceSampler

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_what_it_says(name: str) -> None:
    problem = make_problem(name)
    eigenvalues = torch.linalg.eigvalsh(problem.a.T @ problem.a / 100)
    torch.testing.assert_close(eigenvalues[[0, -1]], torch.tensor([1.0, 10.0], dtype=torch.float64))
    assert len(eigenvalues) == 100
    assert 1 < eigenvalues[1] < eigenvalues[-2] < 2
    assert problem.mu == pytest.approx(1 + RIDGE)
    assert problem.smoothness.mean().item() == pytest.approx(eigenvalues.sum().item() + RIDGE)
    assert (problem.smoothness.max() / problem.smoothness.mean() > 6) == (name == "apart")
    x = problem.minimum.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.f(x), x)
    assert gradient.norm() < 1e-12
    hessians = problem.a[:, :, None] * problem.a[:, None, :] + RIDGE * torch.eye(100, dtype=torch.float64)
    lowest = torch.linalg.solve(hessians, problem.b[:, None] * problem.a)  # (n, d): of each f_i, by its own normal equations
    values = ((problem.a * lowest).sum(1) - problem.b) ** 2 / 2 + RIDGE / 2 * lowest.square().sum(1)
    assert problem.mean_f_i_inf == pytest.approx(values.mean().item(), rel=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_are_those_of_the_optimizer(name: str) -> None:
    problem, steps, seeds = make_problem(name), 15, 2
    points = np.stack(list(trajectories(problem, steps, seeds)))
    assert points.shape == (steps, len(WAYS), len(LAMBDS), seeds, 100)
    for w, way in enumerate(WAYS):
        sampler = ImportanceSampler(lipschitz=torch.ones(100) if way == "uniform" else problem.smoothness)
        indices, weights = (part.reshape(-1, seeds) for part in sampler.draw(1000 * seeds, torch.Generator().manual_seed(w)))
        for k, lambd in enumerate(LAMBDS):
            theirs = steps_of(problem, way, lambd)
            for seed in range(seeds):
                x = torch.zeros(100, dtype=torch.float64, requires_grad=True)
                opt = sam_kernels.UnifiedSAM([x], torch.optim.SGD, rho=theirs.rho, lambd=lambd, lr=theirs.gamma)
                for t in range(steps):
                    a, b, weight = problem.a[indices[t, seed]], problem.b[indices[t, seed]], weights[t, seed]

                    def closure(a=a, b=b, weight=weight, x=x, opt=opt):  # type: ignore[no-untyped-def]
                        opt.zero_grad()
                        loss = weight * ((a @ x - b) ** 2 / 2 + RIDGE / 2 * x @ x)
                        loss.backward()
                        return loss

                    opt.step(closure)
                np.testing.assert_allclose(points[-1, w, k, seed], x.detach().numpy(), rtol=1e-9, atol=1e-15)


def test_steps_follow_the_sampling() -> None:
    problem = make_problem("apart")
    uniform, paper, own = (steps_of(problem, way, 0.5) for way in WAYS)
    assert uniform.L == paper.L == problem.smoothness.max().item() > own.L == pytest.approx(problem.smoothness.mean().item())
    assert uniform.gamma < paper.gamma < own.gamma
    assert uniform.C > paper.C == own.C


def test_rates_of_a_decay_that_is_exponential() -> None:
    times = np.array(times_of(5000, 60, first=5))
    assert times[0] == 0
    assert times[-1] == 5000
    assert (np.diff(times) > 0).all()
    assert rate_of(3 * np.exp(-0.001 * times), times) == pytest.approx(0.001)
    assert rate_of(3 * np.exp(-0.00001 * times), times) == pytest.approx(0.00001)


def test_blocks_of_draws_do_not_show() -> None:
    problem = make_problem("mixed")
    short = [x.copy() for x in trajectories(problem, 3, 1)]
    for a, b in zip(short, islice(trajectories(problem, 1003, 1), 3), strict=True):
        assert (a == b).all()
    assert len(list(trajectories(problem, 1003, 1))) == 1003


def test_run_end_to_end(tmp_path: Path) -> None:
    target, image, docs = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "docs.md"
    arguments = ["--no-gate", "--steps", "50", "--points", "10", "--seeds", "2", "--json", str(target), "--image", str(image)]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    assert image.read_bytes().startswith(b"\x89PNG")
    result = json.loads(target.read_text())
    for problem in result["problems"]:
        assert problem["times"][-1] == 50
        assert [(row["way"], row["lambd"]) for row in problem["rows"]] == [(way, lambd) for way in WAYS for lambd in LAMBDS]
        assert all(len(row["gap"]) == len(problem["times"]) for row in problem["rows"])
    docs.write_text("# Title\n<!-- bench:begin -->\n<!-- bench:end -->\n")
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs)]).exit_code == 0
    assert PROBLEMS["apart"] in docs.read_text()
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 0
    docs.write_text(docs.read_text().replace("uniform", "even"))
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 1


def stored() -> Path:
    (path,) = (ROOT / "bench" / "results").glob("*/importance.json")
    return path


@pytest.mark.stored
def test_the_page_shows_the_stored_result() -> None:
    run = CliRunner().invoke(report.main, [str(stored()), "--check"])
    assert run.exit_code == 0, run.output
    assert "images/importance.png" in (ROOT / "docs/sampling.md").read_text()
    assert (ROOT / "docs/images/importance.png").exists()


def test_the_stored_runs_keep_the_bound_and_importance_is_faster() -> None:
    for problem in json.loads(stored().read_text())["problems"]:
        for row in problem["rows"]:
            assert row["largest_share_of_bound"] <= 1
            assert row["rate_measured"] >= row["rate_predicted"]
            if row["floor_measured"] is not None:
                assert row["floor_measured"] <= row["floor_predicted"]
            if row["way"] == "importance":
                assert report.faster(problem["rows"], row) > problem["L_max"] / problem["L_avg"]
