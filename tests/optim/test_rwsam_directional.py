"""Norms estimated along random directions are the formula's, with the random numbers of the reference, and leave nothing behind."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, reference, use_backend
from sam_kernels.optim._seeds import derived_seed
from tests.optim.problem import assert_same_bits, every_backend
from tests.optim.rwsam_problem import (
    B,
    Recorded,
    ascent_along,
    assert_close,
    combined,
    directions_of,
    group_grads,
    losses_of,
    make_batch,
    make_model,
    norms_of,
)

SEED = 11


def seeds_of(step: int, closure: int, k: int, group: int = 0) -> int:
    return derived_seed(derived_seed(SEED, step, closure, 1), k, group)


def slopes_of(model: nn.Module, batch: tuple[Tensor, Tensor], directions: list[list[Tensor]], m: int) -> Tensor:  # (B / m,)
    """√(mean_k (z_k·∇f)²)."""
    grads = group_grads(model, batch, m)
    each = [[sum((z * g).sum() for z, g in zip(zs, group, strict=True)) for group in grads] for zs in directions]
    return torch.tensor(each, dtype=torch.float64).square().mean(0).sqrt()


@every_backend
@pytest.mark.parametrize("kind", ["finite_difference", "jvp"])
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("m", [1, 3])
def test_norms_and_ascent_are_the_formulas(backend: str, kind: str, distribution: str, m: int) -> None:
    model, batch = make_model(), make_batch()
    k = 3
    options: dict[str, Any] = {"norms": kind, "num_directions": k, "distribution": distribution, "micro_batch": m, "seed": SEED}
    with use_backend(backend):
        optimizer = RWSAM(model, torch.optim.SGD, beta=1.5, delta=1e-6, rho=0.2, lambd=0.5, lr=0.1, **options)
        for step in (1, 2):
            closure = Recorded(model, batch)
            zs = [directions_of(model, seeds_of(step, 0, i), distribution) for i in range(k)]
            expected, grads = slopes_of(model, batch, zs, m), group_grads(model, batch, m)
            optimizer.step(closure)
            # Normals differ by 1e-6 between math libraries; a difference quotient is off by δ/2 times a second derivative, and by 1e-16/δ.
            tolerance = 1e-9 if (kind, distribution) == ("jvp", "rademacher") else 1e-4
            assert optimizer.last_norms is not None
            assert_close(optimizer.last_norms, expected, tolerance)
            # The weights follow from those norms.
            p = (1.5 * optimizer.last_norms).softmax(0)
            assert_close(closure.ascent, ascent_along(combined(grads, p), closure.calls[-2], rho=0.2, lambd=0.5))
            assert len(closure.calls) == k + 2


@every_backend
@pytest.mark.parametrize("scaling", ["sqrt_d", "unit"])
def test_the_closure_is_called_at_the_perturbed_weights(backend: str, scaling: str) -> None:
    """w + δz at first, each z from w itself, then w again, bit for bit."""
    model, batch = make_model(torch.float32), make_batch(torch.float32)
    closure = Recorded(model, batch)
    start = [param.detach().clone() for param in model.parameters()]
    with use_backend(backend):
        optimizer = RWSAM(
            model,
            torch.optim.SGD,
            beta=1.0,
            norms="finite_difference",
            num_directions=2,
            delta=0.01,
            delta_scaling=scaling,
            seed=SEED,
            rho=0.2,
            lr=0.1,
        )
        optimizer.step(closure)
    d = sum(param.numel() for param in start)
    scale = 0.01 if scaling == "sqrt_d" else 0.01 / math.sqrt(d)
    for k in range(2):
        expected = [param.double() for param in start]
        olds = [torch.empty_like(param) for param in expected]
        reference.random_perturb_(expected, olds, seed=seeds_of(1, 0, k), scale=scale, distribution="rademacher")
        assert_close(closure.calls[k], expected, 1e-6)
        length = torch.stack([(there - here).square().sum() for there, here in zip(closure.calls[k], start, strict=True)]).sum().sqrt()
        assert length.item() == pytest.approx(0.01 * (math.sqrt(d) if scaling == "sqrt_d" else 1.0), rel=1e-4)
    assert_same_bits(closure.calls[2], start)


@pytest.mark.parametrize("kind", ["finite_difference", "jvp"])
def test_groups_have_directions_of_their_own(kind: str) -> None:
    """And one without a radius none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)).double()
    batch = make_batch()
    groups = [{"params": layer.parameters(), "rho": rho} for layer, rho in zip(model, (0.1, 0.0, 0.1), strict=True)]
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, params=groups, norms=kind, delta=1e-6, seed=SEED, lr=0.1)
    zs: list[Tensor] = []
    for i, layer in enumerate(model):
        z = directions_of(layer, seeds_of(1, 0, 0, i))
        zs += [torch.zeros_like(each) for each in z] if i == 1 else z
    assert not torch.equal(zs[0], zs[4])
    expected = slopes_of(model, batch, [zs], 1)
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_norms, expected, 1e-4)


