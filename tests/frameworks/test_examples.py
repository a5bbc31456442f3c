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
    "timm_loop.py": ("timm", "mlxtend", "sklearn"),
    "cifar_style_cnn.py": ("mlxtend", "sklearn"),  # no framework: make test runs it too
}


def numbers(pattern: str, text: str) -> list[float]:
    return [float(each) for each in re.findall(pattern, text)]


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_shows_a_gain(name: str) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    out = printed(name)
    if name == "lora.py":
        losses = numbers(r"loss (\d+\.\d+)", out)
        assert losses[-1] < 0.95 * losses[0]
    elif name == "finetune_transformers.py":
        before, base, sam = numbers(r": (\d+\.\d+)", out)
        assert sam < before
        assert base < before
    else:
        base, sam = numbers(r": (\d+\.\d+) %", out)
        assert sam > base + 2


def printed(name: str, *arguments: str) -> str:
    argv = [str(EXAMPLES / name), *arguments]
    code = f"import sys, tests.frameworks.conftest, runpy; sys.argv = {argv}; runpy.run_path(sys.argv[0], run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES.parent, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.parametrize("form", ["gray.npz", "colour.npz", "folder"])
def test_the_cnn_reads_data_of_ones_own(form: str, tmp_path: Path) -> None:
    """Two classes, dark and bright, which a network tells apart in a few epochs."""
    np = pytest.importorskip("numpy")
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    shape = (80, 16, 16) if form == "gray.npz" else (80, 16, 16, 3)
    images = (rng.integers(0, 100, shape) + 150 * labels.reshape(80, *([1] * (len(shape) - 1)))).astype(np.uint8)
    path = tmp_path / form
    if form == "folder":
        pytest.importorskip("torchvision")
        image = pytest.importorskip("PIL.Image")
        for i, (each, label) in enumerate(zip(images, labels, strict=True)):
            (path / f"class {label}").mkdir(parents=True, exist_ok=True)
            image.fromarray(each).save(path / f"class {label}" / f"{i}.png")
    else:
        np.savez(path, images=images, labels=labels)
    assert numbers(r": (\d+\.\d+) %", printed("cifar_style_cnn.py", "--data", str(path), "--wrong", "0", "--epochs", "10")) == [
        100.0,
        100.0,
    ]
