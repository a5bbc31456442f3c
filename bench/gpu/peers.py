"""Peers of a whole step on the device: torch's own optimizers alone, on plain tensors and on DTensors, other implementations of SAM, and
plain copies of as many bytes, which tell what the memory gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.gpu.timing import Call
from bench.providers import PROVIDERS, Base
from bench.workloads import Workload, make_params

__all__ = [
    "BASE_ALONE",
    "COPY",
    "FOREACH_COPY",
    "LOOPS",
    "NOT_RECORDED",
    "ON_DTENSORS",
    "OTHERS",
    "call_of",
    "makers",
    "moved_bytes",
    "one_rank_mesh",
]

LOOPS = ("davda54/foreach", "davda54/fused")
OTHERS = ("torch._foreach_/fused", "pytorch_optimizer/foreach", "pytorch_optimizer/fused")
BASE_ALONE = "torch, fused base alone"
ON_DTENSORS = {implementation: f"torch, {implementation} base alone, DTensors" for implementation in ("fused", "foreach")}
COPY, FOREACH_COPY = "torch, copy_ of as many bytes", "torch, _foreach_copy_ of as many bytes"
NOT_RECORDED = (*OTHERS, *ON_DTENSORS.values(), COPY, FOREACH_COPY)  # by the profiler, which takes longer than the peer
Maker = Callable[[], Call]
Say = Callable[[str], None]


def call_of(name: str, params: Sequence[torch.nn.Parameter], base: Base) -> Call:
    """Both halves of a step of one of :data:`bench.providers.PROVIDERS`."""
    stepper = PROVIDERS[name].make(params, base)

    def run() -> None:
        stepper.first_step()
        stepper.second_step()

    return run


@contextlib.contextmanager
def one_rank_mesh(device: str) -> Iterator[DeviceMesh]:
    """A mesh of this process alone. A process group that is there already is used, and stays.

    Nothing leaves the process: its store is in memory, and no operation of a peer communicates. Raises what torch raises where no backend
    can be had.
    """
    is_ours = not dist.is_initialized()
    try:
        yield _mesh(device) if is_ours else init_device_mesh(device, (1,))
    finally:
        if is_ours and dist.is_initialized():
            dist.destroy_process_group()


def _mesh(device: str) -> DeviceMesh:
    """By the first backend that can be had."""
    *others, last = ("gloo",) if device == "cpu" else ("nccl", "gloo")
    for backend in others:
        try:
            return _mesh_by(backend, device)
        except Exception:
            if dist.is_initialized():
                dist.destroy_process_group()
    return _mesh_by(last, device)


def _mesh_by(backend: str, device: str) -> DeviceMesh:
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,))


def _on_dtensors(grads: Sequence[Tensor], mesh: DeviceMesh) -> list[torch.nn.Parameter]:
    """As ``fully_shard`` leaves them, on one rank: the local tensors are the whole ones."""
    params = []
    for grad in grads:
        local, of_grad = (DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in (grad * 0.02, grad))
        param = torch.nn.Parameter(local)
        param.grad = of_grad
        params.append(param)
    return params


def _copies(lists: Sequence[Sequence[Tensor]], sweeps: int, copy: Callable[[list[Tensor], list[Tensor]], object]) -> Call:
    """Copies from list to list in turn, so that no list is copied again before all others were; of an odd sweep half a list."""
    pairs = [(list(lists[(i + 1) % len(lists)]), list(lists[i % len(lists)])) for i in range(sweeps // 2)]
    if sweeps % 2:
        halves = [[tensor.view(-1)[: tensor.numel() // 2] for tensor in lists[i % len(lists)]] for i in (sweeps // 2 + 1, sweeps // 2)]
        pairs.append((halves[0], halves[1]))

    def run() -> None:
        for targets, sources in pairs:
            copy(targets, sources)

    return run


def _copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def moved_bytes(name: str, alone: int, whole: int) -> int:
    """Of a peer's row: those of the base's own update, or of a whole step."""
    return alone if name in (BASE_ALONE, *ON_DTENSORS.values()) else whole


def makers(
    workload: Workload,
    base: Base,
    grads: Sequence[Tensor],
    sweeps: int,
    mesh: Callable[[], DeviceMesh],
    *,
    is_about_launching: bool,
    say: Say,
) -> dict[str, Maker]:
    """Name -> what makes its call. ``sweeps``: of a whole step. Of one tensor only what tells about the memory is of interest.

    ``mesh`` is called when a peer on DTensors is made: a process group's threads must not meet a graph that is being captured.
    """
    lists = 2 + sum(key != "step" for key in base.state_keys) + 1  # parameters, gradients, backups and state: what a step touches

    def alone(params: Callable[[], list[torch.nn.Parameter]], implementation: str) -> Maker:
        return lambda: base.optimizer(params(), **{**base.kwargs, implementation: True}).step

    def flat() -> list[list[Tensor]]:
        numel = sum(grad.numel() for grad in grads)
        return [[torch.rand(numel, device=grads[0].device).to(grads[0].dtype)] for _ in range(lists)]

    def alike() -> list[list[Tensor]]:
        return [[grad.clone() for grad in grads] for _ in range(lists)]

    found: dict[str, Maker] = {BASE_ALONE: alone(lambda: make_params(grads), "fused"), COPY: lambda: _copies(flat(), sweeps, _copy_each)}
    found[FOREACH_COPY] = lambda: _copies(alike(), sweeps, torch._foreach_copy_)
    if not is_about_launching:
        return found
    for name in OTHERS:
        reason = PROVIDERS[name].missing(workload.n_tensors)
        if reason is None:
            found[name] = lambda name=name: call_of(name, make_params(grads), base)
        else:
            say(f"left out: {name} {workload.name}: {reason}")
    for implementation, name in ON_DTENSORS.items():
        found[name] = alone(lambda: _on_dtensors(grads, mesh()), implementation)
    return found
