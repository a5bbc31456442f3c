"""``unsupported="verify"``: planted wrong layers and rules are caught by name, and right ones pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from sam_kernels.per_sample import GradNorms, _node_rules, _registry, register_rule
from sam_kernels.per_sample._registry import Rule
from tests.per_sample import test_graph_reads
from tests.per_sample.brute import assert_right, group_norms, run_engine
from tests.per_sample.test_graph_reads import CASES as OF_THE_GRAPH
from tests.per_sample.test_layers import LAYERS, build
from tests.per_sample.test_subclasses import Added, OnceMore, Scaled, Spectral, Squared, Standardized

B, T, D = 6, 5, 4
f64 = torch.float64
WORDS = torch.randint(0, 9, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    return


class Scale(nn.Module):
    def __init__(self, size: int = D) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def scale_rule(factor: float = 1.0) -> Rule:
    return lambda module, args, kwargs, grad: {"scale": factor * (args[0] * grad).flatten(1, -2).sum(1)}


def as_a(kind: type[nn.Module], *of: type[nn.Module]) -> None:
    """Take the rule of a class for others, as a user would who thinks that it is right for them."""
    rule = _registry._RULES[kind]
    for each in of:
        register_rule(each, lambda *args: rule(*args))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1)  # type: ignore[no-any-return]


def data_of(model: Any, dtype: torch.dtype = f64) -> Tensor:
    return WORDS if isinstance(model[0], nn.Embedding) else torch.linspace(-2, 2, B * T * D, dtype=dtype).cos().view(B, T, D)


def between(layer: nn.Module, last: int = D) -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), layer, nn.Linear(last, 3))


def wrong_rules() -> None:
    register_rule(Scale, scale_rule(1.5))
    as_a(nn.Linear, Scaled, Added, Spectral)
    as_a(nn.LayerNorm, Squared)
    as_a(nn.Conv1d, Standardized)
    as_a(nn.Embedding, OnceMore)


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {  # a model, and the parameter that is named
    "scale": (lambda: between(Scale()), r"scale of 1 \(Scale\)"),
    "linear, scaled": (lambda: between(nn.Sequential(Scaled(D, D))), r"(weight|bias) of 1.0 \(Scaled\)"),
    "linear, swapped weight": (lambda: between(Spectral(D, D)), r"weight of 1 \(Spectral\)"),
    "layer norm of a square": (lambda: between(Squared(D)), r"weight of 1 \(Squared\)"),
    "standardized convolution": (lambda: nn.Sequential(nn.Linear(D, D), Standardized(T, 2, 3)), r"weight of 1 \(Standardized\)"),
    "embedding": (lambda: nn.Sequential(OnceMore(9, D), nn.Linear(D, 3)), r"weight of 0 \(OnceMore\)"),
    "shared": (lambda: nn.Sequential(*[nn.Linear(D, D), Scale()] * 2), r"scale of 3 \(Scale\)"),
}


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"micro_batch": 3, "reduction": "mean"}], ids=str)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rule_is_caught(case: str, options: dict[str, Any]) -> None:
    wrong_rules()
    torch.manual_seed(3)
    make, name = WRONG[case]
    model = make().double()
    x = data_of(model)
    _, losses, norms = run_engine(model, lambda: losses_of(model, x), **options)
    assert not torch.allclose(norms, group_norms(model, losses, **options), rtol=1e-6)  # it is silent without the option
    with pytest.raises(
        RuntimeError, match=rf"verify.*{name}: .*%.*its rule is not what .* computes: write one with @sam_kernels"
    ) as caught:
        run_engine(model, lambda: losses_of(model, x), unsupported="verify", **options)
    assert 'unsupported="vmap"' in str(caught.value)
    losses_of(model, x).sum().backward()  # nothing of the engine is left
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("how", ["float32", "autocast", "1 %", "sign", "rows of it"])
def test_types_and_sizes_of_errors(how: str) -> None:
    """An error of 1 % is seen but where tensors have 16 bits; one that leaves the norms as they are is, too."""
    model, x = between(Scale()), data_of([None], torch.float32)
    rules: dict[str, Rule] = {
        "1 %": scale_rule(1.01),
        "sign": scale_rule(-1.0),
        "rows of it": lambda module, args, kwargs, grad: {"scale": (args[0] * grad).sum(1).flip(1)},
    }
    register_rule(Scale, rules.get(how, scale_rule(2.0)))
    context: Any = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext()

    def forward() -> Tensor:
        with context:
            return losses_of(model, x).float()

    with pytest.raises(RuntimeError, match=r"scale of 1 \(Scale\)"):
        run_engine(model, forward, unsupported="verify")


def test_the_message_has_both_numbers() -> None:
    register_rule(Scale, scale_rule(4.0))
    model = nn.Sequential(Scale()).double()
    with torch.no_grad():
        model[0].scale.fill_(1.0)  # type: ignore[union-attr]
    x = torch.zeros(2, 1, D, dtype=f64)
    x[1, 0, 0] = 3.0
    words = r"the norm of its gradient of losses\[1\] is 12, and by a backward pass of these alone 3 \(off by 75 % of the larger\)"
    with pytest.raises(RuntimeError, match=words):
        run_engine(model, lambda: model(x).sum((1, 2)), unsupported="verify")


class DoubledWeights(TorchFunctionMode):
    """A library that takes the place of an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = (args[0], args[1] * 2, *args[2:]) if func is F.linear else args
        return func(*args, **(kwargs or {}))


