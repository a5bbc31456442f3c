"""The rows of the table of peers that two processes decide: steps of replicas (DDP) and of shards (FSDP2) against those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sam_kernels
from tests.distributed.problem import RANKS, batch_of, losses_of, make_model
from tests.peers.implementations import IMPLEMENTATIONS, RHO, Implementation
from tests.peers.scenarios import DoesNotHold, close, explain

__all__ = ["LAYOUTS", "on_rank", "sharded", "through_replicas"]

LAYOUTS = ("DDP", "FSDP2")
STEPS = 4
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
# The problem is float64, and one of the implementations takes the norm in float32: a few roundings of 2^-24 in a perturbation of 0.1.
TOLERANCE = 1e-6


def on_rank(rank: int, name: str) -> dict[str, Any]:
    """Return, for each layout, the whole weights after the last step, or the error of a step as a string."""
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        try:
            found[layout] = _run(rank, IMPLEMENTATIONS[name], layout)
        except Exception as error:
            found[layout] = explain(error)
    return found


def _run(rank: int, make: type[Implementation], layout: str) -> list[Tensor]:
    model = make_model()
    if layout == "DDP":
        around: nn.Module = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (RANKS,))
        fully_shard(model[0], mesh=mesh)  # type: ignore[index]
        around = fully_shard(model, mesh=mesh)
    run = make(around, **SGD)
    for k in range(STEPS):
        batch = batch_of(k, rank, 1)
        run.step(lambda batch=batch: losses_of(around, *batch).mean())  # type: ignore[misc]
    return [param.full_tensor() if isinstance(param, DTensor) else param.detach().clone() for param in model.parameters()]


def through_replicas(make: type[Implementation], found: Sequence[dict[str, Any]]) -> None:
    """DDP: the step of one process on the batches of all ranks, and replicas that stay equal."""
    weights = [_weights(each["DDP"]) for each in found]
    observed = []
    if close(weights[0], _micro_batch_steps(), TOLERANCE):
        observed.append("every rank perturbs along its own gradient (m-SAM)")
    if (apart := _apart(*weights)) > 0:
        observed.append(f"the weights of the ranks are {apart:.0e} apart after {STEPS} steps")
    if observed:
        raise DoesNotHold(", and ".join(observed))
    _check_whole_batch(make, weights[0])


def sharded(make: type[Implementation], found: Sequence[dict[str, Any]]) -> None:
    """FSDP2: the step of one process on the batches of all ranks."""
    weights = _weights(found[0]["FSDP2"])
    if close(weights, _unrestored_steps(), TOLERANCE):
        raise DoesNotHold("the weights stay perturbed after every step")
    _check_whole_batch(make, weights)


def _weights(found: Any) -> list[Tensor]:
    if isinstance(found, str):
        raise DoesNotHold(found)
    return list(found)


def _apart(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def _whole_batch(step: int) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*(batch_of(step, rank, 1) for rank in range(RANKS)), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def _check_whole_batch(make: type[Implementation], weights: list[Tensor]) -> None:
    run = make(make_model(), **SGD)
    for k in range(STEPS):
        batch = _whole_batch(k)
        run.step(lambda batch=batch: losses_of(run.model, *batch).mean())  # type: ignore[misc]
    right = [param.detach() for param in run.model.parameters()]
    if not close(weights, right, TOLERANCE):
        raise DoesNotHold(f"the weights are {_apart(weights, right):.3f} from those of one process after {STEPS} steps")


def _micro_batch_steps() -> list[Tensor]:
    """m-SAM over the ranks' batches, on one process."""
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = losses_of(model, *batch).mean()
        loss.backward()
        return loss

    for k in range(STEPS):
        optimizer.step([partial(closure, batch_of(k, rank, 1)) for rank in range(RANKS)])
    return [param.detach() for param in model.parameters()]


def _unrestored_steps() -> list[Tensor]:
    """Steps on the whole batch that update the perturbed weights, on one process."""
    model = make_model()
    base = torch.optim.SGD(model.parameters(), **SGD)
    for k in range(STEPS):
        for is_first in (True, False):
            base.zero_grad()
            losses_of(model, *_whole_batch(k)).mean().backward()
            if is_first:
                grads = [param.grad for param in model.parameters()]
                norm = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
                with torch.no_grad():
                    for param in model.parameters():
                        param.add_(param.grad * (RHO / norm))  # type: ignore[operator]
        base.step()
    return [param.detach() for param in model.parameters()]
