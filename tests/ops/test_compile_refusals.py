"""What operations refuse, they refuse in the same words under ``torch.compile``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from tests.helpers.compiling import compiled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def perturb(one: Tensor, **changes: Any) -> None:
    given = {"params": [one], "grads": [one + 1], "old_params": [one + 2], "norm": torch.tensor(1.0), "rho": 0.1}
    functional.perturb_(**{**given, **changes})


def sgd(one: Tensor, **changes: Any) -> None:
    functional.sgd_step_(**{"params": [one], "grads": [one + 1], "momentum_buffers": [None], "lr": 0.1, "momentum": 0.9, **changes})


def random(one: Tensor, **changes: Any) -> None:
    given = {"params": [one], "old_params": [one + 2], "seed": 5, "scale": 0.1, "distribution": "normal"}
    functional.random_perturb_(**{**given, **changes})


def direction(one: Tensor, **changes: Any) -> Tensor:
    return functional.direction_norm_(**{"grads": [one], "ema": [one + 1], "kind": "vasso", **changes})


def combine(one: Tensor, **changes: Any) -> Tensor:
    given = {"outs": [one], "lefts": [one + 1], "rights": [one + 2], "left_weight": 0.5, "right_weight": 0.5}
    return functional.combine_(**{**given, **changes})


def into(one: Tensor, **changes: Any) -> None:
    functional.grad_norm_(**{"norm": one, "grads": [one + 1], **changes})


def check(one: Tensor, **changes: Any) -> None:
    functional.check_finite_(**{"grads": [one], "found_inf": one, **changes})


# What a schema can carry is refused when the graph runs, by the operation itself.
@pytest.mark.parametrize(
    ("call", "changes", "error", "words"),
    [
        (perturb, {"rho": torch.inf}, ValueError, r"perturb_: rho must be a finite number in \(-inf, inf\), got inf"),
        (combine, {"origin_weight": 0.5}, ValueError, r"combine_: origin_weight needs origins"),
        (combine, {"rights": []}, ValueError, r"combine_: rights has 0 tensors, outs has 1"),
        (perturb, {"grads": [torch.ones(4)]}, ValueError, r"perturb_: grads\[0\] has shape \(4,\)"),
        (perturb, {"grads": []}, ValueError, r"perturb_: grads has 0 tensors, params has 1"),
        (perturb, {"grads": [torch.ones(3).int()]}, TypeError, r"perturb_: grads\[0\] has dtype torch.int32"),
        (perturb, {"ema": [None]}, ValueError, r"perturb_: ema and kind belong together, got only ema"),
        (perturb, {"kind": "vasso"}, ValueError, r"perturb_: ema and kind belong together, got only kind"),
        (perturb, {"ema": [None, None], "kind": "vasso"}, ValueError, r"perturb_: ema has 2 tensors, params has 1"),
        (perturb, {"ema": [None], "kind": "sam"}, ValueError, r"perturb_: kind must be one of 'vasso', 'friendly', got 'sam'"),
        (random, {"distribution": "uniform"}, ValueError, r"random_perturb_: distribution must be one of"),
        (random, {"scale": torch.inf}, ValueError, r"random_perturb_: scale must be a finite number"),
        (direction, {"theta": 0.0}, ValueError, r"direction_norm_: theta must be a finite number in \(0.0, 1.0\], got 0.0"),
        (direction, {"adaptive": True}, ValueError, r"direction_norm_: adaptive=True needs params"),
        (into, {}, ValueError, r"grad_norm_: norm must hold one floating-point number"),
        (check, {}, ValueError, r"check_finite_: found_inf must hold one floating-point number"),
        (sgd, {"max_norm": 1.0}, ValueError, r"sgd_step_: max_norm needs norm"),
        (sgd, {"nesterov": True, "dampening": 0.1}, ValueError, r"sgd_step_: nesterov=True needs"),
    ],
)
def test_a_refused_value(call: Callable[..., None], changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compiled(lambda one: call(one, **changes))(torch.ones(3))


# What it cannot is refused while tracing; without fullgraph the graph breaks there, and the call raises what it always raises.
@pytest.mark.parametrize(
    ("call", "changes", "words"),
    [
        (perturb, {"rho": "x"}, r"perturb_: rho must be a number, got 'x'"),
        (perturb, {"rho": True}, r"perturb_: rho must be a number, got True"),
        (perturb, {"adaptive": 1}, r"perturb_: adaptive must be True or False"),
        (perturb, {"params": torch.ones(3)}, r"perturb_: params must be a list or tuple"),
        (perturb, {"grads": [3.0]}, r"perturb_: grads\[0\] must be a torch.Tensor"),
        (perturb, {"norm": 1.0}, r"perturb_: norm must be a 0-dim tensor, got 1.0"),
        (perturb, {"ema": (None,), "kind": "vasso"}, r"perturb_: ema must be a list of tensors or None, got tuple"),
        (perturb, {"rounding_seed": True}, r"perturb_: rounding_seed must be an integer, got True"),
        (random, {"seed": 5.0}, r"random_perturb_: seed must be an integer, got 5.0"),
        (random, {"seed": [0, 5]}, r"random_perturb_: seed must be an integer, got list"),
        (direction, {"ema": (None,)}, r"direction_norm_: ema must be a list of tensors or None, got tuple"),
        (direction, {"ema": None}, r"direction_norm_: ema must be a list of tensors or None, got None"),
        (direction, {"kind": 1}, r"direction_norm_: kind must be one of"),
        (into, {"norm": 1.0}, r"grad_norm_: norm must be a 0-dim tensor, got 1.0"),
        (check, {"found_inf": None}, r"check_finite_: found_inf must be a 0-dim tensor, got None"),
        (perturb, {"radius": 1.0}, r"unexpected keyword argument 'radius'"),
        (sgd, {"momentum_buffers": None}, r"sgd_step_: momentum_buffers must be a list"),
        (lambda one: functional.restore_([one]), {}, r"missing 1 required positional argument: 'old_params'"),
        (lambda one: functional.grad_norms([one]), {}, r"grad_norms: grad_groups\[0\] must be a list"),
    ],
)
def test_a_refused_type(call: Callable[..., None], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        torch.compile(lambda one: call(one, **changes), backend="aot_eager")(torch.ones(3))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(lambda one: call(one, **changes))(torch.ones(3))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # the graph breaks
@pytest.mark.parametrize("seed", [-1, 2**64, 2**100])
def test_a_refused_seed(seed: int) -> None:
    words = rf"random_perturb_: seed must be an integer in \[0, 2\^64\), got {seed}"
    step = torch.compile(lambda one, seed: random(one, seed=seed), backend="aot_eager")
    for given in (5, 6):  # a constant of the graph, then an input of it
        step(torch.ones(3), given)
        with pytest.raises(ValueError, match=words):
            step(torch.ones(3), seed)
