"""A small problem whose parameters are DTensors, in each way that they can be, and the same run in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sam_kernels import ASAM, CRSAM, GCSAM, GSAM, RSAM, RWSAM, S2SAM, SAM, SAMSPS, WSAM, FriendlySAM, LookSAM, MomentumSAM, VaSSO
from sam_kernels.optim.directions import Extragradient
from sam_kernels.schedules import AdaptivePolicy, AscentInfo, Radius

__all__ = [
    "CASES",
    "Case",
    "batch_of",
    "closure_of",
    "fully_sharded",
    "largest_difference",
    "make_model",
    "run",
    "sharded_as",
    "thirty_steps_in_bfloat16",
    "whole",
]

ROWS = 24
SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "rho": 0.1}
ADAMW: dict[str, Any] = {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "rho": 0.1}


class ByNormAndLoss(Radius):
    """Other than the ranks' own losses would make it."""

    def radius(self, info: AscentInfo) -> Any:
        assert info.loss is not None
        return 0.1 * info.loss / (1.0 + info.norm)


def chooses_steps(params: Any, **options: Any) -> Any:
    """SAM with a policy of each run's own, in which steps 4, 6 and 8 rest by far: no rounding of a norm decides."""
    return SAM(params, **{**options, "rho": AdaptivePolicy(0.1, decay=0.5, c=lambda t: 100.0 if t % 2 else -100.0)})


@dataclass(frozen=True)
class Case:
    make: Callable[..., Any]
    options: dict[str, Any]
    micro_batches: int | None = None
    steps: int = 5
    how: str = "step"  # or "halves", "backward", "ascent", "samples", "samples, halves"
    refused_with: dict[str, str] = field(default_factory=dict)  # by layout, words of the error


WHOLE_SAMPLES = dict.fromkeys(("tensor parallel", "tensor parallel and FSDP2"), "gradient of a sample lies on several ranks")
CASES = {
    "SAM, SGD": Case(SAM, SGD, steps=20),
    "SAM, halves": Case(SAM, SGD, how="halves"),
    "n-SAM": Case(SAM, SGD, how="ascent"),
    "SAM, backward": Case(SAM, SGD, how="backward"),
    "ASAM, AdamW": Case(ASAM, {**ADAMW, "rho": 0.5}, steps=20),
    "mix, clipped, Adam": Case(SAM, {"base_optimizer": torch.optim.Adam, "lr": 0.01, "rho": 0.1, "lambd": 0.3, "max_grad_norm": 0.2}),
    "base's own step": Case(SAM, {"base_optimizer": torch.optim.RMSprop, "lr": 0.01, "rho": 0.1, "max_grad_norm": 0.3}),
    "radius by norm and loss": Case(SAM, {**SGD, "rho": ByNormAndLoss()}),
    "scaled, adaptive": Case(SAM, {**SGD, "scale": 0.5, "adaptive": True, "eta": 0.1, "lambd": 0.5}),
    "policy": Case(chooses_steps, SGD, steps=8),
    "extragradient": Case(SAM, {**SGD, "direction": Extragradient()}),
    "m-SAM": Case(SAM, SGD, micro_batches=3),
    "GSAM": Case(GSAM, SGD),
    "CRSAM": Case(CRSAM, {**SGD, "gamma": 0.3, "beta": 0.05}),
    "WSAM": Case(WSAM, SGD),
    "WSAM, coupled": Case(WSAM, {**ADAMW, "decoupled": False}),
    "LookSAM": Case(LookSAM, {**SGD, "k": 3}),
    "VaSSO": Case(VaSSO, {**SGD, "theta": 0.4}),
    "FriendlySAM": Case(FriendlySAM, ADAMW),
    "MomentumSAM": Case(MomentumSAM, SGD),
    "MomentumSAM, AdamW": Case(MomentumSAM, ADAMW),
    "S2SAM": Case(S2SAM, SGD),
    "S2SAM, clipped, AdamW": Case(S2SAM, {**ADAMW, "lambd": 0.5, "max_grad_norm": 0.2}),
    "RSAM without noise": Case(RSAM, {**SGD, "sigma": 0.0}),
    "GCSAM": Case(GCSAM, SGD, refused_with=dict.fromkeys(("tensor parallel", "tensor parallel and FSDP2"), "sharded along dimension 1")),
    "RWSAM": Case(RWSAM, {**SGD, "beta": 2.0}, how="samples", refused_with=WHOLE_SAMPLES),
    "RWSAM, of pairs, AdamW": Case(
        RWSAM,
        {**ADAMW, "beta": 2.0, "micro_batch": 2, "max_grad_norm": 0.2},
        micro_batches=2,
        how="samples",
        refused_with=WHOLE_SAMPLES,
    ),
    "RWSAM, drawn": Case(
        RWSAM, {**SGD, "beta": 2.0, "sampling": "draw", "draws": 5}, how="samples", refused_with=WHOLE_SAMPLES
    ),
    "RWSAM, halves": Case(RWSAM, {**SGD, "beta": 2.0}, how="samples, halves", refused_with=WHOLE_SAMPLES),
    "SAMSPS": Case(SAMSPS, {"base_optimizer": torch.optim.SGD, "gamma_b": 1.0, "momentum": 0.5, "rho": 0.1}),
}  # fmt: skip


