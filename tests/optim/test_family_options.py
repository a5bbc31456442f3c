"""Every member with SAM's other options: clipping, capturable, random numbers, running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels.optim import descents
from tests.optim.family import BASES, CLOSURES_ONLY, MEMBERS, ONE_PASS
from tests.optim.family_runs import CASES, ONE_CASE_EACH, close, everything_of, make, run, two_steps, using
from tests.optim.problem import assert_same_bits, closure_of, every_backend, loss_of, make_batch, make_model, twin, weights

pytestmark = pytest.mark.engine

NOT_CAPTURABLE = ("RSAM", "CRSAM", "LookSAM")
NOT_CLIPPED = ("WSAM-decoupled", "SAMSPS")


@every_backend
@pytest.mark.parametrize(("name", "base"), [case for case in CASES if case.values[0] not in NOT_CAPTURABLE and case.values[1] != "rmsprop"])
def test_capturable_takes_the_same_steps(backend: str, name: str, base: str) -> None:
    """Numbers are tensors then; GSAM's and SAM-SPS's learning rate too, which their formulas read."""
    model = make_model(torch.float64)
    other = twin(model)
    with using(backend):
        recorded, usual = make(name, model.parameters(), base, capturable=True), make(name, other.parameters(), base)
        for group in recorded.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        run(recorded, model, 5)
        run(usual, other, 5)
    assert isinstance(recorded.param_groups[0]["rho"], torch.Tensor)
    close(everything_of(recorded, model)[: len(weights(model))], weights(other))


@pytest.mark.parametrize("loss", [1.5, torch.ones((), device="meta")], ids=["number", "elsewhere"])
def test_a_loss_that_a_graph_would_freeze_is_refused(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = make("SAMSPS", model.parameters(), capturable=True)
    run(optimizer, model, 1)
    monkeypatch.setattr(descents, "is_recording", lambda device: True)
    run(optimizer, model, 1)  # the closure's loss is a tensor where the weights are
    before = weights(model)
    with pytest.raises(RuntimeError, match="recorded into a CUDA graph, but the loss is a number, or a tensor elsewhere"):
        optimizer.step(lambda: closure_of(optimizer, model, make_batch())() and loss)
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_polyak_loss_keeps_its_digits(momentum: float) -> None:
    """A Python number is a float64, whatever torch's default is."""
    models = [make_model(torch.float64) for _ in range(2)]
    for model, as_number in zip(models, (True, False), strict=True):
        optimizer = make("SAMSPS", model.parameters(), momentum=momentum)
        closure = closure_of(optimizer, model, make_batch(torch.float64))
        optimizer.step(lambda closure=closure, as_number=as_number: closure().item() if as_number else closure())
    assert_same_bits(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("name", [name for name in NOT_CAPTURABLE if name != "CRSAM"])  # its third pass has words of its own
def test_capturable_is_refused_where_the_host_decides(name: str) -> None:
    with pytest.raises(ValueError, match=r"SAM: capturable=True, but what '[\w-]+' does at a step is decided, or drawn, by the host"):
        make(name, make_model().parameters(), capturable=True)


@every_backend
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e3])
@pytest.mark.parametrize(("name", "base"), [case for case in CASES if case.values[0] not in NOT_CLIPPED])
def test_what_is_clipped_is_what_the_base_steps_along(backend: str, name: str, base: str, max_grad_norm: float) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    base_class, kwargs = BASES[base]
    expected = MEMBERS[name].transcribe(other, base_class(other.parameters(), **kwargs), max_grad_norm=max_grad_norm)
    with using(backend):
        optimizer = make(name, model.parameters(), base, max_grad_norm=max_grad_norm)
        for k in range(5):
            batch = make_batch(torch.float64, seed=k)
            optimizer.step(closure_of(optimizer, model, batch))
            expected.step(batch)
            close(weights(model), weights(other))


@pytest.mark.parametrize(("name", "rule"), [("WSAM-decoupled", "wsam"), ("SAMSPS", "polyak")])
def test_clipping_is_refused_where_it_is_not_defined(name: str, rule: str) -> None:
    """Two gradients with two steps; a step whose length is the gradient's to find."""
    with pytest.raises(ValueError, match=f"SAM: max_grad_norm is not defined for descent '{rule}'"):
        make(name, make_model().parameters(), max_grad_norm=1.0)


