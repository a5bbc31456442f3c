"""The foreach backend as it works on an accelerator, where nothing is read back: on the CPU, by denying it that a number can be read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sam_kernels import functional, use_backend
from sam_kernels.backends import foreach
from sam_kernels.operations import Operands, Operation
from sam_kernels.validation.check import check, combinations
from tests.helpers.backends import OPERATIONS, calls_in_pairs

OPERATIONS_ON_A_DEVICE = ("direction_norm_", "grad_dots", "combine_", "perturb_", "random_perturb_", "sgd_step_", "adamw_step_")


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_reading(*_: object) -> None:
        raise AssertionError("a number was read back from the device")

    for module in (foreach.ops, foreach._rows):
        monkeypatch.setattr(module, "is_host", lambda scalar: False)
    for name in OPERATIONS_ON_A_DEVICE:
        kind = OPERATIONS[name]

        def guarded(op: Operation, lists: Operands, real: Callable[..., object] = foreach.BACKEND.operations[kind]) -> object:
            with pytest.MonkeyPatch.context() as patch:
                for reading in ("item", "tolist", "__float__", "__bool__"):
                    patch.setattr(torch.Tensor, reading, no_reading)
                return real(op, lists)

        monkeypatch.setitem(foreach.BACKEND.operations, kind, guarded)


@pytest.mark.parametrize("op", OPERATIONS_ON_A_DEVICE)
def test_matches_the_reference_without_reading_a_number(is_full: bool, op: str) -> None:
    """Without --full: the calls of this dtype among those in which every case meets every keyword set."""
    dtype, checked = "float32", 0
    for case, option in combinations(op, dtype) if is_full else calls_in_pairs(op, (dtype, "bfloat16"))[dtype]:
        if option != "found_inf_first":  # the next test
            found = check(op, ["foreach"], dtype, case, option, seed=0)["foreach"]
            assert found.passed, f"case {case}, option {option}: {found}"
            checked += 1
    assert checked > 10


def test_a_skipped_first_step_leaves_a_momentum_of_zero() -> None:
    params, grads, buffers = [torch.ones(3)], [torch.full((3,), torch.nan)], [None]
    with use_backend("foreach"):
        functional.sgd_step_(params, grads, buffers, lr=0.1, momentum=0.9, found_inf=torch.ones(()))
    assert torch.equal(params[0], torch.ones(3))
    assert torch.equal(buffers[0], torch.zeros(3))
