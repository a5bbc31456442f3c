"""Every member in float32, bfloat16 and float16, on gradients that are given: zeros, and numbers that float64 can follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import schedules
from tests.optim.family import BASES, MEMBERS, ONE_PASS
from tests.optim.family_runs import CASES, everything_of, make, using
from tests.optim.problem import BACKENDS, assert_same_bits, every_backend
from tests.optim.transcriptions import Transcription

STEPS = 6
NO_DECAY = {"weight_decay": 0.0}
FUSED = [case for case in CASES if case.values[1] != "rmsprop"]
OPTIONS: list[dict[str, Any]] = [{}, {"adaptive": True}, {"lambd": 0.0}, {"lambd": 0.5}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "base"), FUSED)
@every_backend
def test_zero_gradients_give_no_nan_and_move_nothing(
    backend: str, name: str, base: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """With momentum too: what is added up is 0. A zero among the weights, for |w| = 0. float16 has no 1e-8, which Adam's eps is: its
    first step, where MomentumSAM has no momentum yet, is made in float32 as the others are."""
    params = [nn.Parameter(torch.linspace(-1, 1, 129).to(dtype)), nn.Parameter(torch.zeros(3, 2, dtype=dtype))]
    before = [param.detach().clone() for param in params]

    def closure() -> float:
        for param in params:
            param.grad = torch.zeros_like(param)
        return 0.0

    with using(backend):
        optimizer = make(name, params, base, **options, **NO_DECAY)
        for _ in range(4):
            if name == "SAMSPS":
                optimizer.step(lambda: closure() + 2.0)  # a gap, and nothing to divide it by
            optimizer.step(closure)
    assert optimizer.skipped_steps == 0
    holder = nn.ParameterList(params)
    assert all(each.isfinite().all() for each in everything_of(optimizer, holder))
    assert_same_bits([param.detach() for param in params], before)


class Given(nn.Module):
    """Two parameters whose gradients are a table's, whatever the weights are: what differs is the optimizer's own arithmetic."""

    def __init__(self, dtype: torch.dtype, size: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weights = nn.ParameterList(
            nn.Parameter((size * torch.randn(shape)).to(torch.bfloat16).to(dtype)) for shape in ((7, 5), (300,))
        )
        self.calls = 0

    def backward(self) -> float:
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        for param in self.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(torch.bfloat16).to(param.dtype)
        return 40.0


class OnTables(Transcription):
    """Mixed into a member's transcription: gradients of the table."""

    def gradients(self, batch: Any) -> list[Tensor]:
        self.loss = self.model.backward()  # type: ignore[operator]
        self.absent = [False] * len(list(self.model.parameters()))
        found = [param.grad.clone() for param in self.model.parameters()]  # type: ignore[union-attr]
        self.largest_gradient = max(getattr(self, "largest_gradient", 0.0), largest(found))
        return found


UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def largest(tensors: Iterable[Tensor]) -> float:
    return max((tensor.abs().max().item() for tensor in tensors), default=0.0)


