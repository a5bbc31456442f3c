"""The papers' experiments: that batched steps are the optimizer's, what each one claims on a quick run, what is stored and shown."""

from __future__ import annotations

import csv
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench import batched
from bench.linear_models import LOSSES, LinearModels
from bench.papers import drift, log, report, schedules, stall, unified
from bench.papers.__main__ import main
from bench.papers.experiment import TOLERANCE, compare, look
from bench.papers.experiments import EXPERIMENTS
from bench.papers.lambda_choice import MIXES, SGD, Chosen, choose, row_of
from bench.papers.lambda_problems import CLASSES, Grid, batches, make, minima
from bench.papers.sharpness_runs import IN_TIME, METHODS
from sam_kernels import theory
from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.optimizers import Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import run

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("papers")]  # a minute of quick runs, which its tests share


def some_models(loss: str) -> LinearModels:
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((3, 12, 5)), np.sign(generator.standard_normal((3, 12)))
    return LinearModels(loss, a, b, ridge=0.1)


SOME_STEPS = batched.Steps(lambda t: 0.1 / t**0.5, np.array([0.0, 0.3, 1.0, 0.7]), np.full((3, 4), 0.05))
EVERY_RUN = [(stream, run) for stream in range(3) for run in range(4)]


@pytest.mark.parametrize("sees", ["all", "batches"])
@pytest.mark.parametrize("loss", LOSSES)
def test_batched_steps_are_those_of_the_optimizer(loss: str, sees: str) -> None:
    models, generator = some_models(loss), np.random.default_rng(2)
    draws = [None if sees == "all" else (generator.integers(0, 12, (3, 4)), generator.random((3, 4))) for _ in range(40)]
    start = generator.standard_normal((3, 4, 5))
    assert batched.deviation(models, start, draws, SOME_STEPS, EVERY_RUN) <= TOLERANCE


