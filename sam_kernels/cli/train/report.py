"""Everything about a comparison, as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import sam_kernels
from sam_kernels.cli.train.run import Run
from sam_kernels.cli.train.summary import Summary

__all__ = ["to_json"]


def to_json(config: dict[str, Any], summaries: Sequence[Summary], runs: Sequence[Run]) -> str:
    versions = {"sam_kernels": sam_kernels.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    report = {
        "config": config,
        "versions": versions,
        "summary": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """A diverged run's nan and inf become null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
