"""The dial: shares of SAM's gain, epochs of equal time, the choice of radii, what a method's steps are, and what is stored and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bench.dial import accuracy, methods, report, text
from bench.dial.__main__ import main
from bench.dial.cost import BAR, bar
from bench.dial.methods import BASE, METHODS, MICRO_BATCHES, SAM, late_start
from bench.dial.results import Results
from bench.dial.stored import Stored
from bench.dial.summary import TRIES, best, equal_time_epochs, gains, next_radius, share
from bench.dial.tasks import TASKS, Problem, Task
from bench.dial.training import Training

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


# --- from scores to shares ---


def test_a_share_is_the_ratio_of_mean_gains_with_the_error_of_pairs() -> None:
    assert gains([3.0, 5.0], [2.0, 7.0], 1) == [1.0, -2.0]
    assert gains([3.0, 5.0], [2.0, 7.0], -1) == [-1.0, 2.0]
    found = share([4.0, 5.0, 9.0], [9.0, 10.0, 11.0])
    assert found is not None
    assert found.mean == pytest.approx(0.6)
    # 4, 5, 9 less 0.6 times 9, 10, 11: -1.4, -1 and 2.4
    assert found.standard_error == pytest.approx(math.sqrt((1.4**2 + 1 + 2.4**2) / 2 / 3) / 10)
    half = share([4.5, 5.0, 5.5], [9.0, 10.0, 11.0])
    assert half is not None
    assert half.standard_error == pytest.approx(0, abs=1e-15)  # seeds differ, and the share does not


@pytest.mark.parametrize("sam", [[1.0, -0.9, 0.5], [-9.0, -10.0, -11.0], [5.0], [1.0, math.nan]])
def test_there_is_no_share_of_what_is_no_gain(sam: list[float]) -> None:
    assert share([1.0] * len(sam), sam) is None


def test_a_gain_is_more_than_two_standard_errors() -> None:
    """Of two values a, b the error is |a - b| / 2: the mean is twice that where b = 3 a."""
    assert share([1.0, 1.0], [1.0, 3.0]) is None
    assert share([1.0, 1.0], [1.0, 2.9]) is not None


@pytest.mark.parametrize(("cost", "epochs"), [(1.0, 26), (2.2, 12), (1.1, 24), (4.4, 6), (100.0, 1)])
def test_epochs_of_equal_time_are_the_inverse_of_the_cost(cost: float, epochs: int) -> None:
    assert equal_time_epochs(12, cost, 2.2) == epochs


@pytest.mark.parametrize(
    ("score", "sign", "tried", "chosen"),
    [
        (lambda rho: -abs(math.log2(rho)), 1, [1, 0.5, 2], 1),
        (lambda rho: abs(math.log2(rho)), -1, [1, 0.5, 2], 1),
        (lambda rho: -abs(math.log2(rho) - 2), 1, [1, 0.5, 2, 4, 8], 4),
        (lambda rho: -abs(math.log2(rho) + 2), 1, [1, 0.5, 2, 0.25, 0.125], 0.25),
        (lambda rho: rho, 1, [1, 0.5, 2, 4, 8, 16, 32, 64], 64),
        (lambda rho: 0.0, 1, [1, 0.5, 2, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6], 2**-6),
        (lambda rho: math.nan if rho > 1 else rho, 1, [1, 0.5, 2], 1),
        (lambda rho: math.nan if rho < 1 else rho, -1, [1, 0.5, 2], 1),
    ],
)
def test_the_grid_of_radii_goes_on_where_its_end_is_best(
    score: Callable[[float], float], sign: int, tried: list[float], chosen: float
) -> None:
    scores: dict[float, float] = {}
    while (rho := next_radius(scores, sign, 1.0)) is not None:
        scores[rho] = score(rho)
    assert list(scores) == tried
    assert len(scores) <= TRIES
    assert best(scores, sign) == chosen


# --- tasks and methods ---


def small_task(base: str = "sgd") -> Task:
    def make(seed: int, samples: int, held_out: bool) -> Problem:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
        inputs = torch.randn(samples, 3)
        return Problem(model, inputs, (inputs[:, 0] > 0).long(), lambda: 50.0)

    return Task("small", "accuracy, %", 1, base, rho=0.1, epochs=10, batch_size=8, samples=36, make=make, decimals=2)


PASSES = {  # forward and backward passes of 40 steps, those of micro-batches apart
    BASE: 40,
    SAM: 80,
    "norm-layers": 80,
    "every-2": 60,
    "every-5": 48,
    "late": 45,
    "s2-sam": 40,
    "momentum-sam": 40,
    "looksam": 48,
    "m-sam": 80 * MICRO_BATCHES,
    "rw-sam": 80,
}


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", METHODS)
def test_forty_steps_take_the_passes_of_their_kind(name: str, base: str, repeats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, right = [], methods.sample_losses

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        return right(*arguments)

    monkeypatch.setattr(methods, "sample_losses", counted)
    training = Training(small_task(base), name, None if name == BASE else 0.1, 0, steps=40, held_out=False, repeats=repeats)
    before = [param.clone() for param in training.problem.model.parameters()]
    for block in range(1, 3 if repeats else 2):
        for _ in range(40):
            training.step()
        assert len(calls) == block * PASSES[name]
    assert not any(torch.equal(*pair) for pair in zip(before, training.problem.model.parameters(), strict=True))


def test_the_late_steps_are_an_eighth_and_one_at_least() -> None:
    assert [late_start(steps) for steps in (40, 96, 9, 2)] == [35, 84, 8, 1]


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_pairs_with_equal_seeds(name: str) -> None:
    """Equal weights and batches; a radius of almost 0 leaves SAM's gradient in the ascent that there is, so that methods part later."""
    base, other = (Training(small_task(), method, None if method == BASE else 1e-3, 3, steps=20, held_out=False) for method in (BASE, name))
    for one, two in zip(base.problem.model.parameters(), other.problem.model.parameters(), strict=True):
        assert torch.equal(one, two)
    for _ in range(9):  # more than two epochs of four batches
        batches = next(base._batches), next(other._batches)
        assert torch.equal(*batches)
        assert len(batches[0]) == 8


