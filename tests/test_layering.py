"""The layers of docs/internals/layers.md: imports and includes go downward only, files stay small.

Every rule is a function of a root folder that returns what is wrong, so that it can be shown to fail on a planted violation.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Layer -> what its modules may import from inside the package. "own" is the same layer; backends and their kind are told apart below.
USERS = ("optim", "monitors", "per_sample", "sampling", "theory", "schedules")
BOTTOM = ("_backend", "_flags", "_memory_of", "_reading", "_sharding", "_tensor_list", "_unfold", "operations")
COMPILED = ("_cpu", "_cuda", "_cuda_on_host")
CORE = ("_dispatch", "_grouping", "_validate")
ALLOWED: dict[str, set[str]] = {
    "bottom": {"own"},  # depend on nothing, everyone may use them
    "compiled": set(),
    "backends": {"own", "bottom", "compiled"},
    "core": {"own", "bottom", "backends"},
    "functional": {"own", "core", "bottom"},
    "users": {"own", "functional", "core", "bottom"},
    "package": {
        "own",
        "users",
        "functional",
        "core",
        "bottom",
    },  # sam_kernels itself and the names that it imports on use
    "integrations": {"own", "users", "core", "bottom"},  # imported on request alone
    "reference": {"own"},
    "validation": {"own", "functional", "reference", "core", "bottom", "backends"},
    "cli": {"own", "validation", "package", "core", "compiled"},
    "main": {"cli"},
}
# What may be imported from outside the standard library. cli prints and trains; everything else is a library over torch.
THIRD_PARTY: dict[str, set[str]] = {layer: {"torch"} for layer in ALLOWED} | {
    "backends": {"torch", "triton"},
    "integrations": {"torch", "transformers", "accelerate", "lightning", "timm"},
    "cli": {"torch", "click", "rich", "numpy", "mlxtend", "scipy", "sklearn", "matplotlib", "triton"},
    "main": set(),
}
# Headers that a file compiled once per instruction set may see. Anything with function templates that are not always inlined would leave a
# weak copy in that file's instruction set, which the linker could keep for all (tests/native/test_objects.py looks at the objects).
KERNEL_HEADERS = {"cmath", "cstddef", "cstdint", "cstring", "type_traits", "immintrin.h", "arm_neon.h"}
# What csrc/ may include beside the standard library: by folder, or by name for the files at its top. Nothing includes torch; CUDA's headers
# stay with the CUDA kernels and their binding, which needs the types of the runtime alone.
INCLUDES = {
    "common": ("common/",),
    "cpu": ("cpu/", "common/", "immintrin.h", "arm_neon.h"),
    "cuda": ("cuda/", "common/", "cuda_"),
    "bind_common.h": ("common/", "operation.h", "tensor_list.h"),
    "bind_cpu.cpp": ("bind_common.h", "cpu/", "common/", "pybind11/"),
    "bind_cuda.cpp": ("cuda/", "common/", "bind_cuda_operations.h", "tensor_list.h", "pybind11/", "cuda_runtime_api.h"),
    "bind_cuda_operations.h": ("bind_common.h", "cuda/", "pybind11/"),
    "operation.cpp": ("operation.h", "pybind11/"),
    "operation.h": ("common/", "tensor_list.h", "pybind11/"),
    "tensor_list.cpp": ("common/", "tensor_list.h", "pybind11/", "structmember.h"),  # Python's own
    "tensor_list.h": ("common/", "pybind11/"),
}
LINE_BUDGETS = {"setup.py": 120, "sam_kernels": 400, "csrc": 400, "tests": 400, "bench": 400, "tools": 400}
INIT_BUDGET = 40
SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}


def layer_of(module: str) -> str:
    """The layer of a dotted module name inside the package."""
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    head = parts[1]
    fixed = dict.fromkeys(BOTTOM, "bottom") | {"__main__": "main", "_api": "package"} | dict.fromkeys(COMPILED, "compiled")
    if head in fixed:
        return fixed[head]
    if head in USERS:
        return "users"
    if head in ("backends", "functional", "reference", "validation", "cli", "integrations"):
        return head
    return "core" if head.startswith("_") else f"unknown ({module}: give it a layer in tests/test_layering.py)"


def module_of(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports: statements anywhere in it, and import_module or __import__ of a string."""
    module = module_of(path, root)
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    known = {module_of(file, root) for file in (root / "sam_kernels").rglob("*.py*") if file.suffix in (".py", ".pyi")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from sam_kernels import functional` names a module, `from sam_kernels.functional import perturb_` does not.
                yield node.lineno, full if full in known or (base == "sam_kernels" and alias.name in COMPILED) else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and node.args:
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value).rstrip(".")


def import_violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "sam_kernels").rglob("*.py")):
        module = module_of(path, root)
        layer = layer_of(module)
        if layer not in ALLOWED:
            found.append(f"{path.relative_to(root)}: no such layer: {layer}")
            continue
        for line, name in imports_of(path, root):
            top = name.partition(".")[0]
            where = f"{path.relative_to(root)}:{line}: {layer} imports {name}"
            if top != "sam_kernels":
                if top not in sys.stdlib_module_names and top not in THIRD_PARTY[layer]:
                    found.append(where)
                continue
            target = layer_of(name)
            if target == layer:
                allowed = "own" in ALLOWED[layer] or module == name
                if layer == "backends" and name != "sam_kernels.backends":
                    allowed = module.split(".")[:3] == name.split(".")[:3]  # a backend imports itself, never another
            else:
                allowed = target in ALLOWED[layer]
            if not allowed:
                found.append(where)
    return found


def import_circles(root: Path) -> list[str]:
    """A module that imports itself by way of others, for type checkers alone too. (The packages that a module lies in do not count.)"""
    files = sorted((root / "sam_kernels").rglob("*.py"))
    imports = {
        module: {name for _, name in imports_of(path, root) if not f"{module}.".startswith(f"{name}.")}
        for path in files
        for module in [module_of(path, root)]
    }
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


def is_standard(header: str) -> bool:
    return re.fullmatch(r"[a-z_]+", header) is not None


def included_by_kernels(root: Path) -> Iterator[tuple[Path, str]]:
    """(file, header) of everything that files compiled once per instruction set (those that use SAM_ISA) include, directly or not."""
    todo = [path for path in (root / "csrc" / "cpu").glob("*.cpp") if "SAM_ISA" in path.read_text(encoding="utf-8")]
    seen = set(todo)
    while todo:
        path = todo.pop()
        for header in includes_of(path):
            yield path, header
            target = root / "csrc" / header
            if target.exists() and target not in seen:
                seen.add(target)
                todo.append(target)


def include_violations(root: Path) -> list[str]:
    found = []
    for path in sorted(path for path in (root / "csrc").rglob("*") if path.suffix in SOURCES - {".py"}):
        allowed = INCLUDES.get(path.relative_to(root / "csrc").parts[0], ())
        found += [
            f"{path.relative_to(root)} includes {header}"
            for header in includes_of(path)
            if not is_standard(header) and not header.startswith(allowed)
        ]
    for path, header in included_by_kernels(root):
        if header not in KERNEL_HEADERS and not header.startswith(("cpu/", "common/")):
            found.append(f"{path.relative_to(root)} is compiled per instruction set and includes {header}")
    return found


def size_violations(root: Path) -> list[str]:
    found = []
    for name, budget in LINE_BUDGETS.items():
        top = root / name
        for path in [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.suffix in SOURCES):
            limit = INIT_BUDGET if path.name == "__init__.py" else budget
            lines = path.read_text(encoding="utf-8").count("\n")
            if lines > limit:
                found.append(f"{path.relative_to(root)} has {lines} lines, more than {limit}")
    return found


def unlisted_sources(root: Path) -> list[str]:
    """Every source in csrc/ is in exactly one of the lists of csrc/ninja_build.py, but for csrc/cuda/*.cu, all of which are compiled."""
    text = (root / "csrc" / "ninja_build.py").read_text(encoding="utf-8")
    tree = {
        node.targets[0].id: node.value for node in ast.parse(text).body if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id")
    }
    lists = {name: ast.literal_eval(tree[name]) for name in ("BINDING", "SHARED", "ENGINE", "CHUNK_KERNELS", "MATRIX_KERNELS")}
    kernels = [f"cpu/{name}" for name in lists["CHUNK_KERNELS"] + lists["MATRIX_KERNELS"]]
    listed = sorted(f"{name}.cpp" for name in [*set(lists["BINDING"].values()), *lists["SHARED"], *lists["ENGINE"], *kernels])
    sources = {path for path in (root / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")} - {*(root / "csrc" / "cuda").glob("*.cu")}
    present = sorted(str(path.relative_to(root / "csrc")) for path in sources)
    return [] if listed == present else [f"csrc/ninja_build.py compiles {listed}, csrc has {present}"]


RULES = [import_violations, import_circles, include_violations, size_violations, unlisted_sources]


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps(rule):
    assert rule(ROOT) == []


def plant(root: Path, files: dict[str, str]) -> Path:
    """A small package in order, with these files added to it or replaced."""
    sound = {
        "sam_kernels/__init__.py": "from importlib import import_module\nimport_module('sam_kernels._api')\n",
        "sam_kernels/_api.py": "from sam_kernels import functional\n",
        "sam_kernels/functional.py": "import torch\nfrom sam_kernels import _dispatch\nfrom sam_kernels._tensor_list import TensorList\n",
        "sam_kernels/_dispatch.py": "import importlib\nimportlib.import_module(f'sam_kernels.backends.{1}')\n",
        "sam_kernels/_tensor_list.py": "from torch import Tensor\n",
        "sam_kernels/_backend.py": "from sam_kernels.operations import Operands\n",
        "sam_kernels/operations/__init__.py": "from sam_kernels.operations.ascent import Perturb\n",
        "sam_kernels/operations/ascent.py": "from torch import Tensor\n",
        "sam_kernels/backends/__init__.py": "",
        "sam_kernels/backends/foreach.py": "from sam_kernels._backend import Backend\nfrom sam_kernels.operations import Perturb\n",
        "sam_kernels/backends/native/__init__.py": "from .cpu import perturb_\n",
        "sam_kernels/backends/native/cpu.py": "from sam_kernels import _cpu\n",
        "sam_kernels/reference/__init__.py": "import torch\n",
        "sam_kernels/optim/__init__.py": "from sam_kernels.optim.sam import SAM\n",
        "sam_kernels/optim/sam.py": "from sam_kernels import functional\n",
        "sam_kernels/cli/__init__.py": "import click\nimport sam_kernels\n",
        "sam_kernels/cli/validate.py": "from sam_kernels.validation.check import check\n",
        "sam_kernels/cli/train/__init__.py": "",
        "sam_kernels/cli/train/command.py": "import click\nimport sam_kernels\n",
        "sam_kernels/validation/__init__.py": "",
        "sam_kernels/validation/check.py": "from sam_kernels import functional, reference\nfrom sam_kernels.backends import foreach\n",
        "sam_kernels/__main__.py": "from sam_kernels.cli import main\n",
        "csrc/common/formulas.h": "#include <cmath>\n",
        "csrc/cpu/engine.cpp": '#include <vector>\n#include "common/formulas.h"\n',
        "csrc/cpu/sgd.cpp": '#include "cpu/block.h"\ninline namespace SAM_ISA {}\n',
        "csrc/cpu/block.h": "#include <cstring>\n#include <immintrin.h>\n",
        "csrc/bind_cpu.cpp": '#include <pybind11/pybind11.h>\n#include "cpu/engine.h"\n',
        "csrc/tensor_list.cpp": '#include "tensor_list.h"\n',
        "csrc/tensor_list.h": '#include <pybind11/pybind11.h>\n#include "common/formulas.h"\n',
        "csrc/cuda/sgd.cu": '#include <cuda_runtime.h>\n#include "cuda/chunk.cuh"\n',
        "csrc/cuda/chunk.cuh": '#include <cstdint>\n#include "common/formulas.h"\n',
        "csrc/bind_cuda.cpp": '#include <cuda_runtime_api.h>\n#include <pybind11/stl.h>\n#include "cuda/sgd.h"\n#include "tensor_list.h"\n',
        "csrc/ninja_build.py": 'BINDING = {"_cpu": "bind_cpu", "_cuda": "bind_cuda", "_cuda_on_host": "bind_cuda"}\n'
        'SHARED = ["tensor_list"]\nENGINE = ["cpu/engine"]\nCHUNK_KERNELS = ["sgd"]\nMATRIX_KERNELS = []\n',
    }
    for name, text in {**sound, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_package_passes(rule, tmp_path):
    assert rule(plant(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sam_kernels/functional.py", "from sam_kernels.optim import SAM\n"),
        ("sam_kernels/functional.py", "from . import optim\n"),
        ("sam_kernels/functional.py", "import sam_kernels.backends.foreach\n"),
        ("sam_kernels/functional.py", "import numpy\n"),
        ("sam_kernels/_dispatch.py", "from sam_kernels import functional\n"),
        ("sam_kernels/_tensor_list.py", "from sam_kernels import _dispatch\n"),
        ("sam_kernels/_backend.py", "from sam_kernels import _dispatch\n"),
        ("sam_kernels/operations/ascent.py", "from sam_kernels import functional\n"),
        ("sam_kernels/operations/ascent.py", "from sam_kernels.backends import foreach\n"),
        ("sam_kernels/backends/foreach.py", "from sam_kernels.backends import native\n"),
        ("sam_kernels/backends/foreach.py", "from sam_kernels.backends.native.cpu import perturb_\n"),
        ("sam_kernels/backends/native/cpu.py", "from ..foreach import perturb_\n"),
        ("sam_kernels/backends/native/cpu.py", "def later():\n    import sam_kernels.functional\n"),
        ("sam_kernels/backends/native/cpu.py", "from sam_kernels.reference import perturb_\n"),
        ("sam_kernels/backends/native/cpu.py", "import importlib\nimportlib.import_module('sam_kernels.functional')\n"),
        ("sam_kernels/optim/sam.py", "from sam_kernels import reference\n"),
        ("sam_kernels/optim/sam.py", "from sam_kernels.backends import foreach\n"),
        ("sam_kernels/optim/sam.py", "import sam_kernels.cli\n"),
        ("sam_kernels/cli/validate.py", "from sam_kernels import reference\n"),
        ("sam_kernels/cli/train/run.py", "from sam_kernels.reference import ops\n"),
        ("sam_kernels/cli/train/run.py", "from sam_kernels.backends import foreach\n"),
        ("sam_kernels/validation/check.py", "from sam_kernels.cli.validate import validate\n"),
        ("sam_kernels/validation/check.py", "from sam_kernels.optim import SAM\n"),
        ("sam_kernels/validation/check.py", "from sam_kernels import _cuda\n"),
        ("sam_kernels/validation/check.py", "import click\n"),
        ("sam_kernels/functional.py", "from sam_kernels.validation.check import check\n"),
        ("sam_kernels/reference/__init__.py", "from sam_kernels import _validate\n"),
        ("sam_kernels/reference/__init__.py", "import numpy\n"),
        ("sam_kernels/__init__.py", "from sam_kernels.cli import main\n"),
        ("sam_kernels/_api.py", "from sam_kernels.integrations import timm\n"),
        ("sam_kernels/optim/sam.py", "from sam_kernels._api import SAM\n"),
        ("sam_kernels/__main__.py", "from sam_kernels import functional\n"),
        ("sam_kernels/functional.py", "from sam_kernels import _cuda\n"),
        ("sam_kernels/_dispatch.py", "from sam_kernels import _cuda_on_host\n"),
        ("sam_kernels/surprise.py", "import torch\n"),
    ],
)
def test_a_planted_import_is_found(name, text, tmp_path):
    (violation,) = import_violations(plant(tmp_path, {name: text}))
    assert name in violation


@pytest.mark.parametrize("typed", [False, True])
def test_a_planted_circle_is_found(typed, tmp_path):
    back = "from sam_kernels.operations import norms\n"
    text = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {back}" if typed else back
    files = {
        "sam_kernels/operations/ascent.py": text,
        "sam_kernels/operations/norms.py": "from sam_kernels.operations.ascent import Perturb\n",
    }
    (circle,) = import_circles(plant(tmp_path, files))
    assert "sam_kernels.operations.norms" in circle
    assert "sam_kernels.operations.ascent" in circle


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("csrc/common/formulas.h", '#include "cpu/engine.h"\n'),
        ("csrc/common/formulas.h", "#include <cuda_runtime.h>\n"),
        ("csrc/cpu/engine.cpp", "#include <torch/extension.h>\n"),
        ("csrc/cpu/engine.cpp", "#include <pybind11/pybind11.h>\n"),
        ("csrc/bind_cpu.cpp", "#include <ATen/ATen.h>\n"),
        ("csrc/bind_cpu.cpp", "  #  include <c10/util/Half.h>\n"),
        ("csrc/common/formulas.h", '#include "cuda/chunk.cuh"\n'),
        ("csrc/cpu/engine.cpp", '#include "cuda/chunk.cuh"\n'),
        ("csrc/cpu/engine.cpp", "#include <cuda_runtime_api.h>\n"),
        ("csrc/cuda/sgd.cu", '#include "cpu/block.h"\n'),
        ("csrc/cuda/sgd.cu", "#include <torch/extension.h>\n"),
        ("csrc/cuda/sgd.cu", '#include "tensor_list.h"\n'),
        ("csrc/cuda/chunk.cuh", '#include "cpu/block.h"\n'),
        ("csrc/cuda/chunk.cuh", "#include <ATen/cuda/CUDAContext.h>\n"),
        ("csrc/cuda/chunk.cuh", "#include <pybind11/pybind11.h>\n"),
        ("csrc/bind_cuda.cpp", '#include "cpu/engine.h"\n'),
        ("csrc/bind_cuda.cpp", "#include <cuda_runtime.h>\n"),
        ("csrc/bind_cpu.cpp", '#include "cuda/chunk.cuh"\n'),
        ("csrc/bind_cpu.cpp", "#include <cuda_runtime_api.h>\n"),
        ("csrc/tensor_list.h", "#include <cuda_runtime_api.h>\n"),
        ("csrc/tensor_list.cpp", '#include "cpu/engine.h"\n'),
        ("csrc/surprise.cpp", '#include "common/formulas.h"\n'),
        ("csrc/cpu/block.h", "#include <vector>\n"),
        ("csrc/common/formulas.h", "#include <algorithm>\n"),
    ],
)
def test_a_planted_include_is_found(name, text, tmp_path):
    kernel = {"csrc/cpu/sgd.cpp": '#include "cpu/block.h"\n#include "common/formulas.h"\ninline namespace SAM_ISA {}\n'}
    violations = include_violations(plant(tmp_path, {**kernel, name: text}))
    assert violations
    assert all(name in violation for violation in violations)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("sam_kernels/functional.py", 401),
        ("csrc/cpu/block.h", 401),
        ("csrc/cuda/sgd.cu", 401),
        ("csrc/cuda/chunk.cuh", 401),
        ("csrc/ninja_build.py", 401),
        ("tests/ops/test_x.py", 401),
        ("setup.py", 121),
        ("sam_kernels/__init__.py", 41),
    ],
)
def test_a_file_over_its_budget_is_found(name, lines, tmp_path):
    root = plant(tmp_path, {name: "\n" * lines})
    assert size_violations(root) == [f"{name} has {lines} lines, more than {lines - 1}"]


@pytest.mark.parametrize("name", ["csrc/cpu/adamw.cpp", "csrc/cuda/engine.cpp", "csrc/cuda/more/norm.cu", "csrc/norm.cu", "csrc/more.cpp"])
def test_a_source_that_is_not_compiled_is_found(name, tmp_path):
    assert unlisted_sources(plant(tmp_path, {name: ""})) != []


def test_a_new_cuda_kernel_needs_no_list(tmp_path):
    assert unlisted_sources(plant(tmp_path, {"csrc/cuda/adamw.cu": ""})) == []
