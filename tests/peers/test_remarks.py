"""What docs/peers.md says beside the marks: where a peer comes close, and why one falls short."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.problem import assert_same_bits, loss_of, make_batch, make_model, weights
from tests.peers.implementations import IMPLEMENTATIONS, Forward, Implementation, SamKernels
from tests.peers.recorded import Recording
from tests.peers.scenarios import DoesNotHold, accumulation, close

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


def made(name: str, model: nn.Module | None = None) -> Implementation:
    if (reason := IMPLEMENTATIONS[name].reason_missing()) is not None:
        pytest.skip(f"{name}: {reason}")
    return IMPLEMENTATIONS[name](make_model() if model is None else model, **SGD)


def train(run: Implementation, steps: range) -> None:
    for k in steps:
        run.step(lambda k=k: loss_of(run.model, make_batch(seed=k)))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["davda54/sam", "Composer"])
def test_with_the_state_of_the_base_beside_it_a_checkpoint_is_exact(name: str) -> None:
    run, other = made(name), made(name)
    train(run, range(3))
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.optimizer.base_optimizer.load_state_dict(copy.deepcopy(run.optimizer.base_optimizer.state_dict()))
    train(run, range(3, 6))
    train(other, range(3, 6))
    assert_same_bits(weights(run.model), weights(other.model))


def test_a_lost_micro_batch_is_seen() -> None:
    """Accumulation is the one row that holds for all."""

    class Forgetful(SamKernels):
        def step(self, *forwards: Forward) -> None:
            super().step(forwards[-1])

    with pytest.raises(DoesNotHold, match="not those of undivided batches"):
        accumulation(Forgetful)


def test_composer_restores_weights_to_a_rounding() -> None:
    run = made("Composer")
    scaler, before = run.scaler(1024.0), weights(run.model)
    factors = iter((1.0, float("inf")))
    run.scaled()["ClosureGradScaler.step"](lambda: loss_of(run.model, make_batch()) * next(factors), scaler)
    now = weights(run.model)
    assert any(not torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert close(now, before, 4 * 2.0**-24)


@pytest.mark.parametrize(("name", "counted"), [("sam_kernels", 1), ("davda54/sam", 2), ("pytorch_optimizer", 2)])
def test_batches_tracked_in_a_step(name: str, counted: int) -> None:
    torch.manual_seed(3)
    run = made(name, nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2)))
    run.step_with_batch_norm(lambda: loss_of(run.model, make_batch()))
    assert run.model[1].num_batches_tracked == counted  # type: ignore[index]


def test_composer_reads_the_loss_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    run, reads = made("Composer"), []

    class Loss:
        def __bool__(self) -> bool:
            reads.append(1)
            return True

    def closure(**options: Any) -> Loss:
        run.optimizer.zero_grad()
        loss_of(run.model, make_batch()).backward()
        return Loss()

    run.optimizer.step(closure)
    assert len(reads) == 2


def test_composer_skips_a_loss_of_zero() -> None:
    run = made("Composer")
    before = weights(run.model)

    def forward() -> Tensor:
        loss = loss_of(run.model, make_batch())
        return loss - loss.detach()

    run.step(forward)
    assert any(param.grad.abs().max() > 0.01 for param in run.model.parameters() if param.grad is not None)
    assert_same_bits(weights(run.model), before)


@pytest.mark.parametrize(("name", "are_steps"), [("davda54/sam", False), ("pytorch_optimizer", True)])
def test_replays_of_recorded_operations(name: str, are_steps: bool) -> None:
    """Weights at another address are no matter of taste: replays go on from those that the recorded step began with."""
    run, eager, batch = made(name), made(name), make_batch()

    def step(one: Implementation) -> None:
        one.step(lambda: loss_of(one.model, batch))

    for one in (run, run, eager, eager):
        step(one)
    run.optimizer.zero_grad(set_to_none=True)
    with Recording() as recording:
        step(run)
    for _ in range(3):
        recording.replay()
    for _ in range(4):
        step(eager)
    assert close(weights(run.model), weights(eager.model), 1e-5) == are_steps
