"""Parameters that several calls share, nested and frozen parts, outputs used several times: against autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms, _combine
from tests.per_sample.brute import assert_right, run_engine

B = 6
f64 = torch.float64


def losses_of(output: Tensor) -> Tensor:
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


class Model(nn.Module):
    """Modules, and a function of them for the forward pass."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._function = forward
        self.double()
        for param in self.parameters():
            nn.init.normal_(param, std=0.7)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(self, *inputs)


def tied(*, padding_idx: int | None = None, embeddings: int = 1) -> Model:
    def forward(m: Any, ids: Tensor) -> Tensor:
        h = sum(getattr(m, f"embed{i}")(ids.roll(i, 1)) for i in range(embeddings))
        return m.head(torch.tanh(m.mix(h)))

    modules = {f"embed{i}": nn.Embedding(7, 4, padding_idx=padding_idx) for i in range(embeddings)}
    model = Model(forward, mix=nn.Linear(4, 4), head=nn.Linear(4, 7), **modules)
    for i in range(embeddings):
        getattr(model, f"embed{i}").weight = model.head.weight
    return model


def cell(steps: int = 4) -> Model:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for t in range(steps):
            h = torch.tanh(m.i(x[:, t]) + m.h(h))
        return m.o(h)

    return Model(forward, i=nn.Linear(3, 5), h=nn.Linear(5, 5), o=nn.Linear(5, 2))


def two_types() -> Model:
    """One scale of a normalisation and of a PReLU, one bias of a Linear and of a normalisation."""
    model = Model(lambda m, x: m.prelu(m.norm(m.linear(x))), linear=nn.Linear(3, 4), norm=nn.LayerNorm(4), prelu=nn.PReLU(4))
    model.prelu.weight, model.linear.bias = model.norm.weight, model.norm.bias
    return model


def residuals() -> Model:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x + m.a(x)
        return h + m.b(h).relu_() + m.a(h)

    return Model(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3))


def linear_and_transposed() -> Model:
    """An autoencoder whose convolution and its transpose have one weight."""
    model = Model(lambda m, x: m.back(torch.tanh(m.conv(x))), conv=nn.Conv1d(3, 4, 2, stride=2), back=nn.ConvTranspose1d(4, 3, 2, stride=2))
    model.back.weight = model.conv.weight
    return model


def rows(*shape: int) -> Tensor:
    return torch.randn(B, *shape, dtype=f64)


def ids() -> Tensor:
    return torch.randint(0, 7, (B, 5))


