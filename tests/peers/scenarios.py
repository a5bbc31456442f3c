"""The rows of the table of peers: each runs one implementation and raises DoesNotHold, with what it has observed, or returns.

Weights count as restored if they are within four roundings of what they were: who restores them by subtraction is not blamed for the
last bit. State of the base must have its bits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.optim.problem import make_batch, make_model, weights
from tests.peers.implementations import RHO, Forward, Implementation, SamKernels

__all__ = ["SCENARIOS", "DoesNotHold", "Undecided", "close", "explain"]

Make = Callable[..., Implementation]  # (model, base, **options of the base)
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
SCALE = 1024.0
ROUNDING = 2.0**-24  # of float32


class DoesNotHold(Exception):
    """An implementation does something else than the row says. The message is the observation."""


class Undecided(Exception):
    """What can be checked here holds, and more is needed. The message names it."""


def explain(error: BaseException) -> str:
    """The first line of an exception, short."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:120]}"


def close(left: Iterable[Tensor], right: Iterable[Tensor], tolerance: float) -> bool:
    """Whether all elements are finite and differ by less than ``tolerance`` of the largest of their tensor."""
    return all(
        bool(torch.isfinite(a).all()) and (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())
        for a, b in zip(left, right, strict=True)
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def _forward(run: Implementation, seed: int) -> Forward:
    return lambda: _loss(run.model, make_batch(seed=seed))


def _spoiled(forward: Forward, bad_pass: int, factor: float) -> Forward:
    """The loss of pass ``bad_pass`` (1 or 2) times ``factor``."""
    passes = iter((1, 2))
    return lambda: forward() * (factor if next(passes, 0) == bad_pass else 1.0)


def _check_unchanged(run: Implementation, before: list[Tensor], state: list[Tensor], when: str) -> None:
    now = weights(run.model)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in now):
        raise DoesNotHold(f"{when}: the weights become NaN")
    if not close(now, before, 4 * ROUNDING):
        moved = torch.cat([(a - b).flatten() for a, b in zip(now, before, strict=True)]).norm().item()
        perturbed = ", still perturbed" if abs(moved - RHO) < 1e-4 * RHO else ""
        raise DoesNotHold(f"{when}: the weights have moved by {moved:.3f}{perturbed} (rho is {RHO})")
    if not all(torch.equal(a, b) for a, b in zip(run.base_state(), state, strict=True)):
        raise DoesNotHold(f"{when}: the state of the base has changed")


def _in_every_case(checks: Iterable[Callable[[], None]]) -> None:
    """Holds if every case does."""
    observed = []
    for check in checks:
        try:
            check()
        except DoesNotHold as failure:
            observed.append(str(failure))
    if observed:
        raise DoesNotHold("; ".join(observed))


def _in_one_way(ways: Iterable[str], check: Callable[[str], None]) -> None:
    """Holds if one of the ways does."""
    observed = []
    for way in ways:
        try:
            check(way)
            return
        except DoesNotHold as failure:
            observed.append(f"{way}: {failure}")
        except Exception as error:
            observed.append(f"{way}: {explain(error)}")
    raise DoesNotHold("; ".join(observed))


def mixed_precision(make: Make) -> None:
    """Scaled steps are those without a scaler; an inf in either pass skips the step and halves the scale."""

    def check(way: str) -> None:
        run, unscaled = make(make_model(), **SGD), make(make_model(), **SGD)
        scaler = run.scaler(SCALE)
        for k in range(3):
            run.scaled()[way](_forward(run, k), scaler)
            unscaled.step(_forward(unscaled, k))
        if not close(weights(run.model), weights(unscaled.model), 1e-6):
            raise DoesNotHold("the steps are not those without a scaler")
        for bad_pass in (2, 1):
            run = make(make_model(), **SGD)
            scaler, step = run.scaler(SCALE), run.scaled()[way]
            step(_forward(run, 0), scaler)
            before, state = weights(run.model), run.base_state()
            step(_spoiled(_forward(run, 1), bad_pass, float("inf")), scaler)
            _check_unchanged(run, before, state, f"inf in pass {bad_pass}")
            if scaler.get_scale() != SCALE / 2:
                raise DoesNotHold(f"inf in pass {bad_pass}: the scale is {scaler.get_scale()} after {SCALE}")

    _in_one_way(make(make_model(), **SGD).scaled(), check)


def nan_gradient(make: Make) -> None:
    """A NaN in the gradients of either pass, without a scaler."""

    def check(bad_pass: int) -> None:
        run = make(make_model(), **SGD)
        run.step(_forward(run, 0))
        before, state = weights(run.model), run.base_state()
        run.step(_spoiled(_forward(run, 1), bad_pass, float("nan")))
        _check_unchanged(run, before, state, f"NaN in pass {bad_pass}")

    _in_every_case([partial(check, 1), partial(check, 2)])


def exception(make: Make) -> None:
    """The closure of the second pass raises."""

    def check(error: BaseException) -> None:
        run = make(make_model(), **SGD)
        run.step(_forward(run, 0))
        before, state, passes = weights(run.model), run.base_state(), iter((1, 2))

        def forward() -> Tensor:
            if next(passes) == 2:
                raise error
            return _forward(run, 1)()

        when = f"{type(error).__name__} in pass 2"
        try:
            run.step(forward)
        except type(error):
            _check_unchanged(run, before, state, when)
        else:
            raise DoesNotHold(f"{when} does not reach the caller")

    _in_every_case([partial(check, torch.OutOfMemoryError("out of memory")), partial(check, KeyboardInterrupt())])


