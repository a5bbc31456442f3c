"""``validate --fuzz``: random calls pass on right backends, find planted errors, and are repeated by the command that is printed."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sam_kernels._dispatch import BACKENDS, reason_missing
from sam_kernels.backends import foreach
from sam_kernels.cli import main
from sam_kernels.cli.fuzzing import MOST_FAILURES
from sam_kernels.operations import Operands, Restore
from sam_kernels.validation.cases import ROLES, Row
from sam_kernels.validation.check import check_call
from sam_kernels.validation.fuzz import fuzz_one
from sam_kernels.validation.lists import Lists
from sam_kernels.validation.options import OPERATIONS, OPTIONS
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.random_calls import describe, random_call

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = range(400)


def bits(call: Problem) -> list[Any]:
    tensors = (t for given in call.lists.values() for t in given if t is not None)
    return [call.op, describe(call), [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in tensors if t.numel()]]


def test_random_calls_pass_on_every_backend() -> None:
    backends = [name for name in BACKENDS if reason_missing(name) is None]
    checks = 0
    for seed in CALLS:
        findings, checked = fuzz_one(seed, backends, OPERATIONS)
        assert findings == []
        checks += checked
    assert checks >= len(CALLS)


def test_a_seed_is_a_call_whatever_was_drawn_before() -> None:
    there = [bits(random_call(seed, OPERATIONS)) for seed in range(12)]
    torch.manual_seed(5)
    assert [bits(random_call(seed, OPERATIONS)) for seed in reversed(range(12))] == there[::-1]
    assert len({json.dumps(each) for each in there}) == len(there)


def test_random_calls_have_everything_that_matters() -> None:
    """Operations, dtypes, empty lists and tensors, layouts, and numbers that are not finite."""
    calls = [random_call(seed, OPERATIONS) for seed in CALLS]
    assert {call.op for call in calls} == set(OPERATIONS)
    tensors = [t for call in calls for given in call.lists.values() for t in given if t is not None]
    assert {t.dtype for t in tensors} >= {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    assert any(call.op in OPTIONS and not next(iter(call.lists.values())) for call in calls)
    assert any(t.numel() == 0 for t in tensors)
    assert any(not t.is_contiguous() for t in tensors)
    assert any(t.data_ptr() % 16 for t in tensors)
    assert any(0 in t.stride() for t in tensors if t.numel())
    for call_has in (torch.isnan, torch.isinf):
        assert any(bool(call_has(t).any()) for call in calls for t in call.lists.get("grads", ()) if t is not None)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last element of the last of several tensors is not restored."""
    right = foreach.BACKEND.operations[Restore]

    def wrong(op: Restore, lists: Operands) -> None:
        right(op, lists)
        last = lists["params"][-1]
        if len(lists["params"]) > 1 and last.numel():
            last[(-1,) * last.dim()] = 7.0

    monkeypatch.setitem(foreach.BACKEND.operations, Restore, wrong)


@pytest.mark.usefixtures("planted")
def test_a_planted_error_is_found_and_repeated_by_the_printed_command() -> None:
    arguments = ["validate", "--fuzz", "60", "--seed", "3", "--op", "restore_", "--backend", "foreach"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert len({finding["seed"] for finding in report["findings"]}) == MOST_FAILURES
    assert f"stopped after {MOST_FAILURES} failed calls" in result.stderr
    failure, repeat = [line for line in result.stderr.splitlines() if line.startswith(("FAIL", "repeat"))][-2:]
    again = CliRunner().invoke(main, shlex.split(repeat)[shlex.split(repeat).index("validate") :])
    assert again.exit_code == 1
    assert failure in again.stdout.splitlines()
    assert "restore_()" in again.stdout
    assert "params: " in again.stdout


def test_the_same_seeds_give_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [CliRunner().invoke(main, ["validate", "--fuzz", "20", "--seed", str(seed)]).output for seed in (7, 7)]
    assert outputs[0] == outputs[1]
    assert "20 random calls" in outputs[0]


def test_a_short_average_of_an_infinite_gradient_is_infinite() -> None:
    """torch's lerp is NaN there for beta1 below 1/2. (Found by random calls.)"""
    rows = [Row((33,), dict.fromkeys(ROLES, torch.float32), special=math.inf)]
    call = Lists().call("adamw_step_", rows, {"lr": 0.1, "betas": (0.2, 0.9)}, torch.Generator().manual_seed(0))
    found = check_call(call, ["foreach"])["foreach"]
    assert found.passed, found
