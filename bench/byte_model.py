"""How many bytes an operation has to move: the model behind every GB/s. ``N`` elements of ``s`` bytes in each list."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILY", "OPS", "STEP_OPS", "Traffic", "family_passes", "op_bytes", "step_bytes"]


@dataclass(frozen=True)
class Traffic:
    """Lists that one pass only reads, reads and writes in place, and only writes."""

    reads: tuple[str, ...]
    updates: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        return len(self.reads) + 2 * len(self.updates) + len(self.writes)

    @property
    def lists(self) -> tuple[str, ...]:
        return self.reads + self.updates + self.writes


OPS = {
    "grad_norm": Traffic(reads=("grads",)),
    "centralize_": Traffic(reads=(), updates=("grads",)),
    "direction_norm_": Traffic(reads=("grads",), updates=("ema",)),
    "grad_dots": Traffic(reads=("lefts", "rights")),
    "combine_": Traffic(reads=("lefts", "rights"), writes=("outs",)),
    "perturb_": Traffic(reads=("grads",), updates=("params",), writes=("old_params",)),
    "random_perturb_": Traffic(reads=(), updates=("params",), writes=("old_params",)),
    "restore_": Traffic(reads=("old_params",), writes=("params",)),
    "sgd_step_": Traffic(reads=("old_params", "grads"), updates=("momentum_buffers",), writes=("params",)),
    "adamw_step_": Traffic(reads=("old_params", "grads"), updates=("exp_avgs", "exp_avg_sqs"), writes=("params",)),
}

# A whole step: norm, ascent, then restore and descent in one pass. Before that the second gradients are read to see that they are finite.
STEP_OPS = {"sgd": ("grad_norm", "perturb_", "sgd_step_"), "adamw": ("grad_norm", "perturb_", "adamw_step_")}
CHECK = Traffic(reads=("grads",))

# m-SAM: what is saved once is perturbed again, and the gradients found there are averaged.
PERTURB_AGAIN = Traffic(reads=("old_params", "grads"), writes=("params",))
COPY = Traffic(reads=("grads",), writes=("mean_grads",))
ADD_TO_MEAN = Traffic(reads=("grads",), updates=("mean_grads",))

# The family, gradients given and kept by somebody: what a rule needs of the first pass is copied. (After a backward pass it is taken over.)
ALONG_AVERAGE = Traffic(reads=("ema",), updates=("params",), writes=("old_params",))
ALONG_BOTH = Traffic(reads=("grads", "ema"), updates=("params",), writes=("old_params",))
GRAD_DOTS = Traffic(reads=("grads", "kept_grads"))
COMBINE = Traffic(reads=("kept_grads",), updates=("grads",))
COMBINE_THREE = Traffic(reads=("grads", "kept_grads"), updates=("params",))
ORTHOGONAL = Traffic(reads=("grads", "kept_grads"), writes=("orthogonal_grads",))
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


def step_bytes(base: str, numel: int, itemsize: int, micro_batches: int = 1) -> int:
    """``micro_batches`` > 1: a step of m-SAM, from gradients that somebody keeps. (Those of a backward pass are taken over, not copied.)"""
    if micro_batches > 1:
        first = OPS["perturb_"].passes + COPY.passes
        later = PERTURB_AGAIN.passes + ADD_TO_MEAN.passes + OPS["restore_"].passes  # the restoring is that of the micro-batch before
        descent = OPS[STEP_OPS[base][-1]].passes  # adding to the mean has told whether it is finite
        passes = micro_batches * OPS["grad_norm"].passes + first + (micro_batches - 1) * later + descent
        return passes * numel * itemsize
    return sum(op_bytes(op, numel, itemsize) for op in STEP_OPS[base]) + CHECK.passes * numel * itemsize
