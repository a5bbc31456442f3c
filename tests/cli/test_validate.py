"""``validate`` passes on right backends, fails by name on a wrong one, and says the same as JSON."""

import importlib
import json
import math
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sam_kernels._dispatch import available
from sam_kernels.backends import foreach
from sam_kernels.cli import main
from sam_kernels.cli.validate import validate
from sam_kernels.operations import Operands, Restore
from sam_kernels.validation.options import OPTIONS
from sam_kernels.validation.rows import validate_rows


def test_passes_and_prints_json_alone_on_stdout() -> None:
    result = CliRunner().invoke(validate, ["--op", "restore_", "--op", "grad_norm", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {(row["op"], row["backend"]) for row in rows} == {(op, name) for op in ("restore_", "grad_norm") for name in available()}
    assert {row["dtype"] for row in rows} == {"float32", "float64", "bfloat16", "float16", "mixed"}
    assert all(row["passed"] and row["cases"] > 5 and math.isfinite(row["error_ulp"]) for row in rows)
    assert all(0 < row["error_ulp"] <= row["bound_ulp"] <= 1 for row in rows if row["op"] == "grad_norm" and row["dtype"] == "float32")
    assert result.stderr.count("  pass  ") == len(rows)
    ulp = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-23, "float16": 2.0**-23}  # a norm of 16-bit gradients is float32
    for row in rows:
        if row["op"] == "grad_norm" and row["dtype"] != "mixed":
            largest = row["error_ulp"] * ulp[row["dtype"]]
            assert largest / 2 <= row["relative_error"] <= largest * (1 + 1e-6)


def test_a_row_is_a_line_printed_when_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line is whole, however long: grep finds a row. The first is there before the last is measured."""
    module = importlib.import_module("sam_kernels.cli.validate")  # the package has the command by this name
    seen: list[int] = []
    right = module._line

    def line(row: Any, widths: Any) -> Any:
        seen.append(len(seen))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return right(row, widths)

    monkeypatch.setattr(module, "_line", line)
    result = CliRunner().invoke(main, ["validate", "--quick", "--op", "restore_", "--backend", "foreach"])
    assert result.exit_code == 130
    lines = result.stdout.splitlines()
    assert [row.split()[:3] for row in lines[1:3]] == [["restore_", "foreach", "float32"], ["restore_", "foreach", "float64"]]
    assert "interrupted" in result.stderr


def test_quick_has_all_rows_and_fewer_cases() -> None:
    quick, whole = (list(validate_rows(["foreach"], ["sgd_step_"], dtypes=["bfloat16"], quick=quick)) for quick in (True, False))
    assert [(row.op, row.dtype) for row in quick] == [(row.op, row.dtype) for row in whole]
    assert len(OPTIONS["sgd_step_"]) <= quick[0].cases < whole[0].cases / 3


def test_quick_and_fuzz_exclude_each_other() -> None:
    result = CliRunner().invoke(validate, ["--quick", "--fuzz", "3"])
    assert result.exit_code == 2
    assert "give one of them" in result.output


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