def make_model() -> nn.Module:
    """Sizes that no number of ranks divides: parts of unequal sizes, and some without an element."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()


def fully_sharded(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    fully_shard(model[0], mesh=mesh, **options)  # type: ignore[index]
    fully_shard(model, mesh=mesh, **options)
    return model


def sharded_as(layout: str) -> tuple[nn.Module, int, int]:
    """The model, and which of how many parts of a batch this rank has."""
    model, rank, ranks = make_model(), distributed.get_rank(), distributed.get_world_size()
    tensor_parallel = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if layout == "FSDP2":
        return fully_sharded(model, init_device_mesh("cpu", (ranks,))), rank, ranks
    if layout == "HSDP":
        return fully_sharded(model, init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))), rank, ranks
    if layout == "tensor parallel":
        return parallelize_module(model, init_device_mesh("cpu", (ranks,)), tensor_parallel), 0, 1
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(model, mesh["tensor"], tensor_parallel)
    return fully_sharded(model, mesh["data"]), mesh.get_local_rank("data"), 2


def batch_of(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(ROWS, size, generator=generator, dtype=torch.float64) for size in (5, 1))
    return inputs.chunk(parts)[part], targets.chunk(parts)[part]


def losses_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:  # (B,)
    losses: Tensor = (model(inputs) - targets).square().mean(1)
    return losses


def closure_of(optimizer: Any, model: nn.Module, *, zeroes: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        if zeroes:
            optimizer.zero_grad()
        loss: Tensor = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    return closure


def thirty_steps_in_bfloat16(model: nn.Module, optimizer: Any, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """The first and the last loss on one batch, of a float32 model whose outputs a policy makes bfloat16."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(inputs).float() - targets).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    return losses[0], losses[-1]


def run(case: Case, model: nn.Module, parts: Sequence[tuple[int, int]], steps: int | None = None, optimizer: Any = None) -> Any:
    """Steps over the parts (i, of how many) of every batch, put together. Returns the optimizer."""
    weighs = case.how.startswith("samples")
    if optimizer is None:
        optimizer = case.make(model if weighs else model.parameters(), **case.options)
    closure = partial(losses_of, model) if weighs else closure_of(optimizer, model, zeroes=case.how in ("step", "ascent"))
    k = case.micro_batches or 1
    for step in range(case.steps if steps is None else steps):
        pieces = [[tensor.chunk(k) for tensor in batch_of(step, part, count)] for part, count in parts]
        batches = [[torch.cat([piece[i][j] for piece in pieces]) for i in range(2)] for j in range(k)]
        if case.how == "halves":
            closure(*batches[0])
            optimizer.first_step(zero_grad=True)
            closure(*batches[0])
            optimizer.second_step(zero_grad=True)
        elif case.how == "samples, halves":
            with optimizer.recording():
                losses = closure(*batches[0])
            optimizer.weighted_backward(losses)
            optimizer.first_step(zero_grad=True)
            closure(*batches[0]).mean().backward()
            optimizer.second_step(zero_grad=True)
        elif case.how == "backward":
            optimizer.backward(lambda batch=batches[0]: closure(*batch))
            optimizer.step()
            optimizer.zero_grad()
        elif case.how == "ascent":
            other = [torch.cat([batch_of(step + 100, part, count)[i] for part, count in parts]) for i in range(2)]
            optimizer.step(partial(closure, *batches[0]), ascent_closure=partial(closure, *other))
        else:
            optimizer.step([lambda batch=batch: closure(*batch) for batch in batches])
    return optimizer


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Relative to the largest element of a tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(left, right, strict=True))
