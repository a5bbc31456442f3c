"""What a run on a device ends up in: the short tables, the bars, who wins, and the reports."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.byte_model import OPS, op_bytes, step_bytes
from bench.gpu import bars, closing, dispatch, limits, products, summary, sweep, sweep_products, training
from bench.gpu.models import MODELS
from bench.gpu.peers import COPY
from bench.gpu.steps import BACKENDS, BASE_ALONE, COMBINATIONS, FORWARDS, LOOPS, graph_of, provider
from bench.gpu.workloads import GPU_WORKLOADS
from bench.page import BEGIN, END
from bench.report import main as report


def full_result() -> dict[str, Any]:
    """As a device with every backend would give."""
    rows: list[dict[str, Any]] = []
    times = {"ms_20": 0.9, "ms_80": 1.1, "host_us": 80.0, "gbps": 2700.0, "pct_copy": 97.5, "copy_gbps": 3000.0}
    for workload, shapes in GPU_WORKLOADS.items():
        for dtype in ("fp32", "bf16"):
            for op in OPS:
                case = {"kind": "op", "op": op, "workload": workload, "dtype": dtype, "base": None}
                case |= {"bytes": op_bytes(op, shapes.numel, 4 if dtype == "fp32" else 2)}
                case |= {"issue_ms": 0.2 if op == "random_perturb_" else None}
                milliseconds = {"native": 1.0, "triton": 1.2, "foreach": 3.0, "torch": 1.5}
                rows += [case | times | {"backend": name, "ms_50": ms} for name, ms in milliseconds.items()]
        for base, dtype in COMBINATIONS:
            case = {"op": "step", "workload": workload, "dtype": dtype, "base": base}
            case |= {"n_tensors": shapes.n_tensors, "numel": shapes.numel}
            case |= {"bytes": step_bytes(base, shapes.numel, 4 if dtype == "fp32" else 2)}
            loops = {LOOPS[0]: 8.0, LOOPS[1]: 5.0}
            walls = {"native": 2.0, "triton": 4.0}
            found = {provider(name): ms for name, ms in walls.items()} | {graph_of(name): ms / 10 for name, ms in walls.items()}
            for name, ms in (found | loops | {BASE_ALONE: 1.0, COPY: 1.9, FORWARDS: 2.2}).items():
                measured = times | {"ms_50": ms, "wall_ms": ms, "launch_us": 50 * ms, "loops": loops}
                rows.append({"kind": "step"} | case | measured | {"backend": name})
            counts = {"kernels": 5, "copies": 0, "fills": 1, "names": "5 kernels: _norm_kernel × 2"}
            rows += [{"kind": "launches"} | case | {"backend": provider(backend)} | counts for backend in BACKENDS]
    for (d, p), name, tokens in itertools.product(products.SHAPES, products.PRECISIONS, products.TOKENS):
        layer = {"in_features": d, "out_features": p, "tokens": tokens, "groups": 8, "dtype": name}
        case = {"kind": "product", "op": products.OP, "base": None} | layer | times | {"tflops": 300.0}
        ours = {"triton, gram": 0.02, "triton, direct": 0.01 if (name, tokens) != ("ieee", 2048) else 0.025}
        for backend, ms in (ours | {"baddbmm": 0.035, "einsum": 0.03}).items():
            peak = 4 * d * p * (40 if backend in products.BASELINES else 1) // 8
            rows.append(case | {"backend": backend, "ms_50": ms, "is_chosen": backend == "triton, direct", "peak_bytes": peak})
    for name, kind in MODELS.items():
        case = {"kind": "training", "op": "training", "workload": name, "dtype": kind.dtype, "base": kind.base, "batch": kind.batch}
        case |= {"flops": 10**13, "norm_flops": 10**12, "norm_bytes": 3 * 10**9, "copy_gbps": 3000.0, "skipped": False, "bytes": 10**9}
        rows += [case | {"backend": each, "wall_ms": ms} for each, ms in zip(training.PROVIDERS, (50.0, 50.2, 62.0), strict=True)]
    rows += dispatch.rows(rows)
    bandwidth = {kind: {"gbps": 3000.0, "by": "x"} for kind in ("copy", "read", "write")}
    where = {"schema": 1, "device": "some-gpu", "gpu": "Some GPU", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
    return where | {"commit": "abc", "dirty": False, "gate": "passed: all", "bandwidth": bandwidth, "rows": rows}


def swept() -> list[dict[str, Any]]:
    where = [(backend, kernel, dtype) for backend in BACKENDS for kernel in sweep.KERNELS for dtype in ("fp32", "bf16")]
    what = [{"kind": "sweep", "backend": backend, "op": "grad_norm", "kernel": kernel, "dtype": dtype} for backend, kernel, dtype in where]
    return [row | {"cut": "16k/2048/4", "ms_50": 1.0 + i, "gbps": 2.0, "is_default": i == 1} for row in what for i in range(4)]


def test_the_tables_are_complete() -> None:
    result = full_result()
    lines = [line for block in closing.tables(result | {"rows": [*result["rows"], *swept()]}) for line in block]
    shown = [(workload, op) for workload in GPU_WORKLOADS for op in OPS if workload == summary.FULL or op in summary.OF_STEPS]
    shown = [pair for pair in shown if pair[0] not in summary.NOT_SHOWN]
    assert all(any(line.startswith(f"{workload:<9} {op}") for line in lines) for workload, op in shown)
    step = next(line for line in lines if line.startswith("many_tiny sgd  "))
    assert step.split("|")[0].split()[3:] == ["2.0000", "98%", "100", "0.2000", "4.00×", "2.50×"]
    assert len(sweep.lines(swept())) == 1 + len(BACKENDS) * 2 * len(sweep.KERNELS)
    assert any("default +100.0 %" in line for line in lines)


def test_the_last_lines_are_few_and_the_bars_come_last() -> None:
    result = full_result()
    phases = [f"phase {i:<10} ok, 100 s: 100 passed, 3 skipped in 100.00s" for i in range(10)]
    asked = bars.lines(result["rows"])
    lines = closing.closing(result, phases)
    assert sum(len(line) + 1 for line in lines) <= closing.ROOM < 6000
    assert lines[-len(asked) :] == asked
    assert lines[-len(asked) - 10 : -len(asked)] == phases
    assert closing.closing(result, phases, room=10**6)[: -len(asked) - 10] == [line for block in closing.tables(result) for line in block]
    # Without room for all bars those go that say nothing.
    few = [row for row in result["rows"] if row["kind"] == "op"]
    lines = closing.closing(result | {"rows": few}, phases, room=3000)
    kept = [line for line in bars.lines(few) if line in lines]
    of_operations = [line for line in kept if not line.startswith("bars: ")]
    assert {line.split(",")[0].strip() for line in of_operations} == set(OPS)
    assert all(" pass | " in line for line in of_operations)
    assert lines[-1] == f"and {len(bars.lines(few)) - len(kept)} figures that were not measured (summary.txt)"
    only_swept = closing.closing(result | {"rows": swept()}, phases)
    assert only_swept[0].startswith("sweep: ")
    assert only_swept[-1] == phases[-1]  # nothing was asked for


def test_a_bar_is_reached_or_not_or_was_not_measured() -> None:
    rows = full_result()["rows"]
    states = {backend: {bar.figure: bar.state for bar in bars.bars(rows, backend)} for backend in BACKENDS}
    assert states["native"]["one_1e9 sgd fp32 beside davda54/foreach"] == "pass"  # 8 ms : 2 ms
    assert states["native"]["resnet50 sgd fp32 beside davda54/foreach"] == "FAIL"
    assert states["native"]["many_tiny sgd fp32, graph, beside davda54/foreach"] == "pass"  # 8 ms : 0.2 ms
    assert states["triton"]["many_tiny sgd fp32, graph, beside davda54/foreach"] == "FAIL"
    assert states["triton"]["gpt2_124m sgd fp32 beside davda54/foreach"] == "FAIL"
    measured = {bar.figure: bar.measured for bar in bars.bars(rows, "native")}
    assert measured["gpt2_124m adamw fp32, launching beside fused base"] == pytest.approx(2.0)
    assert measured["resnet50 sgd fp32, all passes forwards"] == pytest.approx(1.1)
    assert all("forwards" not in bar.figure for bar in bars.bars(rows, "triton"))
    half = [row for row in rows if row.get("dtype") != "bf16"]
    assert {bar.figure: bar.state for bar in bars.bars(half, "native")}["perturb_, one_1e8"] == "not measured"
    states = {bar.state for bars_of in bars.tables([]).values() for bar in bars_of}
    assert states == {"not measured"}


def test_an_operation_is_held_to_the_type_that_is_nearest_to_missing_its_bar() -> None:
    rows = full_result()["rows"]

    def found(rows: list[dict[str, Any]], op: str) -> bars.Bar:
        return next(bar for bar in bars.bars(rows, "native") if bar.figure.startswith(f"{op}, one_1e8"))

    assert (found(rows, "perturb_").bar, found(rows, "perturb_").state) == (97.0, "pass")
    slow = [row | ({"pct_copy": 96.9} if row.get("dtype") == "bf16" and row["op"] == "perturb_" else {}) for row in rows]
    assert (found(slow, "perturb_").measured, found(slow, "perturb_").state) == (96.9, "FAIL")
    assert found(rows, "grad_norm").bar == 97.0  # one launch of 3 µs beside 133 µs of bytes in fp32: 97.8; bf16, 95.7, has more to spare
    dots = next(row for row in rows if (row["kind"], row.get("op"), row["dtype"]) == ("op", "grad_dots", "bf16"))
    one, two = (limits.least_percent(dots | {"backend": backend, "issue_ms": None}, 100.0) for backend in BACKENDS)
    assert 100 / two - 100 / one == pytest.approx(100 / one - 1)  # Triton's sums are added up by a launch of their own
    # 200 µs to issue beside 400 µs (fp32) and 200 µs (bf16) of bytes: of the latter three quarters are not hidden.
    drawn = [row | ({"pct_copy": 98.0 if row.get("dtype") == "fp32" else 56.0} if row["op"] == "random_perturb_" else {}) for row in rows]
    assert found(drawn, "random_perturb_").bar == pytest.approx(100 * 0.2 / 0.353)
    assert found(drawn, "random_perturb_").state == "FAIL"
    unknown = [row | {"issue_ms": None} for row in drawn]
    assert (found(unknown, "random_perturb_").bar, found(unknown, "random_perturb_").state) == (None, "told")


def test_training_steps_are_not_to_take_longer_than_their_bars_and_a_skipped_one_does_not_count() -> None:
    rows = full_result()["rows"]
    found = {bar.figure: bar for bar in bars.tables(rows)["training"]}
    sam, reweighted = found["gpt2_124m: SAM beside base, two steps"], found["gpt2_124m: RW-SAM beside SAM"]
    assert (sam.bar, sam.measured, sam.state) == (pytest.approx(1.01), pytest.approx(1.004), "pass")
    assert reweighted.bar == pytest.approx(1 + 0.1 + 1.0 / 50.2 + 0.01)  # a tenth of the flops, 1 ms of bytes
    assert (reweighted.measured, reweighted.state) == (pytest.approx(62.0 / 50.2), "FAIL")
    skipped = [row | {"skipped": row.get("backend") == training.SAM_STEP} if row["kind"] == "training" else row for row in rows]
    assert {bar.state for bar in bars.tables(skipped)["training"]} == {"not measured"}
    assert training.lines(rows)[1] == "  resnet50 128: 50.00 50.20 62.00; 1.004 1.235; 200"


def test_products_are_as_fast_as_their_slowest_length() -> None:
    rows = full_result()["rows"]
    found = {bar.figure: bar for bar in bars.bars(rows, "triton") if bar.figure.startswith("per sample")}
    room = "per sample: a gradient beside what is allocated"
    good, bad = (
        "per sample bf16: 16 3.0, 64 3.0, 256 3.0, 1024 3.0, 2048 3.0",
        "per sample ieee: 16 3.0, 64 3.0, 256 3.0, 1024 3.0, 2048 1.2",
    )
    assert set(found) == {good, bad, good.replace("bf16", "tf32"), room}
    assert (found[good].state, found[good].measured) == ("pass", pytest.approx(3.0))
    assert (found[bad].state, found[bad].measured) == ("FAIL", pytest.approx(1.2))
    assert found[room].measured == pytest.approx(8.0)
    whole = [row | ({"peak_bytes": 10**9} if row.get("backend") == "triton, gram" else {}) for row in rows]
    assert {bar.figure: bar.state for bar in bars.bars(whole, "triton")}[room] == "FAIL"
    short = [row for row in rows if (row.get("tokens"), row.get("in_features")) != (256, 1024)]  # of one layer
    states = {bar.figure: bar.state for bar in bars.bars(short, "triton")}
    assert states["per sample bf16: 16 3.0, 64 3.0, 256 –, 1024 3.0, 2048 3.0"] == "not measured"
    assert not any(bar.figure.startswith("per sample") for bar in bars.bars(rows, "native"))
    assert len(products.lines(rows)) == 1 + 9
    assert products.lines(rows)[1].startswith("  768 768 bf16; 16: 0.020 [0.010] 0.030 3.0×; 64: ")


def test_a_sweep_of_products_is_told_apart() -> None:
    what = {"kind": "sweep_product", "backend": "triton", "op": products.OP, "kernel": "gram", "dtype": "bf16", "tflops": 500.0}
    rows = [what | {"rank": i, "cut": f"64×64×{32 * i}/4/3", "ms_50": 0.1 * i, "is_default": i == 2} for i in (1, 2)]
    assert sweep.lines(rows) == sweep.lines([])
    assert sweep_products.lines(rows)[1] == "  gram   bf16 64×64×32/4/3 0.1000 (500)  [64×64×64/4/3 0.2000 (500)]"


def test_who_wins_counts_the_host_and_needs_every_backend() -> None:
    case = {"kind": "op", "op": "restore_", "workload": "many_tiny", "dtype": "fp32", "base": None, "host_us": 10.0}
    rows = [case | {"backend": "native", "ms_50": 0.004}, case | {"backend": "triton", "ms_50": 0.002, "host_us": 40.0}]
    (found,) = dispatch.rows(rows)
    assert (found["winner"], found["factor"]) == ("native", pytest.approx(4.0))
    assert dispatch.rows(rows[:1]) == []
    assert dispatch.lines([found])[1].split() == ["many_tiny", "native", "1", "of", "1:", "restore_", "fp32", "4.00"]
    assert dispatch.lines([]) == []


def test_reports_take_results_of_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    header = {key: value for key, value in full_result().items() if key != "rows"}
    rows = [row for row in full_result()["rows"] if row["kind"] != "dispatch"]
    lines = [json.dumps(row) + "\n" for row in ({"kind": "run"} | header, *rows)]
    (tmp_path / "first.jsonl").write_text("".join(lines[:200]) + lines[200][:20])  # cut off
    (tmp_path / "second.jsonl").write_text("".join([lines[0], *lines[200:]]))
    (tmp_path / "sweep.json").write_text(json.dumps(full_result() | {"rows": swept()}))
    files = [str(tmp_path / name) for name in ("first.jsonl", "second.jsonl", "sweep.json")]
    targets = ["--short", tmp_path / "README.md", "--docs", tmp_path / "docs.md", "--image", tmp_path / "a.png"]
    made = CliRunner().invoke(report, [*files, *map(str, targets)])
    assert made.exit_code == 0, made.output
    readme, docs = (tmp_path / "README.md").read_text(), (tmp_path / "docs.md").read_text()
    assert "| ResNet-50, SGD-momentum, fp32, native | 2 ms | 98 % | 100 µs | 200 µs | 4.0× | 2.5× | 5 |" in readme
    assert readme.count("Some GPU") == 1
    assert "### Operations: 1 × 10⁸, bf16, Some GPU" in docs
    assert "| `sgd_step_` triton | 1.2 ms | 900 µs – 1.1 ms | 2,700 | 98 % | 80 µs |" in docs
    assert "| resnet50 sgd fp32 beside davda54/foreach, native | 6.00 x | 4.00 x | FAIL |" in docs
    assert "| gpt2_124m: SAM beside base, two steps, training | ≤1.01 x longer | 1.00 x longer | pass |" in docs
    assert "| GPT-2 124M, 1,024 tokens, bfloat16, batch 16 | 50 ms | 50.2 ms | 62 ms | 1.004 | 1.235 |" in docs
    assert "| GPT-2 124M, step, AdamW, bf16 | 2 ms | 4 ms | native | 2.00× |" in docs
    assert "16k/2048/4, the default" in docs
    assert not (tmp_path / "a.png").exists()
    assert CliRunner().invoke(report, [*files, *map(str, targets), "--check"]).exit_code == 0