@every_backend
@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_an_unchecked_finite_run_is_the_checked_one(backend: str, name: str, base: str) -> None:
    model, other = make_model(), make_model()
    with using(backend):
        unchecked, checked = make(name, model.parameters(), base, check_finite=False), make(name, other.parameters(), base)
        run(unchecked, model, 4)
        run(checked, other, 4)
    assert_same_bits(everything_of(unchecked, model), everything_of(checked, other))


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


@pytest.mark.parametrize("api", ["closure", "two-step"])
@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_running_statistics_are_updated_once_a_step(name: str, base: str, api: str) -> None:
    if name in CLOSURES_ONLY and api == "two-step":
        pytest.skip("needs closures")
    model = normed()
    optimizer = make(name, model.parameters(), base, model=model)
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module.running_mean.clone()))
    for k in range(4):
        before = len(seen)
        if api == "closure":
            optimizer.step(closure_of(optimizer, model, make_batch(seed=k)))
        else:
            two_steps(optimizer, model, make_batch(seed=k))
        assert int(model[1].num_batches_tracked) == k + 1
        assert torch.equal(model[1].running_mean, seen[before])  # that of the step's first forward pass


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("api", ["closure", "two-step"])
@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_both_passes_see_the_same_dropout_masks(name: str, base: str, api: str, preserve: bool) -> None:
    """RSAM's own random numbers are none of torch's generator."""
    if name in (*ONE_PASS, *CLOSURES_ONLY) and api == "two-step":
        pytest.skip("one pass, or no such API")
    model = normed()
    masks: list[torch.Tensor] = []
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
    optimizer = make(name, model.parameters(), base, preserve_rng_state=preserve)
    generators = []
    for k in range(2):
        if api == "closure":
            optimizer.step(closure_of(optimizer, model, make_batch(seed=k)))
            generators.append(torch.get_rng_state())
            continue
        optimizer.record_rng_state()
        two_steps(optimizer, model, make_batch(seed=k))
        generators.append(torch.get_rng_state())
    assert not torch.equal(generators[0], generators[1])
    if name in ONE_PASS:
        assert len(masks) == 2
        return
    if api == "two-step":
        return assert_masks(masks, same=True)
    if name == "CRSAM":
        assert torch.equal(masks[2], masks[1]) is preserve
        del masks[2]
    return assert_masks(masks, same=preserve)


def assert_masks(masks: list[torch.Tensor], *, same: bool) -> None:
    assert torch.equal(masks[0], masks[1]) is same
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_two_steps_without_the_recorded_state_say_so(name: str, base: str) -> None:
    if name in (*ONE_PASS, *CLOSURES_ONLY):
        pytest.skip("no pass before the first step")
    model = make_model()
    optimizer = make(name, model.parameters(), base, preserve_rng_state=True)
    before = weights(model)
    if name == "RSAM":
        optimizer.random_step()
    loss_of(model, make_batch()).backward()
    with pytest.raises(RuntimeError, match=r"needs record_rng_state\(\) before the first forward pass"):
        optimizer.first_step()
    optimizer._restore()
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_memory_is_what_the_docstring_says_and_is_freed(name: str, base: str) -> None:
    """Beside SAM's: averages N s; kept gradients only between the passes, taken over and not copied where autograd made them."""
    model = make_model()
    optimizer = make(name, model.parameters(), base)
    run(optimizer, model, 4)
    numel = sum(param.numel() for param in model.parameters())
    kept: Any = optimizer._kept_grads
    assert not kept._kept
    assert not kept._copies._copies
    names, params = (*optimizer.direction.keeps, *optimizer.descent.keeps), list(model.parameters())
    assert optimizer._memory.names == names
    assert [sum(each.numel() for each in optimizer._memory.entries(key, params)) for key in names] == [numel] * len(names)
    two = name not in (*CLOSURES_ONLY, "RSAM", *ONE_PASS) and optimizer.descent.keeps_grads
    if two:
        loss_of(model, make_batch()).backward()
        optimizer.first_step()  # the caller's gradients stay the caller's
        assert sum(each.numel() for each in kept._copies._copies.values()) == numel
        optimizer.second_step()
    optimizer.release_buffers()
    assert not kept._copies._copies
    run(optimizer, model, 1)
