"""A parameter under two names: in one module, in a parent and a child, in two children; by rules where they suffice, else by vmap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_kernels.per_sample import GradNorms, _recorder, _registry, register_rule
from tests.per_sample.brute import assert_close, assert_right, group_norms

B = 6
f64 = torch.float64


class Model(nn.Module):
    """With parameters of its own that are those of its layers, ``aliases``: their names here and there."""

    def __init__(self, function: Callable[..., Tensor], aliases: dict[str, str], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.double()
        for name, target in aliases.items():
            self.register_parameter(name, self.get_parameter(target))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Mul(nn.Module):
    """Two names for what it multiplies by."""

    def __init__(self, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=f64)) if weight is None else weight
        self.v = self.w

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).tanh() @ self.v.T


def linear() -> nn.Module:
    return nn.Linear(3, 3)


def rows(*shape: int) -> Tensor:
    return torch.randn(B, *shape, dtype=f64)


def losses_of(output: Tensor) -> Tensor:
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def tied_bias() -> Model:
    norm = nn.LayerNorm(3)
    norm.bias = norm.weight
    return Model(lambda m, x: m.a(x), {}, a=norm)


def siblings(kind: Any = Mul) -> Model:
    first = kind()
    return Model(lambda m, x: m.b(m.a(x)), {}, a=first, b=kind(first.w))


W = {"w": "a.weight"}
ALIASES: dict[str, Callable[[], Model]] = {
    "never read by its second name": lambda: Model(lambda m, x: m.a(x).tanh(), W, a=linear()),
    "read by both": lambda: Model(lambda m, x: m.a(x).tanh() @ m.w, W, a=linear()),
    "read by the second alone": lambda: Model(lambda m, x: x @ m.w, W, a=linear()),
    "the layer's weight read directly": lambda: Model(lambda m, x: F.linear(x, m.a.weight), W, a=linear()),
    "read three ways": lambda: Model(lambda m, x: F.linear(m.a(x).tanh() @ m.w, m.a.weight), W, a=linear()),
    "the layer called twice": lambda: Model(lambda m, x: m.a(m.a(x).tanh()) @ m.w, W, a=linear()),
    "called twice, never read": lambda: Model(lambda m, x: m.a(m.a(x).tanh()), W, a=linear()),
    "of two, one read": lambda: Model(lambda m, x: m.b(m.a(x)) + m.w, {"w": "a.bias", "v": "b.bias"}, a=linear(), b=linear()),
    "another layer between": lambda: Model(lambda m, x: m.b(m.a(x)).tanh() @ m.w, W, a=linear(), b=nn.LayerNorm(3)),
    "nested": lambda: Model(
        lambda m, x: m.p(x) @ m.w, {"w": "p.w"}, p=Model(lambda m, x: m.a(x).tanh() @ m.w.T, W, a=linear())
    ),
    "nested, the outer never read": lambda: Model(
        lambda m, x: m.p(x), {"w": "p.w"}, p=Model(lambda m, x: m.a(x).tanh() @ m.w.T, W, a=linear())
    ),
    "the layer called outside too": lambda: outside(),
    "two names in a module": lambda: Model(lambda m, x: m.a(x), {}, a=Mul()),
    "two names in a module and its parent": lambda: Model(lambda m, x: m.a(x) @ m.w, {"w": "a.w"}, a=Mul()),
    "siblings": siblings,
    "a second name of an attention's weight": lambda: Model(
        lambda m, x: m.a(x.unsqueeze(1).expand(-1, 2, 3), *[x.unsqueeze(1).expand(-1, 2, 3).sin()] * 2)[0].mean(1) @ m.w[:3],
        {"w": "a.in_proj_weight"}, a=nn.MultiheadAttention(3, 1, batch_first=True)
    ),
    "a detached layer": lambda: Model(lambda m, x: (m.a(x).detach() + x) @ m.w, W, a=linear()),
    "a detached second name": lambda: Model(lambda m, x: m.a(x) @ m.w.detach(), W, a=linear()),
    "in a checkpoint": lambda: Model(lambda m, x: checkpoint(m.p, x, use_reentrant=False), {}, p=ALIASES["read by both"]()),
}  # fmt: skip
BY_RULES = [
    "never read by its second name", "called twice, never read", "a detached second name", "second name on the layer", "tied bias",
    "second name on a layer without bias",
]  # fmt: skip


def outside() -> Model:
    inner = Model(lambda m, x: m.a(x).tanh() @ m.w, W, a=linear())
    return Model(lambda m, x: m.p.a(m.p(x)), {}, p=inner)


def second_name(bias: bool) -> Model:
    layer = nn.Linear(3, 3, bias=bias)
    layer.register_parameter("alias", layer.weight)
    return Model(lambda m, x: m.a(x), {}, a=layer)


OF_LAYERS = {
    "second name on the layer": lambda: second_name(True),
    "second name on a layer without bias": lambda: second_name(False),
    "tied bias": tied_bias,
}


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("case", [*ALIASES, *OF_LAYERS])
def test_by_vmap(case: str, micro_batch: int) -> None:
    model, x = (ALIASES | OF_LAYERS)[case](), rows(3)
    assert_right(model, lambda: losses_of(model(x)), micro_batch=micro_batch, unsupported="vmap", again=True)


@pytest.mark.parametrize("unsupported", ["error", "vmap"])
@pytest.mark.parametrize("case", BY_RULES)
def test_what_layers_read_alone_needs_no_vmap(case: str, unsupported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recorder, "by_vmap", lambda *args, **kwargs: pytest.fail("called"))
    model, x = (ALIASES | OF_LAYERS)[case](), rows(3)
    assert_right(model, lambda: losses_of(model(x)), unsupported=unsupported)


@pytest.mark.parametrize("case", ["read by both", "read by the second alone", "the layer's weight read directly", "of two, one read"])
def test_a_read_of_the_second_name_is_found_in_the_graph(case: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3).double(), ALIASES[case]()), rows(3)
    assert_right(model, lambda: losses_of(model(x)))


def test_a_second_name_of_an_attentions_weight_is_an_error() -> None:
    """How often an attention reads its weights is not counted."""
    model = Model(lambda m, x: m.a(x, x, x)[0], {"w": "a.in_proj_weight"}, a=nn.MultiheadAttention(3, 1).double())
    engine = GradNorms(model)
    with engine:
        losses = losses_of(model(torch.randn(4, 2, 3, dtype=f64)))
    with pytest.raises(ValueError, match=r"losses\[i\] does not belong to row i of the output of w of the model \(Model\)"):
        engine(losses)


class Tied(nn.Module):
    """A language model that keeps its embedding under a second name."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(7, 3), nn.Linear(3, 3)
        self.tied = self.embedding.weight
        if head:
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.body(self.embedding(ids)).tanh()
        return self.head(h) if hasattr(self, "head") else h @ self.tied.T


