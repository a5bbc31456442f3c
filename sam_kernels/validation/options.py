"""The keyword sets of all operations, as data, and the cases that those over lists are checked with. It imports no torch: the command line
reads the names.

No keyword has its neutral value, under which a forgotten term does not show.

Keys that are no keywords of the operation describe its inputs: ``old`` (an ``old_params`` list is given), ``first`` (which momentum or
average entries are None: "all" or "mixed"), ``norm`` ("true", "nan", "inf"), ``tensors`` (the dtype of ``SCHEDULED`` numbers that are
given as tensors), ``origins`` (such a list is given), ``alias`` (which list's tensors are those of ``outs``) and ``masters`` (16-bit
``params`` with float32 ``old_params``). A ``kind`` of ``perturb_`` comes with an ``ema`` list.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ABOUT_OTHERS", "ABOUT_SLICES", "FOR_LAYOUT_CASES", "OPERATIONS", "OPTIONS", "PER_SAMPLE_OPTIONS", "SCHEDULED", "SHARPNESS_OPTIONS",
    "adapted", "concerns", "is_rounded_stochastically",
]  # fmt: skip

# Numbers that may change with every step
SCHEDULED = ("rho", "lambd", "lr", "scale", "left_weight", "right_weight", "origin_weight")
Options = dict[str, dict[str, Any]]

_VASSO = {"kind": "vasso", "theta": 0.3}
_FRIENDLY = {"kind": "friendly", "sigma": 0.8, "lmbda": 0.7}
_WEIGHTS = {"left_weight": 1.3, "right_weight": -0.7}
_WEIGHTS_OF_THREE = {**_WEIGHTS, "origins": True, "origin_weight": 0.9}
_UNIFIED = {"rho": 0.05, "lambd": 0.3}
_SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "maximize": True}
_NESTEROV = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
_ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": True}
_AMP = {"grad_scale": 1024.0, "found_inf": 0.0}
_CLIP = {"norm": "true", "max_norm": 0.01}
_FROM_MASTERS = {"from_old": True, "masters": True}
_TO_MASTERS = {"old": True, "to_old": True, "masters": True}

OPTIONS: dict[str, Options] = {
    "grad_norm": {
        "plain": {},
        "adaptive": {"adaptive": True, "eta": 0.01},
        "found_inf": {"found_inf": 0.0},
    },
    "grad_norms": {
        "plain": {},
        "adaptive": {"adaptive": True, "eta": 0.01},
    },
    "centralize_": {
        "plain": {"found_inf": 0.0},
        "adaptive": {"adaptive": True, "eta": 0.01},
    },
    "direction_norm_": {
        "vasso": _VASSO,
        "vasso_adaptive": {**_VASSO, "adaptive": True, "eta": 0.01, "grad_scale": 1000.0},
        "vasso_first": {**_VASSO, "first": "mixed", "found_inf": 0.0},
        "friendly": {**_FRIENDLY, "grad_scale": 1000.0, "found_inf": 0.0},
        "friendly_adaptive": {**_FRIENDLY, "adaptive": True, "eta": 0.01},
        "friendly_first": {**_FRIENDLY, "first": "all", "grad_scale": 1000.0, "adaptive": True},
    },
    "grad_dots": {
        "plain": {},
        "origins": {"origins": True},
        "found_inf": {"found_inf": 0.0},
    },
    "combine_": {
        "plain": _WEIGHTS,
        "origins": _WEIGHTS_OF_THREE,
        "difference": {"left_weight": 0.1, "right_weight": 1.0, "origin_weight": -1.0, "origins": True, "alias": "lefts"},
        "into_lefts": {**_WEIGHTS, "alias": "lefts", "found_inf": 0.0},
        "into_rights": {**_WEIGHTS_OF_THREE, "alias": "rights"},
        "into_origins": {**_WEIGHTS_OF_THREE, "alias": "origins"},
        "found_inf": {**_WEIGHTS, "found_inf": 1.0},
        "found_inf_into_lefts": {**_WEIGHTS_OF_THREE, "alias": "lefts", "found_inf": 1.0},
        "tensors": {**_WEIGHTS_OF_THREE, "tensors": "float64"},
        "tensors_float32": {**_WEIGHTS, "alias": "rights", "tensors": "float32"},
    },
    "perturb_": {
        "sam": {"rho": 0.05},
        "extragradient": {"rho": -0.05, "lambd": 0.0},
        "usam": {"rho": 0.05, "lambd": 0.0},
        "unified": _UNIFIED,
        "nearly_sam": {"rho": 0.05, "lambd": 0.999},
        "eps": {"rho": 0.5, "lambd": 0.3, "eps": 0.1},
        "adaptive": {"rho": 0.5, "lambd": 0.3, "adaptive": True},
        "adaptive_eta": {"rho": 0.5, "lambd": 0.3, "adaptive": True, "eta": 0.01},
        "grad_scale": {**_UNIFIED, **_AMP},
        "grad_scale_adaptive": {"rho": 0.5, "lambd": 0.3, "adaptive": True, "eta": 0.01, "grad_scale": 1000.0},
        "from_old": {**_UNIFIED, "from_old": True},
        "from_old_adaptive": {**_UNIFIED, "from_old": True, "adaptive": True, "eta": 0.01},
        "found_inf": {**_UNIFIED, "grad_scale": 1024.0, "found_inf": 1.0},
        "found_inf_from_old": {**_UNIFIED, "found_inf": 1.0, "from_old": True},
        "norm_nan": {**_UNIFIED, "norm": "nan"},
        "norm_inf_from_old": {**_UNIFIED, "norm": "inf", "from_old": True},
        "rounding": {**_UNIFIED, "rounding_seed": 5},
        "rounding_from_old_adaptive": {**_UNIFIED, "rounding_seed": 2**63 + 1, "from_old": True, "adaptive": True, "eta": 0.01},
        "rounding_found_inf": {**_UNIFIED, "rounding_seed": 5, "found_inf": 1.0},
        "vasso": {**_UNIFIED, "kind": "vasso", "grad_scale": 1000.0},
        "vasso_from_old": {**_UNIFIED, "kind": "vasso", "from_old": True, "first": "mixed", "grad_scale": 1000.0},
        "friendly": {**_UNIFIED, **_FRIENDLY, "grad_scale": 1000.0, "found_inf": 0.0},
        "friendly_adaptive": {"rho": 0.5, "lambd": 0.3, **_FRIENDLY, "adaptive": True, "eta": 0.01, "first": "mixed"},
        "friendly_rounding": {**_UNIFIED, **_FRIENDLY, "rounding_seed": 5},
        "masters": {**_UNIFIED, **_FROM_MASTERS},
        "masters_adaptive": {"rho": 0.5, "lambd": 0.3, "adaptive": True, "eta": 0.01, "grad_scale": 1000.0, **_FROM_MASTERS},
        "masters_friendly": {**_UNIFIED, **_FRIENDLY, "grad_scale": 1000.0, "found_inf": 0.0, **_FROM_MASTERS},
        "masters_found_inf": {**_UNIFIED, "found_inf": 1.0, **_FROM_MASTERS},
        "masters_rounding": {**_UNIFIED, "rounding_seed": 7, "adaptive": True, "eta": 0.01, **_FROM_MASTERS},
        "masters_rounding_norm_inf": {**_UNIFIED, "rounding_seed": 7, "norm": "inf", **_FROM_MASTERS},
        "tensors": {"rho": 0.05, "lambd": 0.999, "grad_scale": 1024.0, "tensors": "float64"},
        "tensors_float32": {**_UNIFIED, "kind": "vasso", "from_old": True, "tensors": "float32"},
    },
    "random_perturb_": {
        "rademacher": {"seed": 1, "scale": 0.05, "distribution": "rademacher"},
        "normal": {"seed": 0x9E3779B97F4A7C15, "scale": -0.3, "distribution": "normal"},
        "rademacher_from_old": {"seed": 2**64 - 1, "scale": 0.05, "distribution": "rademacher", "from_old": True},
        "normal_from_old": {"seed": 2**32, "scale": 0.05, "distribution": "normal", "from_old": True},
        "rademacher_masters": {"seed": 11, "scale": 0.05, "distribution": "rademacher", **_FROM_MASTERS},
        "normal_masters": {"seed": 12, "scale": -0.3, "distribution": "normal", **_FROM_MASTERS},
        "tensors": {"seed": 7, "scale": 0.05, "distribution": "rademacher", "tensors": "float64"},
        "tensors_float32": {"seed": 8, "scale": -0.3, "distribution": "normal", "from_old": True, "tensors": "float32"},
    },
    "restore_": {"restore": {}, "masters": {"masters": True}},
    "sgd_step_": {
        "plain": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        "plain_old": {"lr": 0.1, "weight_decay": 0.1, "old": True},
        "no_decay": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "old": True},
        "momentum": _SGD,
        "momentum_old": {**_SGD, "old": True},
        "nesterov": {**_NESTEROV, "maximize": True},
        "nesterov_old": {**_NESTEROV, "old": True},
        "first": {**_SGD, "first": "all", "old": True},
        "first_mixed": {**_SGD, "first": "mixed"},
        "first_nesterov": {**_NESTEROV, "first": "all"},
        "first_mixed_nesterov": {**_NESTEROV, "first": "mixed", "old": True},
        "clip": {**_SGD, **_CLIP, "old": True},
        "clip_inactive": {**_SGD, "norm": "true", "max_norm": 1e30},
        "clip_grad_scale": {**_SGD, **_AMP, **_CLIP, "old": True},
        "grad_scale": {**_NESTEROV, "grad_scale": 1000.0},
        "found_inf": {**_SGD, "grad_scale": 1024.0, "found_inf": 1.0},
        "found_inf_old": {**_SGD, "found_inf": 1.0, "old": True},
        "found_inf_first": {**_SGD, "found_inf": 1.0, "first": "mixed", "old": True},
        "norm_nan": {**_SGD, "norm": "nan"},
        "norm_inf_old": {**_SGD, "norm": "inf", "max_norm": 0.01, "old": True},
        "rounding": {**_SGD, "rounding_seed": 5, "old": True},
        "rounding_in_place": {"lr": 0.1, "weight_decay": 0.1, "rounding_seed": 2**63 + 1},
        "masters": {**_SGD, **_TO_MASTERS},
        "masters_plain": {"lr": 0.1, "weight_decay": 0.1, "maximize": True, **_TO_MASTERS},
        "masters_first": {**_SGD, "first": "mixed", **_TO_MASTERS},
        "masters_clip": {**_NESTEROV, **_AMP, **_CLIP, **_TO_MASTERS},
        "masters_found_inf": {**_SGD, "found_inf": 1.0, **_TO_MASTERS},
        "masters_rounding": {**_NESTEROV, "rounding_seed": 7, "first": "mixed", **_TO_MASTERS},
        "masters_rounding_norm_nan": {**_SGD, "rounding_seed": 7, "norm": "nan", **_TO_MASTERS},
        "tensors": {**_SGD, "old": True, "tensors": "float64"},
        "tensors_float32": {"lr": 0.1, "weight_decay": 0.1, "tensors": "float32"},
    },
    "adamw_step_": {
        "adamw": _ADAM,
        "adamw_old": {**_ADAM, "old": True},
        "adam": {**_ADAM, "decoupled": False},
        "adam_old": {**_ADAM, "decoupled": False, "old": True},
        "no_decay": {**_ADAM, "weight_decay": 0.0, "old": True},
        "no_average": {**_ADAM, "betas": (0.0, 0.0), "old": True},
        "short_average": {**_ADAM, "betas": (0.05, 0.3), "decoupled": False},
        "defaults": {"lr": 0.001, "weight_decay": 0.01},
        "clip": {**_ADAM, **_CLIP},
        "clip_grad_scale": {**_ADAM, **_AMP, **_CLIP, "old": True},
        "grad_scale": {**_ADAM, "decoupled": False, "grad_scale": 1000.0},
        "found_inf": {**_ADAM, "grad_scale": 1024.0, "found_inf": 1.0},
        "found_inf_old": {**_ADAM, "found_inf": 1.0, "old": True},
        "norm_nan": {**_ADAM, "norm": "nan"},
        "norm_inf_old": {**_ADAM, "norm": "inf", "max_norm": 0.01, "old": True},
        "rounding": {**_ADAM, "rounding_seed": 5},
        "masters": {**_ADAM, **_TO_MASTERS},
        "masters_adam_clip": {**_ADAM, "decoupled": False, **_AMP, **_CLIP, **_TO_MASTERS},
        "masters_found_inf": {**_ADAM, "found_inf": 1.0, **_TO_MASTERS},
        "masters_rounding": {**_ADAM, "rounding_seed": 7, "grad_scale": 1000.0, **_TO_MASTERS},
        "masters_rounding_found_inf": {**_ADAM, "rounding_seed": 7, "found_inf": 1.0, **_TO_MASTERS},
        "tensors": {**_ADAM, "old": True, "tensors": "float64"},
        "tensors_float32": {**_ADAM, "decoupled": False, "tensors": "float32"},
    },
}

FOR_LAYOUT_CASES = {
    "grad_norm": ("plain", "adaptive"),
    "grad_norms": ("adaptive",),
    "centralize_": ("plain", "adaptive"),
    "direction_norm_": ("vasso_first", "friendly_adaptive"),
    "grad_dots": ("origins", "plain"),
    "combine_": ("origins", "into_rights"),
    "perturb_": ("unified", "from_old_adaptive", "friendly_rounding"),
    "random_perturb_": ("rademacher", "normal_from_old"),
    "restore_": ("restore", "masters"),
    "sgd_step_": ("momentum_old", "first_mixed", "masters_first", "masters_rounding"),
    "adamw_step_": ("adamw_old", "adam", "masters", "masters_rounding"),
}
ABOUT_OTHERS = {  # cases about gradients or averages that an operation does not read
    "random_perturb_": ("zero_grads", "huge", "nan", "inf", "expanded_grads", "long_state"),
    "restore_": ("huge_params", "tiny", "zero_grads", "nan", "inf", "expanded_grads", "long_state"),
    "centralize_": ("expanded_grads", "long_state"),  # the first of which it refuses to write
    **dict.fromkeys(("grad_norm", "grad_norms", "grad_dots", "combine_"), ("long_state",)),
}
ABOUT_SLICES = ("slices", "unaligned_slices", "long_slices")  # cases that add nothing to other operations

# "given" are the outputs of a call, of an operation for which some may be None.
_PRODUCTS: Options = {
    "gram": {"method": "gram"},
    "direct": {"method": "direct"},
    "auto": {},
    "products": {"given": ("products",)},
    "gram_tf32": {"method": "gram", "precision": "tf32"},
    "direct_bf16": {"method": "direct", "precision": "bf16"},
    "products_tf32": {"given": ("products",), "method": "direct", "precision": "tf32"},
}
PER_SAMPLE_OPTIONS: dict[str, Options] = {
    "linear_square_norms_": {
        **_PRODUCTS,
        "gram_bias": {"method": "gram", "bias": True},
        "direct_bias": {"method": "direct", "bias": True},
    },
    "conv_square_norms_": _PRODUCTS,
    "affine_grads_": {
        "both": {"given": ("weight_grads", "bias_grads")},
        "weight": {"given": ("weight_grads",)},
        "bias": {"given": ("bias_grads",)},
    },
    "embedding_square_norms_": {"plain": {}, "padding": {"padding_idx": 1}},
}

_BETAS: Options = {
    "flat": {"beta": 0.0},
    "plain": {"beta": 0.7},
    "steep": {"beta": 90.0},
    "tensor": {"beta": 1.3, "tensors": "float64"},
    "against": {"beta": -0.7},
    "tensor_against": {"beta": -1.3, "tensors": "float64"},
}
_ALL = 0  # as many draws as there are norms
SHARPNESS_OPTIONS: dict[str, Options] = {
    "sharpness_weights": _BETAS,
    "sharpness_sample": {
        f"{beta}_{'replaced' if replacement else 'successive'}_{'all' if draws == _ALL else draws}": {
            **given,
            "replacement": replacement,
            "num_samples": draws,
        }
        for beta, given in _BETAS.items()
        for replacement in (True, False)
        for draws in (5, _ALL)
    },
}

OPERATIONS = (*OPTIONS, *PER_SAMPLE_OPTIONS, *SHARPNESS_OPTIONS)  # the names of all operations


def concerns(op: str, option: str, dtype: str) -> bool:
    """Return whether a keyword set concerns a dtype: stochastic rounding is for bfloat16 parameters, and refuses float16 ones; masters are
    those of 16-bit parameters."""
    keywords = OPTIONS[op][option]
    if dtype == "bfloat16" or not (is_rounded_stochastically(keywords) or "masters" in keywords):
        return True
    return dtype not in ("float32", "float64") and not is_rounded_stochastically(keywords)


def is_rounded_stochastically(keywords: dict[str, Any]) -> bool:
    """Return whether a call rounds its bfloat16 results stochastically."""
    return "rounding_seed" in keywords


def adapted(direction: Any, params: Any, keywords: dict[str, Any]) -> Any:
    """Return T d with T = |p| + eta for a call with ``adaptive``, otherwise d."""
    return (abs(params) + keywords.get("eta", 0.0)) * direction if keywords.get("adaptive", False) else direction
