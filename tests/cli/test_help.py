"""Help texts of the command line: each is read alone."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from sam_kernels.cli import main

OPTIONS = [
    (name, param) for name in ("info", "train", "validate") for param in main.commands[name].params if isinstance(param, click.Option)
]


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
    for command in ([], ["info"], ["train"], ["validate"]):
        result = CliRunner().invoke(main, [*command, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
