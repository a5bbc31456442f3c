"""Norms over some of the parameters; weighted gradients of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_close, weighted

B = 6


def model_and_input() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    tied = nn.Linear(8, 8)
    layers = [nn.Conv1d(3, 8, 2), nn.GroupNorm(2, 8), nn.Flatten(1), nn.Linear(32, 8), tied, nn.Tanh(), tied]
    return nn.Sequential(*layers).double(), torch.randn(B, 3, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    "names", [["0.weight"], ["1.bias", "3.weight"], ["4.weight"], ["3.weight", "3.bias", "4.bias"], ["0.bias", "1.weight"]]
)
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_norms_are_over_the_chosen_parameters(names: list[str], micro_batch: int, keep: bool) -> None:
    model, x = model_and_input()
    chosen = [model.get_parameter(name) for name in names]
    engine = GradNorms(model, micro_batch=micro_batch, over=iter(chosen))
    with engine:
        losses = model(x).square().sum(1)
    norms = engine(losses, keep=keep, retain_graph=True)
    each = [torch.autograd.grad(group.sum(), chosen, retain_graph=True) for group in losses.split(micro_batch)]
    assert_close(norms, torch.stack([torch.stack([g.square().sum() for g in grads]).sum().sqrt() for grads in each]), 1e-12)
    if keep:
        weights = torch.rand_like(norms)
        expected = weighted(model, losses, weights, micro_batch)
        engine.weighted_grads_(weights)
        for name, param in model.named_parameters():
            assert_close(param.grad, expected[name], 1e-12, name)  # type: ignore[arg-type]  # it has one


def test_all_of_them_is_the_default() -> None:
    model, x = model_and_input()
    found = []
    for over in (None, model.parameters()):
        engine = GradNorms(model, over=over)
        with engine:
            losses = model(x).square().sum(1)
        found.append(engine(losses))
    assert torch.equal(*found)


def test_bad_input() -> None:
    model, x = model_and_input()
    with pytest.raises(ValueError, match=r"over\[1\], .* is no parameter of the model"):
        GradNorms(model, over=[model[0].weight, nn.Parameter(torch.ones(2))])  # type: ignore[index]
    with pytest.raises(TypeError, match=r"over\[0\] must be a parameter"):
        GradNorms(model, over=["0.weight"])  # type: ignore[list-item]
    for over in ([], [model[0].weight.requires_grad_(False)]):  # type: ignore[index]
        engine = GradNorms(model, over=over)
        with engine:
            losses = model(x).square().sum(1)
        with pytest.raises(ValueError, match="over holds no trainable parameter"):
            engine(losses)


def test_it_may_change_between_forward_passes() -> None:
    model, x = model_and_input()
    engine = GradNorms(model, over=[model[0].weight])  # type: ignore[index]
    for name in ("0.weight", "3.bias"):
        engine.over = [model.get_parameter(name)]
        with engine:
            losses = model(x).square().sum(1)
        norms = engine(losses, retain_graph=True)
        each = [torch.autograd.grad(loss, model.get_parameter(name), retain_graph=True)[0].norm() for loss in losses]
        assert_close(norms, torch.stack(each), 1e-12)


def test_an_interrupt_while_hooks_are_put_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_input()
    engine, put = GradNorms(model), nn.Module.register_forward_hook

    def interrupted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is model[1]:  # type: ignore[index]
            raise KeyboardInterrupt
        return put(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_hook", interrupted)
        with pytest.raises(KeyboardInterrupt), engine:
            pass
    assert not any(module._forward_hooks for module in model.modules())
    with engine:
        losses = model(x).square().sum(1)
    assert engine(losses).isfinite().all()
