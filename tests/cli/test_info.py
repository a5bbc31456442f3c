"""``info`` says what runs here and why the rest does not, and never fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import sam_kernels
from sam_kernels import _dispatch
from sam_kernels.cli import main, openmp
from tests.helpers.backends import replace_backend


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["info", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_text_has_one_line_for_each_backend() -> None:
    lines = run().splitlines()
    for name in _dispatch.BACKENDS:
        (line,) = [line for line in lines if line.startswith(f"{name} backend")]
        reason = _dispatch.reason_missing(name, "cpu")
        assert "available on cpu" in line if reason is None else "available on cpu" not in line


def test_json_has_versions_threads_and_devices() -> None:
    facts = json.loads(run("--json"))
    assert facts["versions"]["sam_kernels"] == sam_kernels.__version__
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["devices"][0] == "cpu"
    assert "cpu" in facts["backends"]["foreach"]["devices"]


def test_missing_backend_shows_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_backend(monkeypatch, "native.cpu", "no compiler was there")
    (line,) = [line for line in run().splitlines() if line.startswith("native backend")]
    assert line.endswith("no: no compiler was there")


@pytest.mark.native
def test_instruction_set_is_that_of_the_compiled_module() -> None:
    core = pytest.importorskip("sam_kernels._cpu")
    assert json.loads(run("--json"))["instruction_set"] == core.instruction_set()


def test_openmp_runtimes_are_read_from_the_map(tmp_path: Path) -> None:
    torchs = Path(torch.__file__).resolve().parent / "lib" / "libgomp.so.1"
    other = "/usr/lib/with space/libgomp-a34b3233.so.1.0.0"
    maps = tmp_path / "maps"
    rows = [f"7f00-7f01 r-xp 00000000 08:01 123 {path}" for path in (torchs, torchs, other, "/usr/lib/libcompress.so", "[heap]")]
    maps.write_text("\n".join([*rows, "7f02-7f03 rw-p 00000000 00:00 0"]))
    assert openmp.loaded_runtimes(maps) == sorted([str(torchs), other])
    assert openmp.loaded_runtimes(tmp_path / "absent") is None


def test_openmp_summary_says_whose_and_how_many() -> None:
    torchs = str(Path(torch.__file__).resolve().parent / "lib" / "libgomp.so.1")
    assert openmp.summary([torchs]) == f"{torchs} (torch's), the only one"
    both = openmp.summary([torchs, "/usr/lib/libiomp5.so"])
    assert both.startswith("2 loaded")
    assert "/usr/lib/libiomp5.so (not torch's)" in both


def test_module_entry_point() -> None:
    result = subprocess.run([sys.executable, "-m", "sam_kernels", "info"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "native backend" in result.stdout
