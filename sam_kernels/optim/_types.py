"""Dictionaries of torch's that pass through the optimizers, under the names of what they are."""

from __future__ import annotations

from typing import Any

__all__ = ["ParamGroup", "StateDict"]

ParamGroup = dict[str, Any]  # of Optimizer.param_groups: "params" and options, the base's and SAM's
StateDict = dict[str, Any]  # of Optimizer.state_dict(): "state" by the number of a parameter, and "param_groups"