@pytest.mark.parametrize("wrong", ["gradient", "ascent", "not a number"])
def test_a_wrong_step_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models, start = some_models("squares"), np.ones((3, 4, 5))
    right = LinearModels.gradient
    if wrong == "ascent":
        monkeypatch.setattr(batched, "EPS", 1e-6)
    else:
        factor = 1 + 1e-9 if wrong == "gradient" else math.nan
        monkeypatch.setattr(LinearModels, "gradient", lambda *arguments: factor * right(*arguments))
    with pytest.raises(RuntimeError, match="away from those of"):
        compare(models, start, [None] * 20, SOME_STEPS, 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_slope_is_the_derivative_and_the_curvature_its_largest(loss: str) -> None:
    z, b = torch.linspace(-40, 40, 4001, dtype=torch.float64, requires_grad=True), torch.ones(4001, dtype=torch.float64)
    (first,) = torch.autograd.grad(LOSSES[loss].value(z, b).sum(), z, create_graph=True)
    np.testing.assert_allclose(LOSSES[loss].slope(z.detach().numpy(), b.numpy()), first.detach().numpy(), rtol=1e-12, atol=2e-16)
    (second,) = torch.autograd.grad(first.sum(), z)
    assert second.max().item() == pytest.approx(LOSSES[loss].curvature, rel=1e-3)


def test_what_is_looked_at_is_at_the_times_asked_for() -> None:
    models, start = some_models("squares"), np.ones((3, 4, 5))
    times = batched.times_of(30, 8)
    assert times[:2] == [0, 1]
    assert times[-1] == 30
    points = [start, *batched.trajectories(models, start, [None] * 30, SOME_STEPS)]
    found = look(models, start, [None] * 30, SOME_STEPS, times, lambda x: x)
    assert (found == np.stack([points[t] for t in times])).all()


# --- the experiments ---


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("papers")
    result = CliRunner().invoke(main, ["--quick", "--no-gate", "--out", str(folder), "--json", str(folder / "out.json")])
    assert result.exit_code == 0, result.output
    return folder, json.loads((folder / "out.json").read_text())["experiments"]


def deviations(settings: dict[str, Any]) -> list[float]:
    own = [settings["largest_deviation"]] if "largest_deviation" in settings else []
    return own + [value for part in settings.values() if isinstance(part, dict) for value in deviations(part)]


def test_a_quick_run_writes_everything(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, experiments = quick
    assert list(experiments) == list(EXPERIMENTS)
    for name, entry in experiments.items():
        assert (folder / f"papers_{name}.png").read_bytes().startswith(b"\x89PNG")
        with (folder / f"papers_{name}.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) > 1
        assert all(EXPERIMENTS[name].cells(row) for row in entry["rows"])
    for name in ("stall", "unified", "reshuffling", "log", "lambda"):
        found = deviations(experiments[name]["settings"])
        assert found
        assert max(found) <= TOLERANCE


def test_constant_steps_of_sam_end_in_a_cycle(quick: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["way"]: row for row in quick[1]["stall"]["rows"]}
    for way in ("constant", "constant_almost"):
        # Of the four starts off the axis; on it the curvature is 1.
        assert rows[way]["least"] == rows[way]["largest"] == pytest.approx(rows[way]["cycle"], rel=1e-4)
        assert rows[way]["on_axis"] == pytest.approx(rows[way]["cycle"] / 11.57, rel=1e-3)
    assert stall.cycle(3.0, 0.2, 0.1) == pytest.approx(0.1286, abs=5e-5)
    steps = quick[1]["stall"]["settings"]["steps"]
    assert rows["diminishing"]["largest"] == pytest.approx(stall.cycle(3.0, 1 / steps, 0.1 / steps**0.001), rel=0.01)


def test_runs_of_unified_sam_stay_below_their_bounds(quick: tuple[Path, dict[str, Any]]) -> None:
    rows = quick[1]["unified"]["rows"]
    assert [(row["sampling"], row["lambd"]) for row in rows] == [(s, lambd) for s in unified.SAMPLINGS for lambd in unified.LAMBDS]
    for row in rows:
        assert 0 < row["share_constant"] <= 1
        assert 0 < row["share_decreasing"] <= 1


def test_steps_of_least_squares_are_the_published_ones() -> None:
    models, c = unified.least_squares()
    eigenvalues = np.linalg.eigvalsh(models.a[0].T @ models.a[0] / len(models.a[0]))
    assert (eigenvalues[0], eigenvalues[-1]) == pytest.approx((0.1, 10.0))
    for lambd, published in unified.PUBLISHED.items():
        assert theory.pl_constant_steps(c.mu, c.L, c.A, c.B, lambd) == pytest.approx(published, abs=5e-8)


def test_decreasing_steps_and_their_bound_are_those_of_theory() -> None:
    c = unified.Constants(mu=0.1, L=10.0, A=2.0, B=1.0, C=0.5)
    steps = unified.schedule([c], [("constant", 0.3), ("decreasing", 0.3)])
    constant = theory.pl_constant_steps(c.mu, c.L, c.A, c.B, 0.3)
    exact, times = [5.0], batched.times_of(4000, 40)
    for t in range(times[-1]):
        rho, gamma = theory.pl_decreasing_steps(t, c.mu, c.L, c.A, c.B, 0.3)
        found = steps.at(t + 1)
        assert (found[0][0, 0], found[2][0, 0]) == constant
        assert (found[0][0, 1], found[2][0, 1]) == pytest.approx((rho, gamma), rel=1e-14)
        floor = theory.pl_floor(c.mu, c.L, c.C, 0.3, rho, gamma)
        exact.append(exact[-1] - gamma * c.mu * (exact[-1] - floor))
    bounds = unified.bounds(c, "decreasing", 0.3, 5.0, times)
    for t, bound in zip(times, bounds, strict=True):
        assert exact[t] * (1 - 1e-12) <= bound <= 2 * exact[t]


def test_the_way_of_each_run_of_log_is_what_its_title_says() -> None:
    models = log.make_models(2)
    assert models.f(np.zeros((log.INSTANCES, 1, 2)))[:, 0] == pytest.approx(np.log1p(models.b**2).sum(1))
    smoothness = 2 * np.linalg.norm(models.a[0], 2) ** 2
    rho, lambd, gamma = log.steps_of(models).at(100)
    assert lambd == 1.0
    assert rho.tolist() == pytest.approx([0, 0.1, 0.1 / 100**0.001, 0.01, 0, 0.1, 0.1 / 100**0.001])
    assert (gamma[0] * smoothness).tolist() == pytest.approx([1] * 4 + [1 / (1 + 100 / log.HALF)] * 3)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("Constant", [0.1] * 5),
        ("Diminish 1", [0.1, 0.05, 0.1 / 3, 0.025, 0.02]),
        ("Diminish 2", [0.1, 0.1, 0.1 / 2**0.5001, 0.1 / 3**0.5001, 0.1 / 4**0.5001]),
        ("Diminish 3", [0.1, *[0.1 / (3 * math.log(3))] * 5, 0.1 / (4 * math.log(4))]),
    ],
)
def test_learning_rates_of_the_epochs(name: str, rates: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedules.LR)
    schedule = schedules.SCHEDULES[name](optimizer)
    for rate in rates:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        schedule.step()


def test_a_run_follows_the_learning_rate_of_its_epoch() -> None:
    data = load(schedules.DATA)
    few = Digits(data.train_images[:64], data.train_labels[:64], data.test_images[:8], data.test_labels[:8])
    made: list[torch.optim.Optimizer] = []

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        made.append(optimizer)
        return schedules.SCHEDULES["Diminish 1"](optimizer)

    rates: list[float] = []  # of the epoch to come
    settings = Settings("sgd", schedules.LR, 0.0, 0.05, 1.0)
    run("sam", 0, few, settings, Plan(3, 32, 0.0), schedule=schedule, advance=lambda: rates.append(made[0].param_groups[0]["lr"]))
    assert rates == pytest.approx([0.1 / 2, 0.1 / 3, 0.1 / 4])


def test_the_drift_is_the_gradient_of_the_regularised_loss(quick: tuple[Path, dict[str, Any]]) -> None:
    for row in quick[1]["drift"]["rows"]:
        assert row["order"] == pytest.approx(1.0, abs=0.02)
        assert row["error_4"] < 1e-4


def test_batches_are_cut_in_every_way() -> None:
    for size, m, count in ((4, 2, 3), (4, 1, 1), (6, 2, 15), (8, 4, 35)):
        found = {tuple(sorted(pieces)) for pieces in drift.partitions(tuple(range(size)), m)}
        assert len(found) == len(list(drift.partitions(tuple(range(size)), m))) == count
        assert all(sorted(sum(pieces, ())) == list(range(size)) for pieces in found)


def test_the_drift_depends_on_the_size_of_the_pieces_alone() -> None:
    problem = drift.Problem()
    for lambd in (0.0, 1.0):
        whole, pieces = (drift.drift(problem, drift.Case("", batch, 2), lambd, 0.1) for batch in (2, 4))
        torch.testing.assert_close(whole, pieces, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("m", [1, 4])
def test_another_regulariser_is_not_what_sam_has(m: int) -> None:
    """What is left does not fall with the radius where the variance is that of other micro-batches."""
    problem, case = drift.Problem(), drift.Case("mini-batch", 2, 2)
    plain = drift.gradient_of(lambda x: problem.losses(x).mean(), problem.start)
    for lambd in (0.0, 1.0):
        wanted, wrong = (drift.gradient_of(drift.regulariser(problem, lambd, k), problem.start) for k in (2, m))
        found = (drift.drift(problem, case, lambd, 1e-4) - plain) / 1e-4
        assert (found - wanted).norm() < 1e-3 * (found - wrong).norm()


# --- the best λ ---


def test_a_problem_of_every_class_is_what_it_says() -> None:
    for kind in CLASSES.values():
        models, test = make(kind, 2)
        assert models.ridge == kind.ridge
        assert test.ridge == 0
        lowest = minima(models)
        points = np.random.default_rng(7).standard_normal((2, 50, models.d))
        assert (models.f(points) > lowest[:, None]).all()
        if kind.loss == "squares":
            for a, b, f in zip(models.a, models.b, lowest, strict=True):
                x = np.linalg.solve(a.T @ a / len(a) + kind.ridge * np.eye(models.d), a.T @ b / len(a))
                assert ((a @ x - b) ** 2).mean() / 2 + kind.ridge / 2 * x @ x == pytest.approx(f, rel=1e-9, abs=1e-12)
        if kind.loss == "squares" and not kind.noise:
            assert lowest == pytest.approx(0, abs=1e-12)


def test_a_grid_has_every_mix_and_its_schedules() -> None:
    grid = Grid.of(2.0)
    assert {run[0] for run in grid.runs} == {SGD, *MIXES}
    for t in (1, 2, 10):
        rho, lambd, gamma = grid.steps().at(t)
        for k, (mix, radius, rate) in enumerate(grid.runs):
            assert (rho[k], gamma[k]) == (radius, rate)
            assert lambd[k] == pytest.approx({"1/t": 1 / t, "1-1/t": 1 - 1 / t, SGD: 0.0}.get(mix, mix))


def test_batches_of_the_streams_are_subsets_that_differ() -> None:
    drawn = list(islice(batches(3, 20), 20))
    for rows, weights in drawn:
        assert all(len(set(row)) == 10 for row in rows.tolist())
        assert (weights == 0.1).all()
    assert len({tuple(row) for rows, _ in drawn for row in rows.tolist()}) == 60


def test_what_is_chosen_is_reported_on_other_seeds() -> None:
    runs = ((SGD, 0.0, 0.1), (0.0, 0.1, 0.1), (0.0, 0.2, 0.1), (1.0, 0.1, 0.1))
    scores = np.array([[3.0, 1.0, 2.0, 5.0], [3.0, 1.0, 2.0, 5.0], [3.0, 9.0, 2.0, 0.0], [3.0, 9.5, 2.0, 0.0]])
    chosen = choose(runs, scores, 2)
    assert (chosen[0.0].rho, chosen[0.0].tuned, chosen[0.0].values.tolist()) == (0.1, 1.0, [9.0, 9.5])
    row = row_of(chosen, "difference")
    assert row["best"] == 0.0  # which the others show to have been a mistake
    assert row["effect"] == [6.25, 0.25]
    assert row["alike"] == [0.0, 1.0]
    better = {SGD: chosen[SGD], 0.0: Chosen(0.1, 0.1, 1.0, np.array([1.0, 1.1])), 1.0: Chosen(0.1, 0.1, 2.0, np.array([2.0, 2.1]))}
    assert row_of(better, "difference")["alike"] == [0.0]


# --- where reweighting wins ---


def test_every_method_is_compared_with_sam(quick: tuple[Path, dict[str, Any]]) -> None:
    rows = quick[1]["msharpness"]["rows"]
    assert [row["method"] for row in rows] == [*(method.title for method in METHODS), IN_TIME]
    for row in rows:
        assert (row["verdict"] is None) == (row["method"] == "SAM")
        assert row["variance"] > 0


# --- what is stored, and the page ---


def stored() -> dict[Path, dict[str, Any]]:
    """The experiments of each device's file: every one is in one of them."""
    return {path: json.loads(path.read_text())["experiments"] for path in (ROOT / "bench" / "results").glob("*/papers.json")}


def entries() -> dict[str, Any]:
    found = [pair for experiments in stored().values() for pair in experiments.items()]
    assert len(found) == len(dict(found))
    return dict(found)


def test_the_page_shows_the_stored_results(tmp_path: Path) -> None:
    assert set(entries()) == set(EXPERIMENTS)
    page = (ROOT / "docs/papers.md").read_text()
    for path, experiments in stored().items():
        result = CliRunner().invoke(report.main, [str(path), "--check"])
        assert result.exit_code == 0, result.output
        for name, entry in experiments.items():
            assert entry["gate"].startswith("passed")
            assert not entry["quick"]
            assert f"images/papers_{name}.png" in page
            assert (ROOT / f"docs/images/papers_{name}.png").exists()
            assert (path.parent / f"papers_{name}.csv").exists()
    (path,) = (path for path, experiments in stored().items() if "stall" in experiments)
    copy = tmp_path / "papers.md"
    copy.write_text(page.replace("| 0.1286 |", "| 0.1287 |"))
    assert CliRunner().invoke(report.main, [str(path), "--docs", str(copy), "--check"]).exit_code == 1
    assert CliRunner().invoke(report.main, [str(path), "--docs", str(copy)]).exit_code == 0
    assert copy.read_text() == page


def test_the_stored_runs_show_what_the_page_says() -> None:
    found = entries()
    for name in ("stall", "unified", "log", "lambda"):
        assert max(deviations(found[name]["settings"])) <= TOLERANCE
    by_way = {row["way"]: row for row in found["stall"]["rows"]}
    assert [f"{by_way['constant'][key]:.3g}" for key in ("least", "largest")] == ["0.129"] * 2
    assert [f"{by_way['diminishing'][key]:.3g}" for key in ("least", "largest")] == ["2.22e-06"] * 2
    for row in found["unified"]["rows"]:
        assert max(row["share_constant"], row["share_decreasing"]) <= 1
    for row in found["drift"]["rows"]:
        assert row["order"] == pytest.approx(1.0, abs=0.02)
    for n in log.SIZES:
        ends = {row["way"]: row["gradient_norm"] for row in found["log"]["rows"] if row["n"] == n}
        assert ends["diminishing"] < 0.1 * ends["slow"]
        assert ends["gradient"] < min(ends[way] for way in log.WAYS if "gradient" not in way)
    rows = found["msharpness"]["rows"]
    assert "ahead" not in [row["verdict"] for row in rows if row["method"] == IN_TIME]
    reweighted = [row for row in rows if row["method"].startswith("RW-SAM")]
    for word, settings in (("ahead", 2), ("behind", 3)):
        assert len({(row["network"], row["batch_size"], row["noise"]) for row in reweighted if row["verdict"] == word}) == settings
    gains = [row["over_sam"] for row in reweighted if row["verdict"] == "ahead"]
    assert [f"{gain:.1f}" for gain in (min(gains), max(gains))] == ["0.6", "2.8"]
    for row in found["lambda"]["rows"]:
        assert set(row["alike"]) <= set(MIXES)
        if row["kind"] == "ratio":
            assert row["effect"][0] > 0.97  # no λ gains more on a linear model
        elif row["problem"].startswith("digits, 40%"):
            assert max(row[f"effect_{lambd}"][0] + 2 * row[f"effect_{lambd}"][1] for lambd in (0.0, 0.5, 1.0, "1/t", "1-1/t")) < 0


def test_a_quick_run_is_not_stored() -> None:
    result = CliRunner().invoke(main, ["--quick", "--store"])
    assert result.exit_code == 2
    assert "--quick" in result.output
