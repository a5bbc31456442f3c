"""``stochastic_rounding``: unbiased, reproducible, and other random numbers wherever a step is another one."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import SAM
from tests.helpers.compare import assert_same_bits

ULP = 2.0**-7  # of bfloat16 numbers from 1 to 2
RARE = 1e-6  # how often a bound of these tests would fail by chance, were the seeds not fixed
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
MODES = pytest.mark.parametrize(
    "options",
    [{"stochastic_rounding": True}, {"stochastic_rounding": "update"}, {"stochastic_rounding": True, "master_weights": True}],
    ids=["ascent", "update", "masters"],
)


def params_of(*sizes: int) -> list[nn.Parameter]:
    """The same values for each size."""
    return [nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(size)).to(torch.bfloat16)) for size in sizes]


def closure_of(optimizer: SAM, params: list[nn.Parameter], seen: list[list[Tensor]] | None = None) -> Callable[[], Tensor]:
    """Of a loss whose gradient depends on the weights. ``seen`` gets the weights of every call."""

    def closure() -> Tensor:
        if seen is not None:
            seen.append([param.detach().clone() for param in params])
        optimizer.zero_grad()
        loss = sum((param.to(torch.float32).square().sum() for param in params), torch.tensor(0.0))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss

    return closure


def assert_chi_square(counts: Tensor, draws: int, p: float) -> None:
    """That counts are those of so many draws of probability p, by the tail bounds of Laurent and Massart (2000, lemma 1)."""
    degrees, x = counts.numel(), -math.log(RARE)
    found = ((counts.to(torch.float64) - draws * p).square() / (draws * p * (1 - p))).sum().item()
    assert degrees - 2 * math.sqrt(degrees * x) <= found <= degrees + 2 * math.sqrt(degrees * x) + 2 * x


@pytest.mark.parametrize("p", [1 / 64, 0.25, 0.5])
def test_a_perturbed_weight_is_rounded_up_as_often_as_it_is_above(p: float) -> None:
    size, steps = 4096, 40
    param = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    optimizer = SAM([param], torch.optim.SGD, lr=1e-30, rho=p * ULP * math.sqrt(size), stochastic_rounding=True)
    ups = []
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.first_step()
        ups.append((param.detach() > 1).to(torch.int64))
        assert set(param.detach().unique().tolist()) <= {1.0, 1 + ULP}
        optimizer.second_step()
        assert bool((param == 1).all())
    counts = torch.stack(ups)
    assert_chi_square(counts.sum(1), size, p)  # of each step
    assert_chi_square(counts.sum(0), steps, p)  # of each element


def test_the_mean_perturbation_is_the_perturbation() -> None:
    torch.manual_seed(0)
    layer, rho, draws = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16), 0.05, 36
    weight, grad = layer.weight, torch.randn(1024, 1024).to(torch.bfloat16)
    before = weight.detach().to(torch.float32)  # differences of neighbours, and sums of few of them, are exact
    wanted = rho * grad.to(torch.float32) / grad.to(torch.float64).norm().item()
    optimizer = SAM(layer.parameters(), torch.optim.SGD, lr=1e-30, rho=rho, stochastic_rounding=True)
    total, nearest = torch.zeros_like(before), (before + wanted).to(torch.bfloat16).to(torch.float32) - before
    for i in range(draws):
        weight.grad = grad
        optimizer.first_step()
        total += weight.detach().to(torch.float32) - before
        if i == 0:
            assert cosine(total, wanted) < cosine(nearest, wanted) < 0.9  # nothing is closer than the nearest, and that is not close
        optimizer.second_step()
    assert cosine(total, wanted) >= 0.99
    # An element's variance is at most ulp^2 / 4: that of its two neighbours, each half of the time.
    ulp = torch.ldexp(torch.ones_like(before), torch.frexp((before + wanted).abs()).exponent - 8)
    square = wanted.to(torch.float64).square().sum()
    error = ((wanted * ulp).to(torch.float64).square().sum() / (4 * draws)).sqrt() / square
    projection = (total / draws * wanted).to(torch.float64).sum() / square
    assert abs(projection - 1) <= math.sqrt(-2 * math.log(RARE / 2)) * error  # Hoeffding


def cosine(left: Tensor, right: Tensor) -> float:
    left, right = left.to(torch.float64), right.to(torch.float64)
    return ((left * right).sum() / (left.norm() * right.norm())).item()


@MODES
def test_steps_repeat_on_any_number_of_threads_and_from_a_checkpoint(options: dict[str, Any]) -> None:
    runs, threads = [], torch.get_num_threads()
    try:
        for count, restarts in ((1, False), (2, False), (2, True)):
            torch.set_num_threads(count)
            params = params_of(70_001, 5)
            optimizer = SAM(params, SGD, rho=0.5, **options)
            for i in range(4):
                if restarts and i == 2:
                    params = [nn.Parameter(param.detach().clone()) for param in params]
                    state, optimizer = optimizer.state_dict(), SAM(params, SGD, rho=0.5, **options)
                    optimizer.load_state_dict(state)
                optimizer.step(closure_of(optimizer, params))
            runs.append([param.detach() for param in params])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert_same_bits("params", run, runs[0])


def test_steps_micro_batches_and_groups_have_numbers_of_their_own() -> None:
    """The same weights and gradients everywhere."""
    params = [nn.Parameter(torch.ones(1024, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = SAM([{"params": [param]} for param in params], torch.optim.SGD, lr=1e-30, rho=1.0, stochastic_rounding=True)
    seen: list[list[Tensor]] = []
    closure = closure_of(optimizer, params, seen)
    for _ in range(2):
        optimizer.step([closure, closure])
    before, perturbed = seen[::2], [each for pair in seen[1::2] for each in pair]
    assert all(bool((each == 1).all()) for pair in before for each in pair)
    assert len({tuple(each.tolist()) for each in perturbed}) == 2 * 2 * 2  # steps, micro-batches, groups


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=lambda base: base.__name__)
@pytest.mark.parametrize("way", ["two steps", "backward", "m-SAM of one"])
def test_every_way_to_make_a_step_perturbs_alike(base: type[torch.optim.Optimizer], way: str) -> None:
    expected: list[list[Tensor]] = []
    params = params_of(300, 7)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=0.5, stochastic_rounding=True)
    optimizer.step(closure_of(optimizer, params, expected))
    seen: list[list[Tensor]] = []
    params = params_of(300, 7)
    optimizer = SAM(params, base, lr=0.1, rho=0.5, stochastic_rounding=True)
    closure = closure_of(optimizer, params, seen)
    if way == "two steps":
        closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()
    elif way == "backward":

        def added() -> Tensor:
            seen.append([param.detach().clone() for param in params])
            loss = sum((param.to(torch.float32).square().sum() for param in params), torch.tensor(0.0))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.backward(added)
    else:
        optimizer.step([closure])
    assert_same_bits("perturbed", seen[1], expected[1])


def test_updates_that_bfloat16_would_lose_are_made_on_average() -> None:
    """A tenth of an ulp a step: rounded to nearest nothing moves; stochastically the mean of the weights is that of float32 weights."""
    size, steps, start, p = 4096, 200, 1.75, 0.1
    ends = {}
    for name, dtype, options in (
        ("nearest", torch.bfloat16, {}),
        ("update", torch.bfloat16, {"stochastic_rounding": "update"}),
        ("float32", torch.float32, {}),
    ):
        param = nn.Parameter(torch.full((size,), start, dtype=dtype))
        optimizer = SAM([param], torch.optim.SGD, lr=p * ULP, rho=0.5, **options)

        def closure(param: nn.Parameter = param) -> float:
            param.grad = torch.ones_like(param)
            return 0.0

        for _ in range(steps):
            optimizer.step(closure)
        ends[name] = param.detach().to(torch.float64)
    assert bool((ends["nearest"] == start).all())
    assert bool((ends["float32"] < start - 0.9 * steps * p * ULP).all())
    error = ULP * math.sqrt(steps / 4 / size)  # of the mean: Hoeffding's, of one rounding ulp / 2
    bound = math.sqrt(-2 * math.log(RARE / 2)) * error
    assert abs(ends["update"].mean() - ends["float32"].mean()) <= bound
    assert bound < 0.03 * steps * p * ULP


@MODES
def test_a_skipped_step_leaves_every_bit(options: dict[str, Any]) -> None:
    params = params_of(1030, 5)
    optimizer = SAM(params, SGD, rho=0.5, **options)
    optimizer.step(closure_of(optimizer, params))
    before = [param.detach().clone() for param in params]
    seen: list[list[Tensor]] = []
    closure = closure_of(optimizer, params, seen)

    def spoiled() -> Tensor:
        loss = closure()
        if len(seen) == 2:
            params[1].grad[0] = math.nan  # type: ignore[index]  # there is one
        return loss

    optimizer.step(spoiled)
    assert optimizer.skipped_steps == 1
    assert not torch.equal(seen[1][0], before[0])
    assert_same_bits("params", params, before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"stochastic_rounding": "yes"}, TypeError, "must be True, False or 'update', got"),
        ({"stochastic_rounding": 1}, TypeError, "must be True, False or 'update', got"),
        ({"stochastic_rounding": True, "capturable": True}, ValueError, "a graph would draw the same numbers"),
        ({"stochastic_rounding": "update", "master_weights": True}, ValueError, "masters are updated in float32"),
        ({"stochastic_rounding": "update", "base_optimizer": torch.optim.RMSprop}, ValueError, "RMSprop rounds its update by itself"),
        ({"stochastic_rounding": True, "dtype": torch.float16}, ValueError, r"param_groups\[0\]\['params'\]\[0\] is float16"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    options = {"base_optimizer": torch.optim.SGD, "dtype": torch.bfloat16, **options}
    params = [nn.Parameter(torch.ones(3, dtype=options.pop("dtype")))]
    with pytest.raises(error, match=words):
        SAM(params, lr=0.1, **options)


def test_an_update_that_is_not_fused_is_refused_with_the_weights_as_they_were() -> None:
    params = params_of(1030)
    optimizer = SAM(params, torch.optim.AdamW, lr=0.1, amsgrad=True, stochastic_rounding="update")
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="amsgrad"):
        optimizer.step(closure_of(optimizer, params))
    assert_same_bits("params", params, before)


def test_there_is_a_warning_where_nothing_is_bfloat16() -> None:
    with pytest.warns(UserWarning, match="has nothing to do: no parameter is bfloat16"):
        SAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, stochastic_rounding=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAM([nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)], SGD, stochastic_rounding=True)
        sam_kernels.SAM(params_of(3), SGD, stochastic_rounding=False)
