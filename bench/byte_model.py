"""How many bytes an operation has to move: the model behind every GB/s. ``N`` elements of ``s`` bytes in each list.

The classes of :mod:`sam_kernels.operations` declare how they use each list; this file names the lists that take part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from sam_kernels.operations import (
    Access,
    AdamWStep,
    Centralize,
    CheckFinite,
    Combine,
    DirectionNorm,
    GradDots,
    GradNorms,
    Perturb,
    RandomPerturb,
    Restore,
    SgdStep,
)

__all__ = [
    "CALLS",
    "FAMILY",
    "MASTER_OPS",
    "MASTER_STEP_OPS",
    "NARROW_LISTS",
    "OPS",
    "STEP_OPS",
    "VARIANTS",
    "Traffic",
    "call_bytes",
    "family_passes",
    "master_bytes",
    "master_step_bytes",
    "op_bytes",
    "step_bytes",
    "traffic_of",
]


@dataclass(frozen=True)
class Traffic:
    """Lists that one pass only reads, reads and writes in place, and only writes."""

    reads: tuple[str, ...]
    updates: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """Sweeps over memory."""
        uses = {Access.READ: self.reads, Access.UPDATED: self.updates, Access.WRITTEN: self.writes}
        return sum(access.sweeps * len(lists) for access, lists in uses.items())

    @property
    def lists(self) -> tuple[str, ...]:
        return self.reads + self.updates + self.writes

    def without_names(self) -> Traffic:
        """The same mix with lists named by numbers: equal for equal mixes."""
        names = iter(map(str, range(len(self.lists))))
        return Traffic(*(tuple(next(names) for _ in lists) for lists in (self.reads, self.updates, self.writes)))


def traffic_of(accesses: Callable[[Collection[str]], Mapping[str, Access]], *roles: str, **named: str) -> Traffic:
    """The pass of an operation whose lists in these roles take part, by the method ``accesses`` of its class.

    A list goes by its role, or by the name that a keyword gives it. One that takes two roles is read once, or read and written in place.
    """
    names = dict.fromkeys(roles) | named
    uses: dict[str, set[Access]] = {}
    found = accesses(names)
    for role, name in names.items():
        uses.setdefault(name or role, set()).add(found[role])
    return Traffic(
        reads=tuple(name for name, use in uses.items() if use == {Access.READ}),
        updates=tuple(name for name, use in uses.items() if use not in ({Access.READ}, {Access.WRITTEN})),
        writes=tuple(name for name, use in uses.items() if use == {Access.WRITTEN}),
    )


# One call of each operation that `validate` runs, as an optimizer makes it most often.
OPS = {
    "grad_norm": traffic_of(GradNorms.accesses, "grads"),
    "centralize_": traffic_of(Centralize.accesses, "grads"),
    "direction_norm_": traffic_of(DirectionNorm.accesses, "grads", "ema"),
    "grad_dots": traffic_of(GradDots.accesses, "lefts", "rights"),
    "combine_": traffic_of(Combine.accesses, "lefts", "rights", "outs"),
    "perturb_": traffic_of(Perturb.accesses, "grads", "params", "old_params"),
    "random_perturb_": traffic_of(RandomPerturb.accesses, "params", "old_params"),
    "restore_": traffic_of(Restore.accesses, "old_params", "params"),
    "sgd_step_": traffic_of(SgdStep.accesses, "old_params", "grads", "momentum_buffers", "params"),
    "adamw_step_": traffic_of(AdamWStep.accesses, "old_params", "grads", "exp_avgs", "exp_avg_sqs", "params"),
}

# A whole step: norm, ascent, then restore and descent in one pass. Before that the second gradients are read to see that they are finite.
STEP_OPS = {"sgd": ("grad_norm", "perturb_", "sgd_step_"), "adamw": ("grad_norm", "perturb_", "adamw_step_")}
CHECK = traffic_of(CheckFinite.accesses, "grads")

# m-SAM: what is saved once is perturbed again, and the gradients found there are averaged by torch's own functions.
PERTURB_AGAIN = traffic_of(partial(Perturb.accesses, from_old=True), "old_params", "grads", "params")
COPY = Traffic(reads=("grads",), writes=("mean_grads",))
ADD_TO_MEAN = Traffic(reads=("grads",), updates=("mean_grads",))

# What the CPU's benchmark calls beside them: the check, which returns nothing, and operations with options that change their traffic.
VARIANTS = {
    "check_finite_": CHECK,
    "grad_norm adaptive": traffic_of(GradNorms.accesses, "grads", "params"),
    "perturb_ from backups": PERTURB_AGAIN,
    "perturb_ along averages": traffic_of(Perturb.accesses, "ema", "params", "old_params"),  # the gradient's weight is 0
    "combine_ three lists": traffic_of(Combine.accesses, lefts="outs", rights="rights", origins="origins", outs="outs"),
    "sgd_step_ in place": traffic_of(SgdStep.accesses, "grads", "momentum_buffers", "params"),
}
CALLS = OPS | VARIANTS

# With float32 masters of 16-bit parameters: they are what old_params are, and the base's state is as wide.
MASTER_OPS = {
    "grad_norm": OPS["grad_norm"],
    "perturb_": PERTURB_AGAIN,
    "check_finite_": CHECK,
    "restore_": OPS["restore_"],
    "sgd_step_": traffic_of(partial(SgdStep.accesses, to_old=True), "grads", "old_params", "momentum_buffers", "params"),
    "adamw_step_": traffic_of(partial(AdamWStep.accesses, to_old=True), "grads", "old_params", "exp_avgs", "exp_avg_sqs", "params"),
}
MASTER_STEP_OPS = {base: (*ops[:-1], "check_finite_", ops[-1]) for base, ops in STEP_OPS.items()}
NARROW_LISTS = ("params", "grads")  # 2 bytes an element; the others have 4

# The family, gradients given and kept by somebody: what a rule needs of the first pass is copied. (After a backward pass it is taken over.)
ALONG_AVERAGE = VARIANTS["perturb_ along averages"]
ALONG_BOTH = traffic_of(Perturb.accesses, "grads", "ema", "params", "old_params")
GRAD_DOTS = traffic_of(GradDots.accesses, lefts="grads", rights="kept_grads")
COMBINE = traffic_of(Combine.accesses, lefts="grads", rights="kept_grads", outs="grads")
COMBINE_THREE = traffic_of(Combine.accesses, lefts="params", rights="grads", origins="kept_grads", outs="params")
ORTHOGONAL = traffic_of(Combine.accesses, lefts="grads", rights="kept_grads", outs="orthogonal_grads")
_SAM_ASCENT = (OPS["grad_norm"], OPS["perturb_"])
FAMILY = {
    "vasso": (OPS["direction_norm_"], ALONG_AVERAGE, CHECK),
    "fsam": (OPS["direction_norm_"], ALONG_BOTH, CHECK),
    "gsam": (*_SAM_ASCENT, COPY, GRAD_DOTS, COMBINE),
    "wsam": (*_SAM_ASCENT, COPY, CHECK, COMBINE_THREE),
    "looksam": (*_SAM_ASCENT, COPY, GRAD_DOTS, ORTHOGONAL),
}
BETWEEN_LOOKS = (GRAD_DOTS, COMBINE)


def family_passes(method: str, base: str, every: int = 1) -> int:
    """Lists that a step reads and writes, its descent included; of LookSAM a cycle of ``every`` steps."""
    descent = OPS[STEP_OPS[base][-1]].passes
    between = sum(traffic.passes for traffic in BETWEEN_LOOKS) + descent
    return sum(traffic.passes for traffic in FAMILY[method]) + descent + (every - 1) * between


def op_bytes(op: str, numel: int, itemsize: int) -> int:
    return OPS[op].passes * numel * itemsize


def call_bytes(name: str, numel: int, itemsize: int) -> int:
    """Bytes that an entry of :data:`CALLS` moves."""
    return CALLS[name].passes * numel * itemsize


def master_bytes(op: str, numel: int) -> int:
    traffic = MASTER_OPS[op]
    uses = {Access.READ: traffic.reads, Access.UPDATED: traffic.updates, Access.WRITTEN: traffic.writes}
    return numel * sum(access.sweeps * (2 if name in NARROW_LISTS else 4) for access, lists in uses.items() for name in lists)


def master_step_bytes(base: str, numel: int) -> int:
    return sum(master_bytes(op, numel) for op in MASTER_STEP_OPS[base])


def step_bytes(base: str, numel: int, itemsize: int, micro_batches: int = 1) -> int:
    """``micro_batches`` > 1: a step of m-SAM, from gradients that somebody keeps. (Those of a backward pass are taken over, not copied.)"""
    if micro_batches > 1:
        first = OPS["perturb_"].passes + COPY.passes
        later = PERTURB_AGAIN.passes + ADD_TO_MEAN.passes + OPS["restore_"].passes  # the restoring is that of the micro-batch before
        descent = OPS[STEP_OPS[base][-1]].passes  # adding to the mean has told whether it is finite
        passes = micro_batches * OPS["grad_norm"].passes + first + (micro_batches - 1) * later + descent
        return passes * numel * itemsize
    return sum(op_bytes(op, numel, itemsize) for op in STEP_OPS[base]) + CHECK.passes * numel * itemsize
