"""Bases that keep less state than Adam: 8-bit moments (torchao, bitsandbytes), factored ones (Adafactor). Their steps are their own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import SAM, functional

WIDTH, STEPS, RHO = 256, 3, 0.05


def _of(package: str, name: str) -> Any:
    return getattr(pytest.importorskip(package), name)


# What makes the base, and the bytes of state a parameter may take. 8-bit: two moments, with a scale for 256 elements and a table of 1 KiB.
BASES: dict[str, tuple[Callable[[], Any], float]] = {
    "Adafactor": (lambda: partial(torch.optim.Adafactor, lr=1e-2), 0.05),
    "torchao": (lambda: partial(_of("torchao.optim", "AdamW8bit"), lr=1e-3), 2.1),
    "bitsandbytes": (lambda: partial(_of("bitsandbytes.optim", "AdamW8bit"), lr=1e-3), 2.1),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))


def _loss(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(inputs).square().mean()
    return loss


def _sam_steps(model: nn.Module, optimizer: Any, steps: range) -> None:
    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = _loss(model, step)
        loss.backward()
        return loss

    for step in steps:
        optimizer.step(partial(closure, step))


def _steps_by_hand(model: nn.Module, base: Any, steps: range) -> None:
    params = list(model.parameters())
    for step in steps:
        grads = torch.autograd.grad(_loss(model, step), params)
        start = [param.detach().clone() for param in params]
        with torch.no_grad():  # by the operations, so that the weights are perturbed to the same bits
            functional.perturb_(params, grads, start, functional.grad_norm(grads), rho=RHO)
        for param, grad in zip(params, torch.autograd.grad(_loss(model, step), params), strict=True):
            param.grad = grad
        with torch.no_grad():
            for param, old in zip(params, start, strict=True):
                param.copy_(old)
        base.step()


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if not isinstance(value, Tensor) or value.dim() == 0:
        return 0
    if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:  # what it wraps
        wrapper: Any = value
        return sum(_bytes(getattr(wrapper, name)) for name in wrapper.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


@pytest.mark.parametrize("name", sorted(BASES))
def test_steps_are_the_bases_own_and_a_checkpoint_continues_them_bit_for_bit(name: str) -> None:
    make, most = BASES[name][0](), BASES[name][1]
    expected, model = _model(), _model()
    _steps_by_hand(expected, make(expected.parameters()), range(STEPS))
    optimizer = SAM(model.parameters(), make, rho=RHO)
    _sam_steps(model, optimizer, range(STEPS))
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    params = sum(param.numel() for param in model.parameters())
    assert _bytes(dict(optimizer.base_optimizer.state)) <= most * params

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    other = copy.deepcopy(_model())
    other.load_state_dict(saved["model"])
    continued = SAM(other.parameters(), make, rho=RHO)
    continued.load_state_dict(saved["optimizer"])
    for each, its in ((model, optimizer), (other, continued)):
        _sam_steps(each, its, range(STEPS, 2 * STEPS))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("name", sorted(BASES))
def test_with_masters_they_step_as_on_float32_parameters(name: str) -> None:
    make, most = BASES[name][0](), BASES[name][1]
    ends = []
    for dtype, has_masters in ((torch.float32, False), (torch.bfloat16, True)):
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, WIDTH, WIDTH, generator=generator, dtype=torch.float32)
        param = nn.Parameter(draw().to(torch.bfloat16).to(dtype))
        optimizer = SAM([param], make, rho=RHO, master_weights=has_masters)

        def closure(param: nn.Parameter = param, draw: Callable[[], Tensor] = draw) -> float:
            param.grad = draw().to(torch.bfloat16).to(param.dtype)
            return 0.0

        for _ in range(STEPS):
            optimizer.step(closure)
        ends.append(optimizer.state_dict()["state"][0]["master_param"] if has_masters else param.detach())
        assert _bytes(dict(optimizer.base_optimizer.state)) <= most * param.numel()
    assert torch.equal(*ends)
