"""What a device is asked to show: each figure, its bar, what was measured, and whether that is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.byte_model import OPS
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
        return f"{self.figure:<50} {bar:>6} {measured:>6} {self.unit:<9} {self.state}"


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
    for workload, base, dtype in ORDERS if backend == "native" else ():
        forwards, ours = (_step(measured, workload, base, dtype, name) for name in (FORWARDS, provider(backend)))
        ratio = None if forwards is None or ours is None else forwards["ms_50"] / ours["ms_50"]
        yield Bar(f"{workload} {base} {dtype}, all passes forwards", None, ratio, "x longer")


def lines(rows: Sequence[Row]) -> list[str]:
    """A table for each backend; of an operation's two types the slower one counts."""
    found = []
    for backend in BACKENDS:
        mine = list(bars(rows, backend))
        states = [bar.state for bar in mine]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        found += [f"{f'{backend}: {counts}':<52} {'bar':>6} {'measured':>6}", *(f"  {bar}" for bar in mine)]
    return found
