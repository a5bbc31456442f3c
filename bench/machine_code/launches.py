"""The specialisations that are compiled, recorded and not listed: every operation runs on small CPU tensors with all its keyword sets and
dtypes, the optimizers take steps, and launching is replaced by taking notes. A variant that users can reach is then not missed because
somebody forgot to name it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

import sam_kernels
from bench import op_calls
from bench.byte_model import OPS
from bench.offline import takes_cpu_tensors
from sam_kernels import functional
from sam_kernels.validation.cases import MIXED_NARROW
from sam_kernels.validation.check import build
from sam_kernels.validation.options import OPTIONS, concerns
from sam_kernels.validation.problem import run

__all__ = ["DTYPES", "Variant", "covering", "covering_calls", "operation_calls", "recorded", "records_of", "timed_call"]

_T = TypeVar("_T")
DTYPES = ("float32", "bfloat16", "float16", MIXED_NARROW)
_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
_POINTERS |= {torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as plain data: it travels to other processes and is compiled there."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> type, "constexpr" for what is compiled in
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    num_warps: int  # of 32 threads
    fp_fusion: bool
    num_stages: int | None = None  # None: Triton's own number of buffers

    @property
    def draws(self) -> bool:
        """Whether it makes random numbers."""
        return self.kernel == "_random_kernel" or ("STOCHASTIC", True) in self.constants

    @property
    def holds_slices(self) -> bool:
        """Whether slices of a tensor lie side by side in a block, a slice a line, so that every access has a mask."""
        return any(name == "COLUMNS" for name, _ in self.constants)

    @property
    def values(self) -> tuple[tuple[str, Any], ...]:
        """The constants, each part of a tuple by itself."""
        found: list[tuple[str, Any]] = []
        for name, value in self.constants:
            found += [(f"{name}[{i}]", part) for i, part in enumerate(value)] if isinstance(value, tuple) else [(name, value)]
        return tuple(found)

    @property
    def dtypes(self) -> tuple[tuple[str, str], ...]:
        """Storage type of each operand, in the order of the kernel's arguments."""
        return tuple((name, str(value)) for name, value in self.values if type(value).__name__ == "dtype")

    @property
    def dtype(self) -> str:
        """The storage type of all operands, or "mixed"; "" for a kernel that is given none."""
        found = {dtype for _, dtype in self.dtypes}
        return found.pop() if len(found) == 1 else "mixed" if found else ""

    @property
    def walks_chunks(self) -> bool:
        """Whether this is one of the kernels that move the bytes, and not one of those that finish a norm or count steps."""
        return any(name.lower() == "chunk_size" for name, _ in self.signature)

    def __str__(self) -> str:
        switches = (f"{name}={value}" for name, value in self.values if not name.endswith("_SIZE"))
        return f"{self.kernel}[{' '.join(switches)}]"


