"""Parameter groups, parameters without a gradient, frozen ones: what takes part in a member's formula, and what stands aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import functional
from sam_kernels.optim._seeds import derived_seed
from tests.optim.family import BASES, MEMBERS, ONE_PASS, SEED, SIGMA
from tests.optim.family_runs import CASES, ONE_CASE_EACH, base_of, close, everything_of, make, run, using
from tests.optim.problem import assert_same_bits, closure_of, every_backend, loss_of, make_batch, make_model, twin, weights
from tests.optim.transcriptions import Transcription


def in_two(model: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters()), **first}, {"params": list(model[2].parameters()), **second}]


def draw_by_group(model: nn.Module, *, without: tuple[int, ...] = ()) -> Callable[[int, list[Tensor]], list[Tensor]]:
    """Δ of RSAM: seeds are those of a group, in which a parameter is a row; groups ``without`` do not move."""

    def draw(t: int, start: list[Tensor]) -> list[Tensor]:
        delta = [torch.zeros_like(param) for param in start]
        for i, part in enumerate((delta[:2], delta[2:])):
            if i not in without:
                seed = derived_seed(SEED, t, 0, i)
                functional.random_perturb_(part, [torch.empty_like(each) for each in part], seed=seed, scale=SIGMA, distribution="normal")
        return delta

    return draw


def follows(
    name: str, base: str, first: dict[str, Any], second: dict[str, Any], loss: Callable[[nn.Module, Any], Tensor] = loss_of, **theirs: Any
) -> None:
    """Six steps of two groups are those of the formula. ``theirs``: the transcription's own way of putting the groups' options."""
    member, model = MEMBERS[name], make_model(torch.float64)
    other = twin(model)
    base_class, kwargs = BASES[base]
    given = {"weight_decay": 0.1, "lr": member.options["gamma_b"], **kwargs} if name == "SAMSPS" else kwargs
    only_base = [{key: value for key, value in options.items() if key == "lr"} for options in (first, second)]
    if name == "RSAM":
        theirs = {"draw": draw_by_group(other), **theirs}
    expected = member.transcribe(other, base_class(in_two(other, *only_base), **given), loss, **theirs)
    optimizer = make(name, in_two(model, first, second), base)
    step_alike(optimizer, model, expected, loss)


def step_alike(optimizer: Any, model: nn.Module, expected: Transcription, loss: Any) -> None:
    """Six steps are the transcription's."""
    for k in range(6):
        batch = make_batch(torch.float64, seed=k)
        optimizer.step(closure_of(optimizer, model, batch, loss))
        expected.step(batch)
        close(weights(model), weights(expected.model))


@every_backend
@pytest.mark.parametrize(("name", "base"), CASES)
def test_two_groups_with_equal_options_are_one(backend: str, name: str, base: str) -> None:
    options = {"sigma": 0.0} if name == "RSAM" else {}  # seeds are those of a group
    model = make_model(torch.float64)
    other = twin(model)
    with using(backend):
        two, one = make(name, in_two(model, {}, {}), base, **options), make(name, other.parameters(), base, **options)
        run(two, model, 6)
        run(one, other, 6)
    close(everything_of(two, model), everything_of(one, other))


@every_backend
@pytest.mark.parametrize(("name", "base"), CASES)
def test_a_group_with_rho_zero_stands_aside_in_the_ascent_alone(backend: str, name: str, base: str) -> None:
    """Not in the norm, not moved, by Δ neither; its gradient counts wherever the descent rule has a gradient."""
    theirs: dict[str, Any] = {"rho": [MEMBERS[name].rho] * 2 + [0.0] * 2}
    if name == "RSAM":
        theirs["draw"] = draw_by_group(make_model(), without=(1,))
    with using(backend):
        follows(name, base, {}, {"rho": 0.0}, **theirs)


@every_backend
@pytest.mark.parametrize(("name", "base"), CASES)
def test_radii_normalisation_and_learning_rates_of_a_groups_own(backend: str, name: str, base: str) -> None:
    """SAM-SPS: lr bounds the step; decoupled WSAM: it steps the sharpness down; the others: it is the base's."""
    theirs = {"rho": [0.2] * 2 + [0.1] * 2, "adaptive": [False] * 2 + [True] * 2}
    with using(backend):
        follows(name, base, {"rho": 0.2, "lr": 0.02}, {"rho": 0.1, "adaptive": True, "lr": 0.005}, **theirs)


class Gaps:
    """The loss, with a parameter that has no gradient in some of the passes, 1 and 2, of every step."""

    def __init__(self, name: str, missing: tuple[int, ...]) -> None:
        self.name, self.missing, self.calls = name, missing, 0

    def passes(self) -> list[int]:
        if self.name in ONE_PASS:
            return [2]
        if self.name == "LookSAM":
            return [1, 2, 2, 2]  # k = 3: two passes, then one, then one
        return [1, 2, 2] if self.name == "CRSAM" else [1, 2]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        passes = self.passes()
        now = passes[self.calls % len(passes)]
        self.calls += 1
        inputs, targets = batch
        bias = model[0].bias.detach() if now in self.missing else model[0].bias
        return nn.functional.mse_loss(model[2](torch.tanh(nn.functional.linear(inputs, model[0].weight, bias))), targets)


@every_backend
@pytest.mark.parametrize("missing", [(1,), (2,), (1, 2)], ids=["first", "second", "both"])
@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_parameters_without_a_gradient(backend: str, name: str, base: str, missing: tuple[int, ...]) -> None:
    """In the first pass: it does not move, and has 0 for g. In the second: it is not stepped, whatever the first one gave."""
    member, model = MEMBERS[name], make_model(torch.float64)
    other = twin(model)
    base_class, kwargs = BASES[base]
    kwargs = {"weight_decay": 0.1, "lr": member.options["gamma_b"], **kwargs} if name == "SAMSPS" else kwargs
    expected = member.transcribe(other, base_class(other.parameters(), **kwargs), Gaps(name, missing))
    loss, start = Gaps(name, missing), weights(model)[1]
    with using(backend):
        step_alike(make(name, model.parameters(), base), model, expected, loss)
    assert torch.equal(model[0].bias.detach(), start) is (2 in missing)


@pytest.mark.parametrize(("name", "base"), CASES)
def test_frozen_parameters_are_as_if_they_were_not_there(name: str, base: str) -> None:
    model, other = make_model(torch.float64), make_model(torch.float64)
    for net in (model, other):
        for param in net[2].parameters():
            param.requires_grad_(False)
    start = weights(model)
    given, alone = make(name, model.parameters(), base), make(name, other[0].parameters(), base)
    run(given, model, 5)
    run(alone, other, 5)
    assert_same_bits(weights(model)[2:], start[2:])
    assert_same_bits(weights(model), weights(other))
    assert not torch.equal(weights(model)[0], start[0])


@pytest.mark.parametrize("name", list(MEMBERS))
def test_a_closure_without_a_gradient_is_refused_and_changes_nothing(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base_of(name))
    run(optimizer, model, 2)
    before = everything_of(optimizer, model)

    def closure() -> float:
        optimizer.zero_grad()
        return 1.0

    if name == "LookSAM":  # its third step has one pass, a step of the base
        optimizer.step(closure)
    else:
        with pytest.raises(RuntimeError, match="the closure left no gradient of its own"):
            optimizer.step(closure)
    assert_same_bits(everything_of(optimizer, model), before)
    assert optimizer.skipped_steps == 0
    run(optimizer, model, 1)
