"""Stochastic rounding of bfloat16 parameters: unbiased, the same bits everywhere, and nothing else changes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional, reference, use_backend
from sam_kernels.reference.random import rounded_stochastically
from tests.helpers.compare import assert_same_bits

ONE = torch.tensor(1.0)
# USAM by a power of two: the product is exact, so the float32 result is the same on every backend, contracted or not.
EXACT = {"rho": 2.0**-5, "lambd": 0.0}


def perturbed(params: list[Tensor], grads: list[Tensor], seed: int | None, **options: Any) -> list[Tensor]:
    moved = [param.clone() for param in params]
    functional.perturb_(moved, grads, [torch.zeros_like(p) for p in params], ONE, rounding_seed=seed, **{**EXACT, **options})
    return moved


def bfloat16s(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(torch.bfloat16) for shape in shapes]


def test_the_expectation_is_the_float32_result(backend: str) -> None:
    """A thousand seeds' worth of elements a value, also just below and above a tie and at both signs."""
    trials = 4096
    values = torch.tensor([1.0, 1.0 + 2.0**-9, -1.0 - 2.0**-8 - 2.0**-12, 1.0 + 2.0**-7 - 2.0**-16, 3e-38, -5e30, 1e-40])
    below = values.to(torch.bfloat16)
    rest = (values - below.float())[:, None].expand(-1, trials).contiguous()
    stored = perturbed([below[:, None].expand(-1, trials).contiguous()], [rest / EXACT["rho"]], seed=3)[0].double()
    x = below.float()[:, None].double() + rest.double()
    step = (stored - x).abs().amax(dim=1)
    ulp = 2.0 ** (torch.frexp(values.double()).exponent - 8).clamp(min=-133)
    assert (step < ulp).all()
    assert ((stored - x).mean(dim=1).abs() <= 5 * 0.5 * ulp / math.sqrt(trials)).all()


def test_what_is_not_between_two_neighbours_stays(backend: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.0, math.inf, -math.inf, math.nan]).to(torch.bfloat16).repeat(300)
    moved = perturbed([values], [torch.zeros(values.shape)], seed=1)[0]
    assert torch.equal(moved.isnan(), values.isnan())
    assert torch.equal(moved[~values.isnan()], values[~values.isnan()])


def test_the_bits_are_those_of_the_contract(backend: str) -> None:
    """Against the reference on the same bfloat16 rows: rows of other dtypes between them, permuted layouts, chunk edges."""
    params = bfloat16s((70_001,), (5,), (2, 3, 4, 5))
    params[2] = params[2].to(memory_format=torch.channels_last)
    params.insert(1, torch.randn(300))
    grads = [torch.randn_like(p).to(torch.bfloat16) for p in params]
    olds = [torch.zeros_like(p) for p in params]
    expected = [p.clone() for p in params]
    reference.perturb_(expected, [g.to(p.dtype) for g, p in zip(grads, params, strict=True)], olds, ONE, rounding_seed=77, **EXACT)
    assert_same_bits("params", perturbed(params, grads, seed=77), expected)
    assert_same_bits("float32", perturbed(params, grads, seed=78)[1:2], expected[1:2])
    assert not torch.equal(perturbed(params, grads, seed=78)[0], expected[0])


@pytest.mark.native
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "lambd": 1.0}, {"kind": "vasso", "ema": "grads"}, {"from_old": True}], ids=str)
def test_backends_agree(options: dict[str, Any]) -> None:
    """Nearly everywhere: where float32 results differ in the last bit, one in 65,536 words tells them apart."""
    pytest.importorskip("sam_kernels._cpu")
    params = bfloat16s((100_003,), (7,), (33, 17))
    grads = [torch.randn(p.shape) for p in params]
    chosen = {**options, "ema": grads} if "ema" in options else options
    found = []
    for backend in ("native", "foreach"):
        with use_backend(backend):
            olds, moved = [p.clone() for p in params], [p.clone() for p in params]
            functional.perturb_(moved, grads, olds, ONE, rounding_seed=2**63, **{**EXACT, **chosen})
            found.append(moved)
    different = sum(int((a != b).sum()) for a, b in zip(*found, strict=True))
    assert different <= (0 if not options or "from_old" in options else 20)


@pytest.mark.usefixtures("wide_blocks")
def test_a_small_perturbation_arrives_in_expectation(backend: str) -> None:
    """Half an ulp is 2^-9 at 1; a step of 2^-13 is lost by ordinary rounding, and one element in 64 takes it with this."""
    params, grads = [torch.ones(200_000, dtype=torch.bfloat16)], [torch.full((200_000,), 2.0**-8)]
    assert torch.equal(perturbed(params, grads, seed=None)[0], params[0])
    moved = (perturbed(params, grads, seed=9)[0].double() - 1).mean().item()
    deviation = 2.0**-7 * math.sqrt(2.0**-6 / 200_000)
    assert moved == pytest.approx(2.0**-13, abs=5 * deviation)


def test_a_skipped_ascent_only_saves(backend: str) -> None:
    params = bfloat16s((500,))
    for norm in (math.nan, math.inf):
        moved, olds = [params[0].clone()], [torch.zeros_like(params[0])]
        functional.perturb_(moved, [torch.ones(500)], olds, torch.tensor(norm), rho=1.0, rounding_seed=1)
        assert_same_bits("params, old_params", [*moved, *olds], [*params, *params])


def test_the_reference_truncates_after_adding() -> None:
    x = torch.tensor([1.0, 1.0, -1.0, 1.0 + 2.0**-8, math.inf])
    words = torch.tensor([0xFFFFFFFF, 0, 0xFFFFFFFF, 0x7FFF0000, 0xFFFFFFFF])
    assert rounded_stochastically(x, words).tolist() == [1.0, 1.0, -1.0, 1.0, math.inf]
    words[3] = 0x80000000
    assert rounded_stochastically(x, words)[3].item() == 1.0 + 2.0**-7
