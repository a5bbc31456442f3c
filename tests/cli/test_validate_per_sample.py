"""``validate`` of the operations per sample: it passes on right backends and finds planted errors; bounds are not loose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from sam_kernels import reference
from sam_kernels._dispatch import BACKENDS, reason_missing
from sam_kernels.backends.foreach import per_sample as foreach
from sam_kernels.cli.validate import validate
from sam_kernels.validation.backends import has_per_sample
from sam_kernels.validation.check import build, check, combinations
from sam_kernels.validation.options import PER_SAMPLE_OPTIONS
from sam_kernels.validation.per_sample import bounds_of
from sam_kernels.validation.problem import Problem, run
from sam_kernels.validation.rows import validate_rows


@pytest.mark.parametrize("op", PER_SAMPLE_OPTIONS)
@pytest.mark.usefixtures("one_thread")
def test_passes_on_every_backend_that_has_them(op: str) -> None:
    backends = [name for name in BACKENDS if reason_missing(name) is None and has_per_sample(name)]
    rows = list(validate_rows([name for name in BACKENDS if reason_missing(name) is None], [op]))
    assert {row.backend for row in rows} == set(backends) >= {"foreach"}
    assert {row.dtype for row in rows if row.backend == "foreach"} == {"float32", "float64", "bfloat16", "float16", "mixed"}
    assert [row.worst for row in rows if not row.passed] == []
    assert all(row.cases > 10 for row in rows)


def _in_group(function: Callable[..., Any], op: str, change: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    names = {
        "linear_square_norms_": ("square_norms", "inputs", "grad_outputs", "products"),
        "affine_grads_": ("weight_grads", "bias_grads", "normalized", "grad_outputs"),
        "embedding_square_norms_": ("square_norms", "indices", "grad_outputs"),
    }[op]

    def wrong(*args: Any, **keywords: Any) -> None:
        function(*args, **keywords)
        change(dict(zip(names, args)))  # noqa: B905 - some may be missing

    return wrong


def _scaled(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        if tensors.get(name) is not None:
            tensors[name].view(-1)[-1] *= 1.0 + 1e-4

    return change


def _overwritten(tensors: dict[str, Any]) -> None:
    tensors["square_norms"].sub_(0.25)  # as if it had been written to, not added to


def _input(tensors: dict[str, Any]) -> None:
    tensors["grad_outputs"].view(-1)[0] += 1.0


def _outside(tensors: dict[str, Any]) -> None:
    base = tensors["square_norms"]._base
    if base is not None:
        base[0] = 0.0


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("linear_square_norms_", _scaled("square_norms"), "square_norms[0] element"),
        ("linear_square_norms_", _scaled("products"), "products[0] element"),
        ("linear_square_norms_", _overwritten, "square_norms[0] element"),
        ("linear_square_norms_", _input, "an input was written"),
        ("linear_square_norms_", _outside, "memory outside the tensor was written"),
        ("affine_grads_", _scaled("weight_grads"), "weight_grads[0] element"),
        ("affine_grads_", _scaled("bias_grads"), "bias_grads[0] element"),
        ("embedding_square_norms_", _scaled("square_norms"), "square_norms[0] element"),
    ],
)
def test_a_planted_error_is_found(op: str, change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, op, _in_group(getattr(foreach, op), op, change))
    result = CliRunner().invoke(validate, ["--op", op, "--backend", "foreach"])
    assert result.exit_code == 1
    assert f"FAIL {op} foreach float32: " in result.output
    assert words in result.output


@pytest.mark.parametrize("method", ["gram", "direct"])
def test_a_forgotten_term_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last position of every group, the last channel of a patch."""
    right = foreach.linear_square_norms_

    def wrong(square_norms: Tensor, inputs: Tensor, grad_outputs: Tensor, products: Tensor | None, **keywords: Any) -> None:
        right(square_norms, inputs[..., :-1] if inputs.shape[2] > 1 else inputs, grad_outputs, None, **keywords)

    monkeypatch.setattr(foreach, "linear_square_norms_", wrong)
    for op in ("linear_square_norms_", "conv_square_norms_"):
        assert not check(op, ["foreach"], "bfloat16", "odd", method)["foreach"].passed


@pytest.mark.parametrize(("precision", "digits"), [("tf32", 2.0**-12), ("bf16", 2.0**-9)])
def test_rounded_operands_are_within_their_bound_and_need_it(precision: str, digits: float) -> None:
    """Operands rounded as tensor cores would."""
    option = "gram_tf32" if precision == "tf32" else "direct_bf16"
    call = build("linear_square_norms_", "tile_edges", "float32", option)
    exact, rounded = call.double(), call.double()
    for name in ("inputs", "grad_outputs"):
        if precision == "bf16":
            rounded.lists[name] = [rounded.tensor(name).bfloat16().double()]
        else:
            rounded.lists[name] = [(call.tensor(name).clone().view(torch.int32) & -8192).view(torch.float32).double()]
    run(exact, reference)
    run(rounded, reference)
    error = (exact.tensor("square_norms") - rounded.tensor("square_norms")).abs()
    assert (error <= bounds_of(call)["square_norms"]).all()
    plain = Problem(call.op, call.lists, {**call.kwargs, "precision": "ieee"})
    assert (error > bounds_of(plain)["square_norms"] * 0.01).any()


@pytest.mark.parametrize("op", PER_SAMPLE_OPTIONS)
def test_bounds_tell_something(op: str) -> None:
    """Finite where numbers are ordinary, and a small part of the result: of sums in any order of T^2 = 17,161 terms less is known."""
    for case, option in combinations(op, "float32"):
        if case in ("huge", "tiny", "nan", "zeros", "empty") or "bf16" in option or "tf32" in option:
            continue
        call = build(op, case, "float32", option)
        exact = call.double()
        run(exact, reference)
        for name, bound in bounds_of(call).items():
            assert (bound <= (0.2 if case == "long" else 2e-2) * exact.tensor(name).abs().max()).all(), (case, option, name)
