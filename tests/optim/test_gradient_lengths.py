"""``optimizer.backward(closure, micro_batches=k)``: the closure divides its loss by k, and the ascent is that of the loss itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from sam_kernels.schedules import Radius
from tests.optim.family_runs import close, everything_of, make
from tests.optim.problem import add_gradient, closure_of, loss_of, make_batch, make_model, twin, weights
from tests.optim.scaler_flows import SCALE


def losses_of(model: nn.Module, batch: Any) -> Tensor:  # (B,)
    return (model(batch[0]) - batch[1]).square().mean(1)


class FollowsBoth(Radius):
    """ρ that follows the norm and the loss."""

    def radius(self, info: Any) -> Any:
        return 0.1 * info.norm + 0.05 * info.loss


LENGTHS: dict[str, dict[str, Any]] = {"λ": {"lambd": 0.3}, "radius": {"rho": FollowsBoth()}, "adaptive": {"adaptive": True, "lambd": 0.0}}


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(("name", "options"), [*(("SAM", each) for each in LENGTHS.values()), ("RSAM", {}), ("Extragradient", {})])
def test_the_length_of_a_micro_batchs_gradient(name: str, options: dict[str, Any], scales: bool, k: int) -> None:
    """``micro_batches=k``: it is that of the undivided loss, as for ``step`` with micro-batches. Without it, it is a k-th."""
    model = make_model(torch.float64)
    other, third = twin(model), twin(model)
    optimizer, expected, without = (make(name, each.parameters(), **options) for each in (model, other, third))
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=SCALE) if scales else None

    def scaled_gradient(net: nn.Module, piece: Any) -> Tensor:
        loss = loss_of(net, piece) / k
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    for seed in range(3):
        batch = make_batch(torch.float64, seed)
        for piece in zip(batch[0].split(16 // k), batch[1].split(16 // k), strict=True):
            optimizer.backward(partial(scaled_gradient, model, piece), grad_scaler=scaler, micro_batches=k)
            without.backward(partial(add_gradient, third, piece, 1 / k))
        if scaler is not None:
            scaler.unscale_(optimizer)
            scaler.update()
        optimizer.step()
        without.step()
        optimizer.zero_grad()
        without.zero_grad()
        expected.step(lambda x, y: closure_of(expected, other, (x, y))(), batch=batch, micro_batches=k)
        close(everything_of(optimizer, model), everything_of(expected, other))
    assert max((left - right).abs().max().item() for left, right in zip(weights(third), weights(other), strict=True)) > 1e-4


@pytest.mark.parametrize("norms", ["exact", "finite_difference"])
@pytest.mark.parametrize("scales", [False, True])
def test_the_weights_of_a_micro_batchs_samples(norms: str, scales: bool) -> None:
    """β multiplies the norms of the undivided losses."""
    model, k = make_model(torch.float64), 4
    other, third = twin(model), twin(model)
    optimizer, expected, without = (RWSAM(each, torch.optim.SGD, beta=4.0, lr=0.1, rho=0.2, norms=norms) for each in (model, other, third))
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=SCALE) if scales else None
    for seed in range(3):
        batch = make_batch(torch.float64, seed)
        for piece in zip(batch[0].split(16 // k), batch[1].split(16 // k), strict=True):
            optimizer.backward(lambda piece=piece: losses_of(model, piece) / k, grad_scaler=scaler, micro_batches=k)
            without.backward(lambda piece=piece: losses_of(third, piece) / k)
        if scaler is not None:
            scaler.unscale_(optimizer)
            scaler.update()
        optimizer.step()
        without.step()
        optimizer.zero_grad()
        without.zero_grad()
        expected.step(lambda x, y: losses_of(other, (x, y)), batch=batch, micro_batches=k)
        close(weights(model), weights(other))
        close([optimizer.last_weights], [expected.last_weights], rtol=1e-5, atol=1e-5)
    assert max((left - right).abs().max().item() for left, right in zip(weights(third), weights(other), strict=True)) > 1e-4


@pytest.mark.parametrize("given", [0, 1.5, True, "2"])
def test_micro_batches_is_a_count(given: Any) -> None:
    model = make_model()
    with pytest.raises((TypeError, ValueError), match=r"^SAM\.backward: micro_batches"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1).backward(partial(add_gradient, model), micro_batches=given)
    with pytest.raises((TypeError, ValueError), match=r"RWSAM\.backward: micro_batches"):
        RWSAM(model, torch.optim.SGD, beta=1.0, lr=0.1).backward(lambda: losses_of(model, make_batch()), micro_batches=given)