def test_parts_of_the_text_share_no_module() -> None:
    source = '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Thrée."""\n'
    assert text.docstrings(source) == "One.\n\nTwo.\n\nThr?e."
    inputs, labels = text.windows("train", 5, 8)
    assert inputs.shape == labels.shape == (5, 8)
    assert inputs.flatten()[1:].tolist() == labels.flatten()[:-1].tolist()
    starts = {tuple(text.windows(part, 4, 64)[0].flatten().tolist()) for part in text.PARTS}
    assert len(starts) == len(text.PARTS)
    with pytest.raises(RuntimeError, match="fewer than"):
        text.windows("train", 10**6, 64)


# --- stages and the file ---


def test_runs_that_are_stored_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def train(task: Task, method: str, rho: float | None, seed: int, *, epochs: int, held_out: bool) -> tuple[float, float]:
        made.append((method, rho, seed, epochs, held_out))
        return (0.0 if rho is None else -abs(math.log2(rho / 0.4))) + seed / 100, 1.0

    monkeypatch.setattr(accuracy, "train", train)
    runs: list[dict[str, Any]] = []
    lines: list[str] = []
    costs = {BASE: 1.0, SAM: 2.0, "late": 1.125}
    _, sam, _ = rows = accuracy.measure(accuracy.Runner("small", small_task(), runs, lines.append, "abc"), list(costs), costs, seeds=3)
    assert len(made) == len(set(made)) == len(runs) == len(lines)
    assert {seed for *_, seed, _, held_out in made if held_out} == set(accuracy.TUNING_SEEDS)
    assert {seed for *_, seed, _, held_out in made if not held_out} == {0, 1, 2}
    assert [row["rho"] for row in rows] == [None, 0.4, 0.4]
    assert [rho for rho, _ in sam["tried"]] == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert [row["epochs"]["equal_time"] for row in rows] == [20, 10, 18]
    assert sam["scores"]["equal_time"] == sam["scores"]["equal_epochs"] == pytest.approx([0.0, 0.01, 0.02])

    kept, made[:] = runs[:-2], []
    again = accuracy.measure(accuracy.Runner("small", small_task(), kept, lines.append, "abc"), list(costs), costs, seeds=3)
    assert again == rows
    assert len(made) == 2
    assert kept == runs


HERE = {"device": "here"}


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    path, task = tmp_path / "dial.json", small_task()
    stored = Stored(path, HERE, {"small": task}, quick=False)
    stored.replace("cost", [{"task": "small", "method": name, "of_base": [1.0, 1.0, 1.0]} for name in (BASE, SAM)])
    stored.replace("cost", [{"task": "small", "method": SAM, "of_base": [1.9, 2.0, 2.1]}])
    assert Stored(path, HERE, {"small": task}, quick=False).costs("small") == {BASE: 1.0, SAM: 2.0}
    with pytest.raises(click.ClickException, match="base 'sgd', now 'adamw'"):
        Stored(path, HERE, {"small": small_task("adamw")}, quick=False)
    with pytest.raises(click.ClickException, match="was measured on here, this is there"):
        Stored(path, {"device": "there"}, {"small": task}, quick=False)
    with pytest.raises(click.ClickException, match="do not mix"):
        Stored(path, HERE, {}, quick=True)


