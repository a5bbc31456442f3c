from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.page import BEGIN, END
from bench.report import load, main

ENVIRONMENT = {
    "schema": 1, "commit": "abc", "dirty": False, "device": "some-cpu-2-cores", "cpu": "Some CPU", "threads": 2, "instruction_set": "avx2",
    "torch": "2.13.0", "cores": 2, "load_1min": 0.1,
}  # fmt: skip


def _step(backend: str, ms: float, reference: float = 10.0) -> dict[str, Any]:
    case = {"workload": "resnet18", "dtype": "fp32", "base": "sgd", "n_tensors": 62, "numel": 100}
    times = {"ms_20": ms * 0.9, "ms_50": ms, "ms_80": ms * 1.1, "reference_ms_50": reference}
    return {"kind": "step", "op": "step", "backend": backend, "gbps": 1.0, **case, **times}


def _result(allocator: str, loop_ms: float) -> dict[str, Any]:
    case = {"workload": "resnet18", "dtype": "fp32", "numel": 100}
    times = {"ms_20": 1.0, "ms_50": 2.0, "ms_80": 3.0, "gbps": 9.0}
    floor = {"pct_floor": 90.0, "pct_copy": 95.0, "floor": "C++ pass, streaming", "floor_gbps": 10.0, "regime": "memory"}
    op = {"kind": "op", "op": "perturb_", "base": None, "backend": "native", **case, **times, **floor}
    memory = {"kind": "memory", "op": "step", "base": "sgd", "backend": "davda54/foreach", **case, "held_bytes": 0, "peak_bytes": 600}
    rows = [_step("sam_kernels/native", 10.0), _step("davda54/foreach", loop_ms), op, memory]
    return {**ENVIRONMENT, "allocator": allocator, "rows": rows}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for allocator, ms in (("default", 42.0), ("keeping", 25.0)):
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
    assert "4.2× (2.5×)" in readme
    assert "docs/images/a.png" in readme
    assert "(images/a.png)" in docs
    assert "25 ms (2.5×, keeping)" in docs
    assert "90 %" in docs
    assert "1.50" in docs
    assert (tmp_path / "docs/images/a.png").read_bytes().startswith(b"\x89PNG")
    assert _run(tmp_path, files, "--check").exit_code == 0
    files[0].write_text(json.dumps(_result("default", 43.0)))
    assert _run(tmp_path, files, "--check").exit_code == 1


def test_refuses_what_it_cannot_put_into_one_table(tmp_path: Path, files: list[Path]) -> None:
    files[1].write_text(json.dumps(_result("keeping", 1.0) | {"device": "another"}))
    assert "different devices" in _run(tmp_path, files).output
    files[1].write_text(json.dumps(_result("keeping", 1.0) | {"schema": 0}))
    assert "schema" in _run(tmp_path, files).output
    (tmp_path / "README.md").write_text("no markers")
    assert "bench:begin" in _run(tmp_path, files[:1]).output


def test_stored_results_can_be_read() -> None:
    results = Path(__file__).parents[2] / "bench" / "results"
    for path in sorted([*results.glob("*/*.json"), *results.glob("*/bench*.jsonl")]):
        result = load([path])[0]
        assert result["schema"] == 1
        assert result["device"] == path.parent.name
        assert result["gate"].startswith("passed"), f"{path.name}: numbers without green tests are not kept"