def test_a_layer_that_something_else_computes() -> None:
    model, x = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 3)).double(), data_of([None])

    def forward() -> Tensor:
        with DoubledWeights():
            return losses_of(model, x)

    with pytest.raises(RuntimeError, match=r"weight of [01] \(Linear\).*its rule is not what Linear computes"):
        run_engine(model, forward, unsupported="verify")


def test_a_wrong_rule_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _node_rules.NODE_RULES["MulBackward0"]
    monkeypatch.setitem(_node_rules.NODE_RULES, "MulBackward0", lambda *args: 2 * right(*args))  # type: ignore[operator]
    model = between(Scale()).double()
    words = (
        r'scale of 1 \(Scale\).*found in the graph, at MulBackward0: write a rule with .*register_rule\(Scale\), or pass unsupported="vmap"'
    )
    with pytest.raises(RuntimeError, match=words):
        run_engine(model, lambda: losses_of(model, data_of(model)), unsupported="verify")


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Rolled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ab,btd->atd", torch.eye(B, dtype=x.dtype).roll(1, 0), x)


@pytest.mark.parametrize("layer", [Centred, Rolled])
def test_losses_that_depend_on_several_samples(layer: type[nn.Module]) -> None:
    model = between(layer()).double()
    with pytest.raises(
        RuntimeError, match=r"of 0 \(Linear\).*but the gradient of the whole batch is right: a loss depends on other samples"
    ):
        run_engine(model, lambda: losses_of(model, data_of(model)), unsupported="verify")


@pytest.mark.parametrize("backward", [False, True])
def test_batch_norm_in_training(backward: bool) -> None:
    """Contributions are no gradients of single losses: the batch's gradient is compared."""
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(T), nn.Linear(D, D), Scale()).double()
    x = data_of(model)
    engine = GradNorms(model, unsupported="verify")
    with engine:
        losses = losses_of(model, x)
    engine(losses, backward=backward)
    register_rule(Scale, scale_rule(1.5))
    engine = GradNorms(model, unsupported="verify")
    with engine:
        losses = losses_of(model, x)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"scale of 3 \(Scale\): the sum of its gradients over the batch differs .* by 33 %"):
        engine(losses, backward=backward)
    assert all(param.grad is None for param in model.parameters())


def test_instance_norm_makes_no_sample_depend_on_another() -> None:
    """Though its node takes statistics in training."""
    register_rule(Scale, scale_rule(1.5))
    model = nn.Sequential(nn.Linear(D, D), nn.InstanceNorm1d(T), nn.Linear(D, D), Scale()).double()
    with pytest.raises(RuntimeError, match=r"scale of 3 \(Scale\): the norm of its gradient of losses"):
        run_engine(model, lambda: losses_of(model, data_of(model)), unsupported="verify")


# --- right ones ---


@pytest.mark.parametrize("dtype", [f64, torch.float32])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_raise_no_alarm(case: str, dtype: torch.dtype) -> None:
    layer, x = build(case)
    layer, x = layer.to(dtype), x.to(dtype)
    run_engine(layer, lambda: losses_of(layer, x), unsupported="verify")


@pytest.mark.parametrize("case", OF_THE_GRAPH)
def test_parameters_of_the_graph_raise_no_alarm(case: str) -> None:
    model, x = test_graph_reads.model_of(case), torch.randn(4, 4, 6, dtype=f64)
    run_engine(model, lambda: test_graph_reads.losses_of(model, x), unsupported="verify")


class Encoder(nn.Module):
    """Dropout, attention, tied weights, positions, and a checkpoint with random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(9, 8, padding_idx=2, max_norm=2.0), nn.Parameter(torch.randn(1, T, 8))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 9)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        h = self.embedding(words) + self.places
        h = self.blocks[0](h)
        return self.head(checkpoint(self.blocks[1], h, use_reentrant=False))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 3, "reduction": "mean"}], ids=str)
def test_dropout_checkpoints_and_tied_weights_raise_no_alarm(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Encoder().to(f64 if dtype is f64 else torch.float32)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            return losses_of(model, WORDS).to(f64 if dtype is f64 else torch.float32)

    if dtype is f64:
        assert_right(model, forward, again=True, unsupported="verify", **options)
    else:
        run_engine(model, forward, unsupported="verify", **options)


def test_norms_over_some_parameters() -> None:
    model = between(Scale()).double()
    x = data_of(model)
    _, losses, norms = run_engine(model, lambda: losses_of(model, x), unsupported="verify", over=model[1].parameters())  # type: ignore[index]
    grads = [torch.autograd.grad(loss, list(model[1].parameters()), retain_graph=True)[0] for loss in losses]  # type: ignore[index]
    torch.testing.assert_close(norms, torch.stack([grad.norm() for grad in grads]))
    register_rule(Scale, scale_rule(2.0))  # its weighted gradient is made all the same
    with pytest.raises(RuntimeError, match=r"scale of 1 \(Scale\): a weighted sum of its gradients"):
        run_engine(model, lambda: losses_of(model, x), unsupported="verify", over=model[0].parameters())  # type: ignore[index]


def test_an_ordinary_backward_pass() -> None:
    register_rule(Scale, scale_rule())
    model = between(Scale()).double()
    x = data_of(model)
    losses_of(model, x).sum().backward()
    expected = [param.grad for param in model.parameters()]
    model.zero_grad()
    engine = GradNorms(model, unsupported="verify")
    with engine:
        losses = losses_of(model, x)
    torch.testing.assert_close(engine(losses, backward=True), group_norms(model, losses_of(model, x)))
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), expected, strict=True))  # type: ignore[arg-type]