def test_closures_and_steps_have_directions_of_their_own() -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms="jvp", lr=0.0, seed=SEED)
    seen = []
    for _ in range(2):
        optimizer.step([lambda: losses_of(model, batch)] * 2)
        assert optimizer.last_norms is not None
        seen += list(optimizer.last_norms.split(B))
    for i, norms in enumerate(seen):
        assert not any(torch.equal(norms, other) for other in seen[:i])


@pytest.mark.parametrize("kind", ["finite_difference", "jvp"])
def test_many_directions_find_the_norms(kind: str) -> None:
    """With K directions a squared norm is off by a factor 1 ± √(2/K), one standard deviation (a little less for Rademacher numbers)."""
    model, batch = make_model(), make_batch()
    k = 400
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=kind, num_directions=k, delta=1e-5, lr=0.1)
    expected = norms_of(group_grads(model, batch))
    optimizer.step(lambda: losses_of(model, batch))
    assert optimizer.last_norms is not None
    ratio = optimizer.last_norms / expected
    assert ((ratio.square() - 1).abs() < 4.5 * math.sqrt(2 / k)).all()


@pytest.mark.parametrize("kind", ["finite_difference", "jvp"])
def test_all_losses_of_a_step_see_the_same_dropout_masks(kind: str) -> None:
    """Or the difference would be that of the masks: with δ this small it would be millions."""
    model, batch = make_model(dropout=0.5), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=kind, num_directions=2, delta=1e-7, lr=0.0)
    torch.manual_seed(4)
    optimizer.step(lambda: losses_of(model, batch))
    after = torch.rand(())
    torch.manual_seed(4)
    grads = group_grads(model, batch)
    losses_of(model, batch)  # the second pass
    assert torch.equal(after, torch.rand(())), "random numbers go on as after two forward passes"
    assert optimizer.last_norms is not None
    assert (optimizer.last_norms <= 30 * norms_of(grads).max()).all()


@pytest.mark.parametrize("kind", ["exact", "finite_difference", "jvp"])
def test_running_statistics_see_the_first_pass_alone(kind: str) -> None:
    model, batch = make_model(batch_norm=True), make_batch()
    once = make_model(batch_norm=True)
    once(batch[0])
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=kind, num_directions=2, lr=0.1)
    optimizer.step(lambda: losses_of(model, batch))
    assert_same_bits(list(model.buffers()), list(once.buffers()))


def test_forward_derivatives_of_attention() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(B, 4, 8, dtype=torch.float64)
    losses = lambda: model(x).square().mean((1, 2))  # noqa: E731
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms="jvp", num_directions=2, seed=SEED, lr=0.0)
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses().unbind()]
    zs = [directions_of(model, seeds_of(1, 0, k)) for k in range(2)]
    optimizer.step(losses)
    expected = torch.stack([torch.stack([sum((z * g).sum() for z, g in zip(each, grad, strict=True)) for grad in grads]) for each in zs])
    assert_close(optimizer.last_norms, expected.square().mean(0).sqrt())


