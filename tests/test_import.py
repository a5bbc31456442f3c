"""``import sam_kernels`` alone imports little; a name imports what it needs at its first use, whichever it is."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sam_kernels

NOT_PUBLIC = {"backends", "cli", "integrations", "operations", "reference", "validation"}  # packages that are imported by their own names
# In a process of its own for each name, which has imported torch and no more: prints what the name has, with all of it as the last one.
FIRST_USES = """
import json, os, sys
import torch

def attributes(name):
    import sam_kernels
    if name is None:
        [getattr(sam_kernels, each) for each in sam_kernels.__all__]
        return {each: dir(getattr(sam_kernels, each)) for each in sam_kernels.__all__}
    return dir(getattr(sam_kernels, name))

found = {}
for name in [*json.loads(sys.argv[1]), None]:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with open(theirs, "w") as file:
            json.dump(attributes(name), file)
        os._exit(0)
    os.close(theirs)
    with open(ours) as file:
        found[str(name)] = file.read()
    os.waitpid(child, 0)
json.dump({name: text and json.loads(text) for name, text in found.items()}, sys.stdout)
"""


def run(code: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ)
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [env.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False)


def test_the_package_alone_imports_no_torch() -> None:
    """Nor do look-ups of names that tools try on every module."""
    code = (
        "import sys, sam_kernels\n"
        "tried = [hasattr(sam_kernels, name) for name in ('__wrapped__', '__test__', '_nothing')]\n"
        "print(sam_kernels.__version__, tried, [name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy')])\n"
        "sam_kernels.SAM\n"
        "print('torch' in sys.modules)"
    )
    assert run(code).stdout.splitlines() == [f"{sam_kernels.__version__} [False, False, False] []", "True"]


def test_the_names_are_those_that_the_modules_export() -> None:
    public = {path.parent.name for path in Path(sam_kernels.__file__).parent.glob("*/__init__.py")} - NOT_PUBLIC
    functions = {"last_layers", "norm_layers", "param_groups", "use_backend"}
    assert sorted(sam_kernels.__all__) == sorted({"__version__", *public, *functions, *sam_kernels.optim.__all__})
    assert len(set(sam_kernels.__all__)) == len(sam_kernels.__all__)
    assert set(sam_kernels.__all__) <= set(dir(sam_kernels))
    namespace: dict[str, Any] = {}
    exec("from sam_kernels import *", namespace)
    assert {name: namespace[name] for name in sam_kernels.__all__} == {name: getattr(sam_kernels, name) for name in sam_kernels.__all__}
    assert set(namespace) - {"__builtins__"} == set(sam_kernels.__all__)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_any_name_may_be_the_first() -> None:
    """And what it has does not depend on the names that were used before. SAM stands for all that come by way of ``_api``."""
    modules = [name for name in sam_kernels.__all__ if inspect.ismodule(getattr(sam_kernels, name))]
    found = run(FIRST_USES, json.dumps([*modules, "SAM"]))
    assert found.returncode == 0, found.stderr
    by_name = json.loads(found.stdout)
    last = by_name.pop("None")
    assert len(by_name) == len(modules) + 1 >= 8
    assert list(last) == sam_kernels.__all__
    assert {name: set(last[name]) - set(first) for name, first in by_name.items() if set(first) != set(last[name])} == {}


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'sam_kernels' has no attribute 'Sam'"):
        sam_kernels.Sam  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Sam' from 'sam_kernels'"):
        from sam_kernels import Sam  # noqa: F401
    assert not hasattr(sam_kernels, "_nothing")


def test_a_missing_torch_is_said_at_the_import() -> None:
    for code in ("import sam_kernels", "import sam_kernels.optim", "from sam_kernels.cli import main"):
        found = run(f"import sys; sys.modules['torch'] = None\n{code}")
        assert found.stderr.splitlines()[-1] == "ModuleNotFoundError: sam_kernels needs PyTorch, which is not installed: pip install torch"


@pytest.mark.parametrize("error", ["AttributeError", "ImportError"])
@pytest.mark.parametrize("code", ["hasattr(sam_kernels, 'SAM')", "getattr(sam_kernels, 'optim', None)"])
def test_a_torch_that_cannot_be_imported_makes_no_name_a_missing_one(error: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"raise {error}('libc10.so is broken')")
    found = run(f"import sam_kernels\nprint({code})", path=tmp_path)
    assert found.stdout == ""
    assert "ImportError" in found.stderr.splitlines()[-1]
    assert "libc10.so is broken" in found.stderr.splitlines()[-1]


def test_a_pickled_optimizer_finds_its_class_in_a_new_process(tmp_path: Path) -> None:
    optimizer = sam_kernels.SAM([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, rho=0.05, lr=0.1)
    (tmp_path / "state").write_bytes(pickle.dumps((type(optimizer), optimizer.state_dict())))
    found = run("import pickle, sys\nkind, state = pickle.load(open(sys.argv[1], 'rb'))\nprint(kind.__name__)", str(tmp_path / "state"))
    assert found.stdout.strip() == "SAM", found.stderr
