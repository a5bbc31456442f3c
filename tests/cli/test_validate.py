"""``validate`` passes on right backends, fails by name on a wrong one, and says the same as JSON."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sam_kernels._dispatch import available
from sam_kernels.backends import foreach
from sam_kernels.cli.validate import validate
from sam_kernels.operations import Operands, Restore
from sam_kernels.validation.rows import validate_rows


def test_passes_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(validate, ["--op", "restore_", "--op", "grad_norm", "--json", str(path)])
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert {(row["op"], row["backend"]) for row in rows} == {(op, name) for op in ("restore_", "grad_norm") for name in available()}
    assert {row["dtype"] for row in rows} == {"float32", "float64", "bfloat16", "float16", "mixed"}
    assert all(row["passed"] and row["cases"] > 5 and math.isfinite(row["error_ulp"]) for row in rows)
    assert all(0 < row["error_ulp"] <= row["bound_ulp"] <= 1 for row in rows if row["op"] == "grad_norm" and row["dtype"] == "float32")
    assert result.output.count("pass") == len(rows)


def test_json_to_stdout_is_json_alone() -> None:
    result = CliRunner().invoke(validate, ["--op", "restore_", "--backend", "foreach", "--json", "-"])
    assert result.exit_code == 0
    assert [row["backend"] for row in json.loads(result.output)["rows"]] == ["foreach"] * 5


def test_a_planted_error_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    right = foreach.BACKEND.operations[Restore]

    def wrong(op: Restore, lists: Operands) -> None:
        right(op, lists)
        params = lists["params"]
        if len(params) > 4 and params[3].numel() == 256:
            params[3][17] *= 1.01

    monkeypatch.setitem(foreach.BACKEND.operations, Restore, wrong)
    result = CliRunner().invoke(validate, ["--op", "restore_", "--backend", "foreach"])
    assert result.exit_code == 1
    assert "FAIL restore_ foreach float32: case odd_sizes, option restore, params[3] element 17: " in result.output
    monkeypatch.undo()
    assert CliRunner().invoke(validate, ["--op", "restore_", "--backend", "foreach"]).exit_code == 0


def test_an_operation_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(foreach.BACKEND.operations, Restore, broken)
    result = CliRunner().invoke(validate, ["--op", "restore_", "--backend", "foreach"])
    assert result.exit_code == 1
    assert "raised RuntimeError: no kernel" in result.output


def test_a_missing_backend_says_why() -> None:
    result = CliRunner().invoke(validate, ["--backend", "triton"])
    if "triton" in available():
        pytest.skip("triton is available")
    assert result.exit_code == 2
    assert "backend 'triton' cannot be used" in result.output


def test_another_seed_gives_other_inputs() -> None:
    errors = [[row.error_ulp for row in validate_rows(["foreach"], ["grad_norms"], seed=seed, dtypes=["float32"])] for seed in (0, 1, 0)]
    assert errors[0] == errors[2] != errors[1]


def test_a_device_that_is_not_there_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    result = CliRunner().invoke(validate, ["--device", "cuda"])
    assert result.exit_code == 2
    assert "device 'cuda' cannot be used: " in result.output
    assert CliRunner().invoke(validate, ["--device", "nonsense"]).exit_code == 2
