"""Calls of layers whose outputs get no gradient add nothing to a norm, as autograd says; hidden gradients are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_close, assert_right, group_norms, run_engine, trainable

B = 6
f64 = torch.float64


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.double()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


class TwoHeads(nn.Module):
    """Several outputs, by a rule of nobody's: with ``unsupported="vmap"``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, dtype=f64)), nn.Parameter(torch.randn(3, dtype=f64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.a, (x * self.b).cumsum(1)


def rows(*shape: int) -> Tensor:
    return torch.randn(B, *shape, dtype=f64)


def losses_of(output: Tensor) -> Tensor:
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def under_no_grad(layer: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.no_grad():
        return layer(x)


def detached_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(0.5 * x)
    h.detach_()
    return m.a(x) * h


def unused(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    m.b(h)
    return h


def momentum_branch(m: Any, x: Tensor) -> Tensor:
    return -F.cosine_similarity(m.b(m.a(x)), m.a(0.8 * x).detach()).unsqueeze(1)


def some_outputs(m: Any, x: Tensor) -> Tensor:
    attended, weights = m.a(x, x, x)
    return attended if m.training else weights


def linear() -> nn.Module:
    return nn.Linear(3, 3)


MODELS: dict[str, Callable[[], Model]] = {
    "detached": lambda: Model(lambda m, x: m.a(x) - m.a(0.8 * x).detach(), a=linear()),
    "detached first": lambda: Model(lambda m, x: m.a(m.a(x).detach()), a=linear()),
    "detached in place": lambda: Model(detached_in_place, a=linear()),
    "stopped on one side": lambda: Model(momentum_branch, a=linear(), b=linear()),
    "unused": lambda: Model(unused, a=linear(), b=linear()),
    "unused after another": lambda: Model(lambda m, x: (m.b(m.c(m.a(x))), m.a(x))[1], a=linear(), b=linear(), c=nn.LayerNorm(3)),
    "auxiliary head": lambda: Model(lambda m, x: (m.b(m.a(x)), m.c(m.a(x)))[0], a=linear(), b=linear(), c=linear()),
    "under no_grad": lambda: Model(lambda m, x: m.a(x) * under_no_grad(m.a, 0.5 * x), a=linear()),
    "a teacher of shared weights": lambda: Model(lambda m, x: m.b(m.a(x)) - under_no_grad(lambda y: m.b(m.a(y)), x),
    a=linear(), b=linear()),
    "under no_grad alone": lambda: Model(lambda m, x: m.a(x) * under_no_grad(m.b, x), a=linear(), b=linear()),
    "indices": lambda: Model(lambda m, x: m.a(x) * (m.b(x).argmax(1, keepdim=True) + 1), a=linear(), b=linear()),
    "gate of no gradient": lambda: Model(lambda m, x: m.a(x) * (m.b(x) > 0), a=linear(), b=linear()),
    "times zero": lambda: Model(lambda m, x: m.a(x) + 0.0 * m.b(x), a=linear(), b=linear()),
    "behind a dead relu": lambda: Model(lambda m, x: m.a(x) + (m.b(x) - 1e6).relu(), a=linear(), b=linear()),
    "nothing at all": lambda: Model(lambda m, x: m.a(x).detach() + x.requires_grad_(), a=linear()),
    "tied, one detached": lambda: tied(),
}  # fmt: skip


def tied() -> Model:
    model = Model(lambda m, x: m.b(m.a((x * 2).long().abs() % 5).mean(1)) - m.a(torch.arange(B) % 5).detach() @ m.c.weight.detach(),
                  a=nn.Embedding(5, 3), b=nn.Linear(3, 5, bias=False), c=nn.Linear(5, 3))  # fmt: skip
    model.b.weight = model.a.weight
    return model


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("case", MODELS)
def test_what_gets_no_gradient_adds_nothing(case: str, micro_batch: int) -> None:
    model, x = MODELS[case](), rows(3)
    assert_right(model, lambda: losses_of(model(x)), micro_batch=micro_batch)


@pytest.mark.parametrize("case", MODELS)
def test_the_gradients_are_those_that_autograd_leaves(case: str) -> None:
    """None where autograd leaves None; and with ``backward=True`` the same bits."""
    model, x = MODELS[case](), rows(3)
    for backward in (False, True):
        engine = GradNorms(model)
        with engine:
            losses = losses_of(model(x))
        norms = engine(losses, backward=backward, retain_graph=True)
        assert_close(norms, group_norms(model, losses), 1e-10) if norms.any() else None
        if not backward:
            engine.weighted_grads_()
        found = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        params = trainable(model)
        for (name, _), grad in zip(
            params.items(), torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True), strict=True
        ):
            ours = found[name]
            assert (grad is None) == (ours is None), name
            if grad is not None and ours is not None:
                torch.testing.assert_close(ours, grad, rtol=0 if backward else 1e-10, atol=0 if backward else 1e-12)


@pytest.mark.parametrize("case", ["detached", "unused", "under no_grad", "a teacher of shared weights", "auxiliary head"])
@pytest.mark.parametrize("again", [False, True])
def test_in_a_checkpoint(case: str, again: bool) -> None:
    """``again``: with layers before and behind it."""
    inner, x = MODELS[case](), rows(3)
    model = nn.Sequential(nn.Linear(3, 3), inner, nn.Linear(3, 2)).double() if again else nn.Sequential(inner)

    def forward() -> Tensor:
        h = model[0](x) if again else x
        h = checkpoint(inner, h, use_reentrant=False)
        return losses_of(model[2](h) if again else h)

    assert_right(model, forward, again=True)


@pytest.mark.parametrize("used", [0, 1])
def test_some_of_several_outputs(used: int) -> None:
    model, x = Model(lambda m, x: m.h(m.a(x)[used]), a=TwoHeads(), h=linear()), rows(3)
    assert_right(model, lambda: losses_of(model(x)), unsupported="vmap")
    attention = Model(some_outputs, a=nn.MultiheadAttention(3, 1, batch_first=True)).train(used == 0)
    assert_right(attention, lambda: losses_of(attention(x.unsqueeze(1) * rows(4, 1))))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_whose_states_are_not_used(kind: Any) -> None:
    model, x = Model(lambda m, x: m.a(x)[0], a=kind(3, 4, batch_first=True)), rows(5, 3)
    assert_right(model, lambda: losses_of(model(x)), unsupported="vmap")
    states = Model(lambda m, x: m.a(x)[1][0] if kind is nn.LSTM else m.a(x)[1], a=kind(3, 4, batch_first=True))
    with pytest.raises(ValueError, match=r"output of a \(.*dimension 0 is not the batch"):  # of the states it is dimension 1
        run_engine(states, lambda: losses_of(states(x)[0]), unsupported="vmap")


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "unused, and its weight": lambda m, x: (m.a(x), F.linear(x, m.a.weight))[1],
    "detached, and its weight": lambda m, x: F.linear(x, m.a.weight) + m.a(x).detach(),
    "under no_grad, and its weight": lambda m, x: F.linear(x, m.a.weight) + under_no_grad(m.a, x),
    "one of three": lambda m, x: m.a(x) + m.a(2 * x).detach() + F.linear(x, m.a.weight),
}


