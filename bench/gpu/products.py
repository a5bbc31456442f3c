"""Squared gradient norms of linear layers per sample: both forms of ours beside torch's batched products, which form the gradients."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu.gate import Gate
from bench.gpu.timing import Call, Clock, interleave
from sam_kernels import use_backend
from sam_kernels._dispatch import reason_missing
from sam_kernels.functional import per_sample

__all__ = ["BASELINES", "OP", "PRECISIONS", "SHAPES", "TOKENS", "flops", "lines", "measure", "ours"]

OP = "linear_square_norms_"
TOKENS = (16, 64, 256, 1024, 2048)
SHAPES = ((768, 768), (768, 3072), (1024, 4096))  # d, p
PRECISIONS = {"bf16": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
BASELINES = ("baddbmm", "einsum")
METHODS = ("gram", "direct")
FEW, MANY, LONG = 8, 32, 512  # groups of long sequences, of short ones, and where long begins
SECONDS = 0.08  # of a case's calls, one after the other
Row = Mapping[str, Any]


def ours(method: str) -> str:
    return f"triton, {method}"


def flops(method: str, tokens: int, d: int, p: int) -> int:
    """Of a group: what each form has to do (the Gram form half of two symmetric matrices)."""
    return tokens * tokens * (d + p) if method == "gram" else 2 * tokens * d * p


def _norms(products: Tensor) -> Tensor:
    return torch.linalg.vector_norm(products, dim=(1, 2), dtype=torch.float32).square()


def _baddbmm(a: Tensor, g: Tensor) -> Tensor:
    return _norms(torch.baddbmm(a.new_empty(()), g.mT, a, beta=0.0))


def _einsum(a: Tensor, g: Tensor) -> Tensor:
    return _norms(torch.einsum("mtp,mtd->mpd", g, a))


def _calls(a: Tensor, g: Tensor, precision: str, backend: str) -> dict[str, Call]:
    norms = torch.zeros(len(a), dtype=torch.float64, device=a.device)

    def of(method: str) -> Call:
        def call() -> None:
            with use_backend(backend):
                per_sample.linear_square_norms_(norms, a, g, method=method, precision=precision)

        return call

    return {ours(method): of(method) for method in METHODS} | {"baddbmm": lambda: _baddbmm(a, g), "einsum": lambda: _einsum(a, g)}


@contextmanager
def _torch_precision(precision: str) -> Iterator[None]:
    """Torch's products are tf32 where ours are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call allocates at a time beyond what was there."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated()) - before


def measure(
    clock: Clock, device: str, gate: Gate, deadline: float, *, dtypes: Sequence[str], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Rows of kind "product". A dry run: two tiny cases, on whatever backend there is."""
    reason = reason_missing("triton", torch.device(device).type)
    backend = "triton" if reason is None else "foreach"
    if reason is not None:
        say(f"left out: {OP} on triton: {reason}" + ("; foreach stands in" if device == "cpu" else ""))
    if device != "cpu" and (reason is not None or not gate.allows(OP, "triton")):
        say(f"left out: {OP} on triton: no green test")
        return
    cases = itertools.product(TOKENS, SHAPES) if device != "cpu" else [(16, (32, 48)), (64, (48, 32))]
    for (tokens, (d, p)), (name, (dtype, precision)) in itertools.product(cases, PRECISIONS.items()):
        what = f"{OP} {tokens} {d} {p} {name}"
        if ("bf16" if name == "bf16" else "fp32") not in dtypes:
            continue
        if time.monotonic() > deadline:
            say(f"left out: {what}: out of time")
            continue
        try:
            yield from _case(clock, device, backend, tokens, d, p, name, dtype, precision)
        except Exception as error:  # out of memory, a kernel that does not compile: the others are still of interest
            say(f"left out: {what}: {type(error).__name__}: {str(error)[:200]}")


def _case(
    clock: Clock, device: str, backend: str, tokens: int, d: int, p: int, name: str, dtype: torch.dtype, precision: str
) -> Iterator[dict[str, Any]]:
    m = (FEW if tokens >= LONG else MANY) if device != "cpu" else 2
    a, g = (torch.randn((m, tokens, size), dtype=dtype, device=device) for size in (d, p))
    calls = _calls(a, g, precision, backend)
    with torch.no_grad(), _torch_precision(name):
        peaks = {}
        for provider, call in calls.items():
            call()
            peaks[provider] = _peak(call, device)
        timed = interleave(clock, calls, seconds=SECONDS if device != "cpu" else 0.005)
    with use_backend(backend):
        chosen = ours(per_sample.linear_method(tokens, d, p, torch.device(device).type, dtype))
    row = {"kind": "product", "op": OP, "base": None, "dtype": name, "tokens": tokens, "in_features": d, "out_features": p, "groups": m}
    for provider, found in timed.items():
        q = found.device
        work = m * flops("gram" if provider == ours("gram") else "direct", tokens, d, p)
        times = {"ms_20": q.ms_20, "ms_50": q.ms_50, "ms_80": q.ms_80, "host_us": found.host_us, "tflops": work / q.ms_50 / 1e9}
        yield row | {"backend": provider, "is_chosen": provider == chosen, "peak_bytes": peaks[provider]} | times


def lines(rows: Sequence[Row]) -> list[str]:
    """A line a layer and precision; for each length both forms of ours, the chosen one in brackets, torch's better way, and the factor."""
    cases: dict[tuple[Any, ...], dict[int, dict[str, Row]]] = {}
    for row in (row for row in rows if row["kind"] == "product"):
        case = row["in_features"], row["out_features"], row["dtype"]
        cases.setdefault(case, {}).setdefault(row["tokens"], {})[row["backend"]] = row
    found = ["per sample: d p, precision; T: ms by gram, direct, [chosen]; of torch's better way; which takes longer by"] if cases else []
    for (d, p, dtype), by_tokens in cases.items():
        cells = [f"{tokens}: {_cell(by)}" for tokens, by in by_tokens.items()]
        found.append(f"  {d} {p} {dtype}; {'; '.join(cells)}")
    return found


def _cell(by: Mapping[str, Row]) -> str:
    times = [f"[{row['ms_50']:.3f}]" if (row := by[ours(method)])["is_chosen"] else f"{row['ms_50']:.3f}" for method in METHODS]
    best = min(by[name]["ms_50"] for name in BASELINES)
    chosen = next(row["ms_50"] for row in by.values() if row["is_chosen"])
    return f"{' '.join(times)} {best:.3f} {best / chosen:.1f}×"
