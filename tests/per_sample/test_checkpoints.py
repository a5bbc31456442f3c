"""Parameters without a rule, inside checkpoints: the nodes of the graph give a rule the tensors that they need themselves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from sam_kernels import RWSAM
from sam_kernels.per_sample import GradNorms, _rereading
from tests.per_sample.brute import assert_right, group_norms, run_engine
from tests.per_sample.test_graph_reads import CASES, B, D, Own, T, f64, losses_of, model_of, rms

ALONE = [case for case in CASES if case != "of batch statistics"]


class Block(nn.Module):
    """A module without a rule and a layer, in a checkpoint. Keeps weak references to what lies between the two."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.runs = own, 0
        self.inside: list[weakref.ref[Tensor]] = []

    def forward(self, h: Tensor) -> Tensor:
        self.runs += 1
        h = h.tanh()
        self.inside.append(weakref.ref(h))
        return self.own(h).cos()  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, case: str, depth: int = 1) -> None:
        super().__init__()
        self.first, own, self.last = model_of(case)
        self.block, self.depth = Block(own), depth

    def _run(self, h: Tensor, depth: int) -> Tensor:
        if depth == 0:
            return self.block(h)  # type: ignore[no-any-return]
        return checkpoint(self._run, h, depth - 1, use_reentrant=False)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return losses_of([self.first, lambda h: self._run(h, self.depth), self.last], x)


@pytest.mark.parametrize("case", ALONE)
def test_the_gradients_of_samples_inside_a_checkpoint(case: str) -> None:
    model, x = Model(case), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: model(x), again=True)


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"micro_batch": 2, "reduction": "mean"}], ids=str)
@pytest.mark.parametrize("case", ["one plus", "standardized kernel"])
def test_micro_batches_and_checkpoints_in_checkpoints(case: str, options: dict[str, Any]) -> None:
    model, x = Model(case, depth=2), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: model(x), again=True, **options)


@pytest.mark.parametrize("case", ["one plus", "token", "conv1d of gpt2", "embedding", "low rank"])
def test_a_checkpoint_around_the_whole_model(case: str) -> None:
    model, x = model_of(case), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: checkpoint(losses_of, model, x, use_reentrant=False), again=True)


@pytest.mark.parametrize("case", ["scale", "gain", "conv1d of gpt2", "normalised positions"])
def test_all_ways_to_the_gradients(case: str) -> None:
    model, x = Model(case), torch.randn(B, T, D, dtype=f64)
    expected = group_norms(model, model(x))
    model(x).sum().backward()
    gradients = [param.grad for param in model.parameters()]
    for how in ("ordinary", "not kept", "weighted backward"):
        model.zero_grad()
        engine = GradNorms(model)
        with engine:
            losses = model(x)
        norms = engine(losses, backward=how == "ordinary", keep=False, retain_graph=how == "weighted backward")
        torch.testing.assert_close(norms, expected)
        if how == "weighted backward":
            engine.weighted_backward(losses, torch.ones_like(norms))
        if how != "not kept":
            for param, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(param.grad, gradient)


@pytest.mark.parametrize(("case", "runs"), [("scale", 2), ("one plus", 2), ("conv1d of gpt2", 2), ("standardized kernel", 3)])
def test_a_checkpoint_runs_once_more(case: str, runs: int) -> None:
    """And once more for a value that autograd takes back to its parameter by tensors which the checkpoint frees: a standard deviation."""
    model, x = Model(case), torch.randn(B, T, D, dtype=f64)
    engine = GradNorms(model)
    for _ in range(2):  # the first batch has further passes, which show that rows are samples
        model.block.runs = 0
        with engine:
            losses = model(x)
        engine(losses)
    assert model.block.runs == runs


def test_nothing_of_a_checkpoint_is_held_behind_its_backward_pass() -> None:
    model, x = Model("one plus"), torch.randn(B, T, D, dtype=f64)
    engine = GradNorms(model)
    for _ in range(2):
        model.block.inside.clear()
        with engine:
            losses = model(x)
        gc.collect()
        assert not any(ref() is not None for ref in model.block.inside)
        engine(losses, keep=False)
        gc.collect()
        assert len(model.block.inside) > 1
        assert not any(ref() is not None for ref in model.block.inside)
    del losses


@pytest.mark.parametrize("case", ["scale", "one plus", "conv1d of gpt2", "gain", "embedding"])
@pytest.mark.parametrize("is_end", [False, True])
def test_no_hook_keeps_what_a_rule_has_read(case: str, is_end: bool) -> None:
    """``is_end``: the backward pass ends at the node, which does not run, so that it takes nothing."""
    model, x = Model(case), torch.randn(B, T, D, dtype=f64)
    model.first.requires_grad_(not is_end)
    engine = GradNorms(model)
    with engine:
        losses = model(x)
    engine(losses, keep=False, retain_graph=True)
    assert_nothing_held()
    del losses


def assert_nothing_held() -> None:
    held = [each for each in gc.get_objects() if isinstance(each, _rereading._Held)]
    assert held
    assert not any(each.tensor is not None for each in held)


