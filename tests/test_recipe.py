"""CONTRIBUTING's recipe, "Adding an operation", followed in a copy of the checkout.

The tests of layers, backends and schemas accept the small operation that it makes. Without one of the steps they do not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

pytest.importorskip("sam_kernels._cpu", reason="the native core is not built")

ROOT = Path(__file__).parents[1]
COMPILE = "tests/ops/test_compile.py"
TESTS = (  # the slowest last: a step left out is noticed before it
    f"{COMPILE}::test_the_schema_says_what_is_written",
    f"{COMPILE}::test_every_operation_has_an_operator",
    "tests/ops/test_operations.py",
    "tests/test_layering.py",
)

CLASS = '''"""A shift of all elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sam_kernels.operations._operation import ANY, Access, Number, Operation

__all__ = ["Shift"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift(Operation):
    """params <- params + by."""

    name: ClassVar[str] = "shift_"
    roles: ClassVar = {"params": Access.UPDATED}
    limits: ClassVar = {"by": ANY}

    by: Number
'''
PUBLIC = '''"""A shift of all elements."""

from __future__ import annotations

from sam_kernels._grouping import run
from sam_kernels.functional._common import Tensors, check_lists, checked
from sam_kernels.functional._library import operation
from sam_kernels.operations import Number, Shift

__all__ = ["shift_"]


@operation(written=Shift.written)
def shift_(params: Tensors, *, by: Number) -> None:
    """params <- params + by. Reads and writes params: 2 sweeps."""
    op = checked(Shift(by=by))
    check_lists(Shift, {"params": params})
    run(op, {"params": params})
'''
BACKEND = '''"""A shift of all elements."""

from __future__ import annotations

from sam_kernels.operations import Operands, Shift

__all__ = ["shift_"]


def shift_(op: Shift, lists: Operands) -> None:
    """Reads and writes p."""
    for param in lists["params"]:
        param.add_(op.by)
'''
SCHEMA = '    "shift_": "Tensor(a!)[] params, Tensor by, str? backend) -> ()",'


def _exported(package: str, module: str, name: str) -> tuple[str, str, str]:
    """A change of a package's __init__.py."""
    line = f"from sam_kernels.{package}.{module} import {name}"
    return f"sam_kernels/{package}/__init__.py", "\n__all__ = [\n", f'{line}\n\n__all__ = [\n    "{name}",\n'


def _implemented(package: str, module: str) -> list[Change]:
    """The function of a backend, imported where its table is made."""
    folder, exports = f"sam_kernels/backends/{package}", "\n__all__ = ["
    imported = f"from sam_kernels.backends.{package}.shift import shift_\n{exports}"
    return [(f"{folder}/shift.py", BACKEND), (f"{folder}/{module}.py", exports, imported)]


Change = tuple[str, str] | tuple[str, str, str]  # a new file and its text; a file, a text in it, and what takes its place
STEPS: dict[str, list[Change]] = {
    "class": [
        ("sam_kernels/operations/shift.py", CLASS),
        _exported("operations", "shift", "Shift"),
        ("sam_kernels/operations/__init__.py", "    AdamWStep, Centralize,", "    Shift, AdamWStep, Centralize,"),
    ],
    "public function": [("sam_kernels/functional/shift.py", PUBLIC), _exported("functional", "shift", "shift_")],
    "foreach": _implemented("foreach", "__init__"),
    "native": [*_implemented("native", "cpu"), _implemented("native", "cuda")[1]],
    "triton": _implemented("triton", "_operations"),
    "validation": [("sam_kernels/validation/options.py", '    "restore_": {', '    "shift_": {"by": {"by": 0.5}},\n    "restore_": {')],
    "schema": [("tests/ops/test_compile.py", '    "restore_": ', f'{SCHEMA}\n    "restore_": ')],
}


def followed(folder: Path, without: Collection[str] = ()) -> Path:
    """A copy of the checkout with the operation, but for the steps left out."""
    ignored = shutil.ignore_patterns("__pycache__", "results", ".benchmarks")
    for name in ("sam_kernels", "csrc", "bench", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    for path, *change in [each for step, changes in STEPS.items() if step not in without for each in changes]:
        file = folder / path
        if len(change) == 1:
            file.write_text(change[0], encoding="utf-8")
            continue
        text = file.read_text(encoding="utf-8")
        assert text.count(change[0]) == 1, f"{path}: {change[0]!r}"
        file.write_text(text.replace(*change), encoding="utf-8")
    return folder


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    env.pop("PYTEST_ADDOPTS", None)
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_an_operation_made_by_the_recipe_is_accepted_and_runs(tmp_path: Path) -> None:
    folder = followed(tmp_path / "checkout")
    code = (
        "import torch, sam_kernels; from sam_kernels import functional\n"
        "for name in ('native', 'foreach'):\n"
        "    with sam_kernels.use_backend(name):\n"
        "        params = [torch.ones(3), torch.ones(2, 4).t()]\n"
        "        functional.shift_(params, by=torch.tensor(2.0))\n"
        "        assert all((param == 3).all() for param in params), (name, params)\n"
        "        torch.compile(lambda: functional.shift_(params, by=1.0), backend='eager', fullgraph=True)()\n"
        "        assert all((param == 4).all() for param in params), (name, params)\n"
    )
    called = run_in(folder, "-c", code)
    assert called.returncode == 0, called.stderr
    tested = run_in(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
    assert tested.returncode == 0, tested.stdout[-4000:]


@pytest.mark.parametrize("step", ["public function", "foreach", "schema"])
def test_a_step_left_out_is_noticed(step: str, tmp_path: Path) -> None:
    tested = run_in(followed(tmp_path / "checkout", without=[step]), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS)
    assert tested.returncode != 0
    assert "shift_" in tested.stdout.lower()
