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


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/guides/distributed.md",
        "docs/guides/loops.md",
        "docs/family.md",
        "docs/master_weights.md",
        "docs/migrating.md",
        "docs/monitors.md",
        "docs/per_sample.md",
        "docs/rw_sam.md",
        "docs/schedules.md",
    ],
)
def test_the_examples_run(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    space: dict[str, Any] = {"torch": torch, "sam_kernels": sam_kernels}
    for block in blocks:
        exec(block, space)


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


def test_the_page_of_master_weights_shows_what_rounding_leaves_of_a_perturbation() -> None:
    page = (ROOT / "docs" / "master_weights.md").read_text()
    stored = sorted((ROOT / "bench" / "results").glob("*/masters.json"))
    assert stored
    for path in stored:
        for row in json.loads(path.read_text())["rounding"]["rows"]:
            cells = f"{row['cosine']:.3f} | {row['projection']:.3f} | {100 * row['moved']:.0f} %"
            assert f"| {row['rounding']} | {cells} |\n" in page, path
