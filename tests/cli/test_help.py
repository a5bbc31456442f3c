"""Help texts of the command line: each is read alone, and there at once: without torch, numpy, rich or matplotlib."""

from __future__ import annotations

import importlib
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from sam_kernels.cli import main
from sam_kernels.cli.prove import command as proving
from sam_kernels.cli.train import optimizers
from sam_kernels.optim._reweighted import reweighting
from sam_kernels.validation.check import FAMILIES
from sam_kernels.validation.options import OPERATIONS

COMMANDS = sorted(main.commands)
OPTIONS = [(name, param) for name in COMMANDS for param in main.commands[name].params if isinstance(param, click.Option)]
SLOW = ("torch", "numpy", "rich", "matplotlib", "scipy", "sklearn", "mlxtend", "triton", "sam_kernels._cpu")
# Runs the command line and prints, as its last line, the exit status and which of the slow modules it imported.
WATCHED = f"""
import sys
from sam_kernels.cli import main
try:
    main(sys.argv[1:], prog_name="python -m sam_kernels")
except SystemExit as stop:
    print(stop.code, [name for name in {SLOW} if name in sys.modules])
"""


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda each: each if isinstance(each, str) else each.name)
def test_every_option_has_a_sentence_of_its_own(command: str, option: click.Option) -> None:
    text = option.help or ""
    assert text[:1].isupper(), text
    assert text.endswith("."), text
    assert len(text.split()) >= 3, text
    assert text.split()[0] not in ("Of", "Whose", "As", "It", "They"), text


@pytest.mark.parametrize("command", ["info", "train", "validate"])
def test_json_means_the_same_everywhere(command: str) -> None:
    (option,) = [each for name, each in OPTIONS if name == command and "--json" in each.opts]
    assert option.is_flag
    assert (option.help or "").endswith("as JSON to stdout, and all else to stderr.")


def test_help_of_every_command() -> None:
    for command in ([], *([name] for name in COMMANDS)):
        result = CliRunner().invoke(main, [*command, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.stdout


def watched(*arguments: str) -> str:
    found = subprocess.run([sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    assert watched(*arguments).endswith(" []")


WRONG = [["train", "--base", "sgdd"], ["validate", "--op", "perturb"], ["prove", "--only", "speeds"], ["info", "--jsn"]]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_option_imports_nothing_slow(arguments: list[str]) -> None:
    assert watched(*arguments) == "2 []"


def test_a_command_that_runs_imports_torch() -> None:
    """So that the tests above can fail."""
    assert "'torch'" in watched("info")


def test_choices_are_those_of_the_tables() -> None:
    """Tables without torch name what others, with torch, have: the operations, the norms of RW-SAM, the claims' functions."""
    assert tuple(FAMILIES) == OPERATIONS
    assert reweighting.NORMS == optimizers.NORMS
    for base in optimizers.BASES.values():
        assert base.build.__name__ == base.name
    for claim in proving.CLAIMS:
        module, function = claim.measure.args  # type: ignore[attr-defined]
        assert callable(getattr(importlib.import_module(f"sam_kernels.cli.prove.{module}"), function))
