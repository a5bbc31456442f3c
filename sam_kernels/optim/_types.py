"""Dictionaries of torch's that pass through the optimizers, under the names of what they are."""

from __future__ import annotations

from typing import Any

__all__ = ["GroupOptions", "Keywords", "ParamGroup", "ParamState", "StateDict"]

ParamGroup = dict[str, Any]  # of Optimizer.param_groups: "params" and options, the base's and SAM's
GroupOptions = dict[str, Any]  # some options of a group
ParamState = dict[str, Any]  # what Optimizer.state holds of one parameter
StateDict = dict[str, Any]  # of Optimizer.state_dict(): "state" by the number of a parameter, and "param_groups"; of a copy, attributes
Keywords = dict[str, Any]  # of a constructor
