"""m-SAM (arXiv 2509.18001) along other directions than the gradient: each micro-batch has its own ascent, the descent is along the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.optim._seeds import derived_seed
from tests.optim.family import BASES, MEMBERS, SEED, SIGMA
from tests.optim.family_runs import close, make, two_steps, using
from tests.optim.problem import assert_same_bits, closure_of, every_backend, loss_of, make_batch, make_model, twin, weights
from tests.optim.transcriptions import GCSAM, Transcription

NAMES = ["SAM", "GCSAM", "Extragradient", "RSAM"]
MICRO_BATCHES = 4


def pieces_of(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.chunk(MICRO_BATCHES) for tensor in batch), strict=True))


def drawn(t: int, i: int, start: list[Tensor]) -> list[Tensor]:
    """Δ of micro-batch i."""
    delta = [torch.zeros_like(param) for param in start]
    seed = derived_seed(SEED, t, i, 0)
    functional.random_perturb_(delta, [torch.empty_like(each) for each in delta], seed=seed, scale=SIGMA, distribution="normal")
    return delta


def written_out(expected: Transcription, batch: tuple[Tensor, Tensor]) -> None:
    """One step: the mean of the gradients that the micro-batches have at their own perturbed points."""
    expected.t += 1
    start = weights(expected.model)
    found = []
    for i, piece in enumerate(pieces_of(batch)):
        if "draw" in expected.options:
            delta = drawn(expected.t, i, start)
            there = expected.gradients_at([w + each for w, each in zip(start, delta, strict=True)], piece)
            d = [each + expected.options["c"] * g for each, g in zip(delta, there, strict=True)]
        else:
            d = expected.direction(expected.gradients(piece))
        found.append(expected.gradients_at(expected.perturbed(start, d), piece))
    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*found, strict=True)]
    expected.base_step(GCSAM.centralized(mean) if isinstance(expected, GCSAM) else mean)


@every_backend
@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"lambd": 0.5, "adaptive": True, "eta": 0.01}], ids=str)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("name", NAMES)
def test_the_descent_is_along_the_mean(backend: str, name: str, base: str, options: dict[str, Any], scale: float | None) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    base_class, kwargs = BASES[base]
    expected = MEMBERS[name].transcribe(other, base_class(other.parameters(), **kwargs), **options)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    with using(backend):
        optimizer = make(name, model.parameters(), base, **options)
        for k in range(4):
            batch = make_batch(torch.float64, seed=k)

            def closure(piece: Any) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, piece)
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            optimizer.step([lambda piece=piece: closure(piece) for piece in pieces_of(batch)], grad_scaler=scaler)
            if scaler is not None:
                scaler.update()
            written_out(expected, batch)
            close(weights(model), weights(other))


@every_backend
@pytest.mark.parametrize("bad_call", range(1, 2 * MICRO_BATCHES + 1))
@pytest.mark.parametrize("name", NAMES)
def test_any_pass_of_any_micro_batch_may_fail(backend: str, name: str, bad_call: int) -> None:
    """An error in it, then a gradient that is not finite in it."""
    model = make_model()
    with using(backend):
        optimizer = make(name, model.parameters())
        optimizer.step(closure_of(optimizer, model, make_batch()))
        before = weights(model)
        for error in (True, False):
            calls: list[int] = []

            def closure(piece: Any, calls: list[int] = calls, error: bool = error) -> Tensor:
                calls.append(1)
                loss = closure_of(optimizer, model, piece)()
                if len(calls) == bad_call:
                    if error:
                        raise RuntimeError("no")
                    model[2].bias.grad[0] = float("nan")  # type: ignore[index, union-attr]
                return loss

            closures = [lambda piece=piece, closure=closure: closure(piece) for piece in pieces_of(make_batch())]
            if error:
                with pytest.raises(RuntimeError, match="no"):
                    optimizer.step(closures)
            else:
                optimizer.step(closures)
            assert_same_bits(weights(model), before)
        assert optimizer.skipped_steps == 1
        two_steps(optimizer, model, make_batch())
    assert all(each.isfinite().all() for each in weights(model))
    assert not torch.equal(weights(model)[0], before[0])


@every_backend
def test_micro_batches_of_rsam_have_random_numbers_of_their_own(backend: str) -> None:
    model = make_model()
    points: list[Tensor] = []
    optimizer: Any = make("RSAM", model.parameters())

    def closure() -> Tensor:
        points.append(model[0].weight.detach().clone())
        return closure_of(optimizer, model, make_batch())()

    with using(backend):
        optimizer.step([closure, closure])
    assert not torch.equal(points[0], points[2])
