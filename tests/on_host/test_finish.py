"""The second stage of sums in the last block of the last launch: the same bits whatever the order of blocks, and once a call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import _cuda_on_host, functional
from sam_kernels.backends.native import cuda
from sam_kernels.operations import GradNorms, Operands
from tests.helpers.compare import assert_same_bits

ORDERS = [(1, 0), (2, 1), (3, 0), (3, 2), (7, 5), (1000, 0), (1000, 11)]  # blocks of a launch, the one that runs first


@pytest.fixture(autouse=True)
def _usual_order() -> Iterator[None]:
    yield
    _cuda_on_host.set_blocks()


def rows(*sizes: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator).to(dtypes[i % len(dtypes)]) for i, size in enumerate(sizes)]


LISTS = {
    "one kind": rows(70_000, 5, 0, 9000, 0),
    "several kinds": rows(20_000, 30_000, 0, 7, dtypes=(torch.float32, torch.bfloat16)),
    "the last kind empty": rows(20_000, 0, 9000, 0, dtypes=(torch.float32, torch.float16)),
    "several launches": rows(*[3, 300, 0] * 600),
}


def sums_of(op: str, given: list[Tensor]) -> list[Tensor]:
    grads, others = [t.clone() for t in given], [t.sin() for t in given]
    if op == "grad_norm":
        return [functional.grad_norm(grads)]
    if op == "grad_dots":
        return [functional.grad_dots(grads, others)]
    if op == "combine_":
        return [functional.combine_(grads, grads, others, left_weight=0.5, right_weight=-2.0)]
    if op == "centralize_":
        return [functional.centralize_([t.reshape(-1, 1) if t.numel() % 2 else t.reshape(-1, 2) for t in grads])]
    return [functional.direction_norm_(grads, others, theta=0.5, kind="vasso")]


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("op", ["grad_norm", "grad_dots", "combine_", "centralize_", "direction_norm_"])
def test_the_order_of_blocks_changes_no_bit(op: str, name: str) -> None:
    found = []
    for most, first in ORDERS:
        _cuda_on_host.set_blocks(most=most, first=first)
        found.append(sums_of(op, LISTS[name]))
    for other in found[1:]:
        assert_same_bits(op, other, found[0])


@pytest.mark.parametrize("name", LISTS)
def test_one_norm_has_the_bits_of_the_first_of_several(name: str) -> None:
    """Several are finished by a launch of their own, one by the last block."""
    count = len(LISTS[name])
    lists = Operands({"grads": LISTS[name]}, range(count))
    launches = []
    norms = []
    for sizes in ([count], [count, 0]):
        before = _cuda_on_host.launches()
        norms.append(cuda.grad_norms(GradNorms(group_sizes=sizes), lists)[:1])
        launches.append(_cuda_on_host.launches() - before)
    assert_same_bits("norm", norms[:1], norms[1:])
    assert launches[1] == launches[0] + 1


@pytest.mark.parametrize("name", [*LISTS, "empty ones"])
def test_a_step_begins_once_whatever_the_number_of_launches(name: str) -> None:
    for value in (1.0, float("nan")):
        grads = [t.clone() for t in LISTS.get(name, rows(0, 0))]
        for grad in grads[:1]:
            grad[-1:] = value
        found_inf, skipped, norm = torch.tensor(1.0), torch.tensor(5.0), torch.tensor(7.0)
        functional.grad_norm_(norm, grads, found_inf=found_inf, skipped=skipped)
        is_bad = math.isnan(value) and name != "empty ones"
        assert (float(skipped), float(found_inf), bool(norm.isnan())) == (6.0, float(is_bad), is_bad)


def steps_of(base: type[torch.optim.Optimizer], **options: Any) -> tuple[sam_kernels.SAM, Any]:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    optimizer = sam_kernels.SAM(model.parameters(), base, lr=0.1, **options)
    batch = torch.randn(5, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().sum()
        loss.backward()
        return loss

    return optimizer, closure


@pytest.mark.parametrize(
    ("base", "options", "launches"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, 4),  # norm, perturb, check, update
        (torch.optim.SGD, {"max_grad_norm": 1.0}, 4),  # norm, perturb, norm, update
        (torch.optim.SGD, {"check_finite": False}, 3),
        (torch.optim.AdamW, {}, 5),  # and the step counters
        (torch.optim.AdamW, {"max_grad_norm": 1.0}, 5),
        (torch.optim.AdamW, {"check_finite": False}, 4),
    ],
)
def test_launches_of_a_step(base: type[torch.optim.Optimizer], options: dict[str, Any], launches: int) -> None:
    optimizer, closure = steps_of(base, **options)
    for _ in range(3):
        before = _cuda_on_host.launches()
        optimizer.step(closure)
        assert _cuda_on_host.launches() - before == launches
