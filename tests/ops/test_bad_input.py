"""Every wrong argument raises the right exception, naming operation, list and index, before any memory is touched."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from tests.helpers.calls import CALLS, Arguments
from tests.helpers.compare import assert_same_bits

Change = Callable[[Arguments], None]


def put(name: str, index: int, value: Any) -> Change:
    return lambda arguments: arguments[name].__setitem__(index, value)


def keyword(name: str, value: Any) -> Change:
    return lambda arguments: arguments.__setitem__(name, value)


def same_memory(first: tuple[str, int], second: tuple[str, int]) -> Change:
    return lambda arguments: arguments[second[0]].__setitem__(second[1], arguments[first[0]][first[1]])


def drop_last(name: str) -> Change:
    return lambda arguments: arguments[name].pop()


def narrow(name: str, index: int, dtype: torch.dtype = torch.bfloat16) -> Change:
    return lambda arguments: arguments[name].__setitem__(index, arguments[name][index].to(dtype))


def wide(name: str, index: int) -> Change:
    return narrow(name, index, torch.float64)


def both(*changes: Change) -> Change:
    def apply(arguments: Arguments) -> None:
        for change in changes:
            change(arguments)

    return apply


MASTERS = both(keyword("to_old", True), narrow("params", 0), narrow("params", 1, torch.float16))
SPARSE = torch.ones(5).to_sparse()
EXPANDED = torch.ones(1).expand(5)
# operation, what is wrong, exception, what the message names
TABLE: list[tuple[str, Change, type[Exception], str]] = [
    *[
        (op, put(name, 1, bad), error, rf"{op.split()[0]}: {name}\[1\] .*{words}")
        for op, name in [
            ("perturb_", "params"), ("perturb_", "grads"), ("perturb_", "old_params"),
            ("random_perturb_", "params"), ("random_perturb_", "old_params"), ("restore_", "params"), ("restore_", "old_params"),
            ("sgd_step_", "params"), ("sgd_step_", "grads"), ("sgd_step_", "old_params"), ("sgd_step_", "momentum_buffers"),
            ("adamw_step_", "params"), ("adamw_step_", "grads"), ("adamw_step_", "exp_avgs"), ("adamw_step_", "exp_avg_sqs"),
            ("grad_norm", "grads"), ("grad_norm", "params"),
            ("centralize_", "grads"), ("centralize_", "params"),
            ("grad_dots", "lefts"), ("grad_dots", "rights"), ("grad_dots", "origins"),
            ("combine_", "outs"), ("combine_", "lefts"), ("combine_", "rights"), ("combine_", "origins"),
            ("direction_norm_", "grads"), ("direction_norm_", "params"), ("direction_norm_", "ema"), ("perturb_ ema", "ema"),
        ]
        for bad, error, words in [
            (3.0, TypeError, r"must be a torch.Tensor, got 3.0"),
            (SPARSE, TypeError, r"sparse_coo"),
            (torch.ones(5, dtype=torch.complex64), TypeError, r"complex64"),
            (torch.ones(5, dtype=torch.int64), TypeError, r"int64"),
        ]
    ],
    *[
        (op, put(name, 1, torch.ones(6)), ValueError, rf"{op.split()[0]}: {name}\[1\] has shape \(6,\)")
        for op, name in [
            ("perturb_", "grads"), ("perturb_", "old_params"), ("restore_", "old_params"), ("sgd_step_", "grads"),
            ("sgd_step_", "momentum_buffers"), ("sgd_step_", "old_params"), ("adamw_step_", "grads"), ("adamw_step_", "exp_avgs"),
            ("adamw_step_", "exp_avg_sqs"), ("adamw_step_", "old_params"), ("grad_norm", "params"), ("direction_norm_", "params"),
            ("direction_norm_", "ema"), ("perturb_ ema", "ema"), ("centralize_", "params"),
        ]
    ],
    *[
        (op, drop_last(name), ValueError, rf"{op.split()[0]}: {name} has 2 tensors, \w+ has 3")
        for op, name in [
            ("perturb_", "grads"), ("perturb_", "old_params"), ("restore_", "old_params"), ("sgd_step_", "grads"),
            ("sgd_step_", "momentum_buffers"), ("sgd_step_", "old_params"), ("adamw_step_", "grads"), ("adamw_step_", "exp_avg_sqs"),
            ("adamw_step_", "state_steps"), ("grad_norm", "params"), ("direction_norm_", "params"), ("direction_norm_", "ema"),
            ("perturb_ ema", "ema"), ("centralize_", "params"),
        ]
    ],
    *[
        (op, keyword(name, torch.ones(3)), TypeError, rf"{op.split()[0]}: {name} must be a list")
        for op, name in [
            ("perturb_", "params"), ("perturb_", "grads"), ("restore_", "old_params"), ("sgd_step_", "params"), ("sgd_step_", "grads"),
            ("sgd_step_", "momentum_buffers"), ("adamw_step_", "exp_avgs"), ("adamw_step_", "state_steps"), ("grad_norm", "grads"),
            ("grad_norms", "grad_groups"), ("direction_norm_", "ema"), ("perturb_ ema", "ema"),
            ("centralize_", "grads"),
        ]
    ],
    *[
        (op, same_memory((first, 1), (second, 1)), ValueError, rf"{op}: {first}\[1\] and {second}\[1\] are the same memory")
        for op, first, second in [
            ("perturb_", "params", "old_params"), ("random_perturb_", "params", "old_params"),
            ("sgd_step_", "params", "momentum_buffers"), ("adamw_step_", "exp_avgs", "exp_avg_sqs"),
        ]
    ],
    *[
        (op, both(put(name, 1, shared), put(name, 2, shared), *[put(other, 2, torch.ones(5)) for other in others]), ValueError,
         rf"{op.split()[0]}: {name}\[1\] and {name}\[2\] are the same memory")
        for shared in [torch.ones(5)]
        for op, name, others in [
            ("perturb_", "params", ["grads", "old_params"]), ("restore_", "params", ["old_params"]),
            ("combine_", "outs", ["lefts", "rights", "origins"]),
            ("sgd_step_", "params", ["grads", "momentum_buffers", "old_params"]),
            ("adamw_step_", "exp_avgs", ["params", "grads", "exp_avg_sqs", "old_params"]),
        ]
    ],
    ("sgd_step_", both(put("momentum_buffers", 0, None), put("grads", 2, torch.ones(6))), ValueError, r"sgd_step_: grads\[2\] has shape"),
    ("sgd_step_", both(put("momentum_buffers", 1, None), same_memory(("params", 1), ("params", 2)), *[
        put(name, 2, torch.ones(5)) for name in ("grads", "momentum_buffers", "old_params")
    ]), ValueError, r"sgd_step_: params\[1\] and params\[2\] are the same memory"),
    ("adamw_step_", same_memory(("state_steps", 0), ("state_steps", 2)), ValueError, r"state_steps\[0\] and state_steps\[2\] are the same"),
    ("adamw_step_", put("state_steps", 1, 3), TypeError, r"adamw_step_: state_steps\[1\] must be a 0-dim tensor, got 3"),
    ("adamw_step_", put("state_steps", 1, torch.ones(2)), ValueError, r"adamw_step_: state_steps\[1\] must hold one floating"),
    ("perturb_", put("params", 1, EXPANDED), ValueError, r"perturb_: params\[1\] is expanded"),
    ("sgd_step_", put("momentum_buffers", 1, EXPANDED), ValueError, r"sgd_step_: momentum_buffers\[1\] is expanded"),
    ("grad_norms", lambda a: a["grad_groups"][1].pop(), ValueError, r"grad_norms: .* has \d tensors"),
    ("grad_norms", lambda a: a["grad_groups"][1].__setitem__(2, SPARSE), TypeError, r"grad_norms: grad_groups\[1\]\[2\] .*sparse"),
    ("grad_norm", keyword("params", None), ValueError, r"grad_norm: adaptive=True needs params"),
    ("sgd_step_", keyword("max_norm", 1.0), ValueError, r"sgd_step_: max_norm needs norm"),
    ("adamw_step_", keyword("max_norm", 1.0), ValueError, r"adamw_step_: max_norm needs norm"),
    ("sgd_step_", both(keyword("nesterov", True), keyword("dampening", 0.1)), ValueError, r"sgd_step_: nesterov=True needs"),
    ("sgd_step_", both(keyword("nesterov", True), keyword("momentum", 0.0)), ValueError, r"sgd_step_: nesterov=True needs"),
    ("sgd_step_", keyword("momentum_buffers", None), TypeError, r"sgd_step_: momentum_buffers must be a list"),
    ("perturb_", keyword("norm", 1.0), TypeError, r"perturb_: norm must be a 0-dim tensor, got 1.0"),
    ("perturb_", keyword("norm", torch.ones(2)), ValueError, r"perturb_: norm must hold one floating-point number"),
    ("perturb_", keyword("grad_scale", 2.0), TypeError, r"perturb_: grad_scale must be"),
    ("sgd_step_", keyword("found_inf", True), TypeError, r"sgd_step_: found_inf must be"),
    ("grad_norm", keyword("found_inf", torch.tensor(1)), ValueError, r"grad_norm: found_inf must hold"),
    ("perturb_", keyword("adaptive", 1), TypeError, r"perturb_: adaptive must be True or False, got 1"),
    ("sgd_step_", keyword("maximize", "yes"), TypeError, r"sgd_step_: maximize must be True or False"),
    ("adamw_step_", keyword("betas", 0.9), TypeError, r"adamw_step_: betas must be a pair"),
    ("adamw_step_", keyword("betas", (0.9, 1.0)), ValueError, r"adamw_step_: betas\[1\] must be a finite number in \[0.0, 1.0\)"),
    ("adamw_step_", keyword("betas", (-0.1, 0.9)), ValueError, r"adamw_step_: betas\[0\] must be"),
    ("perturb_", keyword("lambd", 1.5), ValueError, r"perturb_: lambd must be a finite number in \[0.0, 1.0\], got 1.5"),
    *[
        (op, keyword(name, bad), error, rf"{op.split()[0]}: {name} must be a .*got ")
        for op, names in {
            "perturb_": ["lambd", "eta", "eps"],
            "sgd_step_": ["lr", "momentum", "weight_decay"],
            "adamw_step_": ["lr", "eps", "weight_decay"],
            "grad_norm": ["eta"],
            "grad_norms": ["eta"],
        }.items()
        for name in names
        for bad, error in [(math.nan, ValueError), (math.inf, ValueError), (-0.1, ValueError), ("0.1", TypeError), (None, TypeError)]
    ],
    *[
        (op, keyword(name, bad), error, rf"{op}: {name} must be a .*got ")
        for op, name in [
            ("perturb_", "rho"), ("combine_", "left_weight"), ("combine_", "right_weight"), ("combine_", "origin_weight"),
        ]
        for bad, error in [(math.nan, ValueError), (math.inf, ValueError), ("0.1", TypeError), (None, TypeError)]
    ],
    *[
        ("combine_", both(keyword("origins", None), keyword("origin_weight", bad)), ValueError, r"combine_: origin_weight needs origins")
        for bad in (0.5, torch.tensor(-1.0), torch.ones((), device="meta"))
    ],
    ("combine_", put("outs", 1, EXPANDED), ValueError, r"combine_: outs\[1\] is expanded"),
    ("combine_", keyword("found_inf", torch.tensor(1)), ValueError, r"combine_: found_inf must hold"),
    ("grad_dots", keyword("found_inf", 1.0), TypeError, r"grad_dots: found_inf must be"),
    *[
        (op, keyword(name, bad), error, rf"{op}: {name} must be .*{words}")
        for op, name in [
            ("combine_", "left_weight"), ("combine_", "right_weight"), ("combine_", "origin_weight"),
            ("perturb_", "rho"), ("perturb_", "lambd"), ("sgd_step_", "lr"), ("adamw_step_", "lr"), ("random_perturb_", "scale"),
        ]
        for bad, error, words in [
            (torch.tensor(1), TypeError, r"floating-point tensor .*got a torch.int64 tensor of shape \(\) on cpu"),
            (torch.tensor(0.1 + 0j), TypeError, r"floating-point tensor .*got a torch.complex64 tensor"),
            (torch.full((3,), 0.1), ValueError, r"a tensor that holds one, got a torch.float32 tensor of shape \(3,\)"),
            (torch.ones(0), ValueError, r"a tensor that holds one, got a torch.float32 tensor of shape \(0,\)"),
            (torch.ones(1).to_sparse(), TypeError, r"a dense floating-point tensor"),
            (torch.tensor(math.nan), ValueError, r"a finite number .*got nan"),
            (torch.tensor([math.inf]), ValueError, r"a finite number .*got inf"),
        ]
    ],
    ("perturb_", keyword("lambd", torch.tensor(1.5)), ValueError, r"perturb_: lambd must be a finite number in \[0.0, 1.0\], got 1.5"),
    ("sgd_step_", keyword("lr", torch.tensor(-0.5)), ValueError, r"sgd_step_: lr must be a finite number in \[0.0, inf\), got -0.5"),
    *[
        ("random_perturb_", keyword(name, bad), error, rf"random_perturb_: {name} must be .*{words}")
        for name, bad, error, words in [
            ("seed", 1.0, TypeError, r"an integer, got 1.0"), ("seed", True, TypeError, r"an integer, got True"),
            ("seed", None, TypeError, r"an integer, got NoneType"), ("seed", -1, ValueError, r"in \[0, 2\^64\), got -1"),
            ("seed", 2**64, ValueError, r"in \[0, 2\^64\), got 18446744073709551616"), ("scale", math.nan, ValueError, r"a finite number"),
            ("scale", math.inf, ValueError, r"a finite number"), ("scale", "1", TypeError, r"a number, got '1'"),
            ("distribution", "uniform", ValueError, r"one of 'rademacher', 'normal', got 'uniform'"),
            ("distribution", None, TypeError, r"one of 'rademacher', 'normal', got NoneType"), ("from_old", 1, TypeError, r"True or False"),
        ]
    ],
    ("centralize_", both(put("params", 2, torch.ones(5)), same_memory(("grads", 1), ("grads", 2))), ValueError,
     r"centralize_: grads\[1\] and grads\[2\] are the same memory"),
    ("centralize_", put("grads", 1, EXPANDED), ValueError, r"centralize_: grads\[1\] is expanded"),
    ("centralize_", keyword("params", None), ValueError, r"centralize_: adaptive=True needs params"),
    ("centralize_", keyword("adaptive", 1), TypeError, r"centralize_: adaptive must be True or False"),
    ("centralize_", keyword("eta", -1.0), ValueError, r"centralize_: eta must be a finite number in \[0.0, inf\), got -1.0"),
    ("centralize_", keyword("eta", "0.1"), TypeError, r"centralize_: eta must be a number, got '0.1'"),
    ("centralize_", keyword("found_inf", 0.0), TypeError, r"centralize_: found_inf must be a 0-dim tensor, got 0.0"),
    ("direction_norm_", both(put("ema", 0, None), put("ema", 2, torch.ones(3))), ValueError, r"direction_norm_: ema\[2\] has shape"),
    ("direction_norm_", put("ema", 1, EXPANDED), ValueError, r"direction_norm_: ema\[1\] is expanded"),
    ("direction_norm_", keyword("params", None), ValueError, r"direction_norm_: adaptive=True needs params"),
    ("direction_norm_", keyword("kind", None), TypeError, r"direction_norm_: kind must be one of 'vasso', 'friendly', got NoneType"),
    ("direction_norm_", keyword("kind", "sam"), ValueError, r"direction_norm_: kind must be one of 'vasso', 'friendly', got 'sam'"),
    ("direction_norm_", keyword("grad_scale", 2.0), TypeError, r"direction_norm_: grad_scale must be"),
    ("perturb_ ema", keyword("kind", None), ValueError, r"perturb_: ema and kind belong together, got only ema"),
    ("perturb_", keyword("kind", "vasso"), ValueError, r"perturb_: ema and kind belong together, got only kind"),
    *[
        (op, keyword(name, bad), error, rf"{op.split()[0]}: {name} must be a .*got ")
        for op, name in [
            ("direction_norm_", "theta"), ("direction_norm_", "lmbda"), ("direction_norm_", "sigma"), ("direction_norm_", "eta"),
            ("perturb_ ema", "lmbda"), ("perturb_ ema", "sigma"),
        ]
        for bad, error in [(math.nan, ValueError), (math.inf, ValueError), ("0.1", TypeError), (None, TypeError)]
    ],
    *[
        (op, keyword(name, bad), ValueError, rf"{op.split()[0]}: {name} must be a finite number in \(0.0, 1.0\], got {bad}")
        for op, name in [("direction_norm_", "theta"), ("direction_norm_", "lmbda"), ("perturb_ ema", "lmbda")]
        for bad in (0.0, -0.1, 1.5)
    ],
    *[
        (op, change, error, rf"{op}: {words}")
        for op in ("sgd_step_", "adamw_step_")
        for change, error, words in [
            (MASTERS, TypeError, r"params\[2\] is float32; to_old=True is for bfloat16 and float16"),
            (both(MASTERS, narrow("params", 2, torch.float16), wide("old_params", 1)), TypeError,
             r"old_params\[1\] is float64; with to_old=True it is a master and must be float32"),
            (both(MASTERS, narrow("params", 2), narrow("old_params", 2)), TypeError, r"old_params\[2\] is bfloat16; with to_old=True"),
            (keyword("to_old", 1), TypeError, r"to_old must be True or False, got 1"),
            (both(keyword("to_old", True), keyword("old_params", None)), ValueError, r"to_old=True needs old_params"),
            (both(keyword("to_old", True), same_memory(("params", 1), ("old_params", 1))), ValueError,
             r"params\[1\] and old_params\[1\] are the same memory"),
            (keyword("rounding_seed", 1.0), TypeError, r"rounding_seed must be an integer, got 1.0"),
            (keyword("rounding_seed", -1), ValueError, r"rounding_seed must be an integer in \[0, 2\^64\)"),
            (both(keyword("rounding_seed", 1), narrow("params", 1, torch.float16)), TypeError,
             r"params\[1\] is float16; rounding_seed is for bfloat16"),
        ]
    ],
    *[
        (op, both(narrow("params", 1, dtype), change), TypeError,
         rf"{op.split()[0]}: old_params\[1\] is \w+, params\[1\] is {str(dtype)[6:]}: saving would overwrite a master")
        for op in ("perturb_", "perturb_ ema", "random_perturb_")
        for dtype in (torch.bfloat16, torch.float16)
        for change in (keyword("from_old", False), wide("old_params", 1))
    ],
    ("perturb_", keyword("rounding_seed", 1.0), TypeError, r"perturb_: rounding_seed must be an integer, got 1.0"),
    ("perturb_", keyword("rounding_seed", 2**64), ValueError, r"perturb_: rounding_seed must be an integer in \[0, 2\^64\)"),
    ("perturb_", both(keyword("rounding_seed", 1), put("params", 1, torch.ones(5, dtype=torch.float16))), TypeError,
     r"perturb_: params\[1\] is float16; rounding_seed is for bfloat16"),
    ("sgd_step_", keyword("dampening", math.nan), ValueError, r"sgd_step_: dampening must be a finite number"),
    *[
        (op, both(keyword("norm", torch.tensor(1.0)), keyword("max_norm", bad)), ValueError, rf"{op}: max_norm must be a finite number")
        for op in ("sgd_step_", "adamw_step_")
        for bad in (math.nan, -1.0)
    ],
]  # fmt: skip


def test_the_untouched_calls_are_right(backend: str) -> None:
    """So that each row of the table fails for its own reason."""
    for op, arguments in CALLS.items():
        getattr(functional, op.split()[0])(**arguments())


def test_bad_arguments(backend: str) -> None:
    for op, change, error, message in TABLE:
        arguments = CALLS[op]()
        change(arguments)
        before = [tensor.clone() for tensor in tensors_of(arguments)]
        with pytest.raises(error, match=message):  # noqa: PT012 - else nothing would name the row that raised nothing
            getattr(functional, op.split()[0])(**arguments)
            pytest.fail(f"{op} accepted what should raise {error.__name__}: {message}")
        assert_same_bits(f"{op}, {message}", tensors_of(arguments), before)


def tensors_of(arguments: Arguments) -> list[Tensor]:
    given = [value for value in arguments.values() if isinstance(value, list)]
    return [t for values in given for t in values if isinstance(t, Tensor) and t.layout is torch.strided]


def test_numpy_s_integers_are_integers() -> None:
    for seed in (7, 2**63 + 7):
        found = []
        for of_type in (int, np.uint64):
            params = [torch.ones(8)]
            functional.random_perturb_(params, [torch.zeros(8)], seed=of_type(seed), scale=0.1, distribution="normal")
            drawn = functional.sharpness_sample(torch.arange(8.0), np.int8(3), beta=1.0, replacement=True, seed=of_type(seed))
            found.append([*params, *drawn])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
