"""What a user gets from `pip install`, `python -m build` and the wheel."""

from __future__ import annotations

import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from tests.packaging.support import ROOT, copy_tree, install, new_environment, pip_wheel, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("builds")]  # which its fixtures share

VERSION = "0.1.0"
NATIVE = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
# Where it is the build that is tested and not the code: the kernels once instead of once for each instruction set, and not optimised.
QUICKLY = {"SAM_KERNELS_BUILD": "cpu", "SAM_KERNELS_CXXFLAGS": "-O0", "SAM_KERNELS_INSTRUCTION_SETS": "baseline"}
DEGRADES = "installing without the native backend"
# Runs an operation on every backend there is and prints the norm of (3, 4) for each.
USE = """
import torch, sam_kernels
from sam_kernels import _dispatch, functional
for name in _dispatch.available("cpu"):
    with sam_kernels.use_backend(name):
        print(name, functional.grad_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item())
"""
# Without a native core: nothing is lost but speed, and asking for it by name says why it is not there.
USE_PURE = """
import importlib.util, torch, sam_kernels
from sam_kernels import functional
print("_cpu", importlib.util.find_spec("sam_kernels._cpu"))
params, grads, old = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])], [torch.zeros(2)]
norm = functional.grad_norm(grads)
functional.perturb_(params, grads, old, norm, rho=0.5)
print("perturbed", *(round(x, 4) for x in params[0].tolist()), "old", *old[0].tolist())
functional.restore_(params, old)
functional.sgd_step_(params, grads, [None], lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
print("stepped", *(round(x, 4) for x in params[0].tolist()))
try:
    sam_kernels.use_backend("native")
except RuntimeError as error:
    print("forced:", error)
"""


def use(python: Path, code: str, cwd: Path) -> str:
    return run(python, "-I", "-c", code, cwd=cwd)


def names_in(archive: Path) -> list[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.namelist()
    with tarfile.open(archive) as sdist:
        return [name.partition("/")[2] for name in sdist.getnames()]


def test_the_build_needs_no_torch():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requires = text.partition("[build-system]")[2].partition("\n\n")[0].partition("#")[0]
    assert "torch" not in requires


def test_pip_install_builds_in_isolation_without_torch_in_a_minute_and_a_half(source, wheel, kept_objects, tmp_path):
    """`pip install .` where `wheel` was built: only the binding compiles anew, the kernels do not depend on the environment."""
    python = new_environment(tmp_path / "venv")
    start = time.monotonic()
    said = install(python, source, "--verbose", cwd=tmp_path, env={**kept_objects, "SAM_KERNELS_BUILD": "cpu"})
    assert time.monotonic() - start < 90
    assert "torch" not in {line.split()[-1] for line in said.splitlines() if line.strip().startswith("Collecting")}
    assert "bind_cpu.cpp" in said
    assert "adamw.cpp" not in said
    assert "native 5.0" in use(python, USE, tmp_path)


def test_the_wheel_works_in_a_new_environment_without_a_compiler(wheel, tmp_path, no_compiler):
    python = new_environment(tmp_path / "venv")
    install(python, wheel, cwd=tmp_path, env=no_compiler)
    assert use(python, USE, tmp_path).split("\n")[:2] == ["native 5.0", "foreach 5.0"]


def test_the_wheel_is_a_platform_wheel_of_the_package_alone(wheel):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"sam_kernels-{VERSION}-{tag}-{tag}-{platform}.whl"
    names = names_in(wheel)
    assert {name.partition("/")[0] for name in names} == {"sam_kernels", f"sam_kernels-{VERSION}.dist-info"}
    assert [name for name in names if name.endswith((".so", ".o", ".new"))] == [f"sam_kernels/{NATIVE}"]
    assert {"sam_kernels/py.typed", "sam_kernels/functional/__init__.py", f"sam_kernels-{VERSION}.dist-info/licenses/LICENSE"} <= set(names)
    assert wheel.stat().st_size < 5_000_000


def test_build_makes_a_source_distribution_that_builds_itself(kept_objects, tmp_path):
    """`python -m build`: an archive from the tree, then a wheel from the archive. Compiled quickly: the code is tested elsewhere."""
    tree = copy_tree(tmp_path / "tree")
    (tree / "build" / "ninja.x").mkdir(parents=True)
    (tree / "build" / "ninja.x" / "bind_cpu.o").write_text("an old object")
    (tree / "sam_kernels" / NATIVE).write_text("an old module")
    dist = tmp_path / "dist"
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        dist,
        cwd=tree,
        env={**kept_objects, **QUICKLY},
    )
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    names = names_in(sdist)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")}
    assert sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "Makefile"} <= set(names)
    assert {"CHANGELOG.md", "SECURITY.md", "CITATION.cff", "tools/wheels.py", "tests/packaging/test_packaging.py"} <= set(names)
    assert not [name for name in names if name.startswith(("build/", "dist/", ".venv")) or name.endswith((".so", ".o"))]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"sam_kernels/{NATIVE}")[:4] == b"\x7fELF"


