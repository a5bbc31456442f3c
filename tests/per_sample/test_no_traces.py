"""The model is not changed: no hooks, modes, flags or random numbers, whatever happens; and what can go wrong leaves the engine usable."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms, _registry, register_rule
from tests.per_sample.brute import assert_right, run_engine

B = 6


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError("forward")
        return x * self.scale


def fails(*_: Any) -> Any:
    raise ArithmeticError("rule")


def right(module: Any, args: Any, kwargs: Any, grad: Tensor) -> Any:
    return {"scale": (args[0] * grad).reshape(len(grad), -1, 4).sum(1)}


@pytest.fixture(autouse=True)
def _rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    register_rule(Scale, right)


def model_of() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), Scale(), nn.MultiheadAttention(4, 2, batch_first=True), First(), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double()


class First(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0]


class Triple(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
        return x


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def make() -> tuple[Triple, Callable[[], Tensor]]:
    model = Triple(*model_of())
    x = torch.randn(B, 5, 3, dtype=torch.float64)
    return model, lambda: model(x).sin().sum((1, 2))


def assert_clean(model: nn.Module) -> None:
    assert hooks_of(model) == 0
    assert torch._C._len_torch_function_stack() == 0
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), model.state_dict().values(), strict=True))


def test_nothing_is_left() -> None:
    model, forward = make()
    state, training = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = forward()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    engine, losses, norms = run_engine(model, forward)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(losses, expected)
    engine.weighted_grads_(norms)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert [module.training for module in model.modules()] == training
    assert_clean(model)
    model.zero_grad()
    losses.sum().backward()  # the graph was retained
    forward().sum().backward()
    assert all(param.grad is not None for param in model.parameters())


def test_an_exception_in_the_forward_pass() -> None:
    model, forward = make()
    engine = GradNorms(model)
    model[1].fails = True
    with pytest.raises(ArithmeticError, match="forward"), engine:
        forward()
    assert_clean(model)
    assert engine._recorder.calls == []
    model[1].fails = False
    with engine:
        losses = forward()
    assert engine(losses).shape == (B,)
    assert_clean(model)


@pytest.mark.parametrize("where", [0, 1])
def test_an_exception_in_a_rule(where: int) -> None:
    """Of a layer in the middle of the backward pass, and of the one that it ends at."""
    model, forward = make()
    model[0].requires_grad_(where == 1)
    register_rule(Scale, fails)
    engine = GradNorms(model)
    with engine:
        losses = forward()
    with pytest.raises(ArithmeticError, match="rule"):
        engine(losses, retain_graph=True)
    assert_clean(model)
    assert torch.autograd.grad(losses.sum(), model[5].weight)[0].isfinite().all()  # no hook is left on the graph
    register_rule(Scale, right)
    with engine:
        losses = forward()
    assert engine(losses).shape == (B,)


def test_an_exception_in_the_backward_pass() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ArithmeticError("backward")

    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(B, 3)
    engine = GradNorms(model)
    with engine:
        losses = model[1](Broken.apply(model[0](x))).sum(1)
    with pytest.raises(ArithmeticError, match="backward"):
        engine(losses)
    assert_clean(model)


def test_using_it_twice() -> None:
    model, forward = make()
    engine, losses, norms = run_engine(model, forward)
    with pytest.raises(RuntimeError, match="no call of a layer"):
        engine(losses)
    engine.weighted_grads_(norms)
    with pytest.raises(RuntimeError, match="used once"):
        engine.weighted_grads_(norms)
    with pytest.raises(RuntimeError, match="already around"), engine, engine:
        pass
    assert_clean(model)
    with pytest.raises(RuntimeError, match="losses first"):
        GradNorms(model).weighted_grads_(norms)


def test_inside_the_block() -> None:
    model, forward = make()
    with GradNorms(model) as engine:
        norms = engine(forward())
    engine.weighted_grads_(norms)
    assert_clean(model)


def test_again_and_again() -> None:
    model, forward = make()
    model.eval()
    engine = GradNorms(model)
    found = []
    for _ in range(2):
        with engine:
            losses = forward()
        found.append(engine(losses))
    assert torch.equal(*found)
    assert_right(model, forward)
