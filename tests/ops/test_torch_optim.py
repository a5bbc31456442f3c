"""Many steps against torch's own optimizers in float64, with the parameters of one group after another missing a gradient now and then."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from tests.helpers.backends import widest

SHAPES = [(7,), (33, 5), (2, 3, 4, 5), (300,)]
SGD = [
    {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"weight_decay": 0.1},
]


def start(backend: str) -> tuple[list[Tensor], list[torch.nn.Parameter]]:
    ours = [torch.randn(shape, dtype=widest(backend)) for shape in SHAPES]
    return ours, [torch.nn.Parameter(tensor.to(torch.float64, copy=True)) for tensor in ours]


def check_close(ours: list[Tensor], theirs: list[torch.nn.Parameter], step: int) -> None:
    for i, (mine, param) in enumerate(zip(ours, theirs, strict=True)):
        difference = (mine - param.detach()).abs().max().item()
        # float32: each of 20 steps rounds numbers of at most 4 a few times.
        assert difference <= (1e-13 if mine.dtype is torch.float64 else 1e-5), f"params[{i}] differs by {difference} after step {step}"


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("kwargs", SGD, ids=["momentum", "nesterov", "plain"])
def test_sgd(backend: str, kwargs: dict[str, Any], clip: bool) -> None:
    ours, theirs = start(backend)
    optimizer = torch.optim.SGD(theirs, lr=0.05, **kwargs)
    buffers: list[Tensor | None] = [None] * len(ours)
    for step in range(20):
        taking_part = [i for i in range(len(ours)) if (i + step) % 4]  # so that first steps and later ones mix
        grads = [torch.randn_like(p) for p in ours]
        for i, param in enumerate(theirs):
            param.grad = grads[i].to(torch.float64, copy=True) if i in taking_part else None
        chosen, chosen_grads = [ours[i] for i in taking_part], [grads[i] for i in taking_part]
        chosen_buffers = [buffers[i] for i in taking_part]
        clipping = clip_both(theirs, chosen_grads) if clip else {}
        optimizer.step()
        old = [p.clone() for p in chosen]
        for p in chosen:
            p.fill_(torch.nan)
        functional.sgd_step_(chosen, chosen_grads, chosen_buffers, old_params=old, lr=0.05, **kwargs, **clipping)
        for i, buffer in zip(taking_part, chosen_buffers, strict=True):
            buffers[i] = buffer
        check_close(ours, theirs, step)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("maximize", [True, False])
def test_adam(backend: str, decoupled: bool, maximize: bool, clip: bool) -> None:
    ours, theirs = start(backend)
    settings: dict[str, Any] = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, lr=0.01, **settings)
    exp_avgs, exp_avg_sqs = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    steps = [torch.tensor(0.0) for _ in ours]
    for step in range(20):
        taking_part = [i for i in range(len(ours)) if (i + step) % 4]  # so that the numbers of steps differ
        grads = [torch.randn_like(p) for p in ours]
        for i, param in enumerate(theirs):
            param.grad = grads[i].to(torch.float64, copy=True) if i in taking_part else None
        chosen_grads = [grads[i] for i in taking_part]
        clipping = clip_both(theirs, chosen_grads) if clip else {}
        optimizer.step()
        lists = [[tensors[i] for i in taking_part] for tensors in (exp_avgs, exp_avg_sqs, steps)]
        functional.adamw_step_([ours[i] for i in taking_part], chosen_grads, *lists, lr=0.01, decoupled=decoupled, **settings, **clipping)
        check_close(ours, theirs, step)
    assert [int(s) for s in steps] == [int(optimizer.state[p]["step"]) for p in theirs]


def clip_both(theirs: list[torch.nn.Parameter], grads: list[Tensor]) -> dict[str, Any]:
    """Clips torch's gradients with torch's function, and says what makes the operation do the same."""
    max_norm = 3.0
    norm = functional.grad_norm(grads)
    assert norm > max_norm
    total = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, total.detach(), rtol=1e-14 if norm.dtype is torch.float64 else 1e-6, atol=0, check_dtype=False)
    return {"norm": norm, "max_norm": max_norm}
