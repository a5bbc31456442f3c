"""One rank's own gradient is not finite: the replicas skip the step together, in every way of stepping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import RWSAM, SAM
from tests.distributed.problem import RANKS, batch_of, losses_of, make_model, weights_of
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time

STEPS, BAD_STEP = 3, 1


@dataclass
class Stepping:
    """An optimizer of one rank. Pass number ``bad_pass`` of step ``BAD_STEP`` is multiplied by NaN on rank ``bad_rank``."""

    rank: int
    bad_pass: int
    bad_rank: int
    model: DistributedDataParallel
    optimizer: Any
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    passes: int = 0
    weights: list[list[Tensor]] = field(default_factory=list)

    def factor(self) -> float:
        is_bad = (self.step, self.rank, self.passes) == (BAD_STEP, self.bad_rank, self.bad_pass)
        self.passes += 1
        return float("nan") if is_bad else 1.0

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:  # (B,)
        return self.factor() * losses_of(self.model, inputs, targets)

    def closure(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.losses(inputs, targets).mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def without_averaging(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self.model.no_sync():
            return self.closure(inputs, targets)


def _closure(run: Stepping, k: int) -> None:
    kwargs = {} if run.scaler is None else {"grad_scaler": run.scaler}
    run.optimizer.step(run.closure, batch=batch_of(run.step, run.rank, k), micro_batches=k, **kwargs)
    if run.scaler is not None:
        run.scaler.update()


def _own_no_sync(run: Stepping, k: int) -> None:
    batch = batch_of(run.step, run.rank, k)
    run.optimizer.step(lambda: run.closure(*batch), ascent_closure=lambda: run.without_averaging(*batch))


def _two_steps(run: Stepping, k: int) -> None:
    batch = batch_of(run.step, run.rank, k)
    run.without_averaging(*batch)
    run.optimizer.first_step(zero_grad=True, **({} if run.scaler is None else {"grad_scaler": run.scaler}))
    run.closure(*batch)
    if run.scaler is None:
        run.optimizer.second_step()
    else:
        run.scaler.step(run.optimizer)
        run.scaler.update()


def _unscaled_by_hand(run: Stepping, k: int) -> None:
    """With the scaler that combines what ``unscale_`` finds: torch's own keeps the finding of one rank."""
    batch = batch_of(run.step, run.rank, k)
    scaler: Any = run.scaler
    run.without_averaging(*batch)
    scaler.unscale_(run.optimizer)
    run.optimizer.first_step(zero_grad=True)
    run.closure(*batch)
    scaler.unscale_(run.optimizer.base_optimizer)
    run.optimizer.second_step()
    scaler.update()


def _backward(run: Stepping, k: int) -> None:
    def closure() -> Tensor:
        loss = run.losses(*batch_of(run.step, run.rank, k)).mean()
        loss.backward()
        return loss

    run.optimizer.backward(closure)
    run.optimizer.step()
    run.optimizer.zero_grad()


def _reweighted(run: Stepping, k: int) -> None:
    run.optimizer.step(run.losses, batch=batch_of(run.step, run.rank, k), micro_batches=k)


def _reweighted_two_steps(run: Stepping, k: int) -> None:
    batch = batch_of(run.step, run.rank, k)
    with run.optimizer.recording():
        losses = run.losses(*batch)
    run.optimizer.weighted_backward(losses)
    run.optimizer.first_step(zero_grad=True)
    run.losses(*batch).mean().backward()
    run.optimizer.second_step()


SGD, ADAMW, RMSPROP = (
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01}),
)
LOCAL = {"local_ascent": True}
# How it steps, of how many micro-batches, base, what SAM is given beside, which pass is bad, whether there is a scaler.
WAYS: dict[str, tuple[Callable[[Stepping, int], None], int, Any, dict[str, Any], int, bool]] = {
    "ascent": (_closure, 1, SGD, LOCAL, 0, False),
    "ascent-not-fused": (_closure, 1, RMSPROP, LOCAL, 0, False),
    "ascent-unchecked": (_closure, 1, ADAMW, {**LOCAL, "check_finite": False}, 0, False),
    "ascent-averaged": (_closure, 1, SGD, {}, 0, False),
    "descent": (_closure, 1, SGD, LOCAL, 1, False),
    "micro-batch-ascent": (_closure, 2, SGD, LOCAL, 0, False),
    "micro-batch-descent": (_closure, 2, SGD, LOCAL, 1, False),
    "last-ascent": (_closure, 2, SGD, LOCAL, 2, False),
    "own-no-sync": (_own_no_sync, 1, SGD, {}, 0, False),
    "two-steps": (_two_steps, 1, SGD, LOCAL, 0, False),
    "two-steps-averaged": (_two_steps, 1, SGD, {}, 0, False),
    "scaler": (_closure, 1, ADAMW, LOCAL, 0, True),
    "scaler-not-fused": (_closure, 1, RMSPROP, LOCAL, 0, True),
    "scaler-micro-batches": (_closure, 2, SGD, LOCAL, 0, True),
    "scaler-two-steps": (_two_steps, 1, SGD, LOCAL, 0, True),
    "scaler-unscaled-by-hand": (_unscaled_by_hand, 1, SGD, LOCAL, 0, True),
    "reweighted": (_reweighted, 1, SGD, {}, 0, False),
    "reweighted-micro-batches": (_reweighted, 2, SGD, {}, 0, False),
    "reweighted-two-steps": (_reweighted_two_steps, 1, SGD, {}, 0, False),
}


