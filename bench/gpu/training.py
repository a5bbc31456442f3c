"""Whole training steps on the device, forward and backward passes included: two of the base optimizer, one of SAM, one of RW-SAM."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from bench.byte_model import step_bytes
from bench.gpu.gate import Gate
from bench.gpu.models import MODELS, ModelKind
from bench.gpu.steps import allowed
from bench.gpu.timing import Call, Clock, Timed, launch_us, wall_ms
from bench.gpu.work import Work, base_step_bytes, work_of
from bench.providers import BASES, RHO
from sam_kernels import RWSAM, SAM, use_backend
from sam_kernels._dispatch import available

__all__ = ["BASE", "PROVIDERS", "REWEIGHTED", "SAM_STEP", "SECONDS", "TrainingRun", "by_model", "lines", "measure", "ratio"]

BASE, SAM_STEP, REWEIGHTED = "base, two steps", "SAM", "RW-SAM"
PROVIDERS = (BASE, SAM_STEP, REWEIGHTED)
# Operations of the norms per sample that a model's layers need.
PER_SAMPLE_OPS = {
    "resnet50": ("conv_square_norms_", "linear_square_norms_", "affine_grads_"),
    "gpt2_124m": ("linear_square_norms_", "embedding_square_norms_", "affine_grads_"),
}
SECONDS = 40.0  # of all models together
WARM_UPS, MOST_WARM_UPS = 3, 20
ROUNDS, WALL_ROUNDS, LAUNCH_ROUNDS, SAMPLES = 2, 5, 3, 3
LR = 1e-6  # so small that every step is the same step: training on one batch would end with gradients of 0
BETA = 1e-2
INITIAL_SCALE = 2.0**10  # norms per sample take the gradient of a sum over the batch: its mean's with 2^16
Row = Mapping[str, Any]


class TrainingRun:
    """One model with one optimizer on one batch: a call is as much as two passes of SAM."""

    def __init__(self, kind: ModelKind, provider: str, device: str, *, is_tiny: bool, backend: str | None) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model: nn.Module = (kind.make_tiny if is_tiny else kind.make)().to(kind.weights)
            self.inputs, self.labels = kind.inputs(2 if is_tiny else kind.batch, is_tiny)
        self.model = model.to(memory_format=torch.channels_last) if self.inputs.dim() == 4 else model
        self.kind, self.backend, self.device = kind, backend, device
        self.scaler = GradScaler(device, init_scale=INITIAL_SCALE) if kind.scales else None
        self.optimizer = self._make_optimizer(provider)
        self.step = {BASE: self._two_base_steps, SAM_STEP: self._sam_step, REWEIGHTED: self._reweighted_step}[provider]

    def _make_optimizer(self, provider: str) -> torch.optim.Optimizer:
        base = BASES[self.kind.base]
        options: dict[str, Any] = {**base.kwargs, "lr": LR, "fused": True}
        if provider == BASE:
            return base.optimizer(self.model.parameters(), **options)
        if provider == SAM_STEP:
            return SAM(self.model.parameters(), base.optimizer, rho=RHO, model=self.model, **options)
        return RWSAM(self.model, base.optimizer, beta=BETA, rho=RHO, **options)

    def losses(self) -> Tensor:
        """(B,), the mean over a sequence's tokens."""
        dtype = torch.float16 if self.device != "cpu" else torch.bfloat16  # a CPU has no fast convolutions in float16
        with torch.autocast(self.device, dtype=dtype, enabled=self.kind.scales):
            outputs = self.model(self.inputs).float()
        if outputs.dim() == 2:
            return F.cross_entropy(outputs, self.labels, reduction="none")
        return F.cross_entropy(outputs.flatten(0, 1), self.labels.flatten(), reduction="none").view(self.labels.shape).mean(1)

    def _backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.losses().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss.detach()

    def _two_base_steps(self) -> None:
        for _ in range(2):
            self._backward()
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()

    def _sam_step(self) -> None:
        self._step_with(self._backward)

    def _reweighted_step(self) -> None:
        self._step_with(self.losses)

    def _step_with(self, closure: Callable[[], Tensor]) -> None:
        assert isinstance(self.optimizer, SAM)
        with use_backend(self.backend):
            self.optimizer.step(closure, grad_scaler=self.scaler)
        if self.scaler is not None:
            self.scaler.update()

    @property
    def skips(self) -> tuple[float, int]:
        """Changes whenever a step is skipped. Waits for the device."""
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        return scale, self.optimizer.skipped_steps if isinstance(self.optimizer, SAM) else 0

    def warm_up(self) -> None:
        """Steps until some in a row were not skipped: kernels are compiled and the scale has found its size. Raises RuntimeError where it
        does not."""
        in_a_row = 0
        for _ in range(MOST_WARM_UPS):
            before = self.skips
            self.step()
            in_a_row = in_a_row + 1 if self.skips == before else 0
            if in_a_row == WARM_UPS:
                return
        raise RuntimeError(f"of {MOST_WARM_UPS} steps too many were skipped: gradients are not finite")