@pytest.mark.parametrize("case", READS)
def test_a_call_without_gradient_excuses_no_read(case: str) -> None:
    model, x = Model(lambda m, x: m.b(READS[case](m, x)), a=linear(), b=linear()), rows(3)
    with pytest.raises(RuntimeError, match=r"losses read a\.weight . times, of which . are calls of its layer"):
        run_engine(model, lambda: losses_of(model(x)))


class Hidden(torch.autograd.Function):
    """Runs a layer with a graph of its own, and differentiates through it in its backward pass."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor, *params: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y, ctx.params = layer(ctx.x), params
        return ctx.y.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_grad, *param_grads = torch.autograd.grad(ctx.y, (ctx.x, *ctx.params), grads[0])
        return (None, x_grad, *[None] * len(param_grads))


class Round(torch.autograd.Function):
    """A straight-through estimator: a custom function that hides nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize("last", [False, True])
def test_a_function_that_hides_a_gradient(last: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = Hidden.apply(m.b, m.a(x), *m.b.parameters())
        return h if last else m.c(h)

    model, x = Model(forward, a=linear(), b=linear(), c=linear()), rows(3)
    with pytest.raises(RuntimeError, match=r"output of b \(Linear\), but may on its parameters: HiddenBackward"):
        run_engine(model, lambda: losses_of(model(x)))


def test_a_function_that_hides_nothing() -> None:
    model, x = Model(lambda m, x: (m.b(m.a(x)), Round.apply(m.a(x)) + m.a(x), m.b(x))[1], a=linear(), b=linear()), rows(3)
    engine, losses, norms = run_engine(model, lambda: losses_of(model(x)))
    assert_close(norms, group_norms(model, losses), 1e-10)
    engine.weighted_grads_()


def test_a_reentrant_checkpoint() -> None:
    model, x = Model(lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=True), a=linear(), b=linear()), rows(3)
    with pytest.raises(RuntimeError, match=r"b \(Linear\) ran inside .* CheckpointFunction, .*use_reentrant=False"):
        run_engine(model, lambda: losses_of(model(x)))
    model.b.requires_grad_(False)  # torch itself wants an ordinary backward pass then
    engine = GradNorms(model)
    with engine:
        losses = losses_of(model(x))
    expected = group_norms(model, losses_of(model.b(model.a(x))))
    assert_close(engine(losses, backward=True), expected, 1e-10)


def test_a_reentrant_checkpoint_of_fused_layers() -> None:
    """In evaluation mode, under the checkpoint's ``no_grad``, torch calls no layer inside a transformer's."""
    block: Any = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    model = Model(lambda m, x: checkpoint(m.block, m.a(x), use_reentrant=True), a=nn.Linear(3, 4), block=block).eval()
    with pytest.raises(RuntimeError, match="reentrant checkpoint"):
        run_engine(model, lambda: losses_of(model(rows(5, 3))))


def test_losses_without_a_graph() -> None:
    model, x = Model(lambda m, x: under_no_grad(m.a, x), a=linear()), rows(3)
    with pytest.raises(RuntimeError, match="losses have no graph"):
        run_engine(model, lambda: losses_of(model(x)))


def test_losses_of_an_earlier_forward_pass_are_refused() -> None:
    model, x = Model(lambda m, x: m.a(x), a=linear()), rows(3)
    earlier = losses_of(model(x))
    engine = GradNorms(model)
    with engine:
        model(x)
    with pytest.raises(RuntimeError, match=r"read a\.weight 1 times, of which 0 are calls"):
        engine(earlier)
