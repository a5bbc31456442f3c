"""``unsupported="verify"``: how often gradients are compared, at what cost, and when again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM
from sam_kernels.per_sample import GradNorms, _registry, _verification, register_rule
from tests.per_sample.brute import group_norms, run_engine
from tests.per_sample.test_verified_rules import B, D, Scale, between, data_of, f64, losses_of, scale_rule


@pytest.fixture(autouse=True)
def _rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    return


class Counted:
    """Counts the backward passes of single samples, and how many gradients of earlier ones are there at the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes, self.alive = 0, 0
        self._made: list[list[weakref.ref[Tensor]]] = []
        plain = _verification._Comparison._grads

        def grads(comparison: Any, seed: Tensor) -> Any:
            self.passes += 1
            self.alive = max(self.alive, sum(any(ref() is not None for ref in made) for made in self._made))
            made = plain(comparison, seed)
            self._made.append([weakref.ref(grad) for grad in made if grad is not None])
            return made

        monkeypatch.setattr(_verification._Comparison, "_grads", grads)


def step(engine: GradNorms, model: nn.Module, x: Tensor) -> Tensor:
    with engine:
        losses = losses_of(model, x)
    return engine(losses)


def test_each_kind_of_call_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1), Scale(), nn.Linear(D, 3)).double()
    engine = GradNorms(model, unsupported="verify")
    state = torch.get_rng_state()
    step(engine, model.eval(), data_of(model))
    assert counted.passes == B
    assert torch.equal(state, torch.get_rng_state())
    step(engine, model, data_of(model)[:, :2])  # other lengths, and other batches, are of the same kind
    step(engine, model, data_of(model)[:3])
    assert counted.passes == B
    step(engine, model.train(), data_of(model))
    assert counted.passes == 2 * B
    step(engine, model, data_of(model))
    step(engine, model.eval(), data_of(model))
    assert counted.passes == 2 * B


def test_one_sample_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    model = between(Scale()).double()
    step(GradNorms(model, unsupported="verify"), model, data_of(model))
    assert counted.passes == B
    assert counted.alive <= 1


def test_gradients_that_are_zero_are_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a low-rank factor, whose other factor begins with zeros; but not for ever."""
    counted = Counted(monkeypatch)
    register_rule(Scale, scale_rule(2.0))
    model = nn.Sequential(nn.Linear(D, D), Scale(), nn.Linear(D, 3)).double()
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    engine = GradNorms(model, unsupported="verify")
    step(engine, model, data_of(model))
    nn.init.ones_(model[2].weight)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"scale of 1 \(Scale\)"):
        step(engine, model, data_of(model))
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    counted.passes, engine = 0, GradNorms(model, unsupported="verify")
    for _ in range(5):
        step(engine, model, data_of(model))
    assert counted.passes == _verification._TRIES * B


def test_losses_that_are_not_finite_prove_nothing() -> None:
    register_rule(Scale, scale_rule(2.0))
    model = between(Scale()).double()
    engine = GradNorms(model, unsupported="verify")
    x = data_of(model).clone()
    x[2] = float("nan")  # zero times it is no number either: the gradients of the other samples
    step(engine, model, x)
    with pytest.raises(RuntimeError, match=r"scale of 1 \(Scale\)"):
        step(engine, model, data_of(model))


def test_a_gradient_that_overflows_proves_nothing_of_signs() -> None:
    register_rule(Scale, scale_rule(-1.0))
    model, factor = between(Scale()).double(), torch.ones(B, dtype=f64)
    factor[2] = 1e200
    engine = GradNorms(model, unsupported="verify")
    with engine:
        losses = losses_of(model, data_of(model)) * factor * factor
    assert engine(losses).isfinite().sum() == B - 1
    with pytest.raises(RuntimeError, match=r"scale of 1 \(Scale\): a weighted sum"):
        step(engine, model, data_of(model))


def test_the_same_engine_goes_on_when_the_rule_is_right() -> None:
    register_rule(Scale, scale_rule(2.0))
    model = between(Scale()).double()
    engine = GradNorms(model, unsupported="verify")
    with pytest.raises(RuntimeError, match="register_rule"):
        step(engine, model, data_of(model))
    register_rule(Scale, scale_rule())
    torch.testing.assert_close(step(engine, model, data_of(model)), group_norms(model, losses_of(model, data_of(model))))


def test_modules_that_nothing_is_known_of_are_errors_as_by_default() -> None:
    class Distances(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x[:, 0], self.scale.view(1, D))

    model = nn.Sequential(nn.Linear(D, D), Distances()).double()
    with pytest.raises(NotImplementedError, match="has no rule"):
        run_engine(model, lambda: losses_of(model, data_of(model)), unsupported="verify")


def test_rwsam_hands_the_option_on() -> None:
    register_rule(Scale, scale_rule(2.0))
    model = between(Scale())
    x = data_of(model, torch.float32)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"GradNorms\(unsupported=\"verify\"\): scale of 1 \(Scale\)"):
        RWSAM(model, torch.optim.SGD, beta=2.0, unsupported="verify", lr=0.1).step(lambda: losses_of(model, x))
    assert all(map(torch.equal, before, model.parameters()))
    register_rule(Scale, scale_rule())
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, micro_batch=2, unsupported="verify", lr=0.1)
    found = [optimizer.step(lambda: losses_of(model, x)).item() for _ in range(5)]
    assert found[-1] < found[0]