@pytest.mark.parametrize("case", ["scale", "conv1d of gpt2"])
def test_tensors_that_are_offloaded(case: str) -> None:
    model, x = Model(case, depth=0), torch.randn(B, T, D, dtype=f64)

    def forward() -> Tensor:
        with save_on_cpu():
            return model(x)  # type: ignore[no-any-return]

    assert_right(model, forward)


class Crossing(nn.Module):
    """Positions of an embedding that is called in one checkpoint meet the batch in another too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.made, self.used = nn.Embedding(T, D), nn.Linear(D, D), nn.Linear(D, D)
        self.scale = Own(lambda m, x: x * m.w, w=(D,))
        self.one, self.other = Apart(self._one), Apart(self._other)
        self.one.inner, self.other.inner = nn.ModuleList([self.table, self.made]), self.used

    def _one(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = self.table(torch.arange(T)).unsqueeze(0).exp()
        return self.made(x) + places, places

    def _other(self, x: Tensor, places: Tensor) -> Tensor:
        return self.used(x) * places.sin()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        h, places = checkpoint(self.one, x, use_reentrant=False)
        return self.scale(checkpoint(self.other, h, places, use_reentrant=False)).sin().sum((1, 2))  # type: ignore[no-any-return]


class Apart(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner: Any = None
        self._function = function

    def forward(self, *args: Tensor) -> Any:
        return self._function(*args)


def test_a_value_that_goes_from_one_checkpoint_into_another() -> None:
    model, x = Crossing().double(), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: model(x), again=True)


class Positions(nn.Module):
    """All of its modules have rules; the rows of one have no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(D, D), nn.Embedding(T, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh() * self.table(torch.arange(T)).exp()  # type: ignore[no-any-return]


def test_positions_in_a_checkpoint() -> None:
    model, x = nn.Sequential(nn.Linear(D, D), Positions()).double(), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: checkpoint(model[1], model[0](x), use_reentrant=False).sin().sum((1, 2)), again=True)
    engine = GradNorms(model)
    with engine:
        losses = checkpoint(model[1], model[0](x), use_reentrant=False).sin().sum((1, 2))
    engine(losses, keep=False, retain_graph=True)
    assert_nothing_held()
    del losses


class LowRank(nn.Module):
    """All calls of its layers are without a batch: the engine drops them, but the checkpoint has saved tensors for them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.up(self.down(torch.eye(D, dtype=x.dtype)))  # type: ignore[no-any-return]


def test_a_checkpoint_all_of_whose_calls_are_without_a_batch() -> None:
    model, x = nn.Sequential(nn.Linear(D, D), LowRank()).double(), torch.randn(B, T, D, dtype=f64)
    assert_right(model, lambda: checkpoint(model[1], model[0](x), use_reentrant=False).sin().sum((1, 2)), again=True)


def test_rwsam_steps_on_a_checkpointed_model() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(D))

        def forward(self, x: Tensor) -> Tensor:
            return rms(x) * (1 + self.w)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), nn.Sequential(Norm(), nn.Linear(D, D)), nn.Linear(D, 3)), torch.randn(32, D)
    labels = x[:, :3].argmax(1)

    def losses() -> Tensor:
        h = checkpoint(model[1], model[0](x), use_reentrant=False)
        return nn.functional.cross_entropy(model[2](h), labels, reduction="none")

    optimizer = RWSAM(model, torch.optim.SGD, lr=0.2, beta=1.0, rho=0.05)
    found = [optimizer.step(losses).item() for _ in range(20)]
    assert found[-1] < 0.7 * found[0]


# --- what is refused, and what stays behind ---


class OfAFunction(nn.Module):
    """The checkpoint is around a function that reads the module's own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gamma = nn.Linear(D, D), nn.Parameter(torch.rand(D))

    def _inner(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.first(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._inner, x, use_reentrant=False).sin().sum((1, 2))  # type: ignore[no-any-return]


def test_a_parameter_in_a_checkpoint_around_a_function_is_refused() -> None:
    model, x = OfAFunction().double(), torch.randn(B, T, D, dtype=f64)
    with pytest.raises(NotImplementedError, match=r"gamma of the model \(OfAFunction\).*Put the checkpoint around a module"):
        run_engine(model, lambda: model(x))


def test_a_reentrant_checkpoint_is_refused() -> None:
    model, x = Model("scale"), torch.randn(B, T, D, dtype=f64)
    engine = GradNorms(model)
    with engine:
        losses = losses_of([model.first, lambda h: checkpoint(model.block, h, use_reentrant=True), model.last], x)
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        engine(losses)
    block = nn.Sequential(nn.Linear(D, D)).double()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_kwargs"), engine.__class__(block):
        checkpoint(block, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_exception_inside_a_checkpoint_leaves_no_hooks_on_saved_tensors(error: type[BaseException]) -> None:
    model, x = Model("scale"), torch.randn(B, T, D, dtype=f64)

    def fails(m: Any, x: Tensor) -> Tensor:
        raise error

    own: Any = model.block.own
    right, own._forward = own._forward, fails
    with pytest.raises(error), GradNorms(model):
        model(x)
    assert _rereading.top_hooks(False) is None
    assert not _rereading._thread.opened
    own._forward = right
    assert_right(model, lambda: model(x), again=True)
