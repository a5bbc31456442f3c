"""Where one member is another: bit for bit where each operation is exact there, else to float64's last digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sam_kernels
from tests.optim.family_runs import close, everything_of, run, using
from tests.optim.problem import assert_same_bits, every_backend, make_model, twin, weights

BASES = [
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, id="sgd"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01}, id="adamw"),
]
# Every line: 1 x + 0 y is x, whatever a finite y is.
ARE_SAM = [
    pytest.param("VaSSO", {"theta": 1.0}, id="VaSSO: m <- 0 m + 1 g"),
    pytest.param("FriendlySAM", {"sigma": 0.0}, id="FriendlySAM: d = g - 0 m"),
    pytest.param("GSAM", {"alpha": 0.0}, id="GSAM: 1 g_p - 0 g"),
    pytest.param("WSAM", {"kappa": 0.5, "decoupled": False}, id="WSAM: k = 1, 1 g_p + 0 g"),
    pytest.param("CRSAM", {"gamma": 0.0, "beta": 0.0}, id="CRSAM: 1 g_+ + 0 g_- - 0 g"),
    pytest.param("LookSAM", {"k": 1}, id="LookSAM: every step is SAM's"),
]


@every_backend
@pytest.mark.parametrize(("base", "kwargs"), BASES)
@pytest.mark.parametrize(("name", "options"), ARE_SAM)
@pytest.mark.parametrize("more", [{}, {"lambd": 0.4, "adaptive": True, "eta": 0.01}, {"max_grad_norm": 0.1}], ids=str)
def test_is_sam_in_float64(
    backend: str, name: str, options: dict[str, Any], base: Any, kwargs: dict[str, Any], more: dict[str, Any]
) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    with using(backend):
        optimizer = getattr(sam_kernels, name)(model.parameters(), base, rho=0.1, **options, **kwargs, **more)
        expected = sam_kernels.SAM(other.parameters(), base, rho=0.1, **kwargs, **more)
        run(optimizer, model, 5)
        run(expected, other, 5)
    close(weights(model), weights(other))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "kwargs"), BASES)
@pytest.mark.parametrize(("name", "options"), [case for case in ARE_SAM if case.values[0] in ("GSAM", "WSAM", "CRSAM", "LookSAM")])
def test_a_rule_that_leaves_the_gradient_is_sam_bit_for_bit(
    backend: str, name: str, options: dict[str, Any], base: Any, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    """The ascent is SAM's own there; averages take another norm, whose last bit may differ."""
    model = make_model(dtype)
    other = twin(model)
    with using(backend):
        optimizer = getattr(sam_kernels, name)(model.parameters(), base, rho=0.1, **options, **kwargs)
        expected = sam_kernels.SAM(other.parameters(), base, rho=0.1, **kwargs)
        run(optimizer, model, 5)
        run(expected, other, 5)
    assert_same_bits(weights(model), weights(other))


@every_backend
@pytest.mark.parametrize(("base", "kwargs"), BASES)
@pytest.mark.parametrize("decoupled", [True, False])
def test_wsam_with_kappa_zero_is_the_base(backend: str, decoupled: bool, base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    with using(backend):
        optimizer = sam_kernels.WSAM(model.parameters(), base, kappa=0.0, decoupled=decoupled, rho=0.1, **kwargs)
        plain = base(other.parameters(), **kwargs)
        run(optimizer, model, 5)
        run(plain, other, 5)
    close(weights(model), weights(other))


@every_backend
@pytest.mark.parametrize("c", [1.0, 3.0])
def test_rsam_without_randomness_is_sam(backend: str, c: float) -> None:
    """d = c g: SAM's direction does not depend on c; USAM's radius is c times as long."""
    model = make_model(torch.float64)
    others = [twin(model), twin(model), twin(model)]
    with using(backend):
        optimizers = [
            sam_kernels.RSAM(model.parameters(), torch.optim.SGD, lr=0.1, sigma=0.0, c=c),
            sam_kernels.SAM(others[0].parameters(), torch.optim.SGD, lr=0.1),
            sam_kernels.RSAM(others[1].parameters(), torch.optim.SGD, lr=0.1, sigma=0.0, c=c, lambd=0.0),
            sam_kernels.USAM(others[2].parameters(), torch.optim.SGD, lr=0.1, rho=0.05 * c),
        ]
        for optimizer, net in zip(optimizers, [model, *others], strict=True):
            run(optimizer, net, 5)
    close(weights(model), weights(others[0]))
    close(weights(others[1]), weights(others[2]))


@every_backend
def test_the_extragradient_is_sam_with_the_other_sign(backend: str) -> None:
    """w - ρ g / ‖g‖: with λ = 1 the point on the other side."""
    model = make_model(torch.float64)
    seen: dict[str, list[torch.Tensor]] = {}
    with using(backend):
        for name in ("SAM", "Extragradient"):
            net = twin(model)
            optimizer = getattr(sam_kernels, name)(net.parameters(), torch.optim.SGD, lr=0.0, rho=0.1, lambd=1.0)
            points: list[list[torch.Tensor]] = []

            def closure(net: Any = net, optimizer: Any = optimizer, points: Any = points) -> torch.Tensor:
                points.append(weights(net))
                optimizer.zero_grad()
                loss = net(torch.ones(3, 6, dtype=torch.float64)).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            seen[name] = [there - here for here, there in zip(*points, strict=True)]
    close(seen["Extragradient"], [-each for each in seen["SAM"]], atol=1e-15)


@every_backend
def test_directions_and_rules_combine(backend: str) -> None:
    """VaSSO's ascent with GSAM's descent, each at the value where it is nothing, is SAM; and both keep what is theirs."""
    model = make_model(torch.float64)
    other = twin(model)
    parts: dict[str, Any] = {
        "direction": sam_kernels.optim.directions.VarianceSuppressed(theta=1.0),
        "descent": sam_kernels.optim.descents.SurrogateGap(alpha=0.0),
    }
    with using(backend):
        optimizer = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1, **parts)
        expected = sam_kernels.SAM(other.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1)
        run(optimizer, model, 5)
        run(expected, other, 5)
    close(weights(model), weights(other))
    assert len(everything_of(optimizer, model)) == len(everything_of(expected, other)) + 4
