from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.page import BEGIN, END
from bench.report import load, main

ENVIRONMENT = {
    "schema": 1, "commit": "abc", "dirty": False, "device": "some-cpu-2-cores", "cpu": "Some CPU", "threads": 2, "instruction_set": "avx2",
    "torch": "2.13.0", "cores": 2, "load_1min": 0.1, "peers": {"pytorch_optimizer": "4.1.0", "opacus": "1.6.0"},
}  # fmt: skip


def _step(backend: str, ms: float, over: float) -> dict[str, Any]:
    case = {"workload": "resnet18", "dtype": "fp32", "base": "sgd", "n_tensors": 62, "numel": 100}
    times = {"ms_20": ms * 0.9, "ms_50": ms, "ms_80": ms * 1.1, "over_reference_50": over}
    return {"kind": "step", "op": "step", "backend": backend, "gbps": 1.0, **case, **times}


def _result(allocator: str, loop_ms: float) -> dict[str, Any]:
    case = {"workload": "resnet18", "dtype": "fp32", "numel": 100}
    times = {"ms_20": 1.0, "ms_50": 2.0, "ms_80": 3.0, "gbps": 9.0}
    floor = {"of_floor_50": 0.9, "over_native_50": 1.0, "floor": "C++ pass, streaming", "floor_gbps": 10.0, "regime": "memory"}
    cached = {"of_floor_50": None, "over_native_50": 1.25, "floor": None, "floor_gbps": None, "regime": "cached"}
    op = {"kind": "op", "op": "perturb_", "base": None, "backend": "native", **case, **times, **floor}
    of_tiny = {**op, "workload": "many_tiny", **cached}
    memory = {"kind": "memory", "op": "step", "base": "sgd", "backend": "davda54/foreach", **case, "held_bytes": 0, "peak_bytes": 600}
    rows = [_step("sam_kernels/native", 10.0, 1.0), _step("davda54/foreach", loop_ms, loop_ms / 10 + 0.03), op, of_tiny, memory]
    return {**ENVIRONMENT, "allocator": allocator, "rows": rows}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for allocator, ms in (("keeping", 25.0), ("returning", 42.0)):
        paths.append(tmp_path / f"{allocator}.json")
        paths[-1].write_text(json.dumps(_result(allocator, ms)))
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    return paths


def _run(directory: Path, files: list[Path], *extra: str) -> Result:
    targets = ["--short", directory / "README.md", "--docs", directory / "docs/benchmarks.md", "--image", directory / "docs/images/a.png"]
    return CliRunner().invoke(main, [str(argument) for argument in (*files, *targets, *extra)])


def test_round_trip(tmp_path: Path, files: list[Path]) -> None:
    assert _run(tmp_path, files, "--check").exit_code == 1
    written = _run(tmp_path, files)
    assert written.exit_code == 0, written.output
    readme, docs = (tmp_path / "README.md").read_text(), (tmp_path / "docs/benchmarks.md").read_text()
    assert readme.startswith("# Title\n")
    assert readme.endswith("\n\nAfter.\n")
    assert "old" not in readme
    assert "2.53×" in readme, "the median of the ratios, not the ratio of the medians"
    assert "4.23×" not in readme
    assert "docs/images/a.png" in readme
    assert "(images/a.png)" in docs
    assert "| davda54 loop, foreach base | 25 ms | 22.5 ms – 27.5 ms | 2.53× | 42 ms (4.23×) |" in docs
    assert "90 %" in docs
    assert "pytorch_optimizer 4.1.0" in docs
    assert "1.50" in docs
    assert (tmp_path / "docs/images/a.png").read_bytes().startswith(b"\x89PNG")
    assert _run(tmp_path, files, "--check").exit_code == 0
    files[0].write_text(json.dumps(_result("keeping", 26.0)))
    assert _run(tmp_path, files, "--check").exit_code == 1


def test_a_regime_has_a_column_only_where_a_median_leaves_the_spread(tmp_path: Path, files: list[Path]) -> None:
    _run(tmp_path, files)
    assert "| allocator: returning |" in (tmp_path / "docs/benchmarks.md").read_text()
    files[1].write_text(json.dumps(_result("returning", 27.0)))
    _run(tmp_path, files)
    assert "| allocator: returning |" not in (tmp_path / "docs/benchmarks.md").read_text()


def test_columns_without_a_value_are_left_out(tmp_path: Path, files: list[Path]) -> None:
    _run(tmp_path, files)
    _, _, tables = (tmp_path / "docs/benchmarks.md").read_text().partition("### Operations: ResNet-18")
    resnet18, _, many_tiny = tables.partition("### Operations: 1,000 × 3")
    assert "|  | median | 20–80 % | over native | GB/s | of floor | floor |" in resnet18
    assert "|  | median | 20–80 % | over native |\n" in many_tiny


def test_refuses_what_it_cannot_put_into_one_table(tmp_path: Path, files: list[Path]) -> None:
    files[1].write_text(json.dumps(_result("keeping", 1.0) | {"device": "another"}))
    assert "different devices" in _run(tmp_path, files).output
    files[1].write_text(json.dumps(_result("keeping", 1.0) | {"schema": 0}))
    assert "schema" in _run(tmp_path, files).output
    (tmp_path / "README.md").write_text("no markers")
    assert "bench:begin" in _run(tmp_path, files[:1]).output


STORED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*/*.json*"))


@pytest.mark.stored
@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_stored_result_tells_what_was_measured_where(path: Path) -> None:
    """A commit without local changes, the device, the versions, green tests and the load; the stages of the dial have their own."""
    if path.suffix == ".jsonl" and not path.name.startswith("bench"):
        return
    result = load([path])[0]
    assert result["schema"] == 1
    assert result["device"] == path.parent.name
    for where in (result, *result.get("stages", {}).values()):
        assert re.fullmatch(r"[0-9a-f]{12}", where["commit"])
        assert where["dirty"] is False
        assert where["gate"].startswith("passed"), "numbers without green tests are not kept"
        assert where["torch"]
        assert where["python"]
        assert where["cpu"]
        assert where["load_1min"] >= 0
    assert result.get("peers", "not recorded before 2026-11-30"), "no peer was installed"