OWN_RADII = {"own-radii": _closure, "own-radii-backward": _backward}


def _run(rank: int, name: str, bad_rank: int) -> dict[str, Any]:
    way, k, (base, options), more, bad_pass, scales = WAYS[name]
    model = make_model()
    ddp = DistributedDataParallel(model)
    if name.startswith("reweighted"):
        optimizer: Any = RWSAM(ddp, base, beta=2.0, rho=0.3, **options, **more)
    else:
        optimizer = SAM(ddp.parameters(), base, rho=0.3, model=[nn.Identity(), ddp], **options, **more)
    make_scaler: Any = ShardedGradScaler if way is _unscaled_by_hand else torch.amp.GradScaler
    run = Stepping(rank, bad_pass, bad_rank, ddp, optimizer, make_scaler(device="cpu", init_scale=4.0) if scales else None)
    for run.step in range(STEPS):
        run.passes = 0
        way(run, k)
        run.weights.append(weights_of(model))
    return {"weights": run.weights, "skipped": optimizer.skipped_steps, "scale": None if run.scaler is None else run.scaler.get_scale()}


def _rates_of_its_own(rank: int, way: Callable[[Stepping, int], None]) -> list[list[Tensor]]:
    """With a local ascent a rank may have a radius of its own, 0 too: every rank makes the same collectives all the same."""
    model, weights = make_model(), []
    ddp = DistributedDataParallel(model)
    radii = [[0.3, 0.0], [0.0, 0.3], [0.1, 0.2], [0.0, 0.0]]
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, lr=0.1, rho=lambda t: radii[t - 1][rank], model=ddp, local_ascent=True)
    run = Stepping(rank, -1, -1, ddp, optimizer)
    for run.step in range(len(radii)):
        way(run, 2)
        weights.append(weights_of(model))
    return weights


def _plain_step_of_one_rank(rank: int) -> None:
    """As ``torch.distributed.checkpoint`` makes it, with lr = 0, on the rank that loads."""
    ddp = DistributedDataParallel(make_model())
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, lr=0.0, momentum=0.9, model=ddp)
    for param in ddp.parameters():
        param.grad = torch.zeros_like(param)
    if rank == 0:
        optimizer.step()


def _all(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: _run(rank, name, bad_rank=i % RANKS) for i, name in enumerate(WAYS)}
    _plain_step_of_one_rank(rank)
    return {**found, **{name: {"weights": _rates_of_its_own(rank, way)} for name, way in OWN_RADII.items()}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_all, tmp_path_factory.mktemp("agreement"), ranks=RANKS)


@pytest.mark.parametrize("name", [*WAYS, *OWN_RADII])
def test_replicas_stay_equal_bit_for_bit(found: list[dict[str, Any]], name: str) -> None:
    for step, (left, right) in enumerate(zip(*(rank[name]["weights"] for rank in found), strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), f"step {step}"
        assert all(a.isfinite().all() for a in left), f"step {step}"


@pytest.mark.parametrize("name", WAYS)
def test_the_bad_step_is_skipped_on_every_rank_and_no_other(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert rank[name]["skipped"] == 1
        start = weights_of(make_model())
        for step, after in enumerate(rank[name]["weights"]):
            is_still = all(torch.equal(a, b) for a, b in zip(start, after, strict=True))
            assert is_still is (step == BAD_STEP), f"step {step}"
            start = after


@pytest.mark.parametrize("name", [name for name in WAYS if name.startswith("scaler")])
def test_the_scale_is_the_same_on_every_rank(found: list[dict[str, Any]], name: str) -> None:
    """Halved once. (``scaler.step`` sees the second pass alone: it does not hear of the first one.)"""
    right = 4.0 if name == "scaler-two-steps" else 2.0
    assert [rank[name]["scale"] for rank in found] == [right, right]
