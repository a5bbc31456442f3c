"""Parameters of modules without a rule: what the graph shows, against a backward pass for each sample. Modules as models have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_right, group_norms, run_engine

B, T, D = 4, 4, 6  # as many samples as positions: a shape does not tell them apart
f64 = torch.float64


class Own(nn.Module):
    """Parameters of its own, and a function of them and of x (B, T, D)."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **params: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in params.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def standardized(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 0.1)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def planes(x: Tensor) -> Tensor:  # (B, D, T)
    return x.transpose(1, 2)


def windows(m: Any, x: Tensor) -> Tensor:
    """Two windows a sample, as dimension 0 of twice the batch, with a table of biases as of a shifted-window attention."""
    cut = x.view(2 * B, T // 2, D)
    scores = cut @ cut.mT + m.table[torch.tensor([[0, 1], [2, 0]]).view(-1)].view(2, 2).unsqueeze(0)
    return (scores.softmax(-1) @ cut).view(B, T, D)


CASES: dict[str, Callable[[], nn.Module]] = {
    "scale": lambda: Own(lambda m, x: x * m.w, w=(D,)),
    "one plus": lambda: Own(lambda m, x: rms(x) * (1.0 + m.w), w=(D,)),
    "scale of channels": lambda: Own(lambda m, x: planes(planes(x) * m.w), w=(D, 1)),
    "gain": lambda: Own(lambda m, x: x.tanh() * m.w, w=()),
    "divided": lambda: Own(lambda m, x: m.a / (x.square() + 1) - x / (m.b.square() + 1), a=(D,), b=(T, 1)),
    "token": lambda: Own(lambda m, x: torch.cat([m.w.expand(len(x), -1, -1), x], 1), w=(1, 1, D)),
    "repeated": lambda: Own(lambda m, x: torch.cat([m.w.repeat(len(x), 2, 1), x], 1), w=(2, D)),
    "positions": lambda: Own(lambda m, x: x + m.w, w=(1, T, D)),
    "positions of no batch": lambda: Own(lambda m, x: x - 2 * m.w, w=(T, D)),
    "conv1d of gpt2": lambda: Own(lambda m, x: torch.addmm(m.b, x.view(-1, D), m.w).view(B, T, 3), w=(D, 3), b=(3,)),
    "linear": lambda: Own(lambda m, x: F.linear(x, m.w, m.b), w=(3, D), b=(3,)),
    "standardized kernel": lambda: Own(
        lambda m, x: F.conv1d(planes(x), standardized(m.w) * m.g, m.b, padding=1), w=(5, D, 3), g=(5, 1, 1), b=(5,)
    ),
    "transposed": lambda: Own(lambda m, x: F.conv_transpose1d(planes(x), m.w, m.b, 2), w=(D, 5, 3), b=(5,)),
    "embedding": lambda: Own(lambda m, x: x + F.embedding((x[..., 0] > 0).long(), m.w, 1), w=(2, D)),
    "layer norm": lambda: Own(lambda m, x: F.layer_norm(x, (D,), m.w, m.b), w=(D,), b=(D,)),
    "layer norm of rows": lambda: Own(lambda m, x: F.layer_norm(x.view(-1, D), (D,), m.w, m.b).view(B, T, D), w=(D,), b=(D,)),
    "group norm": lambda: Own(lambda m, x: F.group_norm(planes(x), 2, m.w, m.b), w=(D,), b=(D,)),
    "batch norm": lambda: Own(lambda m, x: F.batch_norm(planes(x), x.new_zeros(D), x.new_ones(D), m.w, m.b), w=(D,), b=(D,)),
    "of batch statistics": lambda: Own(lambda m, x: F.batch_norm(planes(x), None, None, m.w, m.b, training=True), w=(D,), b=(D,)),
    "low rank": lambda: Own(lambda m, x: x + (x @ m.a) @ (m.b * m.s), a=(D, 2), b=(2, D), s=()),
    "magnitude": lambda: Own(lambda m, x: (m.s / m.w.norm(dim=1).detach()).view(1, -1) * F.linear(x, m.w), w=(3, D), s=(3,)),
    "windows": lambda: Own(windows, table=(3,)),
    "normalised positions": lambda: Own(lambda m, x: x + F.layer_norm(m.w, (D,), m.s), w=(1, T, D), s=(D,)),
    "used twice": lambda: Own(lambda m, x: (x * m.w).tanh() * m.w + m.w, w=(D,)),
    "in no loss": lambda: Own(lambda m, x: x * m.w + (m.unused * x).detach(), w=(D,), unused=(D,)),
}


def model_of(case: str) -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleList([nn.Linear(D, D), CASES[case](), nn.Linear(3, 3)]).double()


def losses_of(model: Any, x: Tensor) -> Tensor:
    first, own, last = model
    return last(own(first(x)).flatten(1)[:, :12].view(B, -1, 3)).sin().sum((1, 2))


@pytest.mark.parametrize("case", [case for case in CASES if case != "of batch statistics"])
def test_the_graph_gives_the_gradients_of_samples(case: str) -> None:
    model, x = model_of(case), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: losses_of(model, x))


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"micro_batch": 2, "reduction": "mean"}], ids=str)
@pytest.mark.parametrize("case", ["one plus", "conv1d of gpt2", "standardized kernel", "positions", "windows"])
def test_micro_batches(case: str, options: dict[str, Any]) -> None:
    model, x = model_of(case), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: losses_of(model, x), **options)


