"""One OpenMP runtime in the process, torch's, and its number of threads is obeyed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sam_kernels._dispatch import reason_missing

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.skipif(reason_missing("native") is not None, reason=f"native backend: {reason_missing('native')}"),
]

REPORT = """
import json, os, re
def runtimes():
    paths = {line.split()[-1] for line in open("/proc/self/maps")}
    return sorted(path for path in paths if re.match(r"lib(g|i|)omp[0-9]*[-.]", os.path.basename(path)))
def threads():
    return len(os.listdir("/proc/self/task"))
"""


def report(code: str) -> dict:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))}
    run = subprocess.run([sys.executable, "-c", REPORT + code], env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


FIRST = ("from sam_kernels import _cpu", "import sam_kernels\nsam_kernels._cpu", "import sam_kernels.backends.native.cpu")


@pytest.mark.parametrize("first", FIRST)
def test_one_openmp_runtime_is_loaded_and_it_is_torchs(first):
    """However the native core is reached: the package alone imports no torch."""
    found = report(f"{first}\nimport sys\nassert 'sam_kernels._cpu' in sys.modules\nprint(json.dumps(runtimes()))")
    assert len(found) == 1, found
    assert found == report("import torch\nprint(json.dumps(runtimes()))")


WORK = """
import torch
torch.set_num_threads({first})
import sam_kernels
grads, params, old_params = ([torch.empty(1 << 22)] for _ in range(3))  # not filled: that would start torch's threads
norm = torch.ones(())
{warm}
before = threads()
with sam_kernels.use_backend("native"):
    sam_kernels.functional.grad_norm(grads)
    sam_kernels.functional.perturb_(params, grads, old_params, norm, rho=0.05)
print(json.dumps({{"before": before, "after": threads()}}))
"""


def test_one_thread_starts_no_other():
    found = report(WORK.format(first=1, warm=""))
    assert found["after"] == found["before"]


def test_two_threads_are_used():
    """So that the tests beside this one can fail: a pass over four million elements does wake another thread."""
    found = report(WORK.format(first=2, warm=""))
    assert found["after"] == found["before"] + 1


def test_the_threads_are_those_torch_already_has():
    found = report(WORK.format(first=2, warm="grads[0].mul_(1.0)"))
    assert found["after"] == found["before"]
