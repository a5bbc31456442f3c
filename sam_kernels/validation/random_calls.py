"""Calls drawn at random: lists of tensors of any shape, dtype, layout and magnitude, with options that fit them.

A seed is a call: the same one on every machine and in every order, whatever was drawn before it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from sam_kernels.validation.cases import CHUNK, ROLES, Row
from sam_kernels.validation.check import FAMILIES
from sam_kernels.validation.lists import Lists
from sam_kernels.validation.options import OPTIONS
from sam_kernels.validation.problem import Problem

__all__ = ["describe", "random_call"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NARROW = (torch.bfloat16, torch.float16)
_EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1025, CHUNK - 1, CHUNK + 1)
_MOST = 5000  # elements of an ordinary tensor
_SHARE_OF_LISTS = 0.8  # of the calls, where operations of other families are drawn too
_Keywords = dict[str, Any]


def random_call(seed: int, ops: Sequence[str]) -> Problem:
    """Return the call of a seed, of one of ``ops``. Operations over lists get random lists; the others a random one of their cases."""
    rng = random.Random(seed)
    over_lists = [op for op in ops if op in OPTIONS]
    others = [op for op in ops if op not in OPTIONS]
    is_over_lists = rng.random() < _SHARE_OF_LISTS
    op = rng.choice(over_lists if over_lists and (is_over_lists or not others) else others)
    if op not in OPTIONS:
        family = FAMILIES[op]
        dtype = rng.choice(sorted(family.dtypes_of("foreach", "cpu")))
        case, option = rng.choice(sorted(family.combinations(op, dtype)))
        return family.build(op, case, dtype, option, seed)
    keywords = _KEYWORDS[op](rng)
    rows = _rows(rng, op, keywords)
    return Lists().call(op, rows, keywords, torch.Generator().manual_seed(seed))


def describe(problem: Problem) -> list[str]:
    """Return a line for the options of a call, and one for each of its lists."""
    options = ", ".join(f"{name}={value.item() if isinstance(value, torch.Tensor) else value!r}" for name, value in problem.kwargs.items())
    lines = [f"{problem.op}({options})"]
    for name, tensors in problem.lists.items():
        given = ("None" if t is None else f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}{_place(t)}" for t in tensors)
        lines.append(f"{name}: {', '.join(given) or 'empty'}")
    return lines


def _place(tensor: torch.Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" strides {list(tensor.stride())}"
    return strides + ("" if tensor.data_ptr() % 16 == 0 else " unaligned")


# Rows


def _rows(rng: random.Random, op: str, keywords: _Keywords) -> list[Row]:
    if rng.random() < 0.03:
        shapes: list[tuple[int, ...]] = [(3,)] * rng.randint(200, 600)
    else:
        shapes = [_shape(rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 9)))]
    uniform = rng.choice(_DTYPES) if rng.random() < 0.4 else None
    return [_row(rng, op, shape, uniform, keywords) for shape in shapes]


def _shape(rng: random.Random) -> tuple[int, ...]:
    dims = rng.choice((0, 1, 1, 1, 2, 2, 3, 4, 5))
    if dims == 1:
        return (rng.choice(_EDGES) if rng.random() < 0.5 else rng.randint(0, _MOST),)
    largest = max(2, round(_MOST ** (1 / max(dims, 1))))
    return tuple(0 if rng.random() < 0.03 else rng.choice((1, 2, 3, rng.randint(1, largest))) for _ in range(dims))


def _row(rng: random.Random, op: str, shape: tuple[int, ...], uniform: torch.dtype | None, keywords: _Keywords) -> Row:
    dtypes = {role: uniform or rng.choice(_DTYPES) for role in ROLES}
    if "rounding_seed" in keywords and dtypes["params"] is torch.float16:
        dtypes["params"] = torch.bfloat16
    if keywords.get("to_old", False):
        if dtypes["params"] not in _NARROW:
            dtypes["params"] = torch.bfloat16 if "rounding_seed" in keywords else rng.choice(_NARROW)
        dtypes["old_params"] = torch.float32
    grad, param, state = _magnitudes(rng, list(dtypes.values()))
    special = rng.choice((math.nan, math.inf, -math.inf)) if rng.random() < 0.05 else None
    return Row(shape, dtypes, _layouts(rng, op, shape), grad, param, special, state)


def _magnitudes(rng: random.Random, dtypes: Sequence[torch.dtype]) -> tuple[float, float, float]:
    """Of gradients, of parameters and of averages. At most one of the first two is far from 1, so that their products stay in the range of
    float32. Averages are as long as the gradients, or much longer."""
    limit = min(float(torch.finfo(dtype).max) for dtype in dtypes) ** 0.5 / 8  # float16: 32
    smallest = max(float(torch.finfo(dtype).smallest_normal) for dtype in dtypes)
    if rng.random() < 0.05:
        return 0.0, 1.0, rng.choice((0.0, 1.0))
    ordinary, extreme = 10.0 ** rng.uniform(-2, 1), 10.0 ** rng.uniform(-20, 18)
    pair = rng.choice(((ordinary, 1.0), (ordinary, 1.0), (extreme, 1.0), (1.0, extreme)))
    grad, param = (max(min(size, limit), smallest) for size in pair)
    state = grad * 10.0 ** rng.uniform(1, 12) if rng.random() < 0.25 else grad
    return grad, param, min(state, limit)


def _layouts(rng: random.Random, op: str, shape: tuple[int, ...]) -> dict[str, str]:
    layouts = ["contiguous", "unaligned", "transposed", "strided", *(["channels_last"] if len(shape) == 4 else [])]
    if rng.random() < 0.5:
        return {"all": rng.choice(layouts)}
    chosen = {role: rng.choice(layouts) for role in ROLES}
    if op != "centralize_" and math.prod(shape) > 0 and shape and rng.random() < 0.1:  # centralize_ writes its gradients
        chosen["grads"] = "expanded"
    return chosen


# Keyword sets, with the words of options.py


def _size(rng: random.Random, low: float, high: float) -> float:
    """A number between 10^low and 10^high."""
    return float(f"{10.0 ** rng.uniform(low, high):.6g}")


def _weight(rng: random.Random) -> float:
    return rng.choice((1.0, -1.0, 0.0, rng.choice((-1, 1)) * _size(rng, -3, 1)))


def _some(rng: random.Random, share: float, **options: Any) -> _Keywords:
    return options if rng.random() < share else {}


def _adaptive(rng: random.Random) -> _Keywords:
    return _some(rng, 0.35, adaptive=True, eta=rng.choice((0.0, 0.01, 1.0)))


def _flag(rng: random.Random) -> _Keywords:
    return _some(rng, 0.35, found_inf=1.0 if rng.random() < 0.3 else 0.0)


def _scale(rng: random.Random) -> _Keywords:
    return _some(rng, 0.35, grad_scale=rng.choice((1000.0, 1024.0, 65536.0, 0.003)))


def _rounding(rng: random.Random, share: float = 0.2) -> _Keywords:
    return _some(rng, share, rounding_seed=rng.getrandbits(64))


def _as_tensors(rng: random.Random) -> _Keywords:
    return _some(rng, 0.15, tensors=rng.choice(("float32", "float64")))


def _direction(rng: random.Random) -> _Keywords:
    if rng.random() < 0.5:
        return {"kind": "vasso", "theta": rng.choice((1.0, rng.uniform(0.05, 1.0)))}
    return {"kind": "friendly", "sigma": rng.choice((1.0, rng.uniform(-1.0, 2.0))), "lmbda": rng.choice((1.0, rng.uniform(0.2, 1.0)))}


def _first(rng: random.Random, share: float) -> _Keywords:
    return _some(rng, share, first=rng.choice(("all", "mixed")))


def _norm(rng: random.Random) -> str:
    return rng.choice(("true",) * 8 + ("2.5", "0.003", "nan", "inf"))


def _grad_norm(rng: random.Random) -> _Keywords:
    return {**_adaptive(rng), **_flag(rng)}


def _direction_norm(rng: random.Random) -> _Keywords:
    return {**_direction(rng), **_first(rng, 0.3), **_adaptive(rng), **_scale(rng), **_flag(rng)}


def _grad_dots(rng: random.Random) -> _Keywords:
    return {**_some(rng, 0.5, origins=True), **_flag(rng)}


def _combine(rng: random.Random) -> _Keywords:
    has_origins = rng.random() < 0.6
    keywords = {"left_weight": _weight(rng), "right_weight": _weight(rng), **_flag(rng), **_as_tensors(rng)}
    if has_origins:
        keywords |= {"origins": True, "origin_weight": _weight(rng)}
    return keywords | _some(rng, 0.5, alias=rng.choice(("lefts", "rights", *(("origins",) if has_origins else ()))))


def _perturb(rng: random.Random) -> _Keywords:
    along = {}
    if rng.random() < 0.3:
        along = {**_direction(rng), **_first(rng, 0.4)}
        along.pop("theta", None)  # of the average alone
    return {
        "rho": rng.choice((1, 1, -1)) * _size(rng, -3, 1),
        "lambd": rng.choice((0.0, 1.0, 0.999, rng.random())),
        "norm": _norm(rng),
        **_some(rng, 0.2, eps=0.1),
        **_some(rng, 0.4, from_old=True),
        **_adaptive(rng),
        **_scale(rng),
        **_flag(rng),
        **_rounding(rng),
        **_as_tensors(rng),
        **along,
    }


def _random_perturb(rng: random.Random) -> _Keywords:
    return {
        "seed": rng.getrandbits(64),
        "scale": rng.choice((1, -1)) * _size(rng, -3, 0),
        "distribution": rng.choice(("rademacher", "normal")),
        **_some(rng, 0.5, from_old=True),
        **_as_tensors(rng),
    }


def _descent(rng: random.Random) -> _Keywords:
    keywords = {
        "lr": _size(rng, -4, 0),
        **_some(rng, 0.6, weight_decay=_size(rng, -4, -1)),
        **_some(rng, 0.3, maximize=True),
        **_scale(rng),
        **_flag(rng),
        **_rounding(rng),
        **_as_tensors(rng),
        **_some(rng, 0.6, old=True),
    }
    if rng.random() < 0.3:
        keywords |= {"norm": _norm(rng), **_some(rng, 0.7, max_norm=_size(rng, -3, 3))}
    return keywords | (_some(rng, 0.4, to_old=True) if "old" in keywords else {})


def _sgd(rng: random.Random) -> _Keywords:
    keywords = _descent(rng)
    if rng.random() < 0.8:
        keywords |= {"momentum": rng.uniform(0.1, 0.99), **_first(rng, 0.3)}
        keywords |= {"nesterov": True} if rng.random() < 0.4 else {"dampening": rng.choice((0.0, 0.1, 1.0))}
    return keywords


def _adamw(rng: random.Random) -> _Keywords:
    nearly_half = math.nextafter(0.5, rng.choice((0.0, 1.0)))
    beta1 = rng.choice((0.0, 0.5, nearly_half, rng.random(), rng.uniform(0.5, 0.99), _size(rng, -6, -1)))
    betas = (beta1, rng.choice((0.0, rng.random(), rng.uniform(0.5, 0.999))))
    return {**_descent(rng), "betas": betas, "eps": rng.choice((1e-8, 1e-6)), **_some(rng, 0.4, decoupled=False)}


_KEYWORDS = {
    "grad_norm": _grad_norm,
    "grad_norms": _adaptive,
    "centralize_": _grad_norm,
    "direction_norm_": _direction_norm,
    "grad_dots": _grad_dots,
    "combine_": _combine,
    "perturb_": _perturb,
    "random_perturb_": _random_perturb,
    "restore_": lambda _rng: {},
    "sgd_step_": _sgd,
    "adamw_step_": _adamw,
}
