"""What each of two processes does in tests/frameworks/test_processes.py: a trainer, or a loop of accelerate, under DDP."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from sam_kernels.schedules import Radius
from tests.frameworks.formula import LR, RHO, STEPS
from tests.frameworks.hugging_face import arguments, batches, forget, gpt2, loss_of, net, recording, texts

__all__ = ["BETA", "LOOPS", "RANKS", "TRAINERS", "FollowsTheLoss", "in_trainers_and_loops", "losses_of"]

RANKS, BETA = 2, 2.0
SGD: dict[str, Any] = {"lr": LR, "momentum": 0.9, "rho": RHO}


class FollowsTheLoss(Radius):
    """ρ = 0.05 times the loss."""

    def radius(self, info: Any) -> Any:
        return RHO * info.loss


# name -> sam=, accumulation
TRAINERS: dict[str, tuple[dict[str, Any], int]] = {
    "SAM": ({"rho": RHO}, 1),
    "SAM, accumulation": ({"rho": RHO}, 2),
    "λ = 0.3, accumulation": ({"rho": RHO, "lambd": 0.3}, 2),
    "local ascent": ({"rho": RHO, "local_ascent": True}, 1),
    "local ascent, accumulation": ({"rho": RHO, "local_ascent": True}, 2),
    "RW-SAM": ({"rho": RHO, "beta": BETA}, 1),
    "RW-SAM, accumulation": ({"rho": RHO, "beta": BETA}, 2),
    "RW-SAM, local ascent": ({"rho": RHO, "beta": BETA, "local_ascent": True}, 2),
}
# name -> accumulation, what SAM is given beside; "model": the prepared one
LOOPS: dict[str, tuple[int, dict[str, Any]]] = {
    "SAM": (1, {}),
    "SAM, accumulation": (2, {}),
    "optimizer prepared first": (2, {}),
    "radius of the loss": (2, {"rho": FollowsTheLoss()}),
    "two rounds": (2, {}),
    "local ascent": (2, {"model": None, "local_ascent": True}),
    "RW-SAM": (2, {"beta": BETA}),
}


def in_trainers_and_loops(rank: int, folder: Path) -> dict[str, Any]:
    """By name the weights, and of a trainer what it was given. Environment variables are those that ``torchrun`` sets."""
    rank_s, ranks = str(rank), str(RANKS)
    os.environ |= {"RANK": rank_s, "LOCAL_RANK": rank_s, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {f"trainer: {name}": _trained(folder / f"{i}", name) for i, name in enumerate(TRAINERS)}
    found |= {f"resumed: {name}": _resumed(folder / f"resumed{i}", name) for i, name in enumerate(("SAM, accumulation", "RW-SAM"))}
    found |= {f"loop: {name}": _looped(rank, name) for name in LOOPS}
    found["one rank is not finite"] = _skipped(rank)
    found["ascent='batch'"] = _error_of(lambda: _trainer(folder / "batch", "SAM", ascent="batch"))
    return found


def _error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def _trainer(folder: Path, name: str, *, ascent: str = "micro_batch", **options: Any) -> Any:
    from sam_kernels.integrations.transformers import SAMTrainer

    forget()
    sam, accumulation = TRAINERS[name]
    args = arguments(folder, gradient_accumulation_steps=accumulation, **options)
    return recording(SAMTrainer)(gpt2(), args, train_dataset=texts(96), sam={**sam, "ascent": ascent})


def _trained(folder: Path, name: str) -> Any:
    trainer = _trainer(folder, name)
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    return {"weights": _weights(trainer.model), "seen": trainer.seen[:STEPS], "counts": trainer.counts[:STEPS], "wrapped": wrapped}


def _resumed(folder: Path, name: str) -> Any:
    runs = []
    for resumes in (False, True):
        options = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
        trainer = _trainer(folder, name, **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumes else None)
        runs.append(_weights(trainer.model))
    return runs


def losses_of(model: Any, batch: Any) -> Tensor:  # (B,)
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _looped(rank: int, name: str) -> Any:
    from sam_kernels.integrations.accelerate import Accelerator

    forget()
    accumulation, options = LOOPS[name]
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=accumulation), net()
    options = {**SGD, **options}
    if "model" in options:
        model = options["model"] = accelerator.prepare(model)

    def make() -> Any:
        return RWSAM(model, torch.optim.SGD, **options) if "beta" in options else SAM(model.parameters(), torch.optim.SGD, **options)

    if name == "optimizer prepared first":
        optimizer, model = accelerator.prepare(make(), model)
    else:
        model, optimizer = accelerator.prepare(model, make())
    given = batches(STEPS * accumulation, rank)
    for i in range(0, len(given), accumulation):
        halves = [optimizer.first_step, optimizer.second_step] if name == "two rounds" else [None]
        for half in halves:
            for batch in given[i : i + accumulation]:
                with accelerator.accumulate(model):
                    _micro_batch(accelerator, model, optimizer, batch, half)
    return {"weights": _weights(model), "wrapped": type(model).__name__}


def _micro_batch(accelerator: Any, model: Any, optimizer: Any, batch: Any, half: Any) -> None:
    def closure() -> Tensor:
        if isinstance(optimizer.optimizer, RWSAM):
            return losses_of(model, batch)
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        return loss

    if half is not None:
        closure()
        half(zero_grad=True)
        return
    optimizer.backward(closure)
    optimizer.step()
    optimizer.zero_grad()


def _skipped(rank: int) -> Any:
    """With a scaler and a local ascent, the first pass of one rank is not finite: both skip, and have one scale."""
    from sam_kernels.integrations.accelerate import Accelerator

    forget()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model: Any = accelerator.prepare(net(torch.float32))
    optimizer = accelerator.prepare(SAM(model.parameters(), torch.optim.SGD, model=model, local_ascent=True, **SGD))
    before, calls = _weights(model), []
    batch = batches(1, rank, torch.float32)[0]

    def closure() -> Tensor:
        calls.append(1)
        loss = loss_of(model, batch) * (float("inf") if rank == 1 and len(calls) == 1 else 1.0)
        accelerator.backward(loss)
        return loss

    optimizer.backward(closure)
    optimizer.step()
    return optimizer.step_was_skipped, accelerator.scaler.get_scale(), all(map(torch.equal, _weights(model), before))
