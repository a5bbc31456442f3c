"""``freeze_unperturbed=True`` over ranks: the steps are those without it, bit for bit. Two processes make all the runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import GCSAM, RWSAM, SAM, SAMSPS, VaSSO, norm_layers
from tests.distributed import sharded_problem
from tests.distributed.problem import RANKS, batch_of, losses_of
from tests.helpers.ranks import on_one_rank, on_ranks, one_at_a_time

pytestmark = one_at_a_time
STEPS = 4
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
MOVING = 2 * 7  # elements of parameters that are perturbed


class Model(nn.Module):
    """``left`` and ``right`` are used where the input says so, ``never`` nowhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.norm, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.stem(inputs))))
        return out


class Branches(Model):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.LayerNorm(7), nn.LayerNorm(7), nn.LayerNorm(7)

    def forward(self, inputs: Tensor, branch: str = "") -> Tensor:
        hidden = self.norm(self.stem(inputs))
        out: Tensor = self.head(torch.tanh(getattr(self, branch)(hidden) if branch else hidden))
        return out


@dataclass(frozen=True)
class Case:
    make: Callable[..., Any] = SAM
    base: Any = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=lambda: SGD)
    more: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    local: bool = False
    k: int = 1
    how: str = "step"  # or "backward", "halves"
    branches: tuple[tuple[str, ...], ...] = ()  # by rank, by step
    scales: bool = False
    named: bool = True  # model= is given

    def model(self) -> nn.Module:
        return (Branches() if self.branches else Model()).double()

    def optimizer(self, ddp: nn.Module, freeze: bool) -> Any:
        more = {"rho": 0.3, **self.more, "freeze_unperturbed": freeze}
        if self.make is RWSAM:
            return RWSAM(ddp, self.base, params=norm_layers(ddp), local_ascent=self.local, **self.options, **more)
        if self.named:
            more |= {"model": ddp, "local_ascent": self.local}
        return self.make(norm_layers(ddp), self.base, **self.options, **more)


WEIGHED = {"beta": 2.0}
USED = (("left", "", "left", "right"), ("", "", "right", "right"))
CASES = {
    "local": Case(local=True),
    "local, micro-batches": Case(local=True, k=2),
    "local, halves": Case(local=True, how="halves"),
    "local, RWSAM": Case(RWSAM, more=WEIGHED, local=True, k=2),
    "local, bucket view": Case(local=True, ddp={"gradient_as_bucket_view": True}, k=2),
    "averaged": Case(),
    "averaged, AdamW, clipped": Case(
        base=torch.optim.AdamW, options={"lr": 0.01}, more={"max_grad_norm": 0.1, "adaptive": True, "eta": 0.1}
    ),
    "averaged, micro-batches": Case(k=2),
    "averaged, backward": Case(how="backward", k=2),
    "averaged, halves": Case(how="halves"),
    "averaged, halves, VaSSO": Case(VaSSO, how="halves"),
    "averaged, VaSSO": Case(VaSSO),
    "averaged, GCSAM": Case(GCSAM),
    "averaged, Polyak": Case(SAMSPS, options={}, more={"gamma_b": 1.0}),
    "averaged, bucket view": Case(ddp={"gradient_as_bucket_view": True}),
    "averaged, scaled": Case(scales=True),
    "averaged, RWSAM": Case(RWSAM, more=WEIGHED),
    "averaged, RWSAM, directions": Case(RWSAM, more={**WEIGHED, "norms": "finite_difference"}),
    "averaged, unused": Case(branches=USED, ddp={"find_unused_parameters": True}),
    "averaged, unused, adaptive average": Case(
        VaSSO, branches=USED, ddp={"find_unused_parameters": True}, more={"adaptive": True, "eta": 0.1}
    ),
    "unknown, unused": Case(branches=USED, ddp={"find_unused_parameters": True}, named=False),
}  # fmt: skip


def state_of(optimizer: Any, model: nn.Module) -> list[Tensor]:
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [each.detach().clone() for each in (*model.parameters(), *model.buffers(), *kept)]