def allowance(base: str, dtype: torch.dtype, expected: Transcription, weight: float) -> float:
    """What one step adds to the error of a weight, with u the unit of storage, and 6 roundings in a row in float32 arithmetic.

    Rounded to storage are the weight (``weight`` at most), what the base steps along, where a rule writes it, a kept gradient (terms below
    4 G: of GSAM (1 + alpha c) |g_p| + alpha |g|, of WSAM k |g_p| + (k - 1) |g| with k = 7/3, G the largest gradient), and the momentum.
    lr times those reaches the weight, and momentum repeats each at most 1 / (1 - beta) times, no more often than there are steps.
    An Adam step is lr times a ratio below 8 of four rounded numbers, each below 2 against the rounding of the largest.
    SAM-SPS takes its step size from the inner product of g_p with e - w, which is what the weights really moved by: off by u Σ |g_p| |w|,
    which over ‖g_p‖² is less than 2 u here, times a gradient below G.
    """
    u = UNIT[dtype] + 6 * UNIT[torch.float32]
    kwargs = BASES[base][1]
    lr, momentum = kwargs.get("lr", 0.4), kwargs.get("momentum", 0.0)
    if base == "adamw":
        return u * (weight + lr * 8 * 8)
    repeats = min(1 / (1 - momentum), STEPS)
    buffers = [state["momentum_buffer"] for state in expected.base.state.values() if "momentum_buffer" in state]
    largest_gradient: float = expected.largest_gradient  # type: ignore[attr-defined]
    return u * (weight + repeats * lr * (6 * largest_gradient + largest(buffers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "base"), FUSED)
def test_low_precision_follows_the_formula_in_float64(name: str, base: str, dtype: torch.dtype) -> None:
    member = MEMBERS[name]
    base_class, kwargs = BASES[base]
    exact = Given(torch.float64)
    formula = type(member.transcribe(exact, base_class(exact.parameters(), **{"lr": 0.4, **kwargs})))
    given = {"lr": member.options["gamma_b"], "weight_decay": 0.1, **kwargs} if name == "SAMSPS" else kwargs
    options = {"rho": member.rho, **member.options, **member.theirs}
    expected = type("OnTables", (OnTables, formula), {})(exact, base_class(exact.parameters(), **given), None, **options)
    models = {backend: Given(dtype) for backend in BACKENDS}
    optimizers = {backend: make(name, model.parameters(), base) for backend, model in models.items()}
    tolerance = 0.0
    for _ in range(STEPS):
        for backend, optimizer in optimizers.items():
            with using(backend):
                optimizer.step(models[backend].backward)
        expected.step(None)
        tolerance += allowance(base, dtype, expected, largest(exact.parameters()))
    for backend, model in models.items():
        for got, wanted in zip(model.parameters(), exact.parameters(), strict=True):
            error = (got.detach().double() - wanted.detach()).abs().max().item()
            assert error <= tolerance, f"{backend}: {error:.3e} > {tolerance:.3e}"
        assert model.calls == exact.calls
    assert all(optimizer.skipped_steps == 0 for optimizer in optimizers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["VaSSO", "FriendlySAM", "Extragradient", "GCSAM", "RSAM", *ONE_PASS])
def test_perturbed_points_in_low_precision_are_the_formulas(name: str, dtype: torch.dtype) -> None:
    """The point where the second gradient is taken, w + ρ d / ‖d‖ with ρ = 1 and small weights, so that it is the perturbation that shows.

    It is rounded once, u |w + e|. e has the relative error of d and ‖d‖: where d is made of an average that is stored, that of the average,
    which was rounded at each step before, u (1 + 1/2 + 1/4 …) < 2 u with these decays (VaSSO: (1 + 0.7 + …) < 4 u), and F-SAM divides it by
    lmbda = 0.5 and takes sigma = 0.7 of it; a stored momentum adds up u of itself at each of STEPS. All below 8 u of the largest |e|.
    """
    member = MEMBERS[name]
    exact, seen, wanted = Given(torch.float64, 0.02), {backend: [] for backend in BACKENDS}, []  # type: ignore[var-annotated]
    # A learning rate of 0 and momentum: weights stay, so that only the perturbation differs.
    base = torch.optim.SGD(exact.parameters(), lr=0.0, momentum=0.9)
    formula = type(member.transcribe(exact, base))

    class Watching(OnTables, formula):  # type: ignore[misc, valid-type]
        def gradients(self, batch: Any) -> list[Tensor]:
            wanted.append([param.detach().clone() for param in self.model.parameters()])
            found: list[Tensor] = super().gradients(batch)
            return found

    expected = Watching(exact, base, None, **{"rho": 1.0, **member.options, **member.theirs})  # type: ignore[arg-type]
    start = [param.detach().clone() for param in exact.parameters()]
    for backend in BACKENDS:
        model = Given(dtype, 0.02)
        optimizer = member.make(model.parameters(), torch.optim.SGD, lr=0.0, momentum=0.9, rho=1.0)

        def closure(model: Given = model, backend: str = backend) -> float:
            seen[backend].append([param.detach().double() for param in model.parameters()])
            return model.backward()

        with using(backend):
            for _ in range(STEPS):
                optimizer.step(closure)
    for _ in range(STEPS):
        expected.step(None)
    u = UNIT[dtype] + 16 * UNIT[torch.float32]
    for backend in BACKENDS:
        assert len(seen[backend]) == len(wanted)
        for points, there in zip(seen[backend], wanted, strict=True):
            for got, want, weight in zip(points, there, start, strict=True):
                assert (got - want).abs().max().item() <= u * (largest([want]) + 8 * largest([want - weight])), backend
    assert any((want - weight).abs().max() > 0.1 for there in wanted for want, weight in zip(there, start, strict=True))


def test_a_step_that_underflows_is_made_all_the_same() -> None:
    """Gradients of 1e-30: squares are below float32's range, their sums are not below float64's."""
    for name in MEMBERS:
        param = nn.Parameter(torch.ones(8))

        def closure(param: nn.Parameter = param) -> float:
            param.grad = torch.full((8,), 1e-30)
            return 1.0

        optimizer = make(name, [param], rho=schedules.Interval(MEMBERS[name].rho, every=2), **NO_DECAY)
        for _ in range(3):
            optimizer.step(closure)
        assert optimizer.skipped_steps == 0, name
        assert param.isfinite().all(), name
