"""Every optimizer takes three steps on Triton's kernels: the second finds tables and averages of the first, the third is a steady one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from tests.optim.family import BASES, MEMBERS

STEPS = 3


def weights_after(name: str, backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    inputs = torch.randn(6, 5)
    base, options = BASES["sps-momentum" if name == "SAMSPS" else "sgd-momentum"]
    optimizer: Any
    if name == "RWSAM":
        optimizer = sam_kernels.RWSAM(model, base, rho=0.05, beta=0.5, **options)
    else:
        optimizer = MEMBERS[name].make(model.parameters(), base, **options)

    def closure() -> Tensor:
        losses = model(inputs).square().squeeze(1)
        if name == "RWSAM":
            return losses
        optimizer.zero_grad()
        loss = losses.mean()
        loss.backward()
        return loss

    with sam_kernels.use_backend(backend):
        for _ in range(STEPS):
            optimizer.step(closure)
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("name", [*MEMBERS, "RWSAM"])
def test_three_steps(name: str) -> None:
    """float32 sums of norms in another order move a perturbation by some ulp, and a step by less: a hundred ulp is far from either."""
    for found, expected in zip(weights_after(name, "triton"), weights_after(name, "foreach"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