def run(case: Case, rank: int, freeze: bool) -> list[list[Tensor]]:
    """Everything that this rank has after each step."""
    model = case.model()
    ddp = DistributedDataParallel(model, **case.ddp)
    optimizer = case.optimizer(ddp, freeze)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if case.scales else None
    found = []
    for step in range(STEPS):
        kwargs = {"branch": case.branches[rank][step]} if case.branches else {}

        def losses(inputs: Tensor, targets: Tensor, kwargs: Any = kwargs) -> Tensor:
            return losses_of(ddp, inputs, targets, **kwargs)

        def backward(inputs: Tensor, targets: Tensor) -> Tensor:
            loss = losses(inputs, targets).mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        def closure(inputs: Tensor, targets: Tensor) -> Tensor:
            optimizer.zero_grad()
            return backward(inputs, targets)

        batch = batch_of(step, rank, case.k)
        if case.make is RWSAM:
            optimizer.step(losses, batch=batch, micro_batches=case.k)
        elif case.how == "backward":
            for pair in zip(*(each.chunk(case.k) for each in batch), strict=True):
                optimizer.backward(partial(backward, *pair))
            optimizer.step()
            optimizer.zero_grad()
        elif case.how == "halves":
            with optimizer.ascent():
                backward(*batch)
            optimizer.first_step(zero_grad=True)
            backward(*batch)
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step(closure, batch=batch, micro_batches=case.k, **({} if scaler is None else {"grad_scaler": scaler}))
        if scaler is not None:
            scaler.update()
        found.append(state_of(optimizer, model))
    assert optimizer.skipped_steps == 0
    return found


def reduced(rank: int) -> list[tuple[int, ...]]:
    """The shapes of what one step reduces beside DistributedDataParallel."""
    ddp, shapes, reduce = DistributedDataParallel(Model().double()), [], distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(tensor.shape))
        return reduce(tensor, *args, **kwargs)

    optimizer = Case().optimizer(ddp, True)
    with mock.patch.object(distributed, "all_reduce", all_reduce):
        optimizer.step(lambda *batch: backward_of(optimizer, ddp, *batch), batch=batch_of(0, rank, 1))
    return shapes


def backward_of(optimizer: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = losses_of(model, inputs, targets).mean()
    loss.backward()
    return loss


def unknown(rank: int) -> str:
    """What happens where the optimizer was not given the module."""
    ddp = DistributedDataParallel(Model().double())
    optimizer = Case(named=False).optimizer(ddp, True)
    before = [param.detach().clone() for param in ddp.parameters()]
    try:
        optimizer.step(lambda *batch: backward_of(optimizer, ddp, *batch), batch=batch_of(0, rank, 1))
    except RuntimeError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True))
        assert all(param.requires_grad for param in ddp.parameters())
        return str(error)
    return ""


SHARDED = {
    "FSDP2": {},
    "FSDP2, kept": {"reshard_after_forward": False, "kept": True},
    "FSDP2, mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "tensor parallel": {},
}
SHARDED_HOW = ("step", "micro-batches", "backward", "halves")


def fully_sharded(*, kept: bool = False, **options: Any) -> nn.Module:
    """``kept``: what is gathered stays, after a backward pass too."""
    model = sharded_problem.fully_sharded(sharded_problem.make_model().float(), init_device_mesh("cpu", (RANKS,)), **options)
    for module in model.modules() if kept else ():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(False)
    return model


def sharded(layout: str, how: str, freeze: bool) -> list[list[Tensor]]:
    """As :func:`run`, of shards."""
    rank, options = distributed.get_rank(), dict(SHARDED[layout])
    if layout == "tensor parallel":
        model, part, parts = sharded_problem.sharded_as(layout)
    else:
        model, part, parts = fully_sharded(**options), rank, RANKS
    optimizer = SAM(norm_layers(model), torch.optim.SGD, rho=0.3, freeze_unperturbed=freeze, **SGD)
    found = []
    for step in range(STEPS):
        inputs, targets = (each.to(next(model.parameters()).dtype) for each in sharded_problem.batch_of(step, part, parts))

        def closure(inputs: Tensor, targets: Tensor, zeroes: bool = True) -> Tensor:
            if zeroes:
                optimizer.zero_grad()
            loss: Tensor = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        if how == "backward":
            optimizer.backward(partial(closure, inputs, targets, False))
            optimizer.step()
            optimizer.zero_grad()
        elif how == "halves":
            with optimizer.ascent():
                closure(inputs, targets)
            optimizer.first_step(zero_grad=True)
            closure(inputs, targets)
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step(closure, batch=(inputs, targets), micro_batches=2 if how == "micro-batches" else 1)
        found.append([sharded_problem.whole(each) for each in model.parameters()])
    return found


