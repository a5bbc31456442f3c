"""Learning rates, radii ρ_t and mixes λ_t over the course of training. Each depends on what checkpoints hold, and on nothing else."""

from sam_kernels.schedules._by_step import AlmostConstantRadius, DecreasingRadius, LinearLambda, LinearRadius
from sam_kernels.schedules._following import InverseNorm, LRProportional
from sam_kernels.schedules._learning_rate import Constant, Diminish1, Diminish2, Diminish3, PLDecreasing
from sam_kernels.schedules._phases import Interval, Tail
from sam_kernels.schedules._policy import AdaptivePolicy
from sam_kernels.schedules._radius import AscentInfo, Radius

__all__ = [
    "AdaptivePolicy",
    "AlmostConstantRadius",
    "AscentInfo",
    "Constant",
    "DecreasingRadius",
    "Diminish1",
    "Diminish2",
    "Diminish3",
    "Interval",
    "InverseNorm",
    "LRProportional",
    "LinearLambda",
    "LinearRadius",
    "PLDecreasing",
    "Radius",
    "Tail",
]
