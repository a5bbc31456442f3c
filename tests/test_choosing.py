"""The numbers of docs/choosing.md are those of the pages that it links to, which tests of their own hold to stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHOOSING, DIAL = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("choosing.md", "dial.md"))
VARIANTS = {  # by what the rows of both pages are called
    "`SAM`": ("SAM",),
    "`rho=schedules.Interval(rho, 2)`": ("SAM, every 2nd step",),
    "`LookSAM`, or `schedules.Interval(rho, 5)`: try both": ("LookSAM, k = 5", "SAM, every 5th step"),
    "`S2SAM`, `MomentumSAM`": ("S²-SAM", "Momentum-SAM"),
    "m-SAM: [micro-batches](guides/m_sam.md)": ("m-SAM, 4 micro-batches",),
}


def cells_of(page: str, column: int, text: str) -> list[str]:
    """The cells of the first row of ``page`` that has ``text`` in a column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return next(row for row in rows if len(row) > column and row[column] == text)


@pytest.mark.parametrize("variant", VARIANTS)
def test_costs_and_shares_are_those_of_the_dial(variant: str) -> None:
    row = cells_of(CHOOSING, 1, variant)
    found = [cells_of(DIAL, 0, name) for name in VARIANTS[variant]]
    ends = [float(end) for each in found for end in each[1].split(" – ")]
    shown = [float(number) for number in re.findall(r"\d\.\d", row[2])]
    assert [shown[0], shown[-1]] == [float(f"{end:.1f}") for end in (min(ends), max(ends))]
    shares = [each[column].split(" ± ")[0] for each in found for column in (2, 3)]
    assert re.findall(r"(\d+) %", row[3]) in (shares, shares[:1])


def test_radii_are_those_that_were_chosen() -> None:
    chosen = re.findall(r"ρ = ([\d.]+)", "|".join(cells_of(DIAL[DIAL.index("**Radii and epochs.**") :], 0, "SAM")))
    labels, text, clean = chosen
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in CHOOSING.splitlines() if line.startswith("|")]
    by_source = {(row[0], row[2]): row[3] for row in rows if len(row) == 5}
    assert by_source["the same", "512 MNIST images, 40 % wrong labels; clean labels"] == f"{labels}; {clean}"
    assert by_source["transformer, one block", "8 KiB of text"] == text
    (path,) = (path for path in (ROOT / "bench" / "results").glob("*/papers.json") if "msharpness" in path.read_text())
    found = {
        (row["network"], row["batch_size"], row["noise"]): row["rho"]
        for row in json.loads(path.read_text())["experiments"]["msharpness"]["rows"]
        if row["method"] == "SAM"
    }
    large = [found["GroupNorm", 256, noise] for noise in (0.0, 0.4, 0.6, 0.8)]
    assert by_source["CNN with GroupNorm, batch 256", "1,437 digits, 0, 40, 60, 80 % wrong labels"] == ", ".join(
        f"{rho:g}" for rho in large
    )
    assert by_source["the same, batch 64", "40 % wrong labels"] == f"{found['GroupNorm', 64, 0.4]:g}"


def test_the_gain_with_wrong_labels_is_the_dials() -> None:
    epochs, error, time, error_in_time = re.findall(
        r"\*\*40 % wrong labels\*\*.*?gain over the base: ([\d.]+) ± ([\d.]+) at equal epochs, ([\d.]+) ± ([\d.]+)", DIAL
    )[0]
    assert f"{round(float(epochs))} ± {round(float(error))} points over SGD" in CHOOSING
    assert f"{round(float(time))} ± {round(float(error_in_time))} at equal time" in CHOOSING
