"""A comparison and its results, as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import sam_kernels
from sam_kernels.cli.train.comparison import Comparison
from sam_kernels.cli.train.run import Run
from sam_kernels.cli.train.summary import summaries_of

__all__ = ["to_json"]


def to_json(comparison: Comparison, runs: Sequence[Run]) -> str:
    """Return the options, the versions, the summaries and the runs."""
    config = {
        "data": comparison.data,
        **asdict(comparison.settings),
        **asdict(comparison.plan),
        "held_out": comparison.held_out,
        "seeds": comparison.seeds,
        "backend": comparison.backend,
        "device": comparison.device,
        "threads": comparison.threads,
    }
    versions = {"sam_kernels": sam_kernels.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    report = {
        "config": config,
        "versions": versions,
        "summary": [asdict(summary) for summary in summaries_of(runs, comparison.settings)],
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