CASES: dict[str, tuple[Callable[[], Model], Callable[[], Tensor]]] = {
    "tied": (tied, ids),
    "tied_padding": (lambda: tied(padding_idx=2), ids),
    "tied_three_ways": (lambda: tied(embeddings=2), ids),
    "linear_three_times": (lambda: Model(lambda m, x: m.a(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(3, 3)), lambda: rows(2, 3)),
    "linear_2d_and_3d": (lambda: Model(lambda m, x: m.a(m.a(x).mean(1).tanh()), a=nn.Linear(3, 3)), lambda: rows(4, 3)),
    "cell": (cell, lambda: rows(4, 3)),
    "conv_twice": (lambda: Model(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Conv2d(2, 2, 3, padding=1)), lambda: rows(2, 4, 5)),
    "conv_sizes": (lambda: Model(lambda m, x: m.a(F.max_pool2d(m.a(x), 2)), a=nn.Conv2d(2, 2, 3, padding=1)), lambda: rows(2, 4, 6)),
    "conv_and_transposed": (linear_and_transposed, lambda: rows(3, 6)),
    "norm_twice": (lambda: Model(lambda m, x: m.a(m.a(x).sin()), a=nn.LayerNorm(3)), lambda: rows(4, 3)),
    "two_names": (lambda: Model(lambda m, x: m.b(m.a(x)), **dict.fromkeys("ab", nn.Sequential(nn.Linear(3, 3)))), lambda: rows(3)),
    "two_types": (two_types, lambda: rows(3)),
    "output_used_twice": (lambda: Model(lambda m, x: (h := m.a(x)) * h.sin() + h.cumsum(1), a=nn.Linear(3, 3)), lambda: rows(3)),
    "output_through_views": (lambda: Model(lambda m, x: m.a(x)[:, :2] * m.a(x)[:, 1:].exp(), a=nn.Linear(3, 3)), lambda: rows(3)),
    "residuals": (residuals, lambda: rows(2, 3)),
    "parallel": (lambda: Model(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Linear(3, 3), b=nn.Linear(3, 2)), lambda: rows(3)),
}  # fmt: skip


@pytest.mark.parametrize("micro_batch", [1, 2, B])
@pytest.mark.parametrize("case", CASES)
def test_shared(case: str, micro_batch: int) -> None:
    make, inputs = CASES[case]
    model, x = make(), inputs()
    assert_right(model, lambda: losses_of(model(x)), micro_batch=micro_batch)


@pytest.mark.parametrize("case", ["conv_sizes", "conv_and_transposed", "tied_padding"])
def test_some_groups_at_a_time(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_combine, "_TEMPORARY", 1)
    test_shared(case, 2)


@pytest.mark.parametrize("case", ["tied_three_ways", "two_types", "cell", "conv_sizes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_in_16_bits(case: str, dtype: torch.dtype) -> None:
    """About dtypes that meet; the accuracy is that of tests/per_sample/test_precision.py."""
    make, inputs = CASES[case]
    model, x = make().to(dtype), inputs()
    engine, _, norms = run_engine(model, lambda: losses_of(model(x.to(dtype) if x.is_floating_point() else x).float()))
    assert norms.dtype is torch.float32
    assert norms.isfinite().all()
    engine.weighted_grads_(norms)
    assert all(param.grad is not None and param.grad.dtype is dtype for param in model.parameters())


def nested() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(inplace=True))
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Sequential(inner, nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 2)
    ).double()


@pytest.mark.parametrize("frozen", ["0.", "2.0.", "2.1.", "3.", "bias", "weight", "2.0.0.bias", "nothing"])
@pytest.mark.parametrize("wants_grad", [False, True])
def test_frozen_parts(frozen: str, wants_grad: bool) -> None:
    model, x = nested(), rows(5, 3).requires_grad_(wants_grad)
    for name, param in model.named_parameters():
        param.requires_grad_(not (name.startswith(frozen) or name.endswith(frozen)))
    assert_right(model, lambda: losses_of(model(x)), micro_batch=3)
    assert x.grad is None


def test_an_unused_module_has_no_gradient() -> None:
    model = Model(lambda m, x: m.a(x), a=nn.Linear(3, 3), unused=nn.Linear(3, 3))
    x = rows(3)
    assert_right(model, lambda: losses_of(model(x)))


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("a.weight 2 times, of which 1 are", lambda m, x: F.linear(m.a(x), m.a.weight)),
        ("a.weight 1 times, of which 0 are", lambda m, x: m.a.forward(x)),
        ("a.weight 2 times, of which 1 are", lambda m, x: m.a(x) + m.a.weight.square().sum()),
        ("e.weight 2 times, of which 1 are", lambda m, x: F.linear(m.e(x.long()).mean(1), m.e.weight)),
    ],
)
def test_a_parameter_read_past_its_layer_is_refused(what: str, function: Callable[..., Tensor]) -> None:
    """It would be left out of the norm."""
    model = Model(function, a=nn.Linear(3, 3), k=nn.Linear(3, 3), e=nn.Embedding(5, 3))
    engine = GradNorms(model)
    with engine:
        losses = losses_of(model(rows(3)) + model.k(rows(3)) if what[0] == "a" else model(torch.ones(B, 3)))
    with pytest.raises(RuntimeError, match=f"read {what} calls of its layer"):
        engine(losses)


def test_gradients_accumulate() -> None:
    model, batches = nested(), [rows(3), rows(3)]
    for x in batches:
        engine, _, norms = run_engine(model, lambda x=x: losses_of(model(x)))
        engine.weighted_grads_(torch.ones_like(norms))
    expected = torch.autograd.grad(sum(losses_of(model(x)).sum() for x in batches), list(model.parameters()))
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, grad, rtol=1e-10, atol=1e-12)


def test_two_passes_in_one_block() -> None:
    """Two views of the same samples."""
    model, x, y = nested(), rows(3), rows(3)
    assert_right(model, lambda: losses_of(model(x) * model(y)), micro_batch=2)


def test_the_models_own_hooks_stay_what_they_do() -> None:
    model, x = nested(), rows(3)
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[3].register_full_backward_hook(lambda module, grad_input, grad_output: (3 * grad_input[0],))
    assert_right(model, lambda: losses_of(model(x)))
