"""float32 masters of 16-bit parameters on two ranks: over shards, over replicas, and in checkpoints.

Every sum over ranks is exact here, so that a run over ranks has the bits of the same run in one process.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import SAM
from sam_kernels.optim._engine import masters as masters_module
from tests.distributed.sharded_problem import whole
from tests.helpers.compare import assert_same_bits
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
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
    is_hsdp = layout == "HSDP"
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard")) if is_hsdp else init_device_mesh("cpu", (RANKS,))
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


# --- on ranks ---

Attempt = Callable[[int, Path], Any]
ATTEMPTS: dict[str, Attempt] = {}


def attempt(function: Attempt) -> Attempt:
    """Called on every rank, with the rank and a folder; the test of that name gets what all of them return."""
    ATTEMPTS[function.__name__] = function
    return function


def _all_attempts(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, function in ATTEMPTS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                found[name] = function(rank, folder)
            except Exception as error:  # what a rank raises is what its test is about
                found[name] = "".join(traceback.format_exception(error))
        found[f"warnings of {name}"] = [str(each.message) for each in caught if str(each.message).startswith("SAM")]
        distributed.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[Any]]:
    on_all = on_ranks(_all_attempts, folder / "ranks", folder)
    return {name: [each[name] for each in on_all] for name in on_all[0]}


@attempt
def steps(rank: int, folder: Path) -> list[Any]:
    results = []
    for case in CASES:
        training = placed_as(case.layout, rank)
        try:
            tensors, perturbed, optimizer = run(case, training, (rank,) if case.is_local else (None,) * case.micro_batches)
        except Exception as error:
            results.append("".join(traceback.format_exception(error)))
            distributed.barrier()
            continue
        pairs = zip(masters_of(optimizer), (param for param in training.params if param.dtype is torch.bfloat16), strict=True)
        if optimizer._memory.has_masters:
            for master, param in pairs:
                assert isinstance(master, DTensor) is isinstance(param, DTensor)
                assert master.dtype is torch.float32
        results.append((tensors, perturbed))
    return results


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{case.layout}, {case.base}" for case in CASES])
def test_a_run_on_ranks_has_the_bits_of_one_process(i: int, found: Any) -> None:
    case = CASES[i]
    right, perturbed = in_one_process(case)
    for rank, results in enumerate(found["steps"]):
        assert not isinstance(results, str), results
        assert not isinstance(results[i], str), results[i]
        tensors, own = results[i]
        assert tensors.keys() == right.keys()
        for key, value in right.items():
            assert_same_bits(f"rank {rank}, {key}", [tensors[key]], [value])
        part = rank if case.is_local else None
        assert_same_bits(f"rank {rank}, perturbed", own[part], perturbed[part])
    assert found["warnings of steps"] == [[], []]


# --- what is looked at, and what somebody else writes ---


@attempt
def looks(rank: int, folder: Path) -> list[list[int]]:
    """How many parameters are compared with their masters, bit for bit, at each step."""
    counts = []
    usual = masters_module._follow
    for base in ("AdamW", "RMSprop"):
        training = placed_as("FSDP2", rank)
        optimizer, calls = optimizer_of(training, base), []
        masters_module._follow = lambda *args, calls=calls: calls.append(None) or usual(*args)
        try:
            counts.append([len(calls) for _ in range(STEPS) if take_steps(training, optimizer, 1) is None])
        finally:
            masters_module._follow = usual
    return counts


def test_a_usual_step_over_shards_compares_no_bits(found: Any) -> None:
    """Steps 1, 2 and 4 look for writes that leave no version; one of FSDP2's own writes, or the optimizer's, would add others."""
    count = len(list(Layers().parameters()))
    assert found["looks"] == [[[count, 2 * count, 2 * count, 3 * count, 3 * count, 3 * count]] * 2] * RANKS


def halve(param: Tensor, rows: slice) -> None:
    with torch.no_grad():
        param[rows] *= 0.5


@attempt
def writes(rank: int, folder: Path) -> list[Any]:
    """Before the third step, which does not look at bits unasked: a part by rank 0 alone, and a whole DTensor by all."""
    results = []
    for base, writes_all in (("AdamW", False), ("RMSprop", False), ("AdamW", True)):
        training = placed_as("FSDP2", rank)
        optimizer = optimizer_of(training, base)
        take_steps(training, optimizer, 2)
        if writes_all:
            with torch.no_grad():
                training.params[0] *= 0.5
        elif rank == 0:
            halve(training.params[0].to_local(), slice(None))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            take_steps(training, optimizer, STEPS - 2)
        results.append((tensors_of(optimizer), [str(each.message) for each in caught]))
    return results


def test_masters_follow_what_one_rank_writes(found: Any) -> None:
    for i, (base, rows) in enumerate((("AdamW", slice(0, 2)), ("RMSprop", slice(0, 2)), ("AdamW", slice(None)))):
        training = Training(Layers())
        optimizer = optimizer_of(training, base)
        take_steps(training, optimizer, 2)
        halve(training.params[0], rows)
        with pytest.warns(UserWarning, match="1 of 5 parameters of a group were written by somebody else"):
            take_steps(training, optimizer, STEPS - 2)
        for rank, results in enumerate(found["writes"]):
            assert not isinstance(results, str), results
            tensors, words = results[i]
            for key, value in tensors_of(optimizer).items():
                assert_same_bits(f"rank {rank}, {key}", [tensors[key]], [value])
            assert ["1 of 5 parameters" in each for each in words] == [True] * (i == 2 or rank == 0)


@attempt
def float32_shards(rank: int, folder: Path) -> bool:
    model = Layers().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy)
    training = Training(model, parts=(rank,))
    optimizer = optimizer_of(training, "AdamW")
    take_steps(training, optimizer, 2)
    return not masters_of(optimizer)


def test_a_policy_of_bfloat16_has_float32_shards_which_need_no_masters(found: Any) -> None:
    assert found["float32_shards"] == [True] * RANKS
    for words in found["warnings of float32_shards"]:
        assert len(words) == 1
        assert "master_weights=True has nothing to do" in words[0]


@attempt
def zero(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(Layers())
    more = {"optimizer_class": torch.optim.AdamW, "lr": 0.1}
    SAM(model.parameters(), ZeroRedundancyOptimizer, model=model, master_weights=True, **more)


def test_a_base_that_shards_the_parameters_by_itself_is_refused(found: Any) -> None:
    assert all("ValueError: SAM: master_weights=True with ZeroRedundancyOptimizer" in each for each in found["zero"]), found["zero"]
