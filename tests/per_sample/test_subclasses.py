"""Subclasses of layers that have rules: by what their ``forward`` computes, without an option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels.per_sample import _registry, register_rule
from sam_kernels.per_sample._registry import rule_for
from tests.per_sample.brute import assert_right, group_norms, run_engine

B, T, D = 4, 5, 6
f64 = torch.float64


class Plain(nn.Linear):
    """Nothing of it changes what it computes."""

    eps = 0.5

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def length(self) -> Tensor:
        return self.weight.norm()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Added(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Spectral(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / torch.linalg.matrix_norm(self.weight, 2), self.bias)


class OnePlus(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)  # type: ignore[arg-type]


class Squared(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.square(), self.bias)  # type: ignore[arg-type]


class OnceMore(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * super().forward(ids.flip(1))


class Standardized(nn.Conv1d):
    """By the method that ``forward`` calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = (weight - weight.mean((1, 2), keepdim=True)) / (weight.std((1, 2), keepdim=True) + 0.1)
        return super()._conv_forward(x, weight, bias)


class OfATable(nn.Linear):
    """By a property in the place of the parameter."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        try:
            return self._parameters["weight"].exp()  # type: ignore[union-attr]
        except KeyError:
            raise AttributeError("weight") from None


class Lookup(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value * 2 if name == "weight" else value


class Inherits(Scaled):
    pass


WORDS = torch.randint(0, 9, (B, T), generator=torch.Generator().manual_seed(0))


def _embedded(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Linear(D, D))


def _planes(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(T, T, 1), layer)


def _rows(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), layer)


RIGHT = {
    "plain": lambda: _rows(Plain(D, D)),
    "scaled": lambda: _rows(Scaled(D, 3)),
    "inherits": lambda: _rows(Inherits(D, 3)),
    "added": lambda: _rows(Added(D, D)),
    "spectral": lambda: _rows(Spectral(D, 3)),
    "one plus": lambda: _rows(OnePlus(D)),
    "squared": lambda: _rows(Squared(D)),
    "standardized": lambda: _planes(Standardized(T, 3, 3)),
    "a property": lambda: _rows(OfATable(D, 3)),
    "an attribute": lambda: _rows(Lookup(D, 3)),
    "embedding": lambda: _embedded(OnceMore(9, D)),
    "max_norm": lambda: _embedded(nn.Embedding(9, D, max_norm=0.5)),
    "padding": lambda: _embedded(nn.Embedding(9, D, padding_idx=int(WORDS[0, 0]))),
    "weight_norm": lambda: _rows(torch.nn.utils.weight_norm(nn.Linear(D, 3))),
    "spectral_norm": lambda: _rows(torch.nn.utils.spectral_norm(nn.Linear(D, 3)).eval()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("unsupported", ["error", "verify"])
@pytest.mark.parametrize("case", RIGHT)
def test_norms_and_gradients_are_right(case: str, unsupported: str) -> None:
    torch.manual_seed(1)
    model = RIGHT[case]().double()
    for param in model.parameters():  # a class that hides its parameter does not set it itself
        nn.init.uniform_(param, -1.0, 1.0)
    x = WORDS if isinstance(model[0], nn.Embedding) else torch.randn(B, T, D, dtype=f64)  # type: ignore[index]
    losses = [model(x).sin().flatten(1).sum(1) for _ in range(2)][1]
    expected = group_norms(model, losses)
    torch.autograd.backward(losses, expected)
    gradients = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    engine, _, norms = run_engine(model, lambda: model(x).sin().flatten(1).sum(1), unsupported=unsupported)
    torch.testing.assert_close(norms, expected)
    engine.weighted_grads_(expected)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, gradients[name])


def test_a_rule_goes_with_forward_and_with_all_that_it_calls() -> None:
    for layer in (Plain(D, D), nn.Linear(D, D), nn.LazyLinear(D), nn.modules.linear.NonDynamicallyQuantizableLinear(D, D)):
        assert rule_for(layer) is not None
    for layer in (Scaled(D, D), Inherits(D, D), OfATable(D, D), Lookup(D, D), Standardized(T, 3, 3)):
        assert rule_for(layer) is None


def test_a_parametrized_layer_keeps_the_rule_of_its_bias() -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(D, D))
    assert rule_for(layer) is _registry._RULES[nn.Linear]


def test_a_rule_of_ones_own_for_a_class_that_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))

    def rule(module: Any, args: Any, kwargs: Any, grad: Tensor) -> Any:
        return {"weight": torch.einsum("btp,btd->bpd", grad, args[0]) * module.weight, "bias": grad.sum(1)}

    register_rule(OfATable, rule)
    torch.manual_seed(1)
    model, x = _rows(OfATable(D, 3)).double(), torch.randn(B, T, D, dtype=f64)
    nn.init.uniform_(model[2]._parameters["weight"])  # type: ignore[index]
    _, losses, norms = run_engine(model, lambda: model(x).sin().flatten(1).sum(1), unsupported="verify")
    torch.testing.assert_close(norms, group_norms(model, losses))


class Gated(nn.Module):
    """Reads a parameter that a layer has beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.layer.gate = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.gate  # type: ignore[no-any-return]


def test_a_parameter_beside_those_of_the_rule() -> None:
    model, x = Gated().double(), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: model(x).sin().sum((1, 2)))
    unread = nn.Linear(D, D).double()
    unread.gate = nn.Parameter(torch.rand(D))
    assert_right(unread, lambda: unread(x).sin().sum((1, 2)))
