"""Whole steps under ``torch.compile``: operations that read what others have written, and numbers that change with every step."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sam_kernels import functional
from tests.helpers.compiling import assert_same, clone, compiled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def step_arguments() -> dict[str, Any]:
    def tensors() -> list[Tensor]:
        return [torch.randn(3, 4), torch.randn(6, 5).t()[::2], torch.randn(7).to(torch.bfloat16)]

    names = ("params", "first_grads", "second_grads", "old_params", "exp_avgs", "exp_avg_sqs")
    given: dict[str, Any] = {name: tensors() for name in names}
    given["exp_avg_sqs"] = [tensor.square() for tensor in given["exp_avg_sqs"]]
    given["momentum_buffers"] = [None, torch.randn(3, 6), None]
    given["state_steps"] = [torch.tensor(float(i)) for i in range(3)]
    return given | {"found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(4.0)}


def whole_step(
    params: list[Tensor],
    first_grads: list[Tensor],
    second_grads: list[Tensor],
    old_params: list[Tensor],
    *,
    lr: float,
    rho: float,
    **state: Any,
) -> list[Tensor]:
    """Ascent and both descents; between them the parameters are read, as a forward pass in the same graph would."""
    amp = {"grad_scale": state["grad_scale"], "found_inf": state["found_inf"]}
    norm = functional.grad_norm(first_grads, params, adaptive=True, eta=0.1, found_inf=state["found_inf"])
    functional.perturb_(params, first_grads, old_params, norm, rho=rho, adaptive=True, eta=0.1, **amp)
    seen = [param * 2 for param in params]
    second = functional.grad_norm(second_grads, found_inf=state["found_inf"])
    clip = {"norm": second, "max_norm": 0.5}
    functional.sgd_step_(
        params, second_grads, state["momentum_buffers"], old_params=old_params, lr=lr, momentum=0.9, weight_decay=0.1, **amp, **clip
    )
    seen += [param + 1 for param in params]
    moments = (state["exp_avgs"], state["exp_avg_sqs"], state["state_steps"])
    functional.adamw_step_(params, second_grads, *moments, old_params=old_params, lr=lr, **amp, **clip)
    groups = functional.grad_norms([first_grads, second_grads[:1], []])
    functional.restore_(old_params, params)
    return [*seen, norm, second, groups, functional.combine_norms([norm, second])]


def assert_whole_step(compiler: str, *, calls: int) -> int:
    """Runs whole steps with another lr and rho a call; returns how many graphs were made."""
    counter = CompileCounterWithBackend(compiler)
    step = torch.compile(whole_step, backend=counter, fullgraph=True)
    for i in range(calls):
        eager = step_arguments()
        traced = clone(eager)
        schedule = {"lr": 0.1 / (i + 1), "rho": 0.05 * (i + 1)}
        expected, actual = whole_step(**eager, **schedule), step(**traced, **schedule)
        assert_same(f"call {i}: results", actual, expected)
        for key in eager:
            assert_same(f"call {i}: {key}", traced[key], eager[key])
        assert all(buffer is not None for buffer in traced["momentum_buffers"])
    return int(counter.frame_count)


def test_a_whole_step(backend: str) -> None:
    assert_whole_step("aot_eager", calls=1)


def direction_arguments() -> dict[str, Any]:
    given = {name: tensors for name, tensors in step_arguments().items() if name in ("params", "old_params", "grad_scale", "found_inf")}
    given |= {"first": step_arguments()["first_grads"], "second": step_arguments()["first_grads"]}
    return given | {"ema": [None, torch.randn(6, 5).t()[::2], None], "norm": torch.tensor(-1.0), "skipped": torch.tensor(2.0)}


def step_along_directions(
    params: list[Tensor],
    old_params: list[Tensor],
    *,
    first: list[Tensor],
    second: list[Tensor],
    ema: list[Tensor | None],
    norm: Tensor,
    skipped: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    seed: int,
    kind: str,
) -> list[Tensor]:
    """Two steps of a moving average, whose list is passed on as it was and as it has become; norms into one tensor, and random numbers."""
    options: dict[str, Any] = {"kind": kind, "sigma": 0.8, "lmbda": 0.7}
    amp = {"grad_scale": grad_scale, "found_inf": found_inf}
    functional.grad_norm_(norm, first, found_inf=found_inf, skipped=skipped)
    seen = [norm * 2, found_inf + skipped]
    before = list(ema)
    along = functional.direction_norm_(first, ema, theta=0.3, **options, **amp)
    was_first = [None if entry is None else average for entry, average in zip(before, ema, strict=True)]
    functional.perturb_(params, first, old_params, along, rho=0.1, ema=was_first, rounding_seed=seed, **options, **amp)
    seen += [along, *[param * 2 for param in params]]
    # The list holds tensors now, in eager calls and here.
    functional.perturb_(params, first, old_params, along, rho=0.2, from_old=True, ema=ema, rounding_seed=seed + 1, **options, **amp)
    seen += [param * 2 for param in params]
    functional.restore_(params, old_params)
    along = functional.direction_norm_(second, ema, params, adaptive=True, eta=0.1, theta=0.3, **options, **amp)
    functional.perturb_(params, second, old_params, along, rho=0.1, adaptive=True, eta=0.1, ema=ema, **options, **amp)
    seen += [along, *[param * 2 for param in params]]
    functional.random_perturb_(params, old_params, seed=seed, scale=0.1, distribution="normal", from_old=True)
    seen += [param * 2 for param in params]
    functional.check_finite_([*second, seen[-1] * torch.inf], found_inf)
    functional.grad_norm_(norm, second, params, adaptive=True, found_inf=found_inf, skipped=skipped)
    return seen


def assert_step_along_directions(compiler: str, kind: str, seeds: list[int]) -> int:
    """Returns how many graphs were made."""
    counter = CompileCounterWithBackend(compiler)
    step = torch.compile(step_along_directions, backend=counter, fullgraph=True)
    for seed in seeds:
        eager = direction_arguments()
        if compiler == "inductor":  # computes with a 0-dim CPU tensor only when the result is needed, of what was written to it since
            eager |= {name: eager[name].reshape(1) for name in ("norm", "found_inf", "skipped")}
        traced = clone(eager)
        expected, actual = step_along_directions(**eager, kind=kind, seed=seed), step(**traced, kind=kind, seed=seed)
        assert_same(f"seed {seed}: results", actual, expected)
        for key in eager:
            assert_same(f"seed {seed}: {key}", traced[key], eager[key])
        assert all(average is not None for average in traced["ema"])
    return int(counter.frame_count)


@pytest.mark.parametrize("kind", ["vasso", "friendly"])
def test_a_step_along_directions(backend: str, kind: str) -> None:
    assert_step_along_directions("aot_eager", kind, seeds=[5])


# What needs 64 bits is exact, as a graph's first value and as an input of it.
@pytest.mark.parametrize("seeds", [[5, 2**32 + 5, 2**63 - 2, 2**63, 2**64 - 2, 0], [2**64 - 2, 1, 2**32, 2**63 + 1]], ids=str)
def test_schedules_of_seeds_make_two_graphs(seeds: list[int]) -> None:
    assert assert_step_along_directions("aot_eager", "vasso", seeds) == 2


@pytest.mark.parametrize("options", [{}, {"kind": "vasso"}], ids=str)
def test_an_average_that_is_the_gradient_itself(options: dict[str, Any]) -> None:
    """Only read: nothing forbids that the lists share tensors."""

    def function(param: Tensor, grad: Tensor, old: Tensor) -> Tensor:
        functional.perturb_([param], [grad], [old], grad.norm(), rho=0.5, ema=[grad] if options else None, **options)
        return param + grad

    eager = [torch.randn(5), torch.randn(5), torch.randn(5)]
    traced = clone(eager)
    assert_same("result", compiled(function)(*traced), function(*eager))
    assert_same("arguments", traced, eager)


def test_a_skipped_first_step_leaves_the_same_average(backend: str) -> None:
    """Unlike a momentum buffer: eager calls put it into the list too."""

    def function(grad: Tensor, ema: list[Tensor | None], found_inf: Tensor) -> Tensor:
        return functional.direction_norm_([grad], ema, kind="friendly", found_inf=found_inf)

    eager: tuple[Any, ...] = (torch.tensor([1.0, torch.nan, 2.0]), [None], torch.tensor(0.0))
    traced = clone(eager)
    assert_same("result", compiled(function)(*traced), function(*eager))
    assert_same("arguments", traced, eager)
    assert traced[1][0].tolist() == [1.0, 0.0, 2.0]


def test_schedules_of_lr_and_rho_make_two_graphs() -> None:
    assert assert_whole_step("aot_eager", calls=4) == 2  # with the numbers as constants, then with them as inputs


def test_numbers_given_as_tensors_make_no_graph_after_the_first_call() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(whole_step, backend=counter, fullgraph=True)
    made = []
    for lr in (0.1, 0.2, 0.3):
        eager = step_arguments()
        traced = clone(eager)
        schedule = {"lr": torch.tensor(lr), "rho": torch.tensor(lr, dtype=torch.float64)}
        assert_same("results", step(**traced, **schedule), whole_step(**eager, **schedule))
        assert_same("arguments", traced, eager)
        made.append(counter.frame_count)
    assert made == made[:1] * 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_whole_step_in_inductor() -> None:
    assert_whole_step("inductor", calls=2)
    assert_step_along_directions("inductor", "friendly", seeds=[2**64 - 2, 5])
