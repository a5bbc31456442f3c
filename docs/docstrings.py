"""Griffe, for the reference pages: docstrings as Markdown. Roles become code, ``::`` a colon, simple tables blocks of text."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
_TABLE = re.compile(r"((?:^[ ]*=+(?: +=+)+\n)(?:.*\n)*?(?:^[ ]*=+(?: +=+)+$))(?=\n\s*\n|\n?\Z)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    text = _ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2] if found[1][0] == '_' else found[1]}`", text)
    text = _TABLE.sub(lambda found: f"```text\n{found[1]}\n```", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)