def test_batch_statistics_give_parts_of_the_batchs_gradient() -> None:
    model, x = model_of("of batch statistics"), torch.randn(B, T, D, dtype=f64)
    engine, losses, _ = run_engine(model, lambda: losses_of(model, x))
    params = list(model[1].parameters())
    expected = torch.autograd.grad(losses.sum(), params)
    engine.weighted_grads_(torch.ones(B))
    for param, right in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, right)


@pytest.mark.parametrize("case", ["one plus", "positions", "layer norm of rows", "magnitude"])
def test_norms_beside_an_ordinary_backward_pass(case: str) -> None:
    model, x = model_of(case), torch.randn(B, T, D, dtype=f64)
    engine = GradNorms(model)
    for keep in (True, False):
        with engine:
            losses = losses_of(model, x)
        expected = group_norms(model, losses)
        norms = engine(losses, backward=True) if keep else engine(losses, keep=False)
        torch.testing.assert_close(norms, expected)


def test_over_the_parameters_of_the_graph_alone() -> None:
    model, x = model_of("used twice"), torch.randn(B, T, D, dtype=f64)
    own = model[1]
    assert isinstance(own, Own)
    _, losses, norms = run_engine(model, lambda: losses_of(model, x), over=own.parameters())
    grads = [torch.autograd.grad(loss, list(own.parameters()), retain_graph=True) for loss in losses]
    torch.testing.assert_close(norms, torch.stack([each[0].norm() for each in grads]))


def test_positions_of_an_embedding() -> None:
    """Its output has no batch: (T, D), or (1, T, D)."""
    table = nn.Embedding(9, D).double()
    model, x = nn.ModuleList([nn.Linear(D, D), table]).double(), torch.randn(B, T, D, dtype=f64)
    for places in (torch.arange(T), torch.arange(T).view(1, T), torch.tensor([[2, 2, 0, 5]])):
        assert_right(model, lambda places=places: (model[0](x) + table(places).tanh()).sin().sum((1, 2)))


def test_a_tied_embedding_with_a_forward_of_its_own() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 2.0

    embedding, head = Scaled(7, D), nn.Linear(D, 7, bias=False)
    head.weight = embedding.weight
    model, ids = nn.Sequential(embedding, nn.Linear(D, D), nn.Tanh(), head).double(), torch.randint(7, (B, T))
    assert_right(model, lambda: model(ids).sin().sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The cast of a parameter is a part of its value."""
    torch.manual_seed(3)
    model, x = nn.ModuleList([nn.Linear(D, D), CASES["linear"](), nn.Linear(3, 3)]), torch.randn(B, T, D)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            return losses_of(model, x).float()

    assert_right(model, forward, relative=2.0**-7 if dtype is torch.bfloat16 else 1e-5)


def test_a_penalty_that_each_loss_has() -> None:
    model, x = model_of("scale"), torch.randn(B, T, D, dtype=f64)
    own: Any = model[1]
    assert_right(model, lambda: losses_of(model, x) + own.w.square().sum())


# --- what is refused ---


def test_a_square_of_positions_that_is_as_large_as_the_batch() -> None:
    """Offsets (T, T) of T = B positions have the shape of tokens (B, T)."""
    model, x = nn.ModuleList([nn.Linear(D, D), nn.Embedding(9, 1)]).double(), torch.randn(B, T, D, dtype=f64)
    offsets = torch.arange(T).view(T, 1) - torch.arange(T) + T

    def forward(count: int) -> Tensor:
        first = model[0](x[:count])
        return ((first @ first.mT + model[1](offsets).squeeze(2)).softmax(-1) @ first).sin().sum((1, 2))

    assert_right(model, lambda: forward(3))
    assert "losses[i] does not belong to row i of the output of 1 (Embedding)" in _error(model, lambda: forward(B))


def _error(model: nn.Module, forward: Callable[[], Tensor]) -> str:
    with pytest.raises((NotImplementedError, ValueError)) as caught:
        run_engine(model, forward)
    return str(caught.value)


def test_a_batch_that_is_dimension_1_is_found_out() -> None:
    """As many positions as samples, and rows that a shape takes for those of the batch."""
    model, x = model_of("scale"), torch.randn(T, B, D, dtype=f64)
    assert "losses[i] does not belong to row i" in _error(model, lambda: model[1](model[0](x)).sum((0, 2)))


def test_an_operation_without_a_rule() -> None:
    model = nn.ModuleList([nn.Linear(D, D), Own(lambda m, x: torch.cdist(x, m.w), w=(2, D))]).double()
    x = torch.randn(B, D, dtype=f64)
    message = _error(model, lambda: model[1](model[0](x)).sum(1))
    assert "1 (Own) owns trainable parameters and has no rule" in message
    assert "w: a value of shape (2, 6) goes into CdistBackward0, whose output has shape (4, 2)" in message


class Hidden(torch.autograd.Function):
    """Reads a parameter that it is not given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        return x * module.w.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # torch's takes any
        return grad, None


def test_a_function_may_hide_a_parameter() -> None:
    model = nn.ModuleList([nn.Linear(D, D), Own(lambda m, x: Hidden.apply(x, m), w=(D,)), nn.Linear(3, 3)]).double()
    x = torch.randn(B, T, D, dtype=f64)
    assert "a function that may hide it" in _error(model, lambda: losses_of(model, x))
