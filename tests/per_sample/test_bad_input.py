"""What is wrong is said before anything is computed, and by its name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms, register_rule
from tests.per_sample.brute import group_norms, run_engine

B = 6


def model_of() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"micro_batch": 0}, ValueError, "micro_batch must be at least 1, got 0"),
        ({"micro_batch": -2}, ValueError, "micro_batch"),
        ({"micro_batch": 2.0}, TypeError, "micro_batch must be an integer"),
        ({"micro_batch": True}, TypeError, "micro_batch"),
        ({"reduction": "none"}, ValueError, "reduction"),
        ({"reduction": None}, (TypeError, ValueError), "reduction"),
        ({"unsupported": "ignore"}, ValueError, "unsupported"),
        ({"batch_first": 1}, TypeError, "batch_first"),
    ],
)
def test_options(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        GradNorms(model_of(), **options)


@pytest.mark.parametrize("model", [None, torch.ones(3), [nn.Linear(3, 3)], nn.Linear])
def test_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        GradNorms(model)


@pytest.mark.parametrize("how", ["wrapped", "inside", "in place", "later"])
def test_a_compiled_model(how: str) -> None:
    model = model_of()
    if how == "later":
        engine = GradNorms(model)
        model.compile()
        with pytest.raises(TypeError, match="is compiled"):
            engine.__enter__()
        return
    if how == "in place":
        model[2].compile()
    wrapped: Any = torch.compile(model) if how == "wrapped" else nn.Sequential(torch.compile(model[0])) if how == "inside" else model
    with pytest.raises(TypeError, match=r"is compiled.*pass the module it was compiled from"):
        GradNorms(wrapped)


LOSSES: dict[str, tuple[Callable[[Tensor], Any], Any, str]] = {
    "0-dim": (lambda out: out.sum(), ValueError, r"losses must have shape \(B,\).*got \(\)"),
    "2-dim": (lambda out: out.sum(1, keepdim=True), ValueError, r"losses must have shape \(B,\).*got \(6, 1\)"),
    "none": (lambda out: out.sum(1)[:0], ValueError, "losses must have shape"),
    "integers": (lambda out: out.argmax(1), TypeError, "losses must be a floating-point tensor"),
    "a list": (lambda out: list(out.sum(1)), TypeError, "losses must be a floating-point tensor"),
    "odd": (lambda out: out.sum(1)[:5], ValueError, "5 losses cannot be cut into micro-batches of 2"),
    "no graph": (lambda out: out.sum(1).detach(), RuntimeError, "losses have no graph"),
    "fewer": (lambda out: out.sum(1)[:4], ValueError, r"2 \(Linear\) has shape \(6, 2\): dimension 0 is not the batch of 4 losses"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_losses(what: str) -> None:
    function, error, words = LOSSES[what]
    model = model_of()
    engine = GradNorms(model, micro_batch=2)
    with engine:
        losses = function(model(torch.randn(B, 3)))
    with pytest.raises(error, match=words):
        engine(losses)


def test_no_forward_pass() -> None:
    model = model_of()
    with pytest.raises(RuntimeError, match=r"no call of a layer.*with engine"):
        GradNorms(model)(model(torch.randn(B, 3)).sum(1))
    with pytest.raises(RuntimeError, match="no call of a layer"):
        run_engine(model.requires_grad_(False), lambda: model(torch.randn(B, 3, requires_grad=True)).sum(1))


def test_an_input_without_a_batch() -> None:
    layer = nn.Linear(3, B)
    with pytest.raises(NotImplementedError, match="one dimension has no batch"):
        run_engine(layer, lambda: layer(torch.randn(3)))


WEIGHTS: dict[str, tuple[Any, Any, str]] = {
    "too many": (torch.ones(B), ValueError, r"weights must have shape \(3,\), got \(6,\)"),
    "2-dim": (torch.ones(3, 1), ValueError, "weights must have shape"),
    "integers": (torch.ones(3, dtype=torch.int64), TypeError, "weights must be a floating-point tensor"),
    "a list": ([1.0, 1.0, 1.0], TypeError, "weights must be a floating-point tensor"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights(what: str) -> None:
    weights, error, words = WEIGHTS[what]
    model = model_of()
    engine, _, norms = run_engine(model, lambda: model(torch.randn(B, 3)).sum(1), micro_batch=2)
    with pytest.raises(error, match=words):
        engine.weighted_grads_(weights)
    assert all(param.grad is None for param in model.parameters())
    engine.weighted_grads_(norms)  # nothing was lost


def test_an_input_modified_in_place() -> None:
    model, x = nn.Linear(3, 4), torch.randn(B, 3)
    engine = GradNorms(model)
    with engine:
        losses = model(x).sum(1)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"an input of the model \(Linear\) has been modified by an inplace operation"):
        engine(losses)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_modules_without_a_rule() -> None:
    """An operation that no rule of a node is for."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.inner = nn.Parameter(torch.ones(2, 3)), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.cdist(x, self.token) @ self.token)

    model = nn.Sequential(nn.Linear(3, 3), Own())
    with pytest.raises(
        NotImplementedError, match=r'1 \(Own\) owns trainable parameters and has no rule.*token.*Write a rule.*"token": \(B, 2, 3\)'
    ):
        run_engine(model, lambda: model(torch.randn(B, 3)).sum(1))
    for module in (nn.Bilinear(3, 3, 2), nn.GRU(3, 3, batch_first=True)):
        inputs = (torch.randn(B, 5, 3),) * (2 if isinstance(module, nn.Bilinear) else 1)
        with pytest.raises(NotImplementedError, match=f"{type(module).__name__}.*has no rule"):
            run_engine(module, lambda module=module, inputs=inputs: _first(module(*inputs)).sum((1, 2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("where", ["input", "loss"])
def test_a_sample_that_is_not_finite_poisons_only_its_own_norm(value: float, micro_batch: int, where: str) -> None:
    """Through every kind of layer but batch normalisation, and a parameter that is shared."""
    conv = nn.Conv2d(2, 2, 3, padding=1)
    body = [conv, nn.GroupNorm(1, 2), conv, nn.InstanceNorm2d(2, affine=True), nn.Flatten(2), nn.LayerNorm(12), nn.Linear(12, 8)]
    model = nn.Sequential(*body, nn.TransformerEncoderLayer(8, 2, 5, batch_first=True, dropout=0.0)).double()
    x = torch.randn(B, 2, 3, 4, dtype=torch.float64)
    expected = group_norms(model, model(x).sin().sum((1, 2)), micro_batch)
    if where == "input":
        x[3, 1, 1, 1] = value
    factors = torch.ones(B, dtype=torch.float64)
    factors[3] = value if where == "loss" else 1.0
    engine, _, norms = run_engine(model, lambda: model(x).sin().sum((1, 2)) * factors, micro_batch=micro_batch)
    poisoned = torch.arange(B // micro_batch) == 3 // micro_batch
    assert not norms[poisoned].isfinite().any()
    torch.testing.assert_close(norms[~poisoned], expected[~poisoned], rtol=1e-10, atol=0.0)
    engine.weighted_grads_(torch.ones_like(norms))
    assert conv.weight.grad is not None
    assert conv.weight.grad.isnan().any()


def test_a_cached_cast_hides_no_read() -> None:
    """Autocast casts a weight once, for its layer and for whoever reads it past that."""
    layer, x = nn.Linear(3, 3), torch.randn(B, 3)
    engine = GradNorms(layer)
    with engine, torch.autocast("cpu", torch.bfloat16):
        losses = (layer(x) + F.linear(x, layer.weight)).float().sum(1)
    with pytest.raises(RuntimeError, match="read weight 2 times, of which 1 are calls"):
        engine(losses)
    with engine, torch.autocast("cpu", torch.bfloat16):
        losses = layer(layer(x)).float().sum(1)
    engine(losses)


def test_vmap_refuses_what_only_looks_like_a_batch() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # (B, T, 3), (T, 1)
            return x @ self.weight.T * gate

    model = Gated()
    engine = GradNorms(model, unsupported="vmap")
    for tokens in (B + 1, B):
        with engine:
            losses = model(torch.randn(B, tokens, 3), torch.randn(tokens, 1)).sum((1, 2))
        if tokens != B:
            engine(losses)
            continue
        with pytest.raises(NotImplementedError, match="not what it is in the batch"):
            engine(losses)


def test_a_rule_that_gives_the_transposed_gradient() -> None:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:  # (B, 3)
            return x @ self.weight.T

    @register_rule(Projection)
    def rule(module: Projection, args: tuple[Tensor], kwargs: dict[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
        return {"weight": args[0].unsqueeze(2) * grad_output.unsqueeze(1)}

    engine = GradNorms(model := Projection())
    with engine:
        losses = model(torch.randn(B, 3)).sum(1)
    with pytest.raises(ValueError, match="gives a gradient of shape"):
        engine(losses)


def test_a_layer_without_inputs_has_a_bias() -> None:
    model = nn.Linear(0, 3)
    engine = GradNorms(model)
    with engine:
        losses = model(torch.randn(B, 2, 0)).sum((1, 2))
    torch.testing.assert_close(engine(losses), torch.full((B,), 2 * 3**0.5))
