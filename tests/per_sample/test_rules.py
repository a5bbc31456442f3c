"""Layers of one's own: rules in every form, and what takes a module without one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels.per_sample import Convolution, GradNorms, Outer, Rows, _registry, register_rule
from tests.per_sample.brute import assert_right, run_engine

B = 6
f64 = torch.float64


@pytest.fixture(autouse=True)
def _rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    return


class Mul(nn.Module):
    """Its weight on the other side than Linear's."""

    def __init__(self, d: int = 3, p: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, p, dtype=f64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Child(Mul):
    pass


class OwnForward(Mul):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def losses_of(output: Tensor) -> Tensor:
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def tensor_form(module: Any, args: Any, kwargs: Any, grad: Tensor) -> Any:
    return {"weight": torch.einsum("btd,btp->bdp", args[0], grad)}


def outer_form(module: Any, args: Any, kwargs: Any, grad: Tensor) -> Any:
    return {"weight": Outer(args[0], grad)}


@pytest.mark.parametrize("form", [tensor_form, outer_form])
@pytest.mark.parametrize("kind", [Mul, Child])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_forms(form: Any, kind: type[Mul], micro_batch: int) -> None:
    assert register_rule(Mul, form) is form
    model, x = nn.Sequential(kind(), nn.Tanh(), nn.Linear(4, 2).double()), torch.randn(B, 5, 3, dtype=f64)
    assert_right(model, lambda: losses_of(model(x)), micro_batch=micro_batch)


def test_decorator_and_a_later_rule() -> None:
    register_rule(Mul, lambda *_: {})

    @register_rule(Mul)
    def rule(module: Any, args: Any, kwargs: Any, grad: Tensor) -> Any:
        return outer_form(module, args, kwargs, grad)

    model, x = Mul(), torch.randn(B, 5, 3, dtype=f64)
    assert_right(model, lambda: losses_of(model(x)))


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_forward_of_its_own_is_found_in_the_graph(where: str) -> None:
    """The rule is not called: it is for another ``forward``."""
    register_rule(Mul, lambda *_: pytest.fail("called"))
    model = OwnForward() if where == "class" else Mul()
    if where == "instance":
        model.forward = lambda x: 2 * Mul.forward(model, x)
    data = torch.randn(B, 5, 3, dtype=f64)
    assert_right(model, lambda: losses_of(model(data)))


g, x = torch.ones(B, 5, 4), torch.ones(B, 5, 3)
WRONG = {
    "no batch": torch.ones(3, 4),
    "a number": torch.tensor(1.0),
    "another shape": torch.ones(B, 4, 4),
    "sides exchanged": Outer(g, x),
    "rows": Rows(torch.zeros(B, 5, dtype=torch.int64), x),
    "convolution": Convolution(torch.ones(B, 3, 5), torch.ones(B, 4, 5), (1,), (1,), (0,), (1,)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_shapes(what: str) -> None:
    register_rule(Mul, lambda *_: {"weight": WRONG[what]})
    model = Mul()
    with pytest.raises(ValueError, match=rf"rule for the model \(Mul\) gives .* for weight, expected \({B}, 3, 4\)"):
        run_engine(model, lambda: losses_of(model(torch.randn(B, 5, 3, dtype=f64))))


def test_no_gradient_and_no_tensor() -> None:
    model = Mul()
    for found, error, words in (({}, NotImplementedError, "gives no gradient for weight"), ({"weight": 1.0}, TypeError, "for weight")):
        register_rule(Mul, lambda *_, found=found: found)
        with pytest.raises(error, match=rf"rule for the model \(Mul\) .*{words}"):
            run_engine(model, lambda: losses_of(model(torch.randn(B, 5, 3, dtype=f64))))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="module_type must be a subclass"):
        register_rule(torch.sin, tensor_form)
    with pytest.raises(TypeError, match="rule must be callable"):
        register_rule(Mul, 3)
    with pytest.raises(ValueError, match=r"Outer: expected \(B, T, p\)"):
        Outer(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"Rows: expected \(B, T\)"):
        Rows(torch.zeros(2, 3), torch.ones(2, 4, 3))


class Several(nn.Module):
    """Several inputs, one by keyword, and a tuple of outputs of which one is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, dtype=f64)), nn.Parameter(torch.randn(3, 3, dtype=f64))
        self.inner = nn.Linear(3, 3).double()

    def forward(self, x: Tensor, y: Tensor, *, z: Tensor | None = None, factor: float = 1.0) -> tuple[Tensor, ...]:
        out = self.inner(x * self.a) + factor * (y if z is None else z) @ self.b
        return out, out, out.cumsum(1) * self.a, torch.tensor(3)


class Outputs(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = self.module(*args, **kwargs)
        return found[0] if isinstance(self.module, nn.RNNBase) else found[0] * found[1] + found[2]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_vmap_of_several_inputs(micro_batch: int) -> None:
    model = Outputs(Several())
    x, y, z = (torch.randn(B, 3, dtype=f64) for _ in range(3))
    options: Any = {"unsupported": "vmap", "micro_batch": micro_batch}
    assert_right(model, lambda: losses_of(model(x, y)), **options)
    assert_right(model, lambda: losses_of(model(x, y, z=z, factor=3.0)), **options)
    bilinear = nn.Bilinear(3, 3, 2).double()
    assert_right(bilinear, lambda: losses_of(bilinear(x, y)), **options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_vmap_of_recurrent_layers(kind: type[nn.RNNBase], batch_first: bool) -> None:
    model = Outputs(kind(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)).double()
    x = torch.randn(B, 5, 3, dtype=f64) if batch_first else torch.randn(5, B, 3, dtype=f64)

    def forward() -> Tensor:
        return losses_of(model(x) if batch_first else model(x).transpose(0, 1))

    assert_right(model, forward, unsupported="vmap", batch_first=batch_first)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Around(nn.Dropout(0.5)), "random numbers"),
        (Outputs(nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)), "random numbers"),
        (Around(nn.BatchNorm1d(5)), "statistics from the whole batch"),
    ],
)
def test_what_vmap_cannot_do(module: nn.Module, words: str) -> None:
    engine = GradNorms(module, unsupported="vmap")
    with engine:
        losses = losses_of(module(torch.randn(B, 5, 4)))
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=words):
        engine(losses)
    assert torch.equal(torch.get_rng_state(), state)
    module.eval()
    run_engine(module, lambda: losses_of(module(torch.randn(B, 5, 4))), unsupported="vmap")


def test_vmap_of_a_state_whose_batch_is_elsewhere() -> None:
    model = Outputs(nn.GRU(3, 4, batch_first=True)).double()
    with pytest.raises(NotImplementedError, match="cannot be called with one sample"):
        run_engine(model, lambda: losses_of(model(torch.randn(B, 5, 3, dtype=f64), torch.zeros(1, B, 4, dtype=f64))), unsupported="vmap")


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("unsupported", ["error", "vmap"])
def test_parametrized_weights(name: str, unsupported: str) -> None:
    model = getattr(torch.nn.utils.parametrizations, name)(nn.Linear(4, 4))
    data = torch.randn(B, 4)
    model.eval()
    assert_right(model, lambda: losses_of(model(data)), relative=1e-5, unsupported=unsupported)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.parametrizations.requires_grad_(False)  # what is frozen is no trouble
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    assert_right(model, lambda: losses_of(model(data)), relative=1e-5, unsupported=unsupported)