def frozen_sharded() -> list[list[str]]:
    """Which parameters have a gradient inside of the first passes of two steps."""
    model, part, parts = sharded_problem.sharded_as("FSDP2")
    optimizer = SAM(norm_layers(model), torch.optim.SGD, rho=0.3, freeze_unperturbed=True, **SGD)
    closure, found = sharded_problem.closure_of(optimizer, model), []

    def noting(*batch: Tensor) -> Tensor:
        loss = closure(*batch)
        found.append([name for name, param in model.named_parameters() if param.grad is not None])
        return loss

    for step in range(2):
        optimizer.step(noting, batch=sharded_problem.batch_of(step, part, parts))
    return found[::2]


def after_an_exception() -> list[str]:
    """Which parameters an ordinary backward pass gives a gradient, after a step that was given up in its first pass."""
    model = fully_sharded(**SHARDED["FSDP2, kept"])
    optimizer = SAM(norm_layers(model), torch.optim.SGD, rho=0.3, freeze_unperturbed=True, **SGD)
    closure, batch = sharded_problem.closure_of(optimizer, model), [torch.ones(4, size) for size in (5, 1)]

    def interrupted(*pair: Tensor) -> Tensor:
        closure(*pair)
        raise KeyboardInterrupt

    optimizer.step(closure, batch=batch)
    try:
        optimizer.step(interrupted, batch=batch)
    except KeyboardInterrupt:
        closure(*batch)
    pairs = [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]
    return [name for name, param in pairs if param.grad is not None]


def _all(rank: int) -> dict[str, Any]:
    warnings.filterwarnings("error", message="SAM")
    found: dict[str, Any] = {name: [run(case, rank, freeze) for freeze in (False, True)] for name, case in CASES.items()}
    found["reduced"], found["unknown"] = reduced(rank), unknown(rank)
    for layout in SHARDED:
        for how in SHARDED_HOW:
            found[f"{layout}, {how}"] = [sharded(layout, how, freeze) for freeze in (False, True)]
    found["frozen sharded"], found["after an exception"] = frozen_sharded(), after_an_exception()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_all, tmp_path_factory.mktemp("freezing"), ranks=RANKS)


@pytest.mark.parametrize("name", [*CASES, *(f"{layout}, {how}" for layout in SHARDED for how in SHARDED_HOW)])
def test_steps_have_the_same_bits(found: list[dict[str, Any]], name: str) -> None:
    """Of two ranks the mean is one addition and a division by two, wherever it is taken."""
    for rank in range(RANKS):
        plain, frozen = found[rank][name]
        for step, (left, right) in enumerate(zip(plain, frozen, strict=True)):
            assert [torch.equal(a, b) for a, b in zip(left, right, strict=True)] == [True] * len(left), (rank, step)
        assert not torch.equal(frozen[0][0], frozen[-1][0])


def test_the_ascent_reduces_the_gradients_that_it_needs(found: list[dict[str, Any]]) -> None:
    assert found[0]["reduced"] == found[1]["reduced"] == [(MOVING,), ()]  # and the agreement


def test_a_module_that_the_optimizer_does_not_know_is_an_error_of_torchs(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert "Expected to have finished reduction in the prior iteration" in found[rank]["unknown"]


def test_shards_are_frozen_from_the_second_step_on(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        first, second = found[rank]["frozen sharded"]
        assert len(first) == 8
        assert second == ["3.weight", "3.bias"]


def test_shards_require_a_gradient_after_an_exception(found: list[dict[str, Any]]) -> None:
    assert [len(each["after an exception"]) for each in found] == [8, 8]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    with on_one_rank(tmp_path):
        yield


@pytest.mark.usefixtures("alone")
def test_what_ranks_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="static_graph=True"):
        Case().optimizer(DistributedDataParallel(Model().double(), static_graph=True), True)
    with pytest.raises(ValueError, match="freeze_unperturbed=True with process_group"):
        SAM(norm_layers(Model()), torch.optim.SGD, process_group=distributed.group.WORLD, freeze_unperturbed=True, **SGD)
    ddp = DistributedDataParallel(Model().double())
    ddp.register_comm_hook(None, allreduce_hook)
    optimizer, before = Case().optimizer(ddp, True), [param.detach().clone() for param in ddp.parameters()]
    with pytest.raises(ValueError, match="freeze_unperturbed=True with a communication hook"):
        optimizer.step(lambda *batch: backward_of(optimizer, ddp, *batch), batch=batch_of(0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True))
    assert all(param.requires_grad for param in ddp.parameters())
    local = Case(local=True).optimizer(ddp, True)
    local.step(lambda *batch: backward_of(local, ddp, *batch), batch=batch_of(0, 0, 1))
