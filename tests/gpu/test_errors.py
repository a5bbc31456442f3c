"""What a device says when a launch fails, in a process of its own: its context is lost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.devices import reason_without

pytestmark = [pytest.mark.cuda, pytest.mark.only_cuda]
AFTER_AN_ASSERTION = """
import os

import torch
from sam_kernels import functional, use_backend

use_backend("native")
params, old_params = [torch.ones(5, device="cuda")], [torch.zeros(5, device="cuda")]
functional.restore_(params, old_params)
try:
    print(torch.zeros(3, device="cuda")[torch.tensor([5], device="cuda")].cpu())
except RuntimeError:
    try:
        functional.restore_(params, old_params)
    except RuntimeError as error:
        print(error, flush=True)
os._exit(0)  # without tidying up, which such a context does not survive
"""


def test_an_error_names_the_operation_the_device_and_cudas_words() -> None:
    if (reason := reason_without("native")) is not None:
        pytest.skip(f"backend native: {reason}")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", AFTER_AN_ASSERTION], cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"^sam_kernels: restore_ on cuda:0: .+ failed: .+ \(cuda\w+\)", done.stdout, re.MULTILINE), done.stdout + done.stderr
