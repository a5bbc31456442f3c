"""Which faults are planted, and which tests are to find them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from tests.mutants.planting import Mutant, mutants_of

__all__ = ["PLACES", "Run", "chosen", "runs_for"]

PLACES = {  # where: how many faults
    "sam_kernels/optim/**/*.py": 28,
    "sam_kernels/functional/**/*.py": 10,
    "sam_kernels/operations/*.py": 4,
    "sam_kernels/backends/**/*.py": 18,
    "csrc/common/*.h": 8,
    # Files that the draws above might never meet.
    "sam_kernels/optim/groups.py": 3,
    "sam_kernels/optim/_base/names.py": 3,
    "sam_kernels/optim/_engine/first_pass.py": 3,
    "sam_kernels/optim/_engine/last_grads.py": 3,
    "sam_kernels/optim/_replicas/hybrid.py": 2,
    "sam_kernels/optim/_replicas/grad_mean.py": 2,
    "sam_kernels/optim/_shards/replica_groups.py": 2,
    "sam_kernels/optim/_reweighted/samples.py": 2,
    "sam_kernels/optim/_reweighted/weighing.py": 3,
    "sam_kernels/functional/_masters.py": 3,
    "sam_kernels/schedules/_policy.py": 4,
    "sam_kernels/schedules/_following.py": 3,
}


def chosen(root: Path, seed: int, places: dict[str, int] = PLACES) -> list[Mutant]:
    """The faults that a seed chooses of each place: every kind of fault as often as any other, as long as there are some."""
    draw = random.Random(seed)
    found: list[Mutant] = []
    for pattern, count in places.items():
        kinds: dict[str, list[Mutant]] = {}
        for path in sorted(root.glob(pattern)):
            left = [mutant for mutant in mutants_of(str(path.relative_to(root)), path.read_bytes()) if mutant not in found]
            for mutant in left:
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
QUICK = "not compile and not determinism and not against_reference and not instruction_set"
OPS = Run(("tests/ops", "-k", QUICK)), Run((REFERENCE,)), Run(("tests/ops", "-k", "compile"))  # the quickest first
_ABOUT_FORMULAS = ("averages", "semantics", "combinations", "directions", "torch_optim")
FORMULAS = Run((*(f"tests/ops/test_{name}.py" for name in _ABOUT_FORMULAS), "-k", "native"))
OPTIM = Run(("tests/optim",))


DISTRIBUTED = "../distributed"
OPTIM_TESTS = {  # file of sam_kernels/optim -> its nearest tests in tests/optim
    "_engine/amp.py": ("test_amp", "test_family_amp"),
    "_engine/ascent*.py": ("test_family", "test_own_direction", "test_both_sides"),
    "_base/base.py": ("test_contract", "test_both_sides"),
    "_engine/capturable.py": ("test_capturable",),
    "_base/checkpoint.py": ("test_checkpoint", "test_family_checkpoint", "test_flat_checkpoint"),
    "*/closure*.py": ("test_contract", "test_loops", "test_contexts"),
    "_batches/cut.py": ("test_cut_batches", "test_micro_batches"),
    "_engine/update.py": ("test_family", "test_family_options"),
    "_reweighted/directional.py": ("test_rwsam_directional", "test_rwsam"),
    "_base/distributed_checkpoint.py": ("test_flat_checkpoint",),
    "_base/names.py": ("test_rwsam_checkpoint", "test_family_checkpoint", "test_flat_checkpoint"),
    "_engine/added_gradients.py": ("test_gradient_oracle", "test_gradient_oracle_failures", "test_plain_steps", "test_contract"),
    "_engine/two_steps.py": ("test_contract", "test_family_two_steps", "test_non_finite", "test_loops"),
    "_engine/engine.py": ("test_contract", "test_formula", "test_non_finite", "test_family_failures", "test_micro_batch_contract"),
    "_engine/failed_rank.py": (DISTRIBUTED,),
    "_engine/*lists.py": ("test_formula", "test_family_groups", "test_family_schedules", "test_family_bad_input"),
    "_engine/replay.py": ("test_rwsam_contract", "test_contexts"),
    "_base/identity.py": ("test_identity",),
    "_engine/first_pass.py": ("test_freezing", "test_freezing_failures", "test_freezing_models"),
    "groups.py": ("test_groups",),
    "_replicas/grad_mean.py": ("../distributed/test_freezing",),
    "_engine/in_flight.py": ("test_non_finite", "test_amp", "test_interrupted"),
    "_engine/kept_grads.py": ("test_kept_grads", "test_family_two_steps"),
    "_engine/last_grads.py": ("test_last_grads", "test_family"),
    "_engine/observing.py": ("../schedules/test_policy",),
    "_engine/memory.py": ("test_family_checkpoint", "test_family_failures"),
    "_batches/micro_batches.py": ("test_micro_batches", "test_micro_batch_contract"),
    "_base/imitations.py": ("test_imitations",),
    "_base/options.py": ("test_bad_input", "test_family_bad_input", "test_option_names"),
    "_engine/oracle.py": ("test_gradient_oracle", "test_gradient_oracle_failures"),
    "_engine/ownership.py": ("test_contract", "test_identity"),
    "_engine/passes.py": ("test_contract", "test_formula", "test_non_finite", "test_family_failures"),
    "_engine/plan.py": ("test_formula", "test_family_schedules", "test_once_a_step"),
    "_replicas/hybrid.py": ("../distributed/test_replica_groups", "../distributed/test_replica_groups_refused"),
    "_replicas/rank_mean.py": ("test_rwsam_amp", DISTRIBUTED),
    "_replicas/replicas.py": (DISTRIBUTED, "test_rwsam_amp"),
    "_reweighted/samples.py": ("test_rwsam", "../distributed/test_shards", "../distributed/test_per_sample_shards"),
    "_reweighted/weighing.py": ("test_rwsam", "test_rwsam_contract", "test_rwsam_bad_input", "../distributed/test_shards"),
    "_reweighted/reweighting.py": ("test_rwsam", "test_rwsam_bad_input"),
    "_seeds.py": ("test_family", "test_family_groups"),
    "_base/sharded.py": (DISTRIBUTED,),
    "_shards/replica_groups.py": ("../distributed/test_replica_groups", "../distributed/test_replica_groups_refused"),
    "_shards/*": (DISTRIBUTED,),
    "_engine/skip*.py": ("test_non_finite", "test_amp", "test_family_failures"),
    "_batches/structures.py": ("test_cut_batches", "test_micro_batches"),
    "*/w*.py": ("test_both_sides", "test_contract", "test_torch_hooks", "test_torch_scenarios"),
    "descents.py": ("test_family", "test_family_amp", "test_family_failures"),
    "directions.py": ("test_family", "test_family_limits", "test_own_direction"),
    "_part.py": ("test_own_direction", "test_family_bad_input"),
    "presets.py": ("test_formula", "test_family", "test_family_bad_input"),
    "rwsam.py": ("test_rwsam", "test_rwsam_contract", "test_rwsam_bad_input", "test_rwsam_amp"),
    "sam.py": ("test_contract", "test_bad_input", "test_formula"),
    "*": ("test_contract", "test_family"),
}
ON_HOST = tuple(
    Run(arguments, {"SAM_KERNELS_CUDA_ON_HOST": "1"}) for arguments in (("tests/ops", "tests/on_host", "-k", QUICK), (REFERENCE,))
)


FUNCTIONAL_TESTS = {  # file of sam_kernels/functional -> its nearest tests in tests/ops, after those of bad input
    "ascent.py": ("test_semantics", "test_directions", "test_rounding"),
    "centralize.py": ("test_centralize",),
    "combinations.py": ("test_combinations",),
    "descent.py": ("test_semantics", "test_torch_optim", "test_scalar_dtypes"),
    "directions.py": ("test_directions",),
    "norms.py": ("test_norm_and_flags", "test_semantics"),
    "random.py": ("test_random",),
}


def of_functional(*names: str) -> Run:
    return Run(tuple(f"tests/ops/{name}.py" for name in ("test_bad_input", *names)))


def of_optim(*names: str) -> Run:
    return Run(tuple("tests/distributed" if name == DISTRIBUTED else f"tests/optim/{name}.py" for name in names))


def of_backend(name: str) -> tuple[Run, ...]:
    return Run(("tests/ops", "tests/native", "-k", f"{name} and {QUICK}")), Run((REFERENCE,)), OPTIM


# Pattern of a path -> runs, until one of them fails. Of all patterns that fit, the first counts. The last runs of each are for what the
# nearest tests do not find.
RUNS: list[tuple[str, tuple[Run, ...]]] = [
    *((f"sam_kernels/optim/{pattern}", (of_optim(*nearest), OPTIM)) for pattern, nearest in OPTIM_TESTS.items()),
    ("sam_kernels/schedules/*", (Run(("tests/schedules",)), of_optim("test_family_schedules", "test_once_a_step"), OPTIM)),
    ("sam_kernels/functional/_masters.py", (Run(("tests/ops/test_masters.py", "tests/ops/test_semantics.py")), *OPS, OPTIM)),
    ("sam_kernels/functional/per_sample/*", (Run(("tests/ops", "-k", "per_sample")), Run(("tests/per_sample",)))),
    ("sam_kernels/functional/sharpness*", (Run(("tests/ops/test_sharpness.py",)), *OPS)),
    ("sam_kernels/functional/_library*", (Run(("tests/ops/test_compile.py", "tests/ops/test_compile_refusals.py")), *OPS)),
    *((f"sam_kernels/functional/{name}", (of_functional(*nearest), *OPS, OPTIM)) for name, nearest in FUNCTIONAL_TESTS.items()),
    ("sam_kernels/functional/*", (*OPS, OPTIM)),
    ("sam_kernels/operations/*", (Run(("tests/ops/test_operations.py",)), *OPS)),
    ("sam_kernels/backends/*/per_sample*", (Run(("tests/ops", "-k", "per_sample")), Run(("tests/per_sample",)))),
    ("sam_kernels/backends/*/sharpness.py", (Run(("tests/ops/test_sharpness.py",)),)),
    ("sam_kernels/backends/foreach/*", of_backend("foreach")),
    ("sam_kernels/backends/native/cuda*", ON_HOST),
    ("sam_kernels/backends/native/_cuda*", ON_HOST),
    ("sam_kernels/backends/native/*", of_backend("native")),
    ("sam_kernels/_sharding.py", (of_optim(DISTRIBUTED),)),
    ("csrc/common/random.h", (Run(("tests/ops/test_random.py", "tests/ops/test_rounding.py")), *OPS[:2])),
    ("csrc/common/half.h", (Run(("tests/ops/test_half_conversion.py",)), *OPS[:2])),
    ("csrc/common/sampling.h", (Run(("tests/ops/test_sharpness.py",)),)),
    ("csrc/common/formulas.h", (FORMULAS, *of_backend("native"))),
    ("csrc/*", of_backend("native")),
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
    ("norm.py", "tests/ops/test_norm_and_flags.py"),
    ("_slices.py", "tests/ops/test_centralize.py"),
    ("_lists.py", "tests/ops/test_tensor_kinds.py tests/interpreted/test_tables.py"),
    ("_table.py", "tests/interpreted/test_tables.py tests/ops/test_tensor_kinds.py"),
    ("perturb.py", f"{REFERENCE} -k perturb_"),
]


def runs_for(path: str) -> tuple[Run, ...]:
    """The runs that are to find a fault in a file, in their order."""
    if path.startswith(TRITON):
        words = next((words for pattern, words in TRITON_RUNS if fnmatch(path.removeprefix(TRITON), pattern)), f"{REFERENCE} -k sgd")
        runs = Run(tuple(words.split()), INTERPRETED), LAUNCHES, Run(("tests/interpreted",), INTERPRETED), CODE
        return (Run(("tests/triton/test_config.py",)), *runs) if path.endswith("_config.py") else runs
    return next((runs for pattern, runs in RUNS if fnmatch(path, pattern)), (*OPS, OPTIM))
