"""The examples of the pages run as they stand, the blocks of a page one after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sam_kernels

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/per_sample.md", "docs/rw_sam.md"])
def test_the_examples_run(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    space: dict[str, Any] = {"torch": torch, "sam_kernels": sam_kernels}
    for block in blocks:
        exec(block, space)