def test_a_quick_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    path, image = tmp_path / "dial.json", tmp_path / "dial.png"
    options = ["--quick", "--no-gate", "--tasks", "text", "--methods", "every-5", "--out", str(path), "--image", str(image)]
    refused = CliRunner().invoke(main, [*options, "--stages", "accuracy"])
    assert refused.exit_code == 1
    assert "run --stages cost first" in refused.output
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    first = json.loads(path.read_text())
    assert image.read_bytes().startswith(b"\x89PNG")
    assert {run["method"] for run in first["runs"]} == {BASE, SAM, "every-5"}
    assert all(math.isfinite(run["score"]) for run in first["runs"])
    assert f"at most {BAR}" not in done.output  # nothing of the late variant was measured

    assert CliRunner().invoke(main, [*options, "--stages", "accuracy"]).exit_code == 0
    assert json.loads(path.read_text())["runs"] == first["runs"]
    first["cost"] = [row | {"of_base": [9.0, 9.0, 9.0]} if row["method"] == SAM else row for row in first["cost"]]
    with pytest.raises(click.ClickException, match="run --stages accuracy"):
        Results(first)


def test_the_bar_is_of_the_last_eighth() -> None:
    rows = [{"task": "small", "method": "late", "of_base": [1.0, cost, 2.0]} for cost in (BAR, BAR + 0.001)]
    assert [line.rpartition(": ")[2] for line in bar(rows)] == ["pass", "FAIL"]
    assert bar([{"task": "small", "method": SAM, "of_base": [2.0, 2.0, 2.0]}]) == []


def test_a_quick_run_is_not_stored() -> None:
    result = CliRunner().invoke(main, ["--quick", "--store"])
    assert result.exit_code == 2
    assert "--quick" in result.output


# --- what is stored, and the page ---


def stored_file() -> Path:
    (path,) = (ROOT / "bench" / "results").glob("*/dial.json")
    return path


def test_the_stored_runs_show_what_the_page_says() -> None:
    found = Results(json.loads(stored_file().read_text()))

    def kept(method: str, protocol: str = "equal_epochs") -> list[float]:
        shares = [found.share(name, method, protocol) for name in ("noisy-labels", "text")]
        return [each.mean for each in shares if each is not None]

    assert min(kept("every-2")) > 0.95
    for method in ("looksam", "every-5"):
        assert min(kept(method)) < 0.55
        assert max(kept(method)) > 0.9
    assert min(kept("s2-sam")) > 0.6
    assert kept("momentum-sam")[0] > 0.6 > kept("momentum-sam")[1]
    assert max(kept("late")) < 0.1
    assert kept("m-sam")[1] > 1 > max(kept("m-sam", "equal_time"))
    assert all(kept(method, "equal_time")[0] <= 1 for method in METHODS if method != BASE)
    assert all(kept(method, "equal_time")[1] > 0.99 for method in ("looksam", "every-2", "every-5"))
    assert [found.row("noisy-labels", method)["rho"] for method in ("looksam", "norm-layers", SAM)] == [0.1, 6.4, 0.4]
    assert found.share("clean-labels", SAM, "equal_epochs") is None
    loss = found.gain("clean-labels", SAM, "equal_time")
    assert loss.standard_error is not None
    assert loss.mean < -2 * loss.standard_error


@pytest.mark.stored
def test_the_page_shows_the_stored_result(tmp_path: Path) -> None:
    stored = stored_file()
    result = json.loads(stored.read_text())
    assert result["stages"]["accuracy"]["gate"].startswith("passed")
    assert not result["quick"]
    assert result["stages"].keys() == {"cost", "accuracy"}
    found = Results(result)
    assert (found.tasks, found.methods) == (list(TASKS), list(METHODS))
    for stage in result["stages"].values():
        assert not stage["dirty"]
    for name, task in TASKS.items():
        assert result["tasks"][name] == task.settings() | {
            key: result["tasks"][name][key] for key in result["tasks"][name] if key == "text"
        }
        for method in METHODS:
            row = found.row(name, method)
            runs = {
                (run["epochs"], run["seed"]): run["score"]
                for run in result["runs"]
                if (run["task"], run["method"], run["rho"], run["held_out"]) == (name, method, row["rho"], False)
            }
            for protocol, epochs in row["epochs"].items():
                assert row["scores"][protocol] == [runs[epochs, seed] for seed in range(5)]
    page, copy = ROOT / "docs" / "dial.md", tmp_path / "dial.md"
    assert CliRunner().invoke(report.main, [str(stored), "--check"]).exit_code == 0
    assert (ROOT / "docs" / "images" / "dial.png").exists()
    copy.write_text(page.read_text().replace("| 100 ± 0 |", "| 99 ± 0 |"))
    assert CliRunner().invoke(report.main, [str(stored), "--docs", str(copy), "--check"]).exit_code == 1
    image = tmp_path / "dial.png"
    assert CliRunner().invoke(report.main, [str(stored), "--docs", str(copy), "--image", str(image)]).exit_code == 0
    assert copy.read_text() == page.read_text()
    assert image.read_bytes().startswith(b"\x89PNG")