def _type_of(value: Any) -> str:
    """The type Triton gives an argument that is no constant."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    return "fp32"


def _is_multiple(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def _variant(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Variant:
    options = {name: kwargs.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    stages = kwargs.pop("num_stages", None)
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    # What Triton compiles in: arguments that say so, None, and the integer one (unless it was told not to look at the value).
    known = {p.name for p in kernel.params if p.is_constexpr} | {name for name, value in given.items() if value is None}
    known |= {p.name for p in kernel.params if not p.do_not_specialize and type(given[p.name]) is int and given[p.name] == 1}
    unseen = {p.name for p in kernel.params if p.do_not_specialize}
    return Variant(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple((name, "constexpr" if name in known else _type_of(given[name])) for name in kernel.arg_names),
        tuple((name, given[name]) for name in kernel.arg_names if name in known),
        tuple(name for name in kernel.arg_names if name not in known | unseen and _is_multiple(given[name])),
        options["num_warps"],
        options["enable_fp_fusion"],
        stages,
    )


@contextlib.contextmanager
def _notes() -> Iterator[list[Variant]]:
    """While this is open, the Triton backend takes CPU tensors, and a launch is a note in the list and nothing else."""
    from triton.runtime.jit import JITFunction

    found: dict[Variant, None] = {}
    notes: list[Variant] = []

    def note(kernel: Any, grid: Any) -> Callable[..., None]:
        del grid
        return lambda *args, **kwargs: found.setdefault(_variant(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "__getitem__", note), takes_cpu_tensors():
        yield notes
    notes.extend(found)


def records_of(*calls: Callable[[], object]) -> list[Variant]:
    """The specialisations that some calls launch, each once, in the order of their first launch."""
    with _notes() as notes:
        for call in calls:
            call()
    return notes


def _operations() -> Iterator[Callable[[], object]]:
    for op, options in OPTIONS.items():
        cases = ("single", "slices", "long_slices") if op == "centralize_" else ("single",)
        for option, dtype, case in itertools.product(options, DTYPES, cases):
            if concerns(op, option, dtype):
                problem = build(op, case, dtype, option)
                yield lambda problem=problem: run(problem)


def _checks() -> Iterator[Callable[[], object]]:
    """What the keyword sets lack: the check by itself, and the norm that begins a step."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads, flag = [torch.ones(128, dtype=dtype)], torch.zeros(())
        yield lambda grads=grads, flag=flag: functional.check_finite_(grads, flag)
        yield lambda grads=grads, flag=flag: functional.grad_norm_(torch.zeros(()), grads, found_inf=flag, skipped=torch.zeros(()))


def _optimizer_steps() -> Iterator[Callable[[], object]]:
    """Steps as users take them."""
    bases: dict[Any, dict[str, Any]] = {torch.optim.SGD: {"momentum": 0.9}, torch.optim.Adam: {}, torch.optim.AdamW: {}}
    capturable = {"capturable": True, "lr": torch.tensor(0.1)}
    keywords: tuple[dict[str, Any], ...] = ({}, {"max_grad_norm": 1.0}, {"adaptive": True, "eta": 0.01}, capturable)
    for (base, own), given, dtype in itertools.product(bases.items(), keywords, (torch.float32, torch.bfloat16)):

        def two_steps(base: Any = base, own: dict[str, Any] = own, given: dict[str, Any] = given, dtype: torch.dtype = dtype) -> None:
            model = nn.Linear(8, 4).to(dtype)
            optimizer = sam_kernels.SAM(model.parameters(), base, **{"lr": 0.1, **own, **given})

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = model(torch.ones(2, 8, dtype=dtype)).square().sum()
                loss.backward()
                return loss

            for _ in range(2):
                optimizer.step(closure)

        yield two_steps


def timed_call(op: str) -> Callable[[], object]:
    """The call that ``python -m bench`` times, and whose bytes bench/byte_model.py gives."""
    lists = op_calls.make_lists(op, ((2, 2048),), torch.float32)
    return lambda: op_calls.ours(op, "triton")(lists)


def recorded() -> list[Variant]:
    """Every specialisation that the operations and the optimizers launch."""
    return records_of(*_operations(), *_checks(), *_optimizer_steps(), *(timed_call(op) for op in OPS))


def _features(variant: Variant) -> set[tuple[Any, ...]]:
    constants = {(variant.kernel, name, str(value)) for name, value in variant.values}
    return {(variant.kernel, variant.dtype), *constants, *((variant.kernel, *argument) for argument in variant.signature)}


def covering(variants: Sequence[Variant]) -> list[Variant]:
    """A few of them in which every kernel meets every dtype, and every argument every value, at least once. Greedy."""
    return _covering(variants, [_features(variant) for variant in variants])


def covering_calls(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The same of calls, by what they launch."""
    return _covering(calls, [set().union(*map(_features, records_of(call))) for call in calls])


def _covering(things: Sequence[_T], features: Sequence[set[tuple[Any, ...]]]) -> list[_T]:
    missing = set().union(*features)
    chosen = []
    while missing:
        best = max(range(len(things)), key=lambda i: len(features[i] & missing))
        chosen.append(things[best])
        missing -= features[best]
    return chosen


def operation_calls() -> list[Callable[[], object]]:
    """Calls of every operation with every keyword set and dtype."""
    return [*_operations(), *_checks()]
