"""Tensors whose elements do not fit 32 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sam_kernels import functional as F

pytestmark = [pytest.mark.cuda, pytest.mark.only_cuda, pytest.mark.usefixtures("kernels")]
NUMEL = 2**31 + 2**20 + 3
LISTS = {"perturb_": 3, "restore_": 2, "sgd_step_": 4, "adamw_step_": 5}
# The beginning, both sides of 2^31 (an index in int32 would come out negative there), and the end with its masked block.
WINDOWS = [slice(0, 4096), slice(2**31 - 5000, 2**31 + 5000), slice(NUMEL - 70_001, NUMEL)]


def call(op: str, lists: list[Tensor]) -> None:
    device = lists[0].device
    if op == "perturb_":
        F.perturb_(lists[:1], lists[1:2], lists[2:3], torch.full((), 3.0, device=device), rho=0.05)
    elif op == "restore_":
        F.restore_(lists[:1], lists[1:2])
    elif op == "sgd_step_":
        F.sgd_step_(lists[:1], lists[1:2], lists[2:3], old_params=lists[3:4], lr=0.1, momentum=0.9, weight_decay=0.1)
    else:
        steps = [torch.full((), 4.0, device=device)]
        F.adamw_step_(lists[:1], lists[1:2], lists[2:3], lists[3:4], steps, old_params=lists[4:5], lr=0.01, weight_decay=0.1)


def need(nbytes: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < nbytes:
        pytest.skip(f"needs {nbytes / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB are free")


@pytest.mark.parametrize("op", LISTS)
def test_elementwise(op: str, device: str) -> None:
    need((LISTS[op] + 1) * 2 * NUMEL)
    lists = [torch.empty(NUMEL, dtype=torch.bfloat16, device=device).uniform_(0.5, 1.0) for _ in range(LISTS[op])]
    # Cut out before the call, each window is computed as a tensor of its own. Nothing depends on where an element lies.
    expected = [[tensor[window].clone() for tensor in lists] for window in WINDOWS]
    call(op, lists)
    for window, parts in zip(WINDOWS, expected, strict=True):
        call(op, parts)
        for i, (tensor, part) in enumerate(zip(lists, parts, strict=True)):
            assert torch.equal(tensor[window], part), f"list {i}, elements {window.start} to {window.stop}"


@pytest.mark.parametrize("columns", [64, 4096])
def test_slices(columns: int, device: str) -> None:
    """Short ones and long ones, before and behind 2^31."""
    lines = 2**31 // columns + 300
    need(3 * 2 * lines * columns)
    grad = torch.empty(lines, columns, dtype=torch.bfloat16, device=device).uniform_(0.5, 1.0)
    windows = [slice(0, 5), slice(2**31 // columns - 3, 2**31 // columns + 3), slice(lines - 5, lines)]
    expected = [grad[window].clone() for window in windows]
    norm = F.centralize_([grad])
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(grad, dtype=torch.float32).item(), rel=1e-3)  # which is after rounding
    for window, part in zip(windows, expected, strict=True):
        F.centralize_([part])
        assert torch.equal(grad[window], part), f"lines {window.start} to {window.stop}"


def test_a_slice_of_more_than_31_bits(device: str) -> None:
    """Its mean is summed in blocks: of ones and zeros, one for each other element."""
    numel = 2**31 + 2**20
    need(3 * 2 * numel)
    grad = torch.zeros(1, numel, dtype=torch.bfloat16, device=device)
    grad[0, ::2] = 1.0
    norm = F.centralize_([grad])
    assert norm.item() == pytest.approx(0.5 * math.sqrt(numel), rel=1e-5)
    for i in (0, 1, 2**31 - 1, 2**31, numel - 2, numel - 1):
        assert grad[0, i].item() == (-0.5 if i % 2 else 0.5)


def test_norm(device: str) -> None:
    need(3 * NUMEL)
    grad = torch.zeros(NUMEL, dtype=torch.bfloat16, device=device)
    spots = [0, 2**31 - 1, 2**31, NUMEL - 1]
    for i, spot in enumerate(spots):
        grad[spot] = 2.0**i
    assert F.grad_norm([grad]).item() == pytest.approx(math.sqrt(sum(4.0**i for i in range(len(spots)))), rel=1e-6)
    found_inf = torch.zeros((), device=device)
    grad[-1] = math.nan
    F.check_finite_([grad], found_inf)
    assert found_inf.item() == 1.0
