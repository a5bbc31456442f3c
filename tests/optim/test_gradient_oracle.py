"""``optimizer.backward(closure)``: SAM's gradient in the place of an ordinary one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from tests.optim.family_runs import close, everything_of, make
from tests.optim.problem import add_gradient, assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights
from tests.optim.scaler_flows import SCALE, InfOnPass

MEMBERS = ["SAM", "VaSSO", "FriendlySAM", "GCSAM", "RSAM", "Extragradient", "MomentumSAM", "S2SAM", "GSAM", "WSAM-coupled"]
SUMS = ["SAM", "GCSAM", "RSAM", "Extragradient"]  # several gradients a step, of m-SAM too
BASES = ["sgd-momentum", "adamw"]


def pairs(*others: str) -> list[Any]:
    """Each member once, with bases in turn."""
    return [(name, BASES[i % 2]) for i, name in enumerate([*MEMBERS, *others])]


def grads_of(model: nn.Module) -> list[Tensor | None]:
    return [param.grad for param in model.parameters()]


# --- it is the gradient ---


@pytest.mark.parametrize(
    "options", [{}, {"lambd": 0.3, "max_grad_norm": 0.05}, {"adaptive": True, "eta": 0.1}], ids=["", "clips", "adaptive"]
)
@pytest.mark.parametrize(("name", "base"), pairs())
def test_one_call_and_a_step_are_step_with_a_closure(name: str, base: str, options: dict[str, Any]) -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = make(name, model.parameters(), base, **options), make(name, other.parameters(), base, **options)
    for seed in range(4):
        batch = make_batch(seed=seed)
        loss = optimizer.backward(partial(add_gradient, model, batch))
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(loss, expected.step(closure_of(expected, other, batch)))
        if "max_grad_norm" in options and expected.descent.rewrites:
            # The norm that a rule's sum has found may be an ulp beside that of the sum as it lies in .grad: 2^-22 of an update, 4 updates.
            close(everything_of(optimizer, model), everything_of(expected, other), rtol=2.0**-20, atol=2.0**-20)
        else:
            assert_same_bits(everything_of(optimizer, model), everything_of(expected, other))
    assert optimizer.param_groups[0]["sam_step"] == 4


def test_rwsam_too() -> None:
    model = make_model(torch.float64)
    other = twin(model)
    batch = make_batch(torch.float64)
    optimizer, expected = (RWSAM(net, torch.optim.SGD, beta=2.0, lr=0.1, momentum=0.9) for net in (model, other))
    for _ in range(3):
        optimizer.backward(lambda: losses_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        expected.step(lambda: losses_of(other, batch))
        assert_same_bits(everything_of(optimizer, model), everything_of(expected, other))
        assert torch.equal(optimizer.last_weights, expected.last_weights)


def losses_of(model: nn.Module, batch: Any) -> Tensor:  # (B,)
    return (model(batch[0]) - batch[1]).square().mean(1)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_k_calls_with_a_kth_of_the_loss_are_m_sam(name: str, set_to_none: bool) -> None:
    model = make_model(torch.float64)
    other, k = twin(model), 4
    # Of the mean over k, RSAM adds Δ to k times a smaller gradient: it is given back.
    optimizer = make(
        name, model.parameters(), **({"c": 0.8 * k} if name == "RSAM" else {"rho": 0.2 * k} if name == "Extragradient" else {})
    )
    expected = make(name, other.parameters())
    for seed in range(3):
        batch = make_batch(torch.float64, seed)
        for piece in zip(batch[0].split(16 // k), batch[1].split(16 // k), strict=True):
            optimizer.backward(partial(add_gradient, model, piece, 1 / k))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        expected.step(lambda x, y: closure_of(expected, other, (x, y))(), batch=batch, micro_batches=k)
        close(everything_of(optimizer, model), everything_of(expected, other))
    assert optimizer.param_groups[0]["sam_step"] == 3


def test_rwsam_accumulates_and_remembers_the_weights_of_all_calls() -> None:
    model = make_model(torch.float64)
    optimizer, batch = RWSAM(model, torch.optim.SGD, beta=2.0, lr=0.1), make_batch(torch.float64)
    pieces = [(batch[0][:8], batch[1][:8]), (batch[0][8:], batch[1][8:])]
    for _ in range(2):
        for piece in pieces:
            optimizer.backward(lambda piece=piece: losses_of(model, piece))
        assert optimizer.last_weights.shape == (16,)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.backward(lambda: losses_of(model, pieces[0]))
    model.zero_grad()
    optimizer.backward(lambda: losses_of(model, pieces[1]))
    assert optimizer.last_weights.shape == (8,)


@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "rmsprop"])
def test_clipping_from_outside_is_max_grad_norm(base: str) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, expected = make("SAM", model.parameters(), base), make("SAM", other.parameters(), base, max_grad_norm=0.05)
    for _ in range(3):
        optimizer.backward(partial(add_gradient, model))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        expected.step(closure_of(expected, other, make_batch(torch.float64)))
    close(weights(model), weights(other), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_adds_to_what_is_there_in_every_dtype(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = make("SAM", model.parameters())
    optimizer.backward(partial(add_gradient, model))
    one = [grad.clone() for grad in grads_of(model)]
    objects, before = grads_of(model), weights(model)
    optimizer.backward(partial(add_gradient, model))
    assert_same_bits(weights(model), before)
    assert_same_bits(grads_of(model), [2 * grad for grad in one])
    assert all(new is old for new, old in zip(grads_of(model), objects, strict=True))


def test_with_rho_zero_it_is_the_closure_once_and_the_step_is_the_bases() -> None:
    model, calls = make_model(), []
    other = twin(model)
    optimizer, base = SAM(model.parameters(), torch.optim.AdamW, rho=0.0, lr=0.01), torch.optim.AdamW(other.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.backward(lambda: calls.append(1) or add_gradient(model))
        optimizer.step()
        optimizer.zero_grad()
        add_gradient(other)
        base.step()
        base.zero_grad()
    assert len(calls) == 3
    assert_same_bits(weights(model), weights(other))


# --- schedules ---


@pytest.mark.parametrize("capturable", [False, True])
def test_schedules_are_asked_once_a_step_however_many_calls_there_are(capturable: bool) -> None:
    model, asked = make_model(), []

    def rho(t: Any) -> Any:
        asked.append(int(t))
        return 0.1 / t

    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, capturable=capturable)
    asked.clear()
    for _ in range(3):
        for _ in range(2):
            optimizer.backward(partial(add_gradient, model, share=0.5))
        optimizer.step()
        optimizer.zero_grad()
    assert asked == [1, 2, 3]
    assert int(optimizer.param_groups[0]["sam_step"]) == 3


def test_capturable_makes_the_same_steps() -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = (SAM(net.parameters(), torch.optim.AdamW, lr=0.01, capturable=c) for net, c in ((model, True), (other, False)))
    for _ in range(3):
        for opt, net in ((optimizer, model), (expected, other)):
            opt.backward(partial(add_gradient, net))
            opt.step()
            opt.zero_grad()
    close(weights(model), weights(other), rtol=1e-6, atol=1e-7)


# --- loss scaling ---


def scaled_step(optimizer: Any, model: nn.Module, scaler: Any, bad_pass: int | None = None, calls: int = 1, clip: float = 1e9) -> None:
    spoil = InfOnPass(bad_pass)

    def closure() -> Tensor:
        loss = spoil(loss_of(model, make_batch(next(model.parameters()).dtype))) / calls
        scaler.scale(loss).backward()
        return loss

    optimizer.zero_grad()
    for _ in range(calls):
        optimizer.backward(closure, grad_scaler=scaler)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(("name", "base"), [*pairs("SAM"), ("SAM", "rmsprop")])
def test_the_usual_order_of_a_grad_scaler(name: str, base: str) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, expected = make(name, model.parameters(), base, lambd=0.4), make(name, other.parameters(), base, lambd=0.4)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for _ in range(3):
        scaled_step(optimizer, model, scaler)
        expected.step(closure_of(expected, other, make_batch(torch.float64)))
    close(weights(model), weights(other), rtol=1e-9, atol=1e-11)
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("bad_pass", [1, 2, 3, 4])
def test_an_overflow_in_any_pass_of_any_call_halves_the_scale_and_is_one_skipped_step(bad_pass: int, check_finite: bool) -> None:
    model = make_model()
    optimizer = make("SAM", model.parameters(), check_finite=check_finite)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaled_step(optimizer, model, scaler, calls=2)
    before = everything_of(optimizer, model)
    scaled_step(optimizer, model, scaler, bad_pass, calls=2)
    assert_same_bits(everything_of(optimizer, model), before)
    assert scaler.get_scale() == SCALE / 2
    assert optimizer.skipped_steps == 1
    scaled_step(optimizer, model, scaler, calls=2)
    assert optimizer.skipped_steps == 1
    assert not torch.equal(weights(model)[0], before[0])


def test_a_scaler_that_steps_without_unscaling_does_it_inside() -> None:
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, expected = make("SAM", model.parameters()), make("SAM", other.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(lambda: scaler.scale(loss_of(model, make_batch(torch.float64))).backward(), grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        expected.step(closure_of(expected, other, make_batch(torch.float64)))
    close(weights(model), weights(other), rtol=1e-9, atol=1e-11)


# --- what both passes share ---


def test_running_statistics_are_updated_once_and_masks_are_the_same() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 2))
    other = twin(model)
    masks: list[Tensor] = []
    model[2].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=1e-4, model=model, preserve_rng_state=True)
    torch.manual_seed(2)
    optimizer.backward(partial(add_gradient, model))
    end = torch.get_rng_state()
    torch.manual_seed(2)
    add_gradient(other)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(end, torch.get_rng_state())
    assert_same_bits(list(model.buffers()), list(other.buffers()))


def test_vectors_of_spectral_norm_move_once() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 9)), nn.utils.spectral_norm(nn.Linear(9, 2)))
    other = twin(model)
    optimizer = make("SAM", model.parameters(), model=model)
    optimizer.backward(partial(add_gradient, model))
    add_gradient(other)
    assert_same_bits(list(model.buffers()), list(other.buffers()))


# --- parameters ---


@pytest.mark.parametrize("missing_in", [1, 2])
@pytest.mark.parametrize("name", ["SAM", "GSAM", "RSAM"])
def test_a_parameter_that_one_of_the_passes_does_not_reach(name: str, missing_in: int) -> None:
    torch.manual_seed(0)
    stem, extra = nn.Linear(6, 2), nn.Linear(6, 2)
    model = nn.ModuleList([stem, extra])
    other = twin(model)
    results = []
    for net, whole in ((model, False), (other, True)):
        optimizer, calls = make(name, net.parameters()), []

        def closure(net: Any = net, calls: Any = calls, optimizer: Any = optimizer, whole: bool = whole) -> Tensor:
            calls.append(1)
            if whole:
                optimizer.zero_grad()
            inputs, targets = make_batch()
            outputs = net[0](inputs) if len(calls) == missing_in else net[0](inputs) + net[1](inputs)
            loss = nn.functional.mse_loss(outputs, targets)
            loss.backward()
            return loss

        if whole:
            optimizer.step(closure)
        else:
            optimizer.backward(closure)
            optimizer.step()
        results.append(weights(net))
    assert_same_bits(*results)


def test_frozen_parameters_keep_what_they_have() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    stale = torch.full_like(model[0].weight, 100.0)
    other = twin(model)
    optimizer, expected = (make("GSAM", net.parameters()) for net in (model, other))
    model[0].weight.grad = stale
    optimizer.backward(partial(add_gradient, model))
    expected.backward(partial(add_gradient, other))
    assert model[0].weight.grad is stale
    assert torch.equal(stale, torch.full_like(stale, 100.0))
    assert_same_bits(grads_of(model)[1:], grads_of(other)[1:])


@pytest.mark.parametrize("base", ["sgd-momentum", "rmsprop"])
def test_closures_that_zero_do_no_harm(base: str) -> None:
    model = make_model()
    optimizer = make("SAM", model.parameters(), base)
    optimizer.backward(partial(add_gradient, model))
    one = [grad.clone() for grad in grads_of(model)]
    optimizer.backward(closure_of(optimizer, model, make_batch()))
    assert_same_bits(grads_of(model), [2 * grad for grad in one])


def test_parameters_on_the_meta_device_are_named() -> None:
    model = make_model().to("meta")
    optimizer = make("SAM", model.named_parameters())
    with pytest.raises(TypeError, match=r"SAM: parameter '0\.weight' is on the meta device"):
        optimizer.backward(lambda: model(torch.empty(4, 6, device="meta")).sum().backward())
