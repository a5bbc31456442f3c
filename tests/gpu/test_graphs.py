"""Whole steps in CUDA graphs: replayed, they are the eager steps, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sam_kernels.schedules import Interval, LRProportional
from tests.helpers.compare import assert_same_bits
from tests.helpers.training import BASES, CAPTURABLE_MEMBERS, closure_of, everything, make, make_member
from tests.optim.family_runs import memory_of
from tests.schedules.rules import LossOverNorm

pytestmark = [pytest.mark.cuda, pytest.mark.only_cuda, pytest.mark.usefixtures("kernels")]


def warm_up(steps: int, step: Callable[[], Any]) -> None:
    """On a side stream, as torch asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps):
            step()
    torch.cuda.current_stream().wait_stream(side)


def capture(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.01}, {"max_grad_norm": 0.5}], ids=["sam", "asam", "clipped"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["grads_reallocated", "grads_kept"])
@pytest.mark.parametrize("base", BASES)
def test_replays_are_eager_steps(base: str, set_to_none: bool, options: dict[str, Any], device: str) -> None:
    (model, optimizer), (twin, eager) = make(base, device, capturable=True, **options), make(base, device, **options)
    closure, twin_closure = closure_of(optimizer, model, set_to_none=set_to_none), closure_of(eager, twin, set_to_none=set_to_none)
    warm_up(3, lambda: optimizer.step(closure))
    graph = capture(lambda: optimizer.step(closure))
    for _ in range(3):
        eager.step(twin_closure)
    assert_same_bits("after the capture, which runs nothing", everything(model, optimizer), everything(twin, eager))
    for replays in (1, 20):
        for _ in range(replays):
            graph.replay()
            eager.step(twin_closure)
        assert_same_bits(f"after {replays} more replays", everything(model, optimizer), everything(twin, eager))
    # Eager steps in between have gradients of their own: the graph's tables must not follow them, nor theirs the graph's.
    for _ in range(2):
        for _ in range(3):
            optimizer.step(closure)
            eager.step(twin_closure)
        assert_same_bits("after eager steps", everything(model, optimizer), everything(twin, eager))
        graph.replay()
        graph.replay()
        eager.step(twin_closure)
        eager.step(twin_closure)
        assert_same_bits("after replays again", everything(model, optimizer), everything(twin, eager))


@pytest.mark.parametrize("name", CAPTURABLE_MEMBERS)
def test_replays_of_the_family_are_eager_steps(name: str, device: str) -> None:
    """Averages and step sizes too."""
    (model, optimizer), (twin, eager) = make_member(name, device, capturable=True), make_member(name, device, capturable=True)
    closure, twin_closure = closure_of(optimizer, model), closure_of(eager, twin)
    warm_up(3, lambda: optimizer.step(closure))
    graph = capture(lambda: optimizer.step(closure))
    for _ in range(3):
        eager.step(twin_closure)
    for _ in range(5):
        graph.replay()
        eager.step(twin_closure)
    assert_same_bits("after five replays", everything(model, optimizer), everything(twin, eager))
    assert_same_bits("what is kept", *([each.cpu() for each in memory_of(one)] for one in (optimizer, eager)))
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("base", BASES)
def test_the_update_alone(base: str, device: str) -> None:
    """Forward and backward eager, the two halves of the step two graphs over gradients that stay where they are."""
    (model, optimizer), (twin, eager) = make(base, device, capturable=True), make(base, device)
    closure, twin_closure = closure_of(optimizer, model, set_to_none=False), closure_of(eager, twin, set_to_none=False)

    def halves(first: Callable[[], Any], second: Callable[[], Any]) -> None:
        closure()
        first()
        closure()
        second()

    warm_up(3, lambda: halves(optimizer.first_step, optimizer.second_step))
    graphs = [capture(optimizer.first_step), capture(optimizer.second_step)]
    for _ in range(10):
        halves(graphs[0].replay, graphs[1].replay)
    for _ in range(13):
        eager.step(twin_closure)
    assert_same_bits("after ten steps", everything(model, optimizer), everything(twin, eager))


def test_a_replay_skips_a_step_that_is_not_finite(device: str) -> None:
    model, optimizer = make("sgd", device, capturable=True)
    closure = closure_of(optimizer, model)
    warm_up(2, lambda: optimizer.step(closure))
    graph = capture(lambda: optimizer.step(closure))
    graph.replay()
    before = everything(model, optimizer)
    model.factor.fill_(torch.inf)
    graph.replay()
    assert_same_bits("after an infinite loss", everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1
    model.factor.fill_(1.0)
    graph.replay()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(everything(model, optimizer)[0], before[0])


SCHEDULES: dict[str, dict[str, Any]] = {
    "filled": {},
    "usam_to_sam": {"lambd": "1-1/t"},
    "sam_to_usam, a radius that shrinks": {"lambd": "1/t", "rho": "0.1/k^0.5"},
    "callables": {"lambd": lambda t: t / (t + 2), "rho": lambda t: 1 / (t + 9)},
    "a radius that follows lr": {"rho": LRProportional(0.1, 0.02, 0.1, 0.0)},
    "every third step, by loss and norm": {"rho": Interval(LossOverNorm(0.05), 3)},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("base", BASES)
def test_a_replay_follows_schedules(base: str, schedule: str, device: str) -> None:
    """lr by a scheduler; rho and lambd by the graph's own count of steps, or filled between replays."""
    options = SCHEDULES[schedule]
    models, optimizers, schedulers = [], [], []
    for capturable in (True, True, False):  # to be recorded, its twin, and one with numbers
        model, optimizer = make(base, device, capturable=capturable, **options)
        if capturable:
            group = optimizer.param_groups[0]
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device=device)
        models.append(model)
        optimizers.append(optimizer)
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5))
    (model, twin, plain_model), (optimizer, eager, plain) = models, optimizers
    closures = [closure_of(*pair) for pair in zip(optimizers, models, strict=True)]
    warm_up(2, lambda: optimizer.step(closures[0]))
    graph = capture(lambda: optimizer.step(closures[0]))
    for _ in range(2):
        eager.step(closures[1])
        plain.step(closures[2])
    for k in range(10):
        if not options:
            for capturable in (optimizer, eager):
                capturable.param_groups[0]["rho"].fill_(0.1 / (k + 1))
                capturable.param_groups[0]["lambd"].fill_(1 / (k + 1))
            plain.param_groups[0].update({"rho": 0.1 / (k + 1), "lambd": 1 / (k + 1)})
        graph.replay()
        eager.step(closures[1])
        plain.step(closures[2])
        for scheduler in schedulers:
            scheduler.step()
    assert_same_bits("beside eager steps", everything(model, optimizer), everything(twin, eager))
    for got, expected in zip(everything(model, optimizer), everything(plain_model, plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["sam_step"].item() == plain.param_groups[0]["sam_step"] == 12


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("capturable", "steps", "message"),
    [(False, 2, "made without capturable=True"), (True, 0, "no step was made before")],
    ids=["not_capturable", "not_warm"],
)
def test_what_cannot_be_recorded_is_refused(base: str, capturable: bool, steps: int, message: str, device: str) -> None:
    model, optimizer = make(base, device, capturable=capturable)
    closure = closure_of(optimizer, model)

    def attempt() -> None:
        model.factor.fill_(1.0)  # torch warns of an empty graph
        optimizer.step(closure)

    warm_up(steps, lambda: optimizer.step(closure))
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        capture(attempt)
    assert_same_bits("after the attempt", everything(model, optimizer), before)
    optimizer.step(closure)
