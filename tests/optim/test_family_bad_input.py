"""What a member refuses: an error that names the class and the argument, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sam_kernels
from sam_kernels.optim import descents, directions
from tests.optim.family import MEMBERS, ONE_PASS
from tests.optim.family_runs import everything_of, make, run
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, make_model

NAN = float("nan")
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
SCHEDULE = {"rho_max": 0.2, "rho_min": 0.1, "lr_max": 0.1, "lr_min": 0.0}

BY_DIRECTION = ["VaSSO", "FriendlySAM", "Extragradient", "RSAM", "GCSAM", "MomentumSAM", "S2SAM"]
BY_DESCENT = ["GSAM", "CRSAM", "WSAM", "LookSAM"]
HYPERPARAMETERS = [
    ("VaSSO", {"theta": 0.0}, ValueError, r"VaSSO: theta must be a finite number in \(0\.0, 1\.0\], got 0\.0"),
    ("VaSSO", {"theta": 1.5}, ValueError, "VaSSO: theta"),
    ("VaSSO", {"theta": NAN}, ValueError, "VaSSO: theta"),
    ("VaSSO", {"theta": "0.9"}, TypeError, "VaSSO: theta must be a number, got '0.9'"),
    ("FriendlySAM", {"sigma": NAN}, ValueError, "FriendlySAM: sigma"),
    ("FriendlySAM", {"sigma": None}, TypeError, "FriendlySAM: sigma"),
    ("FriendlySAM", {"lmbda": 0.0}, ValueError, "FriendlySAM: lmbda"),
    ("FriendlySAM", {"lmbda": 1.1}, ValueError, "FriendlySAM: lmbda"),
    ("FriendlySAM", {"lmbda": True}, TypeError, "FriendlySAM: lmbda must be a number, got True"),
    ("RSAM", {"sigma": -0.1}, ValueError, "RSAM: sigma"),
    ("RSAM", {"sigma": "big"}, TypeError, "RSAM: sigma"),
    ("RSAM", {"c": float("inf")}, ValueError, "RSAM: c must be"),
    ("RSAM", {"seed": -1}, ValueError, "RSAM: seed"),
    ("RSAM", {"seed": 0.5}, TypeError, "RSAM: seed"),
    ("GSAM", {"rho": 0.1, "alpha": -0.1}, ValueError, "GSAM: alpha"),
    ("GSAM", {"rho": 0.1, "alpha": None}, TypeError, "GSAM: alpha"),
    ("GSAM", {}, ValueError, "GSAM: its radius follows the learning rate: give rho_max, rho_min, lr_max, lr_min, or rho"),
    ("GSAM", {"rho_max": 0.2, "lr_max": 0.1}, ValueError, "GSAM: .* give rho_min, lr_min, or rho"),
    ("GSAM", {"rho": 0.1, "rho_max": 0.2}, ValueError, "GSAM: rho and rho_max are two radii"),
    ("GSAM", {"rho": 0.1, **SCHEDULE}, ValueError, "GSAM: rho and rho_max, rho_min, lr_max, lr_min are two radii"),
    ("GSAM", {**SCHEDULE, "rho_min": 0.3}, ValueError, "rho_min must be a finite number in"),
    ("GSAM", {**SCHEDULE, "lr_min": 0.1}, ValueError, "lr_min must be a finite number in"),
    ("WSAM", {"kappa": 1.0}, ValueError, r"WSAM: kappa must be a finite number in \[0\.0, 1\.0\), got 1\.0"),
    ("WSAM", {"kappa": -0.1}, ValueError, "WSAM: kappa"),
    ("WSAM", {"kappa": "0.9"}, TypeError, "WSAM: kappa"),
    ("WSAM", {"decoupled": 1}, TypeError, "WSAM: decoupled must be True or False"),
    ("CRSAM", {"gamma": -0.1}, ValueError, "CRSAM: gamma"),
    ("CRSAM", {"gamma": "0.1"}, TypeError, "CRSAM: gamma"),
    ("CRSAM", {"beta": NAN}, ValueError, "CRSAM: beta"),
    ("LookSAM", {"k": 0}, ValueError, "LookSAM: k must be"),
    ("LookSAM", {"k": 2.5}, TypeError, "LookSAM: k must be"),
    ("LookSAM", {"k": True}, TypeError, "LookSAM: k must be"),
    ("LookSAM", {"alpha": -1.0}, ValueError, "LookSAM: alpha"),
    ("LookSAM", {"alpha": [0.7]}, TypeError, "LookSAM: alpha"),
    ("USAM", {"lambd": 0.0}, TypeError, "USAM: lambd is 0 by definition"),
    ("ASAM", {"adaptive": True}, TypeError, "ASAM: adaptive is True by definition"),
    ("Extragradient", {"lambd": 2.0}, ValueError, "lambd must be"),
    ("GCSAM", {"rho": -1.0}, ValueError, "rho must be"),
    ("MomentumSAM", {"rho": None}, TypeError, "rho must be"),
    ("SAM", {"direction": "vasso"}, TypeError, r"SAM: direction must be one of sam_kernels\.optim\.directions, .* got 'vasso'"),
    ("SAM", {"direction": directions.Friendly}, TypeError, "SAM: direction must be one of"),
    ("SAM", {"descent": 3}, TypeError, r"SAM: descent must be one of sam_kernels\.optim\.descents, .* got 3"),
    ("SAM", {"descent": directions.Friendly()}, TypeError, "SAM: descent must be one of"),
    *((name, {"direction": directions.Gradient()}, TypeError, f"{name}: its direction is what makes it") for name in BY_DIRECTION),
    *((name, {"rho": 0.1, "descent": descents.Plain()}, TypeError, f"{name}: its descent is what makes it") for name in BY_DESCENT),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), HYPERPARAMETERS)
def test_hyperparameters(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(sam_kernels, name)(make_model().parameters(), torch.optim.SGD, **{**SGD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"f_star": NAN}, ValueError, "SAMSPS: f_star"),
        ({"f_star": None}, TypeError, "SAMSPS: f_star"),
        ({"gamma_b": -1.0}, ValueError, "SAMSPS: gamma_b must be a finite number"),
        ({"gamma_b": NAN}, ValueError, "SAMSPS: gamma_b"),
        ({"gamma_b": "1"}, TypeError, "SAMSPS: gamma_b must be a number"),
        ({"gamma_b": torch.ones(2)}, ValueError, "SAMSPS: gamma_b"),
        ({"weight_decay": -1.0}, ValueError, "SAMSPS: weight_decay must be"),
        ({"weight_decay": NAN}, ValueError, "SAMSPS: weight_decay"),
        ({"descent": descents.Plain()}, TypeError, "SAMSPS: its descent is what makes it SAMSPS"),
        ({"lr": 0.1}, TypeError, "SAMSPS: lr is found at each step; gamma_b bounds it"),
        ({"base_optimizer": torch.optim.Adam}, ValueError, "SAMSPS: the Polyak step size is that of SGD, got Adam"),
        ({"nesterov": True, "momentum": 0.9}, ValueError, "SAMSPS: .* nesterov=True"),
        ({"maximize": True}, ValueError, "SAMSPS: .* maximize=True"),
        ({"dampening": 0.1, "momentum": 0.9}, ValueError, r"SAMSPS: .* dampening=0\.1"),
        ({"max_grad_norm": 1.0}, ValueError, "max_grad_norm is not defined for descent 'polyak'"),
    ],
)
def test_sam_sps(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sam_kernels.SAMSPS(make_model().parameters(), **arguments)


@pytest.mark.parametrize(
    ("base", "kwargs", "message"),
    [
        (torch.optim.SGD, {"lr": 0.1}, r"MomentumSAM: param_groups\[0\] has momentum=0"),
        (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}, "MomentumSAM: RMSprop keeps no momentum that is known here"),
    ],
)
def test_momentum_sam_needs_a_momentum_it_knows(base: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sam_kernels.MomentumSAM(make_model().parameters(), base, **kwargs)


RULES = [descents.SurrogateGap(), descents.WeightedSharpness(decoupled=False), descents.WeightedSharpness(), descents.Look()]


@pytest.mark.parametrize("direction", [directions.Randomized(), directions.Momentum(), directions.Stale()], ids=lambda part: part.name)
@pytest.mark.parametrize("descent", RULES, ids=repr)
def test_rules_that_need_the_gradient_at_the_weights(direction: Any, descent: Any) -> None:
    """An instance of a base that is refused stays what it was."""
    model = make_model()
    base = torch.optim.SGD(model.parameters(), **SGD)
    keys = set(base.param_groups[0])
    with pytest.raises(ValueError, match=rf"SAM: descent '{descent.name}' needs the gradient at the weights; direction '{direction.name}'"):
        sam_kernels.SAM(model.parameters(), base, direction=direction, descent=descent)
    assert set(base.param_groups[0]) == keys
    assert not base._optimizer_step_pre_hooks


ONE_BATCH = [name for name in MEMBERS if name not in ("SAM", "GCSAM", "Extragradient", "RSAM")]


@pytest.mark.parametrize("name", ONE_BATCH)
def test_micro_batches_where_they_have_no_meaning(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    run(optimizer, model, 2)
    before, calls = everything_of(optimizer, model), []
    closure: Callable[..., Any] = lambda *_: calls.append(1)  # noqa: E731
    with pytest.raises(ValueError, match=r"SAM\.step: (descent|direction) '[\w-]+' is defined for one (batch|gradient a step), not for 2"):
        optimizer.step([closure, closure])
    with pytest.raises(ValueError, match="not for 4 micro-batches"):
        optimizer.step(closure, batch=make_batch(), micro_batches=4)
    assert not calls
    assert optimizer.param_groups[0]["sam_step"] == 2
    assert_same_bits(everything_of(optimizer, model), before)
    optimizer.step([closure_of(optimizer, model, make_batch())])  # a list of one is a batch


@pytest.mark.parametrize("name", ONE_PASS)
def test_a_closure_for_the_ascent_alone_has_no_use_where_no_pass_comes_before_the_ascent(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    with pytest.raises(ValueError, match=r"SAM\.step: direction '(momentum|stale)' takes no gradient before the ascent; ascent_closure"):
        optimizer.step(lambda: 0.0, ascent_closure=lambda: 0.0)
    assert optimizer.param_groups[0]["sam_step"] == 0


def rwsam(model: nn.Module, **parts: Any) -> Any:
    return sam_kernels.RWSAM(model, torch.optim.SGD, beta=0.0, lr=0.1, momentum=0.5, **parts)


@pytest.mark.parametrize(
    "part",
    [
        {"direction": directions.Randomized()},
        {"direction": directions.Momentum()},
        {"direction": directions.Stale()},
        *({"descent": d} for d in RULES),
    ],
)
def test_rwsam_refuses_what_is_not_made_of_its_weighted_gradient(part: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"RWSAM: (direction '[\w-]+' does not ascend|descent '[\w-]+' needs the plain gradient)"):
        rwsam(make_model(), **part)


WITH_RWSAM = [
    pytest.param({"direction": directions.VarianceSuppressed(0.3)}, "VaSSO", {"theta": 0.3}, id="vasso"),
    pytest.param({"direction": directions.Friendly(0.7, 0.5)}, "FriendlySAM", {"sigma": 0.7, "lmbda": 0.5}, id="friendly"),
    pytest.param({"direction": directions.Extragradient()}, "Extragradient", {"lambd": 1.0}, id="extragradient"),
    pytest.param({"direction": directions.Centralized()}, "GCSAM", {}, id="centralized"),
    pytest.param({"descent": descents.Polyak(0.1)}, "SAM", {"descent": descents.Polyak(0.1)}, id="polyak"),
]


@pytest.mark.parametrize(("parts", "name", "options"), WITH_RWSAM)
def test_rwsam_goes_with_the_others_and_with_beta_zero_is_the_member(parts: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    """And with another β it is not: the ascent is along samples of long gradients."""
    models = [make_model(torch.float64) for _ in range(3)]
    weighted, other = rwsam(models[0], rho=0.1, **parts), rwsam(models[2], rho=0.1, **parts)
    other.param_groups[0]["beta"] = 2.0
    expected = getattr(sam_kernels, name)(models[1].parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.5, **options)
    for k in range(4):
        inputs, targets = make_batch(torch.float64, seed=k)
        for optimizer, model in ((weighted, models[0]), (other, models[2])):
            optimizer.step(lambda model=model, x=inputs, y=targets: (model(x) - y).square().mean(dim=1))
        expected.step(closure_of(expected, models[1], (inputs, targets)))
    got, wanted, different = (everything_of(o, m) for o, m in zip((weighted, expected, other), models, strict=True))
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)
    assert (got[0] - different[0]).abs().max() > 1e-8
    assert different[0].isfinite().all()


def test_a_wrong_loss_is_found_before_the_step() -> None:
    model = make_model()
    optimizer = make("SAMSPS", model.parameters())
    run(optimizer, model, 1)
    before = everything_of(optimizer, model)
    with pytest.raises(TypeError, match=r"SAMSPS: the loss must be a number or a tensor of one element, got a torch\.float32 tensor"):
        optimizer.step(lambda: closure_of(optimizer, model, make_batch())() * torch.ones(2))
    assert_same_bits(everything_of(optimizer, model), before)
    loss_of(model, make_batch()).backward()
