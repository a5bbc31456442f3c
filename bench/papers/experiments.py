"""The experiments by name, in the order of the page."""

from __future__ import annotations

from bench.papers import beyond, drift, federated, lambdas, log, msharpness, schedules, stall, unified
from bench.papers.experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Experiment] = {
    "stall": stall.EXPERIMENT,
    "unified": unified.EXPERIMENT,
    "log": log.EXPERIMENT,
    "schedules": schedules.EXPERIMENT,
    "drift": drift.EXPERIMENT,
    "lambda": lambdas.EXPERIMENT,
    "msharpness": msharpness.EXPERIMENT,
    "federated": federated.EXPERIMENT,
    "beyond": beyond.EXPERIMENT,
}
