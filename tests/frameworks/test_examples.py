"""The examples that need a framework run, and what they print makes sense: SAM is better than the base where it says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lightning_module.py": ("lightning", "sklearn"),
    "accelerate_loop.py": ("accelerate", "sklearn"),
    "finetune_transformers.py": ("transformers",),
    "lora.py": ("transformers", "peft"),
}


def numbers(pattern: str, text: str) -> list[float]:
    return [float(each) for each in re.findall(pattern, text)]


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_shows_a_gain(name: str) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    code = f"import tests.frameworks.conftest, runpy; runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES.parent, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    if name == "lora.py":
        losses = numbers(r"loss (\d+\.\d+)", ran.stdout)
        assert losses[-1] < 0.95 * losses[0]
    elif name == "finetune_transformers.py":
        before, base, sam = numbers(r": (\d+\.\d+)", ran.stdout)
        assert sam < before
        assert base < before
    else:
        base, sam = numbers(r": (\d+\.\d+) %", ran.stdout)
        assert sam > base + 2