def test_a_model_without_forward_derivative_is_an_error_and_unchanged() -> None:
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))
            self.same = [self.weight]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.same[0]

    model, batch = Elsewhere(), make_batch(torch.float32)
    weight = model.weight
    with pytest.raises(RuntimeError, match=r"jvp.*finite_difference"):
        RWSAM(model, torch.optim.SGD, beta=1.0, norms="jvp", lr=0.1).step(lambda: losses_of(model, batch))
    assert model.weight is weight


def test_sixteen_bits_are_warned_of() -> None:
    """Of losses in them, and of a forward pass whose losses are float32 again: from parameters, or by autocast."""

    def step(dtype: torch.dtype, *, last: torch.dtype, autocast: bool) -> None:
        model, batch = make_model(dtype), make_batch(dtype)
        optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms="finite_difference", lr=0.1)

        def closure() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return nn.functional.cross_entropy(model(batch[0]).to(last), batch[1], reduction="none").square()

        optimizer.step(closure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure)  # said once

    for options in (
        {"dtype": torch.bfloat16, "last": torch.bfloat16, "autocast": False},
        {"dtype": torch.bfloat16, "last": torch.float32, "autocast": False},
        {"dtype": torch.float32, "last": torch.float32, "autocast": True},
    ):
        with pytest.warns(UserWarning, match="in 16 bits"):
            step(**options)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.float32, last=torch.float32, autocast=False)


@pytest.mark.parametrize("kind", ["finite_difference", "jvp"])
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_neither_overflow_nor_vanish(kind: str, size: float) -> None:
    found = []
    for factor in (1.0, size):
        model, batch = make_model(torch.float32), make_batch(torch.float32)
        optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=kind, lr=0.0)
        optimizer.step(lambda: losses_of(model, batch) * factor)  # noqa: B023 - called at once
        found.append(optimizer.last_norms)
        assert optimizer.skipped_steps == 0
    assert_close(found[1], found[0] * size, 1e-4)  # type: ignore[operator]


def test_no_graph_and_no_buffer_of_a_perturbed_pass_stays() -> None:
    """Though the closure turns autograd on, and a module counts its calls."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    for kind in ("finite_difference", "jvp"):
        model, batch = make_model().append(Counts()), make_batch()
        optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=kind, num_directions=3, lr=0.1)
        optimizer.step(torch.enable_grad()(partial(losses_of, model, batch)))
        assert optimizer.last_norms is not None
        assert not optimizer.last_norms.requires_grad
        assert model[-1].calls == 2  # at w and at w + e


def test_a_checkpoint_repeats_its_directions() -> None:
    results = []
    for stops in (False, True):
        model, batch = make_model(torch.float32), make_batch(torch.float32)
        options: dict[str, Any] = {"beta": 2.0, "norms": "finite_difference", "sampling": "draw", "draws": 3, "lr": 0.1, "momentum": 0.9}
        optimizer = RWSAM(model, torch.optim.SGD, **options)
        for step in range(4):
            if stops and step == 2:
                saved = optimizer.state_dict()
                optimizer = RWSAM(model, torch.optim.SGD, **options)
                optimizer.load_state_dict(saved)
            optimizer.step(partial(losses_of, model, batch))
        results.append([param.detach() for param in model.parameters()])
    assert_same_bits(*results)


def test_derived_seeds() -> None:
    found = {derived_seed(seed, a, b) for seed in (0, 1, 2**64 - 1) for a in range(20) for b in range(20)}
    assert len(found) == 1200
    assert all(0 <= each < 2**64 for each in found)
    # SplitMix64's first outputs from state 0 (the generator's published test values).
    assert derived_seed(0, 0) == 0xE220A8397B1DCDAF
    assert derived_seed(0, 1) == 0x6E789E6AA1B965F4
