"""Wrappers of frameworks that take SAM's class among their bases, as Lightning's and Fabric's: the optimizer inside makes the steps.

The frameworks themselves are in tests/frameworks. Here one is imitated by a few lines, so that these tests run everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import GSAM, RWSAM, SAM, LookSAM
from sam_kernels.optim._base.imitations import is_imitation, made_by_closure, replaced


class Precision:
    """A framework's: calls a closure of its own where the step is about to be made, or GradScaler.step."""

    def __init__(self, scaler: Any, calls: list[str]) -> None:
        self.scaler, self.calls = scaler, calls

    def step(self, optimizer: Any, closure: Any) -> Any:
        if self.scaler is None:
            return optimizer.step(closure=partial(self._with_hooks, closure))
        self._with_hooks(closure)
        result = self.scaler.step(optimizer)
        self.scaler.update()
        return result

    def _with_hooks(self, closure: Any) -> Any:
        result = None if closure is None else closure()
        self.calls.append("hook")
        return result


class FrameworkOptimizer:
    def __init__(self, optimizer: Any, scaler: Any = None) -> None:
        self._optimizer, self.calls = optimizer, []
        self._strategy = SimpleNamespace(precision_plugin=Precision(scaler, self.calls))
        self.__class__ = type("Framework" + type(optimizer).__name__, (FrameworkOptimizer, type(optimizer)), {})  # type: ignore[assignment]

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def state_dict(self) -> Any:
        return "the framework's"

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        assert not kwargs
        self.calls.append("step")
        return self._strategy.precision_plugin.step(self._optimizer, closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Problem:
    """A model, its batches and an optimizer, in a framework's wrapper or not."""

    def __init__(self, make: Callable[[nn.Module], Any], *, is_wrapped: bool, is_scaled: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.batches = [(torch.randn(4, 4), torch.randint(0, 3, (4,))) for _ in range(4)]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if is_scaled else None
        self.optimizer: Any = make(self.model)
        self.inner = self.optimizer
        self.is_wrapped = is_wrapped
        if is_wrapped:
            self.optimizer = FrameworkOptimizer(self.inner, self.scaler)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(x), y)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def closure(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        return self.backward(x, y)

    @property
    def scaled(self) -> dict[str, Any]:
        """What a loop without a framework gives SAM itself."""
        return {} if self.is_wrapped or self.scaler is None else {"grad_scaler": self.scaler}

    def update(self) -> None:
        if self.scaler is not None and not self.is_wrapped:
            self.scaler.update()

    def stepped(self) -> None:
        """A step along ``.grad``."""
        if self.is_wrapped or self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        self.update()


def by_closure(problem: Problem, x: Tensor, y: Tensor) -> None:
    loss = problem.optimizer.step(lambda: problem.closure(x, y), **problem.scaled)
    problem.update()
    assert isinstance(loss, Tensor)


def by_micro_batches(problem: Problem, x: Tensor, y: Tensor) -> None:
    problem.optimizer.step(problem.closure, batch=(x, y), micro_batches=2, **problem.scaled)
    problem.update()


def by_backward(problem: Problem, x: Tensor, y: Tensor) -> None:
    problem.optimizer.zero_grad()
    problem.optimizer.backward(lambda: problem.backward(x, y), **problem.scaled)
    problem.stepped()


def by_two_steps(problem: Problem, x: Tensor, y: Tensor) -> None:
    problem.optimizer.zero_grad()
    problem.backward(x, y)
    problem.optimizer.first_step(zero_grad=True, **problem.scaled)
    problem.backward(x, y)
    if problem.is_wrapped or problem.scaler is None:
        problem.optimizer.second_step(zero_grad=True)
    else:
        problem.scaler.step(problem.optimizer)
    problem.update()


def sgd(kind: type[SAM], **options: Any) -> Callable[[nn.Module], SAM]:
    return lambda model: kind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, **options)


WAYS = [by_closure, by_micro_batches, by_backward, by_two_steps]


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_steps_have_the_bits_of_the_optimizer_inside(way: Callable[..., None], is_scaled: bool) -> None:
    """With λ < 1 the ascent needs to know the scale."""
    wrapped, plain = (Problem(sgd(SAM, lambd=0.5), is_wrapped=each, is_scaled=is_scaled) for each in (True, False))
    for problem in (wrapped, plain):
        for i, (x, y) in enumerate(problem.batches):
            way(problem, x * (float("inf") if i == 1 else 1.0), y)
    for param, right in zip(wrapped.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(param, right)
    assert wrapped.optimizer.calls == ["step", "hook"] * 4
    assert wrapped.inner.skipped_steps == wrapped.optimizer.skipped_steps == 1
    assert wrapped.inner.param_groups[0]["sam_step"] == 4
    assert not {"step", "_descend", "_is_led"} & vars(wrapped.inner).keys()
    assert vars(wrapped.optimizer).keys() == {"_optimizer", "calls", "_strategy"}  # no state of SAM's
    if is_scaled:
        assert wrapped.scaler is not None
        assert plain.scaler is not None
        assert wrapped.scaler.get_scale() == plain.scaler.get_scale() == 2.0**9
        assert wrapped.optimizer._strategy.precision_plugin.scaler is wrapped.scaler


@pytest.mark.parametrize("kind", [LookSAM, GSAM])
def test_other_members(kind: type[SAM]) -> None:
    wrapped, plain = (Problem(sgd(kind), is_wrapped=each) for each in (True, False))
    for problem in (wrapped, plain):
        for x, y in problem.batches:
            by_closure(problem, x, y)
    for param, right in zip(wrapped.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(param, right)


def test_reweighted_sam_and_its_two_steps() -> None:
    made = [Problem(lambda model: RWSAM(model, torch.optim.SGD, lr=0.1, beta=1.0, rho=0.1), is_wrapped=each) for each in (True, False)]
    for problem in made:
        optimizer, model = problem.optimizer, problem.model
        for x, y in problem.batches:
            with optimizer.recording():
                losses = nn.functional.cross_entropy(model(x), y, reduction="none")
            optimizer.weighted_backward(losses)
            optimizer.first_step(zero_grad=True)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)
            assert optimizer.last_weights.shape == (4,)
    for param, right in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        assert torch.equal(param, right)


def test_the_gradient_is_there_when_the_framework_calls_its_hooks() -> None:
    problem = Problem(sgd(SAM), is_wrapped=True)
    seen: list[bool] = []
    precision = problem.optimizer._strategy.precision_plugin
    precision.calls = SimpleNamespace(append=lambda _: seen.append(problem.model[0].weight.grad is not None))  # type: ignore[index]
    by_closure(problem, *problem.batches[0])
    assert seen == [True]


def test_an_explicit_scaler_is_used_where_the_framework_has_none() -> None:
    wrapped, plain = (Problem(sgd(SAM), is_wrapped=each, is_scaled=True) for each in (True, False))
    wrapped.optimizer._strategy.precision_plugin.scaler = None
    for x, y in wrapped.batches:
        wrapped.optimizer.step(lambda x=x, y=y: wrapped.closure(x, y), grad_scaler=wrapped.scaler)
        wrapped.scaler.update()  # type: ignore[union-attr]
        by_closure(plain, x, y)
    for param, right in zip(wrapped.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(param, right)


def test_the_frameworks_own_scaler_may_be_given() -> None:
    """Here after ``unscale_``, which GradScaler.step knows of."""
    wrapped, plain = (Problem(sgd(SAM), is_wrapped=each, is_scaled=True) for each in (True, False))
    for problem in (wrapped, plain):
        for x, y in problem.batches:
            problem.optimizer.zero_grad()
            problem.optimizer.backward(lambda problem=problem, x=x, y=y: problem.backward(x, y), grad_scaler=problem.scaler)
            problem.scaler.unscale_(problem.inner)  # type: ignore[union-attr]
            if problem.is_wrapped:
                problem.optimizer.step(grad_scaler=problem.scaler)
            else:
                problem.stepped()
    for param, right in zip(wrapped.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(param, right)


def test_an_error_leaves_the_optimizer_as_it_was() -> None:
    problem = Problem(sgd(SAM), is_wrapped=True, is_scaled=True)
    before = [param.detach().clone() for param in problem.model.parameters()]
    calls: list[int] = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("of the user's")
        return problem.closure(*problem.batches[0])

    with pytest.raises(ValueError, match="of the user's"):
        problem.optimizer.step(failing)
    assert all(map(torch.equal, before, problem.model.parameters()))
    assert not {"step", "_descend", "_is_led"} & vars(problem.inner).keys()
    assert problem.optimizer._strategy.precision_plugin.scaler is problem.scaler
    with pytest.raises(RuntimeError, match="call first_step first"):
        problem.optimizer.second_step()
    with pytest.raises(ValueError, match="micro_batches needs a closure"):
        problem.optimizer.step(micro_batches=2)


def test_other_classes_are_no_imitations() -> None:
    class Mixin:
        def step(self, closure: Any = None) -> None: ...

    class Mixed(Mixin, SAM):
        """Of a user's."""

    class Derived(SAM):
        """Of a user's."""

    class Own(SAM):
        """Of a user's, with names that wrappers have."""

        @property
        def optimizer(self) -> Any: ...

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            ...

    class FromOwn(Own):
        """The class before it is an optimizer."""

    for cls in (Mixed, Derived, SAM, RWSAM, Own, FromOwn):
        assert not is_imitation(cls)
        assert "backward" not in vars(cls) or cls in (SAM, RWSAM)
    optimizer = Problem(sgd(SAM), is_wrapped=True).optimizer
    assert is_imitation(type(optimizer))
    assert optimizer.state_dict() == "the framework's"


def test_a_led_step_calls_the_closure_once_and_skips_where_nothing_was_made() -> None:
    problem = Problem(sgd(SAM), is_wrapped=True)
    before = problem.model[0].weight.detach().clone()  # type: ignore[index]
    calls: list[int] = []
    problem.backward(*problem.batches[0])
    with made_by_closure(problem.inner, skips_blank=True):
        problem.optimizer.step(lambda: calls.append(1))
        assert torch.equal(problem.model[0].weight, before)  # type: ignore[index]  # a plain gradient is none of backward's
        problem.inner.zero_grad()
        problem.optimizer.step(lambda: problem.inner.backward(lambda: problem.backward(*problem.batches[0])))
    assert calls == [1]
    assert not torch.equal(problem.model[0].weight, before)  # type: ignore[index]
    with replaced(problem, "scaler", "another"), replaced(problem, "new", 1):
        assert (problem.scaler, problem.new) == ("another", 1)  # type: ignore[attr-defined]
    assert problem.scaler is None
    assert not hasattr(problem, "new")
