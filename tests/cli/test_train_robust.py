"""``train`` where something is in its way: Ctrl-C, a run that diverges, a folder that cannot be written, no terminal."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from scipy.stats import norm

from sam_kernels.cli import main, results
from sam_kernels.cli.output import Ticker
from sam_kernels.cli.train import comparison, plot
from sam_kernels.cli.train.plot import save_curves, spans_a_decade
from sam_kernels.cli.train.report import Estimate
from sam_kernels.cli.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def invoke(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", "--data", "digits", "--epochs", "1", "--out", str(out), *arguments])


def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C comes in the run of this number."""
    right, started = comparison.run, iter(range(100))

    def run(*args: Any, **kwargs: Any) -> Run:
        if next(started) == number:
            raise KeyboardInterrupt
        return right(*args, **kwargs)

    monkeypatch.setattr(comparison, "run", run)


def test_ctrl_c_keeps_the_runs_that_have_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupted_at(monkeypatch, 3)
    result = invoke(tmp_path, "--optimizers", "sgd,sam", "--seeds", "2", "--json")
    assert result.exit_code == 130
    assert "interrupted: 3 of 4 runs have finished" in result.stderr
    assert "sam, 1 of 2 seeds" in result.stderr
    report = json.loads(result.stdout)
    assert report["interrupted"] is True
    assert [(run["optimizer"], run["seed"]) for run in report["runs"]] == [("sgd", 0), ("sgd", 1), ("sam", 0)]
    assert json.loads((tmp_path / "train.json").read_text()) == report
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("where", ["load", "run"])
def test_ctrl_c_before_a_run_has_finished(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_kernels.cli.train.data.load", interrupt) if where == "load" else interrupted_at(monkeypatch, 0)
    (tmp_path / "train.json").write_text("of an earlier command")
    result = invoke(tmp_path)
    assert result.exit_code == 130
    assert "interrupted: 0 of 4 runs have finished" in result.stdout
    assert (tmp_path / "train.json").read_text() == "of an earlier command"


def test_a_run_that_diverges_is_named_with_what_to_change(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--optimizers", "sgd,sam", "--lr", "1e30", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert [run["diverged"] for run in report["runs"]] == [True, True]
    lines = [line for line in result.stderr.splitlines() if "seed 0 diverged: " in line]
    assert [line.rpartition(". ")[2] for line in lines] == ["Take a smaller --lr.", "Take a smaller --lr or --rho."]
    assert ", diverged" in result.stderr


@pytest.mark.parametrize(
    ("losses", "accuracy", "diverged"),
    [([1.0, 9.0], 0.1, True), ([9.0, 1.0], 0.1, False), ([1.0, 9.0], 0.2, False), ([1.0, math.nan], 0.9, True)],
)
def test_diverged_is_not_finite_or_at_chance_with_a_larger_loss(losses: list[float], accuracy: float, diverged: bool) -> None:
    from sam_kernels.cli.train.run import _has_diverged

    run = Run("sgd", 0, train_loss=losses, test_accuracy=[accuracy], first_loss=2.3, scored_images=360)
    assert _has_diverged(run, chance=0.1) is diverged


def test_one_seed_has_wilsons_interval_and_several_a_standard_error(tmp_path: Path) -> None:
    """p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2), over 1 + z^2 / n: Wilson's formula, written out."""
    share, count, z = 0.9, 360, norm.ppf(0.975)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    ends = [(share + z**2 / (2 * count) + sign * half) / (1 + z**2 / count) for sign in (-1, 1)]
    assert Estimate.of_proportions([share], count).interval == pytest.approx(ends, rel=1e-12)
    assert Estimate.of_proportions([share], count).text(1, 100) == "90.0 (86.5 to 92.7)"
    assert Estimate(-0.0002, 0.004).text(1, 100) == "0.0 ± 0.4"  # no negative zero
    assert Estimate.of_proportions([0.9, 0.8], count).interval is None
    result = invoke(tmp_path, "--optimizers", "sgd")
    assert " to " in result.output
    assert "They include nothing of other seeds" in " ".join(result.output.split())


@pytest.mark.parametrize("kind", ["file", "below a file", "refused", "folder in the way", "full"])
def test_an_unusable_folder_is_a_usage_error_before_the_training(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sam_kernels.cli.train.data.load", lambda _: pytest.fail("the training had begun"))
    out = tmp_path / "out"
    if kind in ("file", "below a file"):
        out.write_text("")
    if kind == "below a file":
        out = out / "deeper"
    if kind == "refused":
        out = Path("/proc/sam_kernels")  # nobody makes a folder there
    if kind == "folder in the way":
        (out / "train.json").mkdir(parents=True)
    if kind == "full":
        monkeypatch.setattr(results, "tempfile", _FullDisk)
    result = invoke(out)
    assert result.exit_code == 2, result.output
    assert "Invalid value for '--out'" in result.stderr
    assert "Traceback" not in result.stderr


class _FullDisk:
    @staticmethod
    def TemporaryFile(dir: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_the_end_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sam_kernels.cli.train.plot.save_curves", full)
    result = invoke(tmp_path, "--optimizers", "sgd", "--json")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: {tmp_path / 'train.png'} was not written: no space left on device"
    assert "ms/step" in result.stderr
    assert json.loads((tmp_path / "train.json").read_text()) == json.loads(result.stdout)


def test_without_a_terminal_there_are_lines_of_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Ticker, "every", 0.0)
    result = invoke(tmp_path, "--optimizers", "sgd", "--epochs", "3")
    progress = [line for line in result.stdout.splitlines() if line.startswith("sgd, seed 0")]
    assert progress[:2] == [f"sgd, seed 0, run 1 of 1: epoch {epoch} of 3" for epoch in (1, 2)]
    assert progress[2].startswith("sgd, seed 0: accuracy ")


def test_losses_over_more_than_a_decade_have_a_logarithmic_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert spans_a_decade([2.0, 0.1, math.nan, 0.0])
    assert not spans_a_decade([2.0, 0.3, math.inf, 0.0])
    assert not spans_a_decade([math.nan])
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    for last in (0.5, 0.001):
        names = [f"optimizer-{i}" for i in range(13)]
        save_curves(tmp_path, [Run(name, 0, train_loss=[1.0, last], test_accuracy=[0.5, 0.9]) for name in names], title="")
    assert [figure.axes[1].get_yscale() for figure in kept] == ["linear", "log"]
    assert [figure.axes[0].get_yscale() for figure in kept] == ["linear", "linear"]
    lines = kept[0].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 13 > len(plot._STYLES)