def test_none_gives_a_pure_wheel_with_everything_on_foreach(pure_wheel, tmp_path):
    assert pure_wheel.name == f"sam_kernels-{VERSION}-py3-none-any.whl"
    assert not [name for name in names_in(pure_wheel) if name.endswith(".so")]
    python = new_environment(tmp_path / "venv")
    install(python, pure_wheel, cwd=tmp_path)
    assert use(python, USE, tmp_path).split("\n")[0] == "foreach 5.0"
    said = use(python, USE_PURE, tmp_path)
    assert "_cpu None" in said
    assert "perturbed 1.3 2.4 old 1.0 2.0" in said
    assert "stepped 0.7 1.6" in said
    assert "forced: use_backend: backend 'native' cannot be used" in said
    assert "sam_kernels._cpu" in said.partition("forced:")[2]


def test_a_module_left_in_the_tree_does_not_get_into_a_pure_wheel(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "sam_kernels" / NATIVE).write_text("an old module")
    pip_wheel(tree, tmp_path / "dist", SAM_KERNELS_BUILD="none")
    (path,) = (tmp_path / "dist").iterdir()
    assert path.name.endswith("py3-none-any.whl")
    assert not [name for name in names_in(path) if name.endswith(".so")]


def test_auto_without_a_compiler_degrades_with_one_line(tmp_path, no_compiler):
    said = pip_wheel(copy_tree(tmp_path / "tree"), tmp_path / "dist", **no_compiler)
    (path,) = (tmp_path / "dist").iterdir()
    assert path.name.endswith("py3-none-any.whl")
    (line,) = [line for line in said.splitlines() if DEGRADES in line]
    assert line.strip().startswith("sam_kernels: no C++ compiler: 'c++' not found")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"SAM_KERNELS_BUILD": "cpu", "CXX": "no-such-compiler -pipe"}, ["'no-such-compiler' not found", "SAM_KERNELS_BUILD=cpu"]),
        ({"SAM_KERNELS_BUILD": "gpu"}, ["SAM_KERNELS_BUILD=gpu: expected auto, none, cpu or cuda"]),
        ({"SAM_KERNELS_BUILD": "cuda", "CXX": "no-such-compiler"}, ["'no-such-compiler' not found", "SAM_KERNELS_BUILD=cuda"]),
    ],
    ids=["cpu without a compiler", "an unknown value", "cuda without a compiler"],
)
def test_what_cannot_be_had_is_an_error(options, words, tmp_path):
    said = pip_wheel(copy_tree(tmp_path / "tree"), tmp_path / "dist", succeeds=False, **options)
    for word in words:
        assert word in said


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_a_failing_compile_is_an_error_with_the_compilers_words(mode, needs_compiler, tmp_path):
    tree = copy_tree(tmp_path / "tree")
    options = {"SAM_KERNELS_BUILD": mode, "SAM_KERNELS_CXXFLAGS": "-include no-such-header.h"}
    said = pip_wheel(tree, tmp_path / "dist", succeeds=False, **options)
    assert "no-such-header.h: No such file" in said
    assert "compiling the native backend failed" in said


def test_builds_are_incremental(kept_objects, tmp_path):
    """Only what a change reaches is compiled again. In a path with spaces, with a compiler of two words."""
    tree = copy_tree(tmp_path / "a folder with spaces & $igns")
    options = {**kept_objects, **QUICKLY, "CXX": "env c++", "MAX_JOBS": "2"}

    def build(**more: str) -> str:
        return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, env={**options, **more})

    assert "_cpu.so" in build()
    assert use(Path(sys.executable), f"import sys; sys.path.insert(0, {str(tree)!r})\n{USE}", tmp_path).startswith("native 5.0")
    assert "no work to do" in build()
    header = tree / "csrc" / "cpu" / "engine.h"  # seen by the engine and the binding, not by the kernels
    header.write_text(header.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
    said = build()
    assert "engine.cpp" in said
    assert "bind_cpu.cpp" in said
    assert "adamw.cpp" not in said
    assert "no work to do" in build()
    source = tree / "csrc" / "cpu" / "norm.cpp"
    source.write_text(source.read_text(encoding="utf-8") + "#error planted\n", encoding="utf-8")
    module = tree / "sam_kernels" / NATIVE
    before = module.read_bytes()
    said = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, env=options, succeeds=False)
    assert "#error planted" in said
    assert module.read_bytes() == before
    assert len(list((tree / "build").glob("ninja*"))) == 1  # one way of compiling, one folder
