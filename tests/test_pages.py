"""The examples of the pages run as they stand, the blocks of a page one after another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sam_kernels

ROOT = Path(__file__).parents[1]


def _blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if _blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_examples_run_as_pasted(page: Path) -> None:
    """In a namespace of their own: a reader has no other names. Blocks marked ``py`` need a framework: tests/frameworks."""
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "page"}
    for block in _blocks(page):
        exec(block, space)


def test_the_change_that_the_readme_asks_for_trains() -> None:
    """The lines of the diff with a space or a plus, after three names that a training loop has."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    program = "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 3)
    batch = torch.randn(64, 20), torch.randint(0, 3, (64,))
    criterion = torch.nn.functional.cross_entropy
    before = criterion(model(batch[0]), batch[1]).item()
    space: dict[str, Any] = {"torch": torch, "sam_kernels": sam_kernels, "model": model, "criterion": criterion, "loader": [batch] * 20}
    exec(program, space)
    assert isinstance(space["optimizer"], sam_kernels.SAM)
    assert criterion(model(batch[0]), batch[1]).item() < before


def test_the_page_of_rw_sam_shows_the_stored_runs() -> None:
    page = (ROOT / "docs" / "rw_sam.md").read_text()
    summary = json.loads((ROOT / "docs" / "runs" / "label_noise.json").read_text())["summary"]
    assert {each["optimizer"] for each in summary} == {"sgd", "sam", "msam:8", "msam:16", "msam:64", "rwsam"}
    for each in summary:
        shown = [each[key] for key in ("test_accuracy", "best_test_accuracy")]
        cells = " | ".join(f"{100 * one['mean']:.2f} ± {100 * one['standard_error']:.2f}" for one in shown)
        assert f"| {cells} | {each['train_loss']['mean']:.3f} |" in page


def test_the_page_of_the_family_shows_the_stored_runs() -> None:
    page = (ROOT / "docs" / "family.md").read_text()
    stored = json.loads((ROOT / "docs" / "runs" / "family.json").read_text())
    assert (stored["config"]["epochs"], stored["config"]["seeds"]) == (5, 5)
    assert f"--optimizers {','.join(each['optimizer'] for each in stored['summary'])} --epochs 5 --seeds 5" in page
    for each in stored["summary"]:
        accuracy = f"{100 * each['test_accuracy']['mean']:.2f} ± {100 * each['test_accuracy']['standard_error']:.2f}"
        row = rf"\| {re.escape(each['optimizer'])} \| [^|]*\| {accuracy} \| {each['train_loss']['mean']:.3f} \|\n"
        assert re.search(row, page), each["optimizer"]


@pytest.mark.parametrize("name", ["held_out_noise", "held_out_clean"])
def test_so_do_the_runs_that_beta_was_chosen_by(name: str) -> None:
    page = " ".join((ROOT / "docs" / "rw_sam.md").read_text().split())
    summary = json.loads((ROOT / "docs" / "runs" / f"{name}.json").read_text())["summary"]
    sam, *others = (f"{100 * each['test_accuracy']['mean']:.1f}" for each in summary)
    assert f"{sam} % for SAM and {others[0]}, {others[1]} and {others[2]} %" in page


def test_the_beta_that_is_advised_is_the_one_that_held_out_images_chose() -> None:
    (path,) = (ROOT / "bench" / "results").glob("*/papers.json")
    rows = json.loads(path.read_text())["experiments"]["msharpness"]["rows"]
    chosen = [row["beta"] for row in rows if row["method"] == "RW-SAM, β > 0, finite differences"]
    assert (len(chosen), chosen.count(0.5), chosen.count(1.5)) == (6, 4, 2)
    assert "chose 0.5 in four of six settings and 1.5 in two" in (ROOT / "docs" / "rw_sam.md").read_text()
    for name in ("held_out_noise", "held_out_clean"):
        sam, *others = json.loads((ROOT / "docs" / "runs" / f"{name}.json").read_text())["summary"]
        assert all(each["test_accuracy"]["mean"] < sam["test_accuracy"]["mean"] for each in others), "without the scale"


def test_the_page_of_the_family_compares_with_the_fastest_loops() -> None:
    page = " ".join((ROOT / "docs" / "family.md").read_text().split())
    (path,) = (ROOT / "bench" / "results").glob("*/family.json")
    rows = json.loads(path.read_text())["rows"]

    def ratios(workload: str, method: str, *, is_lean: bool, base: str = "sgd") -> list[float]:
        """How many times as long the others' loops take, fastest first: the lean ones, or those that are published."""
        case = (workload, method, base)
        others = [row for row in rows if not row["backend"].startswith("sam_kernels/")]
        found = [row for row in others if (row["workload"], row["method"], row["base"]) == case]
        return sorted(row["over_reference_50"] for row in found if ("foreach_" in row["backend"]) == is_lean)

    lean, published = ([ratios("gpt2_124m", name, is_lean=each)[0] for name in ("vasso", "fsam")] for each in (True, False))
    assert max(lean) < min(published), "the lean loop is the fastest"
    assert f"{lean[0]:.2f} times as long as VaSSO and {lean[1]:.2f} times as long as F-SAM" in page
    assert f"{published[0]:.2f} (VaSSO) and {published[1]:.2f} times (F-SAM) as long" in page
    cases = [(name, base) for name in ("vasso", "fsam") for base in ("sgd", "adamw")]
    fastest = [round(ratios("many_tiny", name, is_lean=True, base=base)[0]) for name, base in cases]
    others = [ratio for name, base in cases for ratio in ratios("many_tiny", name, is_lean=False, base=base)]
    assert (
        f"takes {min(fastest)} to {max(fastest)} times as long, and the published ones {min(others):.0f} to {max(others):.0f} times" in page
    )


def test_the_page_of_master_weights_shows_what_rounding_leaves_of_a_perturbation() -> None:
    page = (ROOT / "docs" / "master_weights.md").read_text()
    stored = sorted((ROOT / "bench" / "results").glob("*/masters.json"))
    assert stored
    for path in stored:
        for row in json.loads(path.read_text())["rounding"]["rows"]:
            cells = f"{row['cosine']:.3f} | {row['projection']:.3f} | {100 * row['moved']:.0f} %"
            assert f"| {row['rounding']} | {cells} |\n" in page, path
