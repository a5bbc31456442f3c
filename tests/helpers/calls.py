"""One right call of each operation over lists, with every list that it can take, for tests that change one argument of it."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CALLS", "Arguments"]

Arguments = dict[str, Any]


def perturb() -> Arguments:
    return {**lists("params", "grads", "old_params"), "norm": torch.tensor(1.0), "rho": 0.1}


def direction() -> Arguments:
    return {**lists("grads", "ema", "params"), "kind": "friendly", "adaptive": True}


def centralize() -> Arguments:
    return {**lists("grads", "params"), "adaptive": True}


def friendly() -> Arguments:
    """The call of ``perturb_`` with every list it can take."""
    return {**lists("params", "grads", "old_params", "ema"), "norm": torch.tensor(1.0), "rho": 0.1, "kind": "friendly"}


def dots() -> Arguments:
    return lists("lefts", "rights", "origins")


def combine() -> Arguments:
    return {**lists("outs", "lefts", "rights", "origins"), "left_weight": 0.5, "right_weight": 2.0, "origin_weight": -1.0}


def random_perturb() -> Arguments:
    return {**lists("params", "old_params"), "seed": 1, "scale": 0.1, "distribution": "normal"}


def restore() -> Arguments:
    return lists("params", "old_params")


def sgd() -> Arguments:
    return {**lists("params", "grads", "momentum_buffers", "old_params"), "lr": 0.1, "momentum": 0.9}


def adamw() -> Arguments:
    steps = [torch.tensor(2.0) for _ in range(3)]
    return {**lists("params", "grads", "exp_avgs", "exp_avg_sqs", "old_params"), "state_steps": steps, "lr": 0.1}


def norm() -> Arguments:
    return {**lists("grads", "params"), "adaptive": True}


def norms() -> Arguments:
    given = lists("grads", "more", "params")
    return {"grad_groups": [given["grads"], given["more"]], "params": given["params"], "adaptive": True}


CALLS: dict[str, Callable[[], Arguments]] = {
    "perturb_": perturb,
    "perturb_ ema": friendly,
    "centralize_": centralize,
    "direction_norm_": direction,
    "grad_dots": dots,
    "combine_": combine,
    "random_perturb_": random_perturb,
    "restore_": restore,
    "sgd_step_": sgd,
    "adamw_step_": adamw,
    "grad_norm": norm,
    "grad_norms": norms,
}


def lists(*names: str) -> Arguments:
    return {name: [torch.ones(4, 3), torch.ones(5), torch.ones(2)] for name in names}
