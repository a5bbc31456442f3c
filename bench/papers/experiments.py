"""The experiments by name, in the order of the page."""

from __future__ import annotations

from bench.papers import (
    beyond,
    diffusion,
    drift,
    federated,
    lambdas,
    log,
    msharpness,
    noise,
    reshuffling,
    schedules,
    stall,
    unified,
    variance,
    weak_order,
)
from bench.papers.experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Experiment] = {
    "stall": stall.EXPERIMENT,
    "unified": unified.EXPERIMENT,
    "reshuffling": reshuffling.EXPERIMENT,
    "log": log.EXPERIMENT,
    "schedules": schedules.EXPERIMENT,
    "drift": drift.EXPERIMENT,
    "diffusion": diffusion.EXPERIMENT,
    "weak_order": weak_order.EXPERIMENT,
    "variance": variance.EXPERIMENT,
    "lambda": lambdas.EXPERIMENT,
    "msharpness": msharpness.EXPERIMENT,
    "noise": noise.EXPERIMENT,
    "federated": federated.EXPERIMENT,
    "beyond": beyond.EXPERIMENT,
}
