"""``train --sharpness``: second derivatives of the training loss at the end of each run, in the table and in the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from sam_kernels import monitors
from sam_kernels.cli import main
from sam_kernels.cli.train.data import load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import run
from sam_kernels.cli.train.sharpness import sharpness_of

NAMES = ("top_eigenvalue", "hessian_trace")


def invoke(out: Path, *arguments: str) -> Result:
    plain = ["train", "--data", "digits", "--epochs", "1", "--threads", "1", "--out", str(out)]
    return CliRunner().invoke(main, [*plain, "--optimizers", "sgd,sam", "--label-noise", "0.25", *arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("measured")
    return out, invoke(out, "--sharpness", "--seeds", "2")


def test_table_and_json(measured: tuple[Path, Result]) -> None:
    out, result = measured
    assert result.exit_code == 0, result.output
    assert "top eigenvalue" in result.output
    assert "Hessian trace" in result.output
    report = json.loads((out / "train.json").read_text())
    assert report["config"]["sharpness"] is True
    for row in report["summary"]:
        of_row = [each for each in report["runs"] if each["optimizer"] == row["optimizer"]]
        for name in NAMES:
            first, second = (each[name] for each in of_row)
            assert row[name]["mean"] == pytest.approx((first + second) / 2)
            assert row[name]["standard_error"] == pytest.approx(abs(first - second) / 2)
            assert f"{row[name]['mean']:.3f} ± {row[name]['standard_error']:.3f}" in result.output
        assert all(0 < each["top_eigenvalue"] < each["hessian_trace"] for each in of_row)


def test_it_is_of_the_training_loss_in_evaluation_mode_on_the_labels_trained_on(measured: tuple[Path, Result]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        digits, found = load("digits"), {}

        def finished(model: nn.Module, labels: Tensor) -> None:
            model.eval()
            loss = lambda: nn.functional.cross_entropy(model(digits.train_images[:1000]), labels[:1000])  # noqa: E731
            found["top_eigenvalue"] = monitors.hessian_top_eigenvalue(loss, model.parameters(), seed=1).item()
            found["hessian_trace"] = monitors.hessian_trace(loss, model.parameters()).item()

        run("sgd", 0, digits, Settings("sgd", 0.05, 5e-4, None, 0.5), Plan(1, 64, 0.25), finished=finished)
    finally:
        torch.set_num_threads(threads)
    report = json.loads((measured[0] / "train.json").read_text())["runs"][0]
    assert (report["optimizer"], report["seed"]) == ("sgd", 0)
    assert report["top_eigenvalue"] == pytest.approx(found["top_eigenvalue"], rel=1e-3)  # converged: another first vector
    assert report["hessian_trace"] == pytest.approx(found["hessian_trace"], rel=1e-4)


def test_it_changes_nothing_else(measured: tuple[Path, Result], tmp_path: Path) -> None:
    result = invoke(tmp_path, "--seeds", "2")
    assert "top eigenvalue" not in result.output
    before, after = (json.loads((out / "train.json").read_text()) for out in (tmp_path, measured[0]))
    assert before["config"]["sharpness"] is False
    for ours, theirs in zip(before["runs"], after["runs"], strict=True):
        assert [ours[name] for name in NAMES] == [None, None]
        assert [ours[name] for name in ("train_loss", "test_accuracy")] == [theirs[name] for name in ("train_loss", "test_accuracy")]
    assert [row[name] for row in before["summary"] for name in NAMES] == [None] * 4


def test_at_most_a_thousand_images_are_looked_at() -> None:
    digits, model = load("digits"), small_cnn(8)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append((len(inputs[0]), module.training)))
    found = sharpness_of(model, digits.train_images, digits.train_labels)
    assert seen == [(1000, False)] * 2
    assert model.training
    assert sharpness_of(model, digits.train_images[:1000], digits.train_labels[:1000]) == found


def test_a_diverged_run_is_reported_as_valid_json(tmp_path: Path) -> None:
    assert invoke(tmp_path, "--sharpness", "--lr", "1e30").exit_code == 0
    report = json.loads((tmp_path / "train.json").read_text(), parse_constant=pytest.fail)
    assert report["runs"][0]["top_eigenvalue"] is None
    assert report["summary"][0]["hessian_trace"]["mean"] is None
