"""A problem in bfloat16 in which every sum over two ranks is exact, in each way that its parameters can lie on ranks, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import SAM
from tests.distributed.sharded_problem import whole

RANKS, STEPS = 2, 6
# Rows are divided among two ranks so that these have 16 and 9 elements, and one has none of the second layer: with gradients ±v the norms
# of the parts, 4 v and 3 v, and that of all, 5 v, have no rounding.
LAYERS = ((2, 3, True), (1, 1, True), (2, 7, False))  # inputs, outputs, bias
# Ordinary tensors beside them, with gradients ±v and ±12 v: 5² + 12² + 84² = 85².
BESIDE = (((12, 12), torch.bfloat16, 1.0), ((7, 7), torch.float32, 12.0))
SAM_OPTIONS: dict[str, Any] = {"rho": 0.5, "lambd": 0.5, "master_weights": True}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),  # not fused
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),  # makes its state when it is constructed
}


class Layers(nn.Module):
    """Linear layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in LAYERS)
        self.to(torch.bfloat16)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(each) for layer, each in zip(self.layers, inputs, strict=True)]


def signs(*shape: int, call: int, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * call + place)
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


def size_of(call: int) -> float:
    """v, of the gradients of a call."""
    return 2.0 ** (-1 - call % 3)


@dataclass
class Training:
    """Gradients do not depend on the weights: call j has ±(1 + 2 p) v_j everywhere in part p of the batch. The mean of both is ±2 v_j."""

    model: nn.Module
    beside: list[nn.Parameter] = field(default_factory=list)
    parts: tuple[int, ...] = (0, 1)
    calls: dict[int | None, int] = field(default_factory=dict)
    perturbed: dict[int | None, list[Tensor]] = field(default_factory=dict)  # at every second call, one parameter after another

    @property
    def params(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.beside]

    def _backward(self, call: int, scale: float) -> None:
        inputs = [signs(1, sizes[0], call=call, place=i).bfloat16() for i, sizes in enumerate(LAYERS)]
        weights = [signs(1, sizes[1], call=call, place=i + 10).bfloat16() for i, sizes in enumerate(LAYERS)]
        losses = [(output * weight * scale).sum() for output, weight in zip(self.model(inputs), weights, strict=True)]
        torch.stack(losses).sum().backward()

    def closure(self, part: int | None = None) -> Callable[[], float]:
        """Of one part, or of the mean of ``parts``."""

        def closure() -> float:
            call = self.calls.get(part, 0)
            self.calls[part] = call + 1
            if call % 2:
                self.perturbed.setdefault(part, []).extend(whole(param).detach().clone() for param in self.params)
            for param in self.params:
                param.grad = None
            for each in self.parts if part is None else (part,):
                with torch.enable_grad():
                    self._backward(call, (1 + 2 * each) * size_of(call) / (len(self.parts) if part is None else 1))
            for i, (param, (shape, dtype, factor)) in enumerate(zip(self.beside, BESIDE, strict=False)):
                param.grad = (signs(*shape, call=call, place=i + 20) * (2.0 * factor * size_of(call))).to(dtype)
            return 0.0

        return closure


def masters_of(optimizer: SAM) -> list[Tensor]:
    """Of every parameter that has one."""
    entries = optimizer.state_dict()["state"]
    return [entries[i]["master_param"] for i in sorted(entries) if "master_param" in entries[i]]


def tensors_of(optimizer: SAM) -> dict[str, Tensor]:
    """Weights, masters and state, as whole tensors."""
    found = {f"weights {i}": whole(param) for i, param in enumerate(optimizer.param_groups[0]["params"])}
    for i, entry in optimizer.state_dict()["state"].items():
        found |= {f"{key} {i}": whole(value) for key, value in entry.items() if isinstance(value, Tensor)}
    return found


@dataclass(frozen=True)
class Case:
    layout: str
    base: str
    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1

    @property
    def is_local(self) -> bool:
        return bool(self.options.get("local_ascent"))


LOCAL = {"local_ascent": True}
NO_MASTERS = {"master_weights": False}
CASES = [
    Case("FSDP2", "AdamW", {"max_grad_norm": 0.5}),
    Case("FSDP2", "SGD", micro_batches=2),
    Case("FSDP2", "RMSprop", {"max_grad_norm": 0.5}),
    Case("offload", "SGD"),
    Case("beside", "AdamW"),
    Case("beside", "Adagrad", {"max_grad_norm": 0.5}),
    Case("tensor parallel", "SGD", {"max_grad_norm": 0.5}),
    Case("tensor parallel", "RMSprop"),
    Case("HSDP", "AdamW", LOCAL),
    Case("HSDP", "Adagrad", {**LOCAL, "stochastic_rounding": True}),
    Case("DDP", "AdamW", {"stochastic_rounding": True}),
    Case("DDP", "RMSprop", LOCAL),
    Case("DDP", "AdamW", {**LOCAL, "stochastic_rounding": True}),
    Case("DDP", "SGD", {**NO_MASTERS, "stochastic_rounding": "update"}),
    Case("DDP", "AdamW", {**NO_MASTERS, **LOCAL, "stochastic_rounding": "update"}),
]


def placed_as(layout: str, rank: int) -> Training:
    model, parts = Layers(), (rank,)
    if layout == "DDP":
        return Training(DistributedDataParallel(model), parts=parts)
    if layout == "tensor parallel":
        plan = {f"layers.{i}": ColwiseParallel(output_layouts=Replicate()) for i in range(len(LAYERS))}
        return Training(parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan))
    is_hsdp, ranks = layout == "HSDP", distributed.get_world_size()
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard")) if is_hsdp else init_device_mesh("cpu", (ranks,))
    policy: dict[str, Any] = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if layout == "offload" else {}
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    return Training(model, beside() if layout == "beside" else [], parts)


def beside() -> list[nn.Parameter]:
    torch.manual_seed(4)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype, _ in BESIDE]


def optimizer_of(training: Training, base: str, **options: Any) -> SAM:
    kind, its_options = BASES[base]
    return SAM(training.params, kind, **its_options, **{**SAM_OPTIONS, **options})


def take_steps(training: Training, optimizer: SAM, steps: int, parts: Sequence[int | None] = (None,)) -> None:
    for _ in range(steps):
        optimizer.step([training.closure(part) for part in parts])


def run(case: Case, training: Training, parts: Sequence[int | None]) -> tuple[dict[str, Tensor], Any, SAM]:
    options = {**case.options, "model": training.model} if case.is_local else case.options
    if case.layout == "DDP":
        options = {**options, "model": training.model}
    optimizer = optimizer_of(training, case.base, **options)
    take_steps(training, optimizer, STEPS, parts)
    return tensors_of(optimizer), training.perturbed, optimizer


def in_one_process(case: Case) -> tuple[dict[str, Tensor], Any]:
    training = Training(Layers(), beside() if case.layout == "beside" else [])
    one = Case("", case.base, {key: value for key, value in case.options.items() if key != "local_ascent"})
    parts = tuple(range(RANKS)) if case.is_local else (None,) * case.micro_batches
    return run(one, training, parts)[:2]
