"""``scale`` of a group: T is multiplied by it inside of the norm, e = ρ T² d / ‖T d‖ over all groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import SAM, schedules
from sam_kernels.optim.directions import Direction
from tests.optim.family import BASES, MEMBERS
from tests.optim.family_runs import CASES, ONE_CASE_EACH, close, everything_of, make, run, using
from tests.optim.problem import (
    assert_same_bits,
    closure_of,
    every_backend,
    gradients,
    make_batch,
    make_model,
    through_a_file,
    twin,
    weights,
)
from tests.optim.test_family_groups import draw_by_group, follows, in_two

SCALES = [0.5] * 2 + [3.0] * 2


@every_backend
@pytest.mark.parametrize("options", [{}, {"lambd": 0.3}, {"adaptive": True, "eta": 0.0}], ids=str)
@pytest.mark.parametrize(("name", "base"), CASES)
def test_every_member_follows_its_formula(backend: str, name: str, base: str, options: dict[str, Any]) -> None:
    """Two groups of other scales, the second one adaptive or both, and mixed. (A norm of both in one call would miss a factor.)"""
    theirs = {"scale": SCALES, **({"adaptive": [False] * 2 + [True] * 2} if "adaptive" not in options else {}), **options}
    ours = {key: value for key, value in options.items() if key != "eta"}
    with using(backend):
        follows(name, base, {"scale": 0.5, **ours}, {"scale": 3.0, "adaptive": True, **ours}, **theirs)


@every_backend
@pytest.mark.parametrize(("name", "base"), [case for case in ONE_CASE_EACH if case.values[0] not in ("WSAM-decoupled", "SAMSPS")])
def test_the_gradient_that_is_clipped_is_not_scaled(backend: str, name: str, base: str) -> None:
    """Neither in its norm, which GCSAM takes by itself, nor in what the base steps along."""
    model = make_model(torch.float64)
    other = twin(model)
    base_class, kwargs = BASES[base]
    draw = {"draw": draw_by_group(other)} if name == "RSAM" else {}
    expected = MEMBERS[name].transcribe(other, base_class(other.parameters(), **kwargs), max_grad_norm=0.05, scale=SCALES, **draw)
    with using(backend):
        optimizer = make(name, in_two(model, {"scale": 0.5}, {"scale": 3.0}), base, max_grad_norm=0.05)
        for k in range(4):
            batch = make_batch(torch.float64, seed=k)
            optimizer.step(closure_of(optimizer, model, batch))
            expected.step(batch)
            close(weights(model), weights(other))


@every_backend
def test_layerwise_perturbations_of_mu_p_squared(backend: str) -> None:
    """arXiv 2411.00075: e_l = ρ s_l g_l / ‖(s_1 g_1, …, s_L g_L)‖, which is as long as ρ, with ρ / s_l for the radius of a group."""
    model, batch, seen = make_model(torch.float64), make_batch(torch.float64), []
    with using(backend):
        optimizer = SAM(in_two(model, {"scale": 0.5, "rho": 0.2}, {"scale": 4.0, "rho": 0.025}), torch.optim.SGD, lr=0.0)
        grads, start = gradients(model, batch), weights(model)

        def closure() -> Tensor:
            seen.append(weights(model))
            return closure_of(optimizer, model, batch)()

        optimizer.step(closure)
    scaled = [s * g for s, g in zip([0.5, 0.5, 4.0, 4.0], grads, strict=True)]
    norm = torch.cat([each.flatten() for each in scaled]).norm()
    close([there - w for there, w in zip(seen[1], start, strict=True)], [0.1 * each / norm for each in scaled])


@every_backend
@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_one_scale_for_all_groups_is_a_radius(backend: str, scale: float) -> None:
    """ρ s² g / (s ‖g‖): of a power of two bit for bit, whether one norm is taken or several."""
    models = [make_model() for _ in range(3)]
    with using(backend):
        optimizers = [
            SAM(models[0].parameters(), torch.optim.SGD, lr=0.1, rho=0.5, scale=scale, norm_eps=0.0),
            SAM(models[1].parameters(), torch.optim.SGD, lr=0.1, rho=0.5 * scale, norm_eps=0.0),
            SAM(in_two(models[2], {}, {"scale": scale}), torch.optim.SGD, lr=0.1, rho=0.5, scale=scale, norm_eps=0.0),
        ]
        for optimizer, model in zip(optimizers, models, strict=True):
            run(optimizer, model, 3)
    assert_same_bits(weights(models[0]), weights(models[1]))
    close(weights(models[2]), weights(models[1]), rtol=1e-5, atol=1e-6)


@every_backend
def test_a_scale_of_zero_is_a_radius_of_zero(backend: str) -> None:
    models = [make_model() for _ in range(2)]
    with using(backend):
        for model, second in zip(models, ({"scale": 0.0}, {"rho": 0.0}), strict=True):
            run(SAM(in_two(model, {}, second), torch.optim.SGD, lr=0.1), model, 3)
    assert_same_bits(weights(models[0]), weights(models[1]))


@every_backend
@pytest.mark.parametrize("name", ["SAM", "VaSSO", "GCSAM", "S2SAM"])
def test_capturable_steps_and_those_under_a_loss_scale_are_the_same(backend: str, name: str) -> None:
    models = [make_model(torch.float64) for _ in range(3)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with using(backend):
        optimizers = [
            make(name, in_two(model, {"scale": 0.5}, {"scale": 3.0}), lambd=0.5, capturable=model is models[1]) for model in models
        ]
        for k in range(3):
            batch = make_batch(torch.float64, seed=k)
            for optimizer, model in zip(optimizers[:2], models, strict=False):
                optimizer.step(closure_of(optimizer, model, batch))

            def scaled(batch: Any = batch) -> Tensor:
                optimizers[2].zero_grad()
                loss = nn.functional.mse_loss(models[2](batch[0]), batch[1])
                scaler.scale(loss).backward()
                return loss

            optimizers[2].step(scaled, grad_scaler=scaler)
    close(weights(models[1]), weights(models[0]))
    close(weights(models[2]), weights(models[0]))


def test_a_radius_sees_the_scaled_norm() -> None:
    seen: list[float] = []

    class Sees(schedules.Radius):
        def radius(self, info: schedules.AscentInfo) -> float:
            seen.append(info.norm.item())
            return 0.1

    model, batch = make_model(torch.float64), make_batch(torch.float64)
    optimizer = SAM(in_two(model, {"scale": 0.5}, {"scale": 3.0}), torch.optim.SGD, lr=0.1, rho=Sees())
    scaled = [s * g for s, g in zip(SCALES, gradients(model, batch), strict=True)]
    optimizer.step(closure_of(optimizer, model, batch))
    assert seen == [pytest.approx(torch.cat([each.flatten() for each in scaled]).norm().item(), rel=1e-14)] * 2


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaled_norm_that_overflows_skips_the_step(overflows: bool) -> None:
    """3e38 is a float32, a multiple of it is none."""
    param = nn.Parameter(torch.ones(1))
    optimizer = SAM([param], torch.optim.SGD, lr=1e-39, rho=1e-30, scale=2.0 if overflows else 1.0)

    def closure() -> float:
        param.grad = torch.full((1,), 3e38)
        return 0.0

    optimizer.step(closure)
    assert optimizer.skipped_steps == int(overflows)


def test_checkpoints_hold_it_and_may_lack_it() -> None:
    model = make_model()
    optimizer = SAM(in_two(model, {"scale": 0.5}, {}), torch.optim.SGD, lr=0.1, scale=2.0)
    assert [group["scale"] for group in optimizer.param_groups] == [0.5, 2.0]
    run(optimizer, model, 1)
    saved = through_a_file(optimizer.state_dict())
    other = twin(model)
    resumed = SAM(in_two(other, {}, {}), torch.optim.SGD, lr=0.1)
    resumed.load_state_dict(saved)
    assert [group["scale"] for group in resumed.param_groups] == [0.5, 2.0]
    run(optimizer, model, 2)
    run(resumed, other, 2)
    assert_same_bits(everything_of(resumed, other), everything_of(optimizer, model))
    for group in saved["param_groups"]:
        del group["scale"]
    resumed = SAM(in_two(other, {}, {}), torch.optim.SGD, lr=0.1, scale=4.0)
    resumed.load_state_dict(saved)
    assert [group["scale"] for group in resumed.param_groups] == [4.0, 4.0]


def test_an_optimizer_pickled_without_it_has_one() -> None:
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    state = optimizer.__getstate__()
    state = {**state, "_keys": {k: v for k, v in state["_keys"].items() if k != "scale"}}
    state["defaults"] = {k: v for k, v in state["defaults"].items() if k != "scale"}
    del state["base_optimizer"].param_groups[0]["scale"]
    older = SAM.__new__(SAM)
    older.__setstate__(state)
    assert older.param_groups[0]["scale"] == 1.0
    run(older, model, 1)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (-0.5, ValueError, r"SAM: scale must be a finite number in \[0\.0, 1000000000\.0\], got -0\.5"),
        (float("nan"), ValueError, "SAM: scale must be"),
        (1e10, ValueError, "SAM: scale must be"),
        ("1", TypeError, "SAM: scale must be a number, got '1'"),
        (lambda t: 1.0, TypeError, "SAM: scale must be a number"),
    ],
)
def test_bad_input(scale: Any, error: type[Exception], message: str) -> None:
    model = make_model()
    with pytest.raises(error, match=message):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, scale=scale)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.param_groups[0]["scale"] = scale
    before = weights(model)
    with pytest.raises(error, match=message):
        run(optimizer, model, 1)
    assert_same_bits(weights(model), before)


def test_norms_of_ones_own_without_their_lists_are_refused() -> None:
    class Alone(Direction):
        name = "alone"

        def norm(self, step: Any, group_grads: Any, grad_scale: Any) -> Tensor:
            norm: Tensor = step.combined([sam_kernels.functional.grad_norm(each.grads) for each in group_grads])
            return norm

    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, direction=Alone(), scale=0.5)
    with pytest.raises(TypeError, match=r"a group has a scale, and AscentStep\.combined was given a norm alone; give \(lists, norm\)"):
        run(optimizer, model, 1)
    optimizer.param_groups[0]["scale"] = 1.0
    run(optimizer, model, 1)
