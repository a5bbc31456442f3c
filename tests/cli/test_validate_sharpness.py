"""``validate`` of weights by sharpness and draws by them: it passes on right backends, finds planted errors, and no case is undecided."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from sam_kernels._dispatch import BACKENDS, reason_missing
from sam_kernels.backends.foreach import sharpness as foreach
from sam_kernels.cli.validate import validate
from sam_kernels.reference.sharpness import exponents, gibbs_terms, sharpness_sample, uniforms
from sam_kernels.validation.check import build, combinations
from sam_kernels.validation.options import SHARPNESS_OPTIONS
from sam_kernels.validation.rows import validate_rows
from sam_kernels.validation.sharpness import SHARPNESS_DTYPES, weight_bounds

Drawn = tuple[Tensor, Tensor]


@pytest.mark.parametrize("op", SHARPNESS_OPTIONS)
@pytest.mark.usefixtures("one_thread")
def test_passes_on_every_backend(op: str) -> None:
    backends = [name for name in BACKENDS if reason_missing(name) is None]
    rows = list(validate_rows(backends, [op]))
    assert {(row.backend, row.dtype) for row in rows} == {(name, dtype) for name in backends for dtype in SHARPNESS_DTYPES}
    assert [row.worst for row in rows if not row.passed] == []


def _one_ulp_of_float32(norms: Tensor, drawn: Drawn) -> Drawn:
    return drawn[0], drawn[1] * (1.0 + 2.0**-23)


def _another_index(norms: Tensor, drawn: Drawn) -> Drawn:
    drawn[0][-1] = (drawn[0][-1] + 1) % len(norms)
    return drawn


def _input(norms: Tensor, drawn: Drawn) -> Drawn:
    norms[0] += 1.0
    return drawn


def _around(norms: Tensor, drawn: Drawn) -> Drawn:
    if norms._base is not None:
        norms._base[0] = 0.0
    return drawn


def _wide(norms: Tensor, drawn: Drawn) -> Drawn:
    return drawn[0], drawn[1].double()


def _out_of_range(norms: Tensor, drawn: Drawn) -> Drawn:
    return (drawn[0] if norms.isfinite().all() else drawn[0] - 1 - drawn[0].min()), drawn[1]


def _twice(norms: Tensor, drawn: Drawn) -> Drawn:
    return (drawn[0] if norms.isfinite().all() else drawn[0] * 0), drawn[1]


def _finite(norms: Tensor, drawn: Drawn) -> Drawn:
    return drawn[0], torch.where(drawn[1].isnan(), 0.5, drawn[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_one_ulp_of_float32, "weights[0] element"),
        (_another_index, "differ, draw"),
        (_input, "an input was written"),
        (_around, "memory outside the tensor was written"),
        (_wide, "torch.float64 of shape"),
        (_out_of_range, "out of range"),
        (_twice, "drawn twice"),
        (_finite, "expected nan"),
    ],
)
def test_a_planted_error_of_draws_is_found(change: Callable[[Tensor, Drawn], Drawn], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = foreach.sharpness_sample
    monkeypatch.setattr(foreach, "sharpness_sample", lambda norms, *args, **how: change(norms, right(norms, *args, **how)))
    result = CliRunner().invoke(validate, ["--op", "sharpness_sample", "--backend", "foreach"])
    assert result.exit_code == 1
    assert "FAIL sharpness_sample foreach float32: " in result.output
    assert words in result.output


@pytest.mark.parametrize("planted", ["rounded", "unshifted", "beta in float32"])
def test_a_planted_error_of_weights_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = foreach.sharpness_weights

    def wrong(norms: Tensor, *, beta: float | Tensor) -> Tensor:
        if planted == "rounded":
            return right(norms.float(), beta=beta).to(norms.dtype)
        if planted == "unshifted":
            terms = (norms.double() * beta).exp()
            return (terms / terms.sum()).to(norms.dtype)
        return right(norms, beta=torch.as_tensor(beta).float())

    monkeypatch.setattr(foreach, "sharpness_weights", wrong)
    result = CliRunner().invoke(validate, ["--op", "sharpness_weights", "--backend", "foreach"])
    assert result.exit_code == 1
    assert "FAIL sharpness_weights foreach float64: " in result.output


@pytest.mark.parametrize("dtype", SHARPNESS_DTYPES)
def test_no_draw_is_undecided(dtype: str) -> None:
    """Twice the contract's distance from every boundary, so that indices must be the same."""
    closest = 1.0
    for case, option in combinations("sharpness_sample", dtype):
        call = build("sharpness_sample", case, dtype, option)
        if not call.tensor("norms").isfinite().all():
            continue
        norms, how = call.tensor("norms").double(), call.kwargs
        if how["replacement"]:
            terms = gibbs_terms(norms, how["beta"])
            targets = uniforms(torch.arange(how["num_samples"]), how["seed"])
            sums = terms.cumsum(0) / terms.sum()
            gaps = (sums[:-1] - targets[:, None]).abs()
            assert (gaps > 2 * (4 * len(norms) + 40) * 2.0**-53).all(), (case, option)
        else:
            keys = exponents(norms, how["beta"]) - torch.log(-torch.log(uniforms(torch.arange(len(norms)), how["seed"])))
            keys = keys.sort(descending=True).values
            near = torch.maximum(torch.full_like(keys, 2.0**-42), keys.abs() * 2.0**-51)[1:]
            gaps = keys[:-1] - keys[1:]
            assert (gaps > 2 * near).all(), (case, option)
        closest = min([closest, *gaps.flatten().tolist()])
    assert closest < 1e-2  # the cases have neighbours at all


def test_bounds_tell_something() -> None:
    """A small part of every weight that has one, and nothing at all where weights are flat."""
    for case, option in combinations("sharpness_sample", "float64"):
        call = build("sharpness_sample", case, "float64", option)
        if call.tensor("norms").isfinite().all() and case != "huge":
            drawn, weights = sharpness_sample(call.tensor("norms"), **call.kwargs)
            assert (weight_bounds(call, drawn, weights) < 1e-12 * weights).all(), (case, option)
    flat = build("sharpness_weights", "odd", "float64", "flat")
    assert not weight_bounds(flat, None, flat.tensor("norms")).any()