@pytest.mark.parametrize("head", [False, True])
def test_a_tied_embedding_under_a_second_name(head: bool) -> None:
    model, ids = Tied(head).double(), torch.randint(0, 7, (B, 4))
    assert_right(model, lambda: losses_of(model(ids)), unsupported="vmap", micro_batch=2)
    if head:
        assert_right(model, lambda: losses_of(model(ids)))


@pytest.mark.parametrize("apart", [False, True])
def test_a_rule_for_two_names(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gives a gradient for each use, and one that gives all of it by one name."""
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))

    @register_rule(Mul)
    def rule(module: Mul, args: Any, kwargs: Any, grad: Tensor) -> Any:
        h = (args[0] @ module.w).tanh()
        first = args[0].unsqueeze(2) * ((grad @ module.v) * (1 - h**2)).unsqueeze(1)
        second = grad.unsqueeze(2) * h.unsqueeze(1)
        return {"w": first, "v": second} if apart else {"v": first + second}

    model, x = Mul(), rows(3)
    assert_right(model, lambda: losses_of(model(x)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, dtype=f64))
        self.kept = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.scale
        self.kept = h.square().sum(-1, keepdim=True)
        return h * self.scale


def by_attribute_alone(m: Any, x: Tensor) -> Tensor:
    m.a(x)
    return x + m.a.kept


PAST: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a penalty": (lambda m, x: m.a(x) + m.a.scale.square().sum(), r"read a\.scale . times"),
    "read before": (lambda m, x: m.a(x + m.a.scale.exp()), r"read a\.scale . times"),
    "read between two calls": (lambda m, x: m.a(m.a(x) * m.a.scale), r"read a\.scale . times"),
    "an attribute": (lambda m, x: m.a(x) + m.a.kept, r"read a\.scale inside its module, but not by way of the module's output"),
    "an attribute alone": (by_attribute_alone, r"read a\.scale . times, of which 0"),
}


@pytest.mark.parametrize("how", ["vmap", "a rule"])
@pytest.mark.parametrize("case", [*PAST, "the output alone"])
def test_reads_past_a_module_that_reads_often(case: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be left out of the norm, as those past a layer would."""
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    if how == "a rule":
        register_rule(Scale, lambda module, args, kwargs, grad: {"scale": 2 * args[0] * grad * module.scale})
    options: Any = {"unsupported": "vmap"} if how == "vmap" else {}
    if case == "the output alone":
        model, x = Model(lambda m, x: m.a(m.a(x).tanh()) + x, {}, a=Scale()), rows(3)
        assert_right(model, lambda: losses_of(model(x)), **options)
        return
    function, words = PAST[case]
    model, x = Model(function, {}, a=Scale()), rows(3)
    engine = GradNorms(model, **options)
    with engine:
        losses = losses_of(model(x))
    with pytest.raises(RuntimeError, match=words):
        engine(losses)


def test_reads_past_an_attention() -> None:
    attention: Any = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = rows(3, 4)
    for name, param in attention.named_parameters():
        engine = GradNorms(attention)
        with engine:
            losses = losses_of(attention(x, x.sin(), x)[0]) + param.square().sum()
        with pytest.raises(RuntimeError, match=f"read {name} . times"):
            engine(losses)
    assert_right(attention, lambda: losses_of(attention(x, x.sin(), attention(x, x, x)[0])[0]))


def test_an_interrupted_call_leaves_no_extent() -> None:
    model, x = Model(lambda m, x: m.a(x).tanh() @ m.w, W, a=linear()), rows(3)
    engine = GradNorms(model, unsupported="vmap")
    with engine:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(rows(2))
        losses = losses_of(model(x))
    assert_close(engine(losses, retain_graph=True), group_norms(model, losses), 1e-10)
    assert not engine._recorder._extents
    assert not engine._recorder._spans


@pytest.mark.parametrize("where", ["parameter", "output"])
def test_complex_layers_are_named(where: str) -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x) * self.scale

    layer = nn.Linear(3, 3, dtype=torch.complex64) if where == "parameter" else Filter()
    model = nn.Sequential(nn.Linear(3, 3), layer)
    words = r"1 \(Linear\): parameter weight has dtype torch\.complex64" if where == "parameter" else r"1 \(Filter\) is a torch\.complex64"
    with pytest.raises(NotImplementedError, match=words), GradNorms(model, unsupported="vmap"):
        model(torch.randn(B, 3) if where == "output" else torch.randn(B, 3, dtype=torch.complex64))
    layer.requires_grad_(False)
    x = torch.randn(B, 3)
    if where == "output":
        assert_right(model, lambda: model(x).abs().sum(1), relative=1e-4)


def test_an_attention_beside_a_module_of_another_kind() -> None:
    model = nn.ModuleList([Scale(), nn.MultiheadAttention(3, 1, batch_first=True).double()])
    x = rows(4, 3)
    assert_right(model, lambda: losses_of(model[1](*[model[0](x)] * 3)[0]), unsupported="vmap")
    assert_right(model, lambda: losses_of(model[0](model[1](x, x, x)[0])), unsupported="vmap")
