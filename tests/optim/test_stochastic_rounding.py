"""``stochastic_rounding``: perturbed weights and updates that nearest rounding would lose, and runs that are continued."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import SAM
from tests.helpers.compare import assert_same_bits
from tests.optim.master_problem import assert_masters, closure_of, params_of, run
from tests.optim.problem import through_a_file

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

F32, B16 = torch.float32, torch.bfloat16


def ulp_of(exact: Tensor) -> Tensor:
    """The distance of bfloat16 numbers, of 8 bits, around each value."""
    return torch.exp2(torch.frexp(exact).exponent.float() - 8)


def test_perturbed_weights_are_one_of_two_neighbours_and_masters_are_exact() -> None:
    found = []
    for dtypes in ((F32, F32, F32), (B16, F32, B16)):
        params, seen = params_of(dtypes), list[list[Tensor]]()
        options: dict[str, Any] = {"master_weights": True, "stochastic_rounding": True} if B16 in dtypes else {}
        optimizer = SAM(params, torch.optim.AdamW, lr=0.01, rho=0.05, lambd=0.0, **options)
        for i in range(3):
            optimizer.step(closure_of(params, 10 * i, seen=seen))
        found.append((optimizer, params, seen))
    (_, expected, seen), (optimizer, params, seen_narrow) = found
    assert_masters(optimizer, params, expected)
    for got, right in zip(seen_narrow[1::2], seen[1::2], strict=True):  # of the second passes
        assert_same_bits("without a master", [got[1]], [right[1]])
        for i in (0, 2):
            assert bool(((got[i].float() - right[i]).abs() < ulp_of(right[i])).all())
        assert bool((got[2] != right[2].to(B16)).any())


@pytest.mark.parametrize("way", ["closure", "plain"])
def test_small_updates_arrive_in_the_mean(way: str) -> None:
    """64 updates by 1/16 of the distance of two numbers, where nearest rounding loses every one."""
    param = nn.Parameter(torch.ones(1000, dtype=B16))
    optimizer = SAM([param], torch.optim.SGD, lr=2.0**-12, rho=0.0, stochastic_rounding="update")

    def closure() -> None:
        param.grad = torch.ones_like(param)

    for _ in range(64):
        if way == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    moved = (1.0 - param.detach().float()) * 2.0**8  # in distances
    deviation = (64 * (1 / 16) * (15 / 16)) ** 0.5  # of independent draws
    assert abs(float(moved.mean()) - 4.0) < 5 * deviation / 1000**0.5
    assert 0.8 * deviation < float(moved.std()) < 1.2 * deviation  # 9 standard deviations of the estimate


@pytest.mark.parametrize("options", [{"stochastic_rounding": True, "master_weights": True}, {"stochastic_rounding": "update"}], ids=str)
def test_a_run_that_is_continued_draws_the_same_numbers(options: dict[str, Any]) -> None:
    params = params_of((B16, F32, B16))
    optimizer = SAM(params, torch.optim.AdamW, lr=0.01, rho=0.05, **options)
    run(optimizer, params, range(2))
    others = [nn.Parameter(param.detach().clone()) for param in params]
    other = SAM(others, torch.optim.AdamW, lr=0.01, rho=0.05, **options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    seen: list[list[Tensor]] = []
    for each, each_params in ((optimizer, params), (other, others)):
        each.step([closure_of(each_params, 20, seen=seen), closure_of(each_params, 25, seen=seen)])
    first, second = seen[:4], seen[4:]
    for i, (left, right) in enumerate(zip(first, second, strict=True)):
        assert_same_bits(f"weights of call {i}", left, right)
    assert_same_bits("params", others, params)