def resuming(make: Make) -> None:
    """Three steps, a file, and three more steps of another model and optimizer: the bits of six steps."""
    for base, options in ((torch.optim.SGD, SGD), (torch.optim.AdamW, {"lr": 0.01})):

        def check(way: str, base: Any = base, options: dict[str, Any] = options) -> None:
            run, file = make(make_model(), base, **options), io.BytesIO()
            for k in range(3):
                run.step(_forward(run, k))
            save, _ = run.checkpointing()[way]
            torch.save({"model": run.model.state_dict(), "optimizer": save()}, file)
            file.seek(0)
            stored = torch.load(file)
            other = make(make_model(), base, **options)
            other.model.load_state_dict(stored["model"])
            _, load = other.checkpointing()[way]
            load(stored["optimizer"])
            state, kept = other.base_state(), run.base_state()
            if len(state) != len(kept) or not all(torch.equal(a, b) for a, b in zip(state, kept, strict=True)):
                raise DoesNotHold(f"the state of {base.__name__} is lost")
            for k in range(3, 6):
                run.step(_forward(run, k))
                other.step(_forward(other, k))
            if not all(torch.equal(a, b) for a, b in zip(weights(run.model), weights(other.model), strict=True)):
                raise DoesNotHold("the weights differ after three more steps")

        _in_one_way(make(make_model(), base, **options).checkpointing(), check)


def accumulation(make: Make) -> None:
    """Four micro-batches make the step of the undivided batch."""
    run, whole = make(make_model(), **SGD), make(make_model(), **SGD)

    def part(k: int, i: int) -> Forward:
        inputs, targets = (tensor.chunk(4)[i] for tensor in make_batch(seed=k))
        return lambda: _loss(run.model, (inputs, targets)) / 4

    for k in range(3):
        run.step(*(part(k, i) for i in range(4)))
        whole.step(_forward(whole, k))
    if not close(weights(run.model), weights(whole.model), 1e-6):
        raise DoesNotHold("the steps are not those of undivided batches")


def cuda_graph(make: Make) -> None:
    """Two things without which no graph can hold a step. Whether a device captures it cannot be seen here.

    This package runs other code under FakeTensors. For it only the addresses say something; `tests/gpu/test_graphs.py` has the rest.
    """
    _check_that_nothing_is_read(_Capturable if make is SamKernels else make)
    run = make(make_model(), **SGD)
    run.step(_forward(run, 0))  # makes the momentum
    before = _addresses(run)
    for k in range(3):
        run.step(_forward(run, k))
        if _addresses(run) != before:
            raise DoesNotHold("a step leaves the weights at another address, where a graph does not read them")
    raise Undecided("the capture itself needs a device")


class _Capturable(SamKernels):
    is_capturable = True


class _FakeLoss:
    """A loss on a device that this machine has not: its backward pass leaves gradients without values."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())

    def backward(self) -> None:
        for param in self.params:
            param.grad = torch.empty_like(param, requires_grad=False)

    def detach(self) -> Tensor:
        return torch.empty((), device="cuda")


def _check_that_nothing_is_read(make: Make) -> None:
    """FakeTensors have no value. Who asks for one would wait for the device, which ends a capture."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        model = nn.Module()
        model.weight = nn.Parameter(torch.empty(3, 2, device="cuda"))
        run = make(model, **SGD)
        try:
            for is_captured in (False, False, True):
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda is_captured=is_captured: is_captured)
                run.step(lambda: _FakeLoss(model))  # type: ignore[arg-type,return-value]
        except DataDependentOutputException as error:
            raise DoesNotHold(f"a step reads a value on the host ({error})") from None


def _addresses(run: Implementation) -> list[int]:
    states = [run.optimizer.base_optimizer.state[param]["momentum_buffer"] for param in run.model.parameters()]
    return [tensor.data_ptr() for tensor in (*run.model.parameters(), *states)]


def sample_norms(make: Make) -> None:
    """Norms of the gradients of every sample, from the passes of a step."""
    model, (inputs, targets) = make_model(), make_batch()
    wanted = []
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        wanted.append(torch.cat([param.grad.flatten() for param in model.parameters()]).norm())  # type: ignore[union-attr]
    model.zero_grad()
    run = make(model, **SGD)
    found = run.sample_norms(lambda: (run.model(inputs) - targets).square().mean(1))
    if not any(close([norms], [torch.stack(wanted)], 1e-5) for norms in found):
        raise DoesNotHold("no function returns them, and a step keeps nothing of them")


def batch_norm(make: Make) -> None:
    """Running statistics after two steps: those of one update a step, at the original weights."""
    torch.manual_seed(3)
    run = make(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 2)), **SGD)
    for k in range(2):
        inputs = make_batch(seed=k)[0]
        hidden, layer = run.model[0](inputs).detach(), run.model[1]  # type: ignore[index]
        mean = 0.9 * layer.running_mean + 0.1 * hidden.mean(0)
        var = 0.9 * layer.running_var + 0.1 * hidden.var(0)
        run.step_with_batch_norm(_forward(run, k))
        if not close([layer.running_mean, layer.running_var], [mean, var], 1e-5):
            raise DoesNotHold("both passes of a step update the statistics")


SCENARIOS: dict[str, Callable[[Make], None]] = {
    "mixed precision": mixed_precision,
    "NaN": nan_gradient,
    "exception": exception,
    "resuming": resuming,
    "accumulation": accumulation,
    "CUDA graph": cuda_graph,
    "sample norms": sample_norms,
    "batch norm": batch_norm,
}
