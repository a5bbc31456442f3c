"""Which faults are planted, and which tests are to find them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from tests.mutants.planting import Mutant, mutants_of

__all__ = ["PLACES", "Run", "chosen", "runs_for"]

PLACES = {  # where: how many faults
    "sam_kernels/optim/*.py": 28,
    "sam_kernels/functional/**/*.py": 14,
    "sam_kernels/backends/**/*.py": 18,
    "csrc/common/*.h": 8,
}


def chosen(root: Path, seed: int, places: dict[str, int] = PLACES) -> list[Mutant]:
    """The faults that a seed chooses of each place: every kind of fault as often as any other, as long as there are some."""
    draw = random.Random(seed)
    found = []
    for pattern, count in places.items():
        kinds: dict[str, list[Mutant]] = {}
        for path in sorted(root.glob(pattern)):
            for mutant in mutants_of(str(path.relative_to(root)), path.read_bytes()):
                kinds.setdefault(mutant.kind, []).append(mutant)
        taken: list[Mutant] = []
        while len(taken) < count and any(kinds.values()):
            kind = draw.choice(sorted(kind for kind, left in kinds.items() if left))
            taken.append(kinds[kind].pop(draw.randrange(len(kinds[kind]))))
        found += sorted(taken, key=lambda mutant: (mutant.path, mutant.start, mutant.new))
    return found


@dataclass(frozen=True)
class Run:
    """Arguments of pytest and variables of its environment."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


INTERPRETED = {"TRITON_INTERPRET": "1"}
LAUNCHES = Run(("tests/triton/test_tickets.py", "tests/triton/test_launch.py", "tests/triton/test_jit_path.py"))
CODE = Run(("tests/triton",))
REFERENCE = "tests/ops/test_against_reference.py"
OPS = Run(("tests/ops",))
OPTIM = Run(("tests/optim",))
# Pattern of a path -> runs, until one of them fails. Of all patterns that fit, the first counts. The last runs of each are for what the
# nearest tests do not find.
RUNS: list[tuple[str, tuple[Run, ...]]] = [
    ("sam_kernels/optim/_rep*", (Run(("tests/distributed", "tests/optim/test_rwsam_amp.py")), OPTIM)),
    ("sam_kernels/optim/_sharded*", (Run(("tests/distributed",)), OPTIM)),
    ("sam_kernels/optim/_rank*", (Run(("tests/distributed", "tests/optim/test_rwsam_amp.py")), OPTIM)),
    ("sam_kernels/optim/rwsam.py", (Run(("tests/optim", "-k", "rwsam")), OPTIM)),
    ("sam_kernels/optim/_reweighting.py", (Run(("tests/optim", "-k", "rwsam")), OPTIM)),
    ("sam_kernels/optim/_directional.py", (Run(("tests/optim", "-k", "rwsam")), OPTIM)),
    ("sam_kernels/optim/*", (OPTIM, Run(("tests/schedules", "tests/distributed", "tests/ops/test_compile_steps.py")))),
    ("sam_kernels/functional/per_sample/*", (Run(("tests/ops", "-k", "per_sample")), Run(("tests/per_sample",)))),
    ("sam_kernels/functional/sharpness*", (Run(("tests/ops/test_sharpness.py",)), OPS)),
    ("sam_kernels/functional/_library*", (Run(("tests/ops/test_compile.py", "tests/ops/test_compile_refusals.py")), OPS)),
    ("sam_kernels/functional/*", (Run(("tests/ops", "-k", "not compile and not determinism")), OPS, OPTIM)),
    ("sam_kernels/backends/*/per_sample*", (Run(("tests/ops", "-k", "per_sample")), Run(("tests/per_sample",)))),
    ("sam_kernels/backends/*/sharpness.py", (Run(("tests/ops/test_sharpness.py",)),)),
    ("sam_kernels/backends/foreach/*", (Run(("tests/ops", "-k", "foreach")), Run((REFERENCE,)), OPTIM)),
    ("sam_kernels/backends/native/cuda*", (Run(("tests/ops", "-k", "native"), {"SAM_KERNELS_CUDA_ON_HOST": "1"}),)),
    ("sam_kernels/backends/native/_cuda*", (Run(("tests/ops", "-k", "native"), {"SAM_KERNELS_CUDA_ON_HOST": "1"}),)),
    ("sam_kernels/backends/native/*", (Run(("tests/ops", "tests/native", "-k", "native")), Run((REFERENCE,)), OPTIM)),
    ("csrc/common/random.h", (Run(("tests/ops/test_random.py", "tests/ops/test_rounding.py")), OPS)),
    ("csrc/common/half.h", (Run(("tests/ops/test_half_conversion.py",)), OPS)),
    ("csrc/common/sampling.h", (Run(("tests/ops/test_sharpness.py",)), OPS)),
    ("csrc/*", (Run(("tests/ops", "-k", "native and not compile and not determinism")), Run((REFERENCE,)), Run(("tests/native",)))),
]
# Kernels of Triton's are interpreted, then compiled.
TRITON = "sam_kernels/backends/triton/"
TRITON_RUNS: list[tuple[str, str]] = [
    ("per_sample/*", "tests/ops -k per_sample"),
    ("sharpness/*", "tests/ops/test_sharpness.py"),
    ("adamw.py", f"{REFERENCE} -k adamw"),
    ("sgd.py", f"{REFERENCE} -k sgd"),
    ("random.py", f"{REFERENCE} -k random"),
    ("_random.py", f"{REFERENCE} -k random"),
    ("centralize.py", f"{REFERENCE} -k centralize"),
    ("combine.py", f"{REFERENCE} -k combine"),
    ("dots.py", f"{REFERENCE} -k dots"),
    ("direction.py", f"{REFERENCE} -k direction"),
    ("norm.py", f"{REFERENCE} -k grad_norm"),
    ("perturb.py", f"{REFERENCE} -k perturb_"),
]


def runs_for(path: str) -> tuple[Run, ...]:
    """The runs that are to find a fault in a file, in their order."""
    if path.startswith(TRITON):
        words = next((words for pattern, words in TRITON_RUNS if fnmatch(path.removeprefix(TRITON), pattern)), f"{REFERENCE} -k sgd")
        return Run(tuple(words.split()), INTERPRETED), LAUNCHES, Run(("tests/interpreted",), INTERPRETED), CODE
    return next((runs for pattern, runs in RUNS if fnmatch(path, pattern)), (OPS, OPTIM))
