"""Where Triton cannot do it: one clear error, and weights as they were. (Wrong tensors on a device: tests/gpu/test_streams.py.)"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam_kernels import functional, use_backend
from sam_kernels._dispatch import reason_missing
from sam_kernels.backends.triton import _requirements

FORCE = "import sam_kernels; sam_kernels.use_backend('triton')"
REPORT = "from sam_kernels.backends import triton; print(triton.BACKEND.reason_missing, triton.BACKEND.operations)"

PER_SAMPLE = "frozenset([torch.float32])"


def python(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("import sys; sys.modules['triton'] = None", "triton cannot be imported"),
        (
            "import sys, types; fake = types.ModuleType('triton'); fake.__version__ = '3.1.0'; sys.modules['triton'] = fake",
            "triton 3.1.0 is too old",
        ),
    ],
    ids=["missing", "too old"],
)
def test_a_triton_that_cannot_be_used(prepare: str, words: str) -> None:
    """The package and the backend import all the same; the backend says why it is not there; asking for it is an error with that reason."""
    imported = python("import torch", prepare, REPORT)
    assert imported.returncode == 0, imported.stderr
    assert words in imported.stdout
    assert imported.stdout.endswith(" {}\n")
    forced = python("import torch", prepare, FORCE)
    assert forced.returncode != 0
    assert forced.stderr.strip().splitlines()[-1].startswith(f"RuntimeError: use_backend: backend 'triton' cannot be used: {words}")
    works = python("import torch", prepare, "import sam_kernels; print(sam_kernels.functional.grad_norm([torch.ones(4)]).item())")
    assert works.stdout.strip() == "2.0", works.stderr
    on_a_device = f"from sam_kernels import _dispatch; print(_dispatch.select_per_sample('cuda', {PER_SAMPLE}).__name__)"
    chosen = python("import torch", prepare, on_a_device)
    assert chosen.stdout.strip() == "sam_kernels.backends.foreach.per_sample", chosen.stderr


def test_what_is_promised_is_what_is_tested() -> None:
    """The oldest triton of pyproject.toml, of the package and of ``make test``."""
    root = Path(__file__).resolve().parents[2]
    promised = re.search(r'"triton>=([\d.]+)', (root / "pyproject.toml").read_text(encoding="utf-8"))
    tested = re.search(r"^OLDEST_TRITON := (\S+)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert promised is not None
    assert tested is not None
    assert promised[1] == ".".join(map(str, _requirements.MINIMUM_VERSION))
    assert tested[1].startswith(f"{promised[1]}.")


def test_cpu_tensors_are_refused_by_the_compiled_kernels() -> None:
    if (reason := reason_missing("triton", "cuda")) is not None:
        pytest.skip(f"backend triton: {reason}")
    params, grads, old = [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]
    with use_backend("triton"), pytest.raises(RuntimeError, match="no kernels for 'cpu' tensors, only for"):
        functional.perturb_(params, grads, old, torch.tensor(1.0), rho=1.0)
    assert torch.equal(params[0], torch.ones(3))
    assert torch.equal(old[0], torch.zeros(3))
