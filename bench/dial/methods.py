"""SAM, and what costs less or more: how each optimizer is made, and how it takes a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import sam_kernels
from bench.dial.tasks import sample_losses
from sam_kernels import schedules
from sam_kernels.cli.train.optimizers import BASES, Settings

__all__ = ["BASE", "LATE", "METHODS", "MICRO_BATCHES", "SAM", "Method", "late_start", "make_optimizer", "repeated", "take_step"]

BASE, SAM, LATE = "base", "sam", "late"
MICRO_BATCHES = 4
SHARE = 0.125  # of the steps, at the end, that the late variant makes as SAM


@dataclass(frozen=True)
class Method:
    title: str
    make: Callable[..., Any] = sam_kernels.SAM
    groups: Callable[[nn.Module], Any] = nn.Module.parameters
    radius: Callable[[float, int], Any] = lambda rho, steps: rho  # from ρ and the steps of the run
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: str = "gradient"  # the closure's kind: "gradient", "micro-batches" or "losses"


def late_start(steps: int) -> int:
    """Return the number of plain steps before the late variant's steps of SAM, of which there is at least one."""
    return steps - max(1, round(SHARE * steps))


def _reweighted(params: Any, base: Any, *, model: nn.Module, **options: Any) -> Any:
    return sam_kernels.RWSAM(model, base, beta=Settings.beta, **options)


METHODS = {
    BASE: Method("base"),
    SAM: Method("SAM"),
    "norm-layers": Method("SAM, normalisation layers", groups=sam_kernels.norm_layers, options={"freeze_unperturbed": True}),
    "every-2": Method("SAM, every 2nd step", radius=lambda rho, steps: schedules.Interval(rho, 2)),
    "every-5": Method("SAM, every 5th step", radius=lambda rho, steps: schedules.Interval(rho, 5)),
    LATE: Method("SAM, last 12.5 %", radius=lambda rho, steps: schedules.Tail(rho, late_start(steps))),
    "s2-sam": Method("S²-SAM", sam_kernels.S2SAM),
    "momentum-sam": Method("Momentum-SAM", sam_kernels.MomentumSAM),
    "looksam": Method("LookSAM, k = 5", sam_kernels.LookSAM),
    "m-sam": Method(f"m-SAM, {MICRO_BATCHES} micro-batches", takes="micro-batches"),
    "rw-sam": Method(f"RW-SAM, β = {Settings.beta:g}", _reweighted, takes="losses"),
}


def repeated(radius: Any, steps: int) -> Any:
    """Return a radius that begins again every ``steps`` steps."""
    return (lambda t: radius.at_step((t - 1) % steps + 1)) if isinstance(radius, schedules.Radius) else radius


def make_optimizer(name: str, model: nn.Module, base: str, radius: Any) -> Any:
    """Return an optimizer around a fused base of ``BASES``. The base itself has no radius: None."""
    method, kind = METHODS[name], BASES[base]
    options = {"lr": kind.lr, "weight_decay": kind.weight_decay, "fused": True, **kind.options}
    if name == BASE:
        return kind.build(model.parameters(), **options)
    return method.make(method.groups(model), kind.build, model=model, rho=radius, **method.options, **options)


def take_step(name: str, optimizer: Any, model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Take one step, forward and backward passes included."""
    takes = METHODS[name].takes
    if takes == "losses":  # it zeroes the gradients and calls backward itself
        optimizer.step(lambda: sample_losses(model, inputs, labels))
        return

    def gradient(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
        optimizer.zero_grad()
        loss = sample_losses(model, inputs, labels).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss.detach()

    if takes == "micro-batches":
        optimizer.step(gradient, batch=(inputs, labels), micro_batches=MICRO_BATCHES)
    else:
        optimizer.step(gradient)