def measure(
    clock: Clock, device: str, gate: Gate, deadline: float, *, copy_gbps: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Rows of kind "training". ``wall_ms`` is the figure, a loop of steps by the host's clock; where ``launch_us`` is as long, the host
    decided it. A dry run: tiny models of the same make."""
    deadline = min(deadline, time.monotonic() + SECONDS)
    for name, kind in MODELS.items():
        if time.monotonic() > deadline:
            say(f"left out: training steps of {name}: out of time")
            continue
        try:
            yield from _of_model(name, kind, clock, device, gate, deadline, copy_gbps, say)
        except Exception as error:  # out of memory: the other model is still of interest
            say(f"left out: training steps of {name}: {type(error).__name__}: {str(error)[:300]}")
        _release_memory(device)


def _backend(gate: Gate, base: str, device: str) -> str:
    """The first on which every operation of the step has passed its tests."""
    found = allowed(gate, base, device)
    if not found:
        raise RuntimeError("no green test of an operation of the step")
    return found[0]


def _runs(
    name: str, kind: ModelKind, device: str, gate: Gate, backend: str, deadline: float, say: Callable[[str], None]
) -> dict[str, TrainingRun]:
    # What would be chosen anyway is not forced: gradient norms per sample have kernels on another backend.
    forced = None if device == "cpu" or backend == available(device)[0] else backend
    runs: dict[str, TrainingRun] = {}
    for provider in PROVIDERS:
        what = f"training steps of {name}, {provider}"
        if provider == REWEIGHTED and not all(gate.allows(op, "triton") for op in PER_SAMPLE_OPS[name]):
            say(f"left out: {what}: no green test of its norms per sample")
        elif time.monotonic() > deadline:
            say(f"left out: {what}: out of time")
        else:
            try:
                run = TrainingRun(kind, provider, device, is_tiny=device == "cpu", backend=forced)
                run.warm_up()
                runs[provider] = run
            except Exception as error:  # a kernel that does not compile, no memory: the others are still of interest
                say(f"left out: {what}: {type(error).__name__}: {str(error)[:300]}")
    return runs


def _of_model(
    name: str, kind: ModelKind, clock: Clock, device: str, gate: Gate, deadline: float, copy_gbps: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    backend, is_tiny = _backend(gate, kind.base, device), device == "cpu"
    batch = 2 if is_tiny else kind.batch
    work = work_of(kind.make_tiny if is_tiny else kind.make, lambda: kind.inputs(batch, is_tiny), 2)
    with _tuned_convolutions():
        runs = _runs(name, kind, device, gate, backend, deadline, say)
        before = {provider: run.skips for provider, run in runs.items()}
        calls: dict[str, Call] = {provider: run.step for provider, run in runs.items()}
        timed = _turns(clock, calls, 1 if is_tiny else ROUNDS)
        wall = wall_ms(clock, calls, timed, rounds=1 if is_tiny else WALL_ROUNDS)
        launch = launch_us(clock, calls, rounds=1 if is_tiny else LAUNCH_ROUNDS)
    row = {"kind": "training", "op": "training", "workload": name, "dtype": kind.dtype, "base": kind.base, "batch": batch}
    for provider, run in runs.items():
        q = timed[provider].device
        times = {"ms_20": q.ms_20, "ms_50": q.ms_50, "ms_80": q.ms_80, "wall_ms": wall[provider], "launch_us": launch[provider]}
        counted = _counted(run, provider, work) | {"samples": len(timed[provider].device_ms), "copy_gbps": copy_gbps}
        yield row | {"backend": provider, "kernels": backend} | times | counted | {"skipped": run.skips != before[provider]}


def _turns(clock: Clock, calls: Mapping[str, Call], rounds: int) -> dict[str, Timed]:
    """As :func:`bench.gpu.timing.interleave`, of calls that are warm and so long that few of them must do."""
    timed = {name: Timed() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            timed[name].extend(clock.turn(call, SAMPLES, 1, 0.0))
    return timed


def _counted(run: TrainingRun, provider: str, work: Work) -> dict[str, int]:
    """``flops`` of both passes, ``bytes`` of the optimizer; what the norms per sample add, by themselves."""
    params = list(run.model.parameters())
    numel, itemsize = sum(param.numel() for param in params), params[0].element_size()
    of_base = 2 * base_step_bytes(run.kind.base, numel, itemsize, scales=run.kind.scales)
    nbytes = of_base if provider == BASE else step_bytes(run.kind.base, numel, itemsize)
    found = {"n_tensors": len(params), "numel": numel, "flops": 2 * work.pass_flops, "bytes": nbytes, "norm_flops": 0, "norm_bytes": 0}
    return found | ({"norm_flops": work.norm_flops, "norm_bytes": work.norm_bytes} if provider == REWEIGHTED else {})


@contextlib.contextmanager
def _tuned_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _release_memory(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def by_model(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """{model: {provider: row}} in the order of measuring."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "training":
            found.setdefault(row["workload"], {})[row["backend"]] = row
    return found


def lines(rows: Sequence[Row]) -> list[str]:
    """A line a model: milliseconds of each, and how many times longer."""
    found = ["training steps: wall ms of two base steps, SAM, RW-SAM; SAM : two base steps; RW-SAM : SAM; Tflop/s of the base"]
    for name, by in by_model(rows).items():
        times = [f"{by[provider]['wall_ms']:.2f}" if provider in by else "–" for provider in PROVIDERS]
        ratios = [ratio(by, SAM_STEP, BASE), ratio(by, REWEIGHTED, SAM_STEP)]
        rate = f"{by[BASE]['flops'] / by[BASE]['wall_ms'] / 1e9:.0f}" if BASE in by else "–"
        batch = next(iter(by.values()))["batch"]
        found.append(f"  {name} {batch}: {' '.join(times)}; {' '.join(ratios)}; {rate}")
    return found if len(found) > 1 else []


def ratio(by: Mapping[str, Row], longer: str, shorter: str) -> str:
    """Of their times; a dash where one was not measured."""
    return f"{by[longer]['wall_ms'] / by[shorter]['wall_ms']:.3f}" if longer in by and shorter in by else "–"
