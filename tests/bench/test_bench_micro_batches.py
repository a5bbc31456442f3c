"""Steps of m-SAM: equal work of every provider, bytes, rows and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from bench.__main__ import main
from bench.byte_model import step_bytes
from bench.markdown import docs_section, short_section
from bench.providers import BASES, PROVIDERS, REFERENCE, RHO
from bench.tables import Case
from bench.workloads import make_grads, make_params

SHAPES = ((5, 3), (7,), (4, 2, 3), (1,))
COUNT = 3
STEPS = ("--parts", "steps", "--workloads", "many_tiny", "--rounds", "1", "--no-gate", "--allocator", "default")
TAKERS = [name for name, provider in PROVIDERS.items() if provider.takes_micro_batches]


def _distance(params: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max((p.detach().double() - q).abs().max().item() / q.abs().max().item() for p, q in zip(params, expected, strict=True))


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("gradients_stay", [True, False])
def test_step_is_the_formulas(name: str, gradients_stay: bool) -> None:
    """Each micro-batch is perturbed by its own gradient from the same weights, and the step is along the mean of what is found there."""
    params = make_params(make_grads(SHAPES, torch.float32, seed=100))
    stepper: Any = PROVIDERS[name].make(params, BASES["sgd"])
    expected = [p.detach().double() for p in params]
    momentum = [torch.zeros_like(p) for p in expected]
    for step in range(3):
        grads = [make_grads(SHAPES, torch.float32, seed=10 * step + i) for i in range(2 * COUNT)]
        calls: list[int] = []

        def closure(grads: Any = grads, calls: Any = calls) -> None:
            call = len(calls)
            calls.append(1)
            before = grads[call - 1] if call % 2 else None
            there = expected
            if before is not None:
                norm = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in before]))
                there = [p + RHO / norm * g.double() for p, g in zip(expected, before, strict=True)]
            assert _distance(params, there) <= 2e-6, f"call {call}"
            for p, g in zip(params, grads[call], strict=True):
                p.grad = g if gradients_stay else g.clone()

        kept = [[g.clone() for g in some] for some in grads]
        stepper.micro_batch_step([closure] * COUNT)
        assert len(calls) == 2 * COUNT
        assert all(torch.equal(g, copy) for some, copies in zip(grads, kept, strict=True) for g, copy in zip(some, copies, strict=True))
        for i, p in enumerate(expected):
            momentum[i] = 0.9 * momentum[i] + sum(some[i].double() for some in grads[1::2]) / COUNT
            expected[i] = p - 0.1 * momentum[i]
        assert _distance(params, expected) <= 4e-6


def test_the_reference_and_two_peers_take_them() -> None:
    assert REFERENCE in TAKERS
    assert {name.partition("/")[0] for name in TAKERS} == {"sam_kernels", "davda54", "torch._foreach_"}


def test_bytes_of_a_step() -> None:
    """Norm 1 each; perturb 4 once, then 3; copy 2 once, then 3 to the mean; restore 2 but for the last; SGD 5, AdamW 7."""
    assert step_bytes("sgd", 1, 1, 2) == 2 + (4 + 2) + (3 + 3 + 2) + 5
    assert step_bytes("sgd", 1, 4, 8) == 4 * (9 * 8 + 3)
    assert step_bytes("adamw", 1, 2, 8) == 2 * (9 * 8 + 5)
    assert step_bytes("sgd", 1, 4, 1) == step_bytes("sgd", 1, 4)


def test_rows_and_tables(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    run = CliRunner().invoke(
        main, [*STEPS, "--json", str(target), "--micro-batches", "3", "--providers", "davda54/foreach,unifiedsam/foreach"]
    )
    assert run.exit_code == 0, run.output
    assert "m-SAM of 3 micro-batches" in run.output
    result = json.loads(target.read_text())
    rows = [row for row in result["rows"] if row["micro_batches"] == 3]
    assert {(row["kind"], row["dtype"], row["base"]) for row in rows} == {("step", "fp32", "sgd")}
    assert [row["backend"] for row in rows] == [REFERENCE, "davda54/foreach"] or [row["backend"] for row in rows][::-1] == [
        REFERENCE,
        "davda54/foreach",
    ]
    assert rows[0]["bytes"] == step_bytes("sgd", 3000, 4, 3)
    case = Case("many_tiny", "fp32", "sgd", 3)
    assert f"### Whole step: {case.title}" in docs_section([result], "image.png")
    ordinary, of_micro_batches = [line for line in short_section([result], "image.png").splitlines() if line.startswith("|  |")]
    assert case.title in of_micro_batches
    assert "m-SAM" not in ordinary


def test_none_is_measured_where_none_is_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    run = CliRunner().invoke(main, [*STEPS, "--bases", "sgd", "--micro-batches", "0", "--providers", REFERENCE, "--json", str(target)])
    assert run.exit_code == 0, run.output
    assert {row["micro_batches"] for row in json.loads(target.read_text())["rows"]} == {1}
