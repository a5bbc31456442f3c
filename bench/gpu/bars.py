"""What a device is asked to show: each figure, its bar, what was measured, and whether that is enough. Where the bars come from:
:mod:`bench.gpu.limits` and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.byte_model import OPS
from bench.gpu import limits
from bench.gpu.models import MODELS
from bench.gpu.peers import COPY, ON_DTENSORS
from bench.gpu.products import BASELINES, PRECISIONS, SHAPES, TOKENS
from bench.gpu.steps import BACKENDS, BASE_ALONE, COMBINATIONS, FORWARDS, LOOPS, graph_of, provider
from bench.gpu.training import BASE, REWEIGHTED, SAM_STEP
from bench.workloads import DTYPES

__all__ = ["Bar", "bars", "lines", "tables"]

Row = Mapping[str, Any]
LOOP_FOREACH, LOOP_FUSED = LOOPS
# What is compared with a copy, and the percentage that bytes alone would allow: all operations, and those of a step.
OF_COPY = {"one_1e8": (limits.FULL, tuple(OPS)), "resnet18": (limits.SMALL, ("grad_norm", "perturb_", "sgd_step_", "adamw_step_"))}
# (workload, base, dtype, loop, from a graph): how many times longer the published loop's step takes. Of several tensors the host decides
# for the loop, and the bar is no higher than what our bytes allow.
SPEEDUPS = {
    ("one_1e9", "sgd", "fp32", LOOP_FOREACH, False): limits.loop_ratio("sgd", LOOP_FOREACH),
    ("one_1e9", "sgd", "fp32", LOOP_FUSED, False): limits.loop_ratio("sgd", LOOP_FUSED),
    ("gpt2_124m", "sgd", "fp32", LOOP_FOREACH, False): 2.5,
    ("resnet50", "sgd", "fp32", LOOP_FOREACH, False): 6.0,
    ("many_tiny", "sgd", "fp32", LOOP_FOREACH, True): 30.0,
}
# Gradient norms per sample by the form that is chosen: how many times longer the better of torch's batched products takes, which forms
# the gradients; and one (p, d) gradient in units of what ours allocates.
PRODUCTS, NO_GRADIENT = 1.5, 1.0
# The host's time for a whole step, in units of what torch's fused optimizer takes for its one pass. Told, without a bar.
LAUNCHES = (("gpt2_124m", "sgd", "fp32"), ("gpt2_124m", "adamw", "fp32"))
WIDTH = 42  # of a figure in the table; the terminal's last lines are all that some see
# Steps of native whose passes all run forwards, in units of the usual ones, which begin in what the last pass left in the cache. Told.
ORDERS = (("one_1e8", "sgd", "fp32"), ("gpt2_124m", "sgd", "fp32"), ("resnet50", "sgd", "fp32"))
# Torch's own update alone, and a copy of as many bytes as a step, in percent of the copy's bandwidth. Told.
OF_TORCH = (("one_1e8", "adamw", "fp32"), ("resnet18", "adamw", "fp32"))


@dataclass(frozen=True)
class Bar:
    """``measured``: None where it was not. ``bar``: to be reached, or, ``at_most``, not to be exceeded; None where there is none."""

    figure: str
    bar: float | None
    measured: float | None
    unit: str
    at_most: bool = False

    @property
    def state(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.bar is None:
            return "told"
        return "pass" if (self.measured <= self.bar if self.at_most else self.measured >= self.bar) else "FAIL"

    @property
    def shown_bar(self) -> str:
        return "–" if self.bar is None else f"{'≤' if self.at_most else ''}{self.bar:.2f}"


def _step(rows: Sequence[Row], workload: str, base: str, dtype: str, name: str) -> Row | None:
    case = ("step", workload, base, dtype, name)
    return next((row for row in rows if (row["kind"], row.get("workload"), row["base"], row["dtype"], row["backend"]) == case), None)


def bars(rows: Sequence[Row], backend: str) -> Iterator[Bar]:
    measured = [row for row in rows if row["kind"] in ("op", "step")]
    yield from _of_copy(measured, backend)
    for (workload, base, dtype, loop, from_graph), bar in SPEEDUPS.items():
        row = _step(measured, workload, base, dtype, graph_of(backend) if from_graph else provider(backend))
        ratio = None
        if row is not None and loop in row["loops"]:
            bar = bar if row["n_tensors"] == 1 else limits.beside_loop(bar, row["loops"][loop], row)
            ratio = row["loops"][loop] / row["wall_ms"]
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


def _of_copy(rows: Sequence[Row], backend: str) -> Iterator[Bar]:
    """An operation is held to the type that is nearest to missing its bar; whole steps have a bar each."""
    for workload, (most, ops) in OF_COPY.items():
        for op in ops:
            case = ("op", op, workload, backend)
            found = {row["dtype"]: row for row in rows if (row["kind"], row["op"], row["workload"], row["backend"]) == case}
            yield _nearest(f"{op}, {workload}", found, {dtype: limits.least_percent(row, most) for dtype, row in found.items()})
        for base, dtype in COMBINATIONS:
            row = _step(rows, workload, base, dtype, provider(backend))
            bar = None if row is None else limits.percent_of_copy(most, row["bytes"], row["copy_gbps"], limits.step_launches(base))
            yield Bar(f"{workload} {base} {dtype}, a step", bar, None if row is None else row["pct_copy"], "% of copy")


def _nearest(figure: str, found: Mapping[str, Row], least: Mapping[str, float | None]) -> Bar:
    """Of the types that are nearest to missing their bars; not measured where one of them was not."""
    measured = {dtype: row["pct_copy"] for dtype, row in found.items()}
    if len(measured) < len(DTYPES):
        return Bar(figure, None, None, "% of copy")
    margins = {dtype: measured[dtype] - (least[dtype] or 0.0) for dtype in measured}
    nearest = min(margins, key=lambda dtype: margins[dtype])
    return Bar(figure, least[nearest], measured[nearest], f"% of copy, {nearest}")


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


def _of_training(rows: Sequence[Row]) -> Iterator[Bar]:
    """Of steps that were not skipped: a skipped one updates nothing."""
    sound = [row for row in rows if row["kind"] == "training" and not row["skipped"]]
    for name in MODELS:
        found = {row["backend"]: row for row in sound if row["workload"] == name}
        most: dict[str, float] = {}
        if SAM_STEP in found and BASE in found:
            sam, base = found[SAM_STEP], found[BASE]
            most[SAM_STEP] = limits.sam_ratio(base["wall_ms"], base["bytes"], sam["bytes"], sam["copy_gbps"])
        if SAM_STEP in found and REWEIGHTED in found:
            work = (found[REWEIGHTED][key] for key in ("flops", "norm_flops", "norm_bytes", "copy_gbps"))
            most[REWEIGHTED] = limits.reweighted_ratio(found[SAM_STEP]["wall_ms"], *work)
        for longer, shorter in ((SAM_STEP, BASE), (REWEIGHTED, SAM_STEP)):
            ratio = found[longer]["wall_ms"] / found[shorter]["wall_ms"] if longer in most else None
            yield Bar(f"{name}: {longer} beside {shorter}", most.get(longer), ratio, "x longer", at_most=True)


def _of_torch(rows: Sequence[Row]) -> Iterator[Bar]:
    measured = [row for row in rows if row["kind"] == "step"]
    for case in OF_TORCH:
        for name, words in ((BASE_ALONE, "fused base alone"), (COPY, "copy_ of as much")):
            row = _step(measured, *case, name)
            yield Bar(f"{' '.join(case)}, {words}", None, None if row is None else row["pct_copy"], "% of copy")
    for case in LAUNCHES[1:]:  # torch has no fused SGD for DTensors
        alone, sharded = (_step(measured, *case, name) for name in (BASE_ALONE, ON_DTENSORS["fused"]))
        ratio = None if alone is None or sharded is None else sharded["launch_us"] / alone["launch_us"]
        yield Bar(f"{' '.join(case)}, launching on DTensors", None, ratio, "x longer")


def tables(rows: Sequence[Row]) -> dict[str, list[Bar]]:
    """By backend; then whole training steps, and what torch itself reaches here."""
    found = {backend: list(bars(rows, backend)) for backend in BACKENDS}
    return found | {"training": list(_of_training(rows)), "torch": list(_of_torch(rows))}


def lines(rows: Sequence[Row]) -> list[str]:
    """A line a figure, the backends side by side: bar, what was measured, and whether that is enough."""
    found = tables(rows)
    of_backends = [{bar.figure: bar for bar in found.pop(backend)} for backend in BACKENDS]
    figures = dict.fromkeys(figure for mine in of_backends for figure in mine)
    heads = [_counts(title, mine.values()) for title, mine in zip(BACKENDS, of_backends, strict=True)]
    result = [f"bars: {'; '.join(heads)}"]
    result += [f"  {figure:<{WIDTH}} {' | '.join(_cell(mine.get(figure)) for mine in of_backends).rstrip()}" for figure in figures]
    for title, bars in found.items():
        result += [f"bars: {_counts(title, bars)}", *(f"  {bar.figure:<{WIDTH}} {_cell(bar)}" for bar in bars)]
    return result


def _counts(title: str, bars: Iterable[Bar]) -> str:
    states = [bar.state for bar in bars]
    return f"{title} {', '.join(f'{states.count(state)} {state}' for state in dict.fromkeys(states))}"


def _cell(bar: Bar | None) -> str:
    if bar is None:
        return ""
    measured = "–" if bar.measured is None else f"{bar.measured:.2f}"
    return f"{bar.shown_bar:>5} {measured:>5} {bar.state}"
