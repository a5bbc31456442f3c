"""What a device is asked to show: each figure, its bar, what was measured, and whether that is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.byte_model import OPS
from bench.gpu.products import BASELINES, PRECISIONS, SHAPES, TOKENS
from bench.gpu.steps import BACKENDS, BASE_ALONE, FORWARDS, LOOPS, graph_of, provider
from bench.workloads import DTYPES

__all__ = ["Bar", "bars", "lines"]

Row = Mapping[str, Any]
OF_COPY = 92.0  # percent of the bandwidth of a copy, each operation on 10^8 elements
LOOP_FOREACH, LOOP_FUSED = LOOPS
# (workload, base, dtype, loop, from a graph): how many times longer the published loop's step takes.
SPEEDUPS = {
    ("one_1e9", "sgd", "fp32", LOOP_FOREACH, False): 1.8,
    ("one_1e9", "sgd", "fp32", LOOP_FUSED, False): 1.25,
    ("gpt2_124m", "sgd", "fp32", LOOP_FOREACH, False): 2.5,
    ("resnet50", "sgd", "fp32", LOOP_FOREACH, False): 6.0,
    ("many_tiny", "sgd", "fp32", LOOP_FOREACH, True): 30.0,
}
# Gradient norms per sample by the form that is chosen: how many times longer the better of torch's batched products takes, which forms
# the gradients; and one (p, d) gradient in units of what ours allocates.
PRODUCTS, NO_GRADIENT = 1.5, 1.0
# The host's time for a whole step, in units of what torch's fused optimizer takes for its one pass. Told, without a bar.
LAUNCHES = (("gpt2_124m", "sgd", "fp32"), ("gpt2_124m", "adamw", "fp32"))
# Steps of native whose passes all run forwards, in units of the usual ones, which begin in what the last pass left in the cache. Told.
ORDERS = (("one_1e8", "sgd", "fp32"), ("gpt2_124m", "sgd", "fp32"), ("resnet50", "sgd", "fp32"))


@dataclass(frozen=True)
class Bar:
    """``measured``: None where it was not. ``bar``: to be reached; None where there is none."""

    figure: str
    bar: float | None
    measured: float | None
    unit: str

    @property
    def state(self) -> str:
        if self.measured is None:
            return "not measured"
        return "told" if self.bar is None else "pass" if self.measured >= self.bar else "FAIL"

    def __str__(self) -> str:
        bar, measured = ("–" if value is None else f"{value:.2f}" for value in (self.bar, self.measured))
        return f"{self.figure:<44} {bar:>6} {measured:>6} {self.unit:<9} {self.state}"


def _step(rows: Sequence[Row], workload: str, base: str, dtype: str, name: str) -> Row | None:
    case = ("step", workload, base, dtype, name)
    return next((row for row in rows if (row["kind"], row.get("workload"), row["base"], row["dtype"], row["backend"]) == case), None)


def bars(rows: Sequence[Row], backend: str) -> Iterator[Bar]:
    measured = [row for row in rows if row["kind"] in ("op", "step")]
    for op in OPS:
        case = ("op", op, "one_1e8", backend)
        found = {row["dtype"]: row["pct_copy"] for row in measured if (row["kind"], row["op"], row["workload"], row["backend"]) == case}
        shown = ", ".join(f"{dtype} {found[dtype]:.1f}" if dtype in found else f"{dtype} –" for dtype in DTYPES)
        yield Bar(f"{op}, 10^8: {shown}", OF_COPY, min(found.values()) if len(found) == len(DTYPES) else None, "% of copy")
    for (workload, base, dtype, loop, from_graph), bar in SPEEDUPS.items():
        row = _step(measured, workload, base, dtype, graph_of(backend) if from_graph else provider(backend))
        ratio = None if row is None or loop not in row["loops"] else row["loops"][loop] / row["wall_ms"]
        yield Bar(f"{workload} {base} {dtype}{', graph,' if from_graph else ''} beside {loop}", bar, ratio, "x")
    for workload, base, dtype in LAUNCHES:
        ours, alone = (_step(measured, workload, base, dtype, name) for name in (provider(backend), BASE_ALONE))
        ratio = None if ours is None or alone is None else ours["launch_us"] / alone["launch_us"]
        yield Bar(f"{workload} {base} {dtype}, launching beside fused base", None, ratio, "x longer")
    if backend == "triton":  # the others have no kernels for it
        yield from _products([row for row in rows if row["kind"] == "product"])
    for workload, base, dtype in ORDERS if backend == "native" else ():
        forwards, ours = (_step(measured, workload, base, dtype, name) for name in (FORWARDS, provider(backend)))
        ratio = None if forwards is None or ours is None else forwards["ms_50"] / ours["ms_50"]
        yield Bar(f"{workload} {base} {dtype}, all passes forwards", None, ratio, "x longer")


def _products(rows: Sequence[Row]) -> Iterator[Bar]:
    """A bar a precision: of all layers and lengths the smallest factor counts, and none is missing."""
    cases: dict[tuple[str, int], dict[tuple[int, int], dict[str, Row]]] = {}
    for row in rows:
        layer = row["in_features"], row["out_features"]
        cases.setdefault((row["dtype"], row["tokens"]), {}).setdefault(layer, {})[row["backend"]] = row
    for name in PRECISIONS:
        factors = {tokens: _factor(cases.get((name, tokens), {})) for tokens in TOKENS}
        shown = ", ".join(f"{tokens} –" if factor is None else f"{tokens} {factor:.1f}" for tokens, factor in factors.items())
        known = [factor for factor in factors.values() if factor is not None]
        yield Bar(f"per sample {name}: {shown}", PRODUCTS, min(known) if len(known) == len(TOKENS) else None, "x")
    ours = [row for row in rows if row["backend"] not in BASELINES and row["peak_bytes"] is not None]
    room = [4 * row["in_features"] * row["out_features"] / max(row["peak_bytes"], 1) for row in ours]
    yield Bar("per sample: a gradient beside what is allocated", NO_GRADIENT, min(room, default=None), "x")


def _factor(by_layer: Mapping[tuple[int, int], Mapping[str, Row]]) -> float | None:
    """Torch's better way beside the form that is chosen; the smallest of all layers, None where one is missing."""
    found = []
    for by_backend in by_layer.values():
        torchs = [by_backend[name]["ms_50"] for name in BASELINES if name in by_backend]
        chosen = [row["ms_50"] for row in by_backend.values() if row["is_chosen"]]
        found += [min(torchs) / chosen[0]] if torchs and chosen else []
    return min(found) if len(found) == len(SHAPES) else None


def lines(rows: Sequence[Row]) -> list[str]:
    """A table for each backend; of an operation's two types the slower one counts."""
    found = []
    for backend in BACKENDS:
        mine = list(bars(rows, backend))
        states = [bar.state for bar in mine]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        found += [f"{f'{backend}: {counts}':<46} {'bar':>6} {'measured':>6}", *(f"  {bar}" for bar in mine)]
    return found
