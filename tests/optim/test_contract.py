"""Rows 6, 7 and 9–14 of the behaviours in docs/internals/contracts.md; test_non_finite.py has row 8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import functional
from tests.optim.problem import assert_same_bits, closure_of, every_backend, every_base, loss_of, make_batch, make_model, twin, weights


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_06_sixteen_bit_parameters_are_computed_in_float32_and_rounded_once(backend: str, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.linspace(0.5, 2.0, 4096).to(dtype))
    optimizer = sam_kernels.SAM([param], torch.optim.AdamW, rho=0.05, lr=0.1, betas=(0.9, 0.99))
    start = param.detach().float()
    first = torch.linspace(-1.0, 1.0, 4096).to(dtype)
    param.grad = first.clone()
    with sam_kernels.use_backend(backend):
        optimizer.first_step()
        scale = 0.05 / first.double().norm()
        assert torch.equal(param.detach(), (start.double() + scale * first.double()).float().to(dtype))
        second = torch.linspace(1.0, -0.5, 4096).to(dtype)
        param.grad = second.clone()
        optimizer.second_step()
    # First step of AdamW: m / (sqrt(v) + eps) with bias corrections is g / (|g| + eps).
    update = start.double() * (1 - 0.1 * 0.01) - 0.1 * second.double() / (second.double().abs() + 1e-8)
    # The moments are rounded to the storage type after use, so only this step's own arithmetic shows.
    error = (param.detach().double() - update).abs()
    spacing = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(update.abs().clamp_min(2.0**-14)))
    assert (error <= 0.5 * spacing + 4 * 2.0**-24).all()


@every_backend
@every_base
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_row_07_a_second_closure_that_raises_leaves_the_weights(
    backend: str, base: Any, kwargs: dict[str, Any], error: BaseException
) -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.5, **kwargs)
        before = weights(model)
        calls = []

        def closure() -> Tensor:
            calls.append(weights(model))
            if len(calls) == 2:
                raise error
            return closure_of(optimizer, model, batch)()

        with pytest.raises(type(error)):
            optimizer.step(closure)
        assert not torch.equal(calls[1][0], before[0])
        assert_same_bits(weights(model), before)
        expected = sam_kernels.SAM(other.parameters(), base, rho=0.5, **kwargs)
        optimizer.step(closure_of(optimizer, model, batch))
        expected.step(closure_of(expected, other, batch))
    assert_same_bits(weights(model), weights(other))


def test_row_07_an_iteration_given_up_after_first_step_is_undone_by_the_next() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    expected = sam_kernels.SAM(other.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.step(closure_of(optimizer, model, batch))
    expected.step(closure_of(expected, other, batch))
    assert_same_bits(weights(model), weights(other))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_row_09_zero_gradients_give_no_nan(backend: str, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.linspace(-1, 1, 300).to(dtype))
    before = param.detach().clone()
    with sam_kernels.use_backend(backend):
        for lambd in (0.0, 0.5, 1.0):
            optimizer = sam_kernels.SAM([param], torch.optim.SGD, lr=0.1, lambd=lambd)
            param.grad = torch.zeros_like(param)
            optimizer.first_step()
            assert torch.equal(param.detach(), before)
            optimizer.second_step()
    assert torch.equal(param.detach(), before)
    assert optimizer.skipped_steps == 0


@every_backend
@every_base
@pytest.mark.parametrize("missing", ["first", "second", "both", "all"])
def test_row_09_parameters_without_a_gradient(backend: str, base: Any, kwargs: dict[str, Any], missing: str) -> None:
    params = [nn.Parameter(torch.full((5,), float(i + 1))) for i in range(3)]
    before = [param.detach().clone() for param in params]
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(params, base, rho=0.3, **kwargs)
        for k, param in enumerate(params):
            absent = missing == "all" or (k == 1 and missing in ("first", "both"))
            param.grad = None if absent else torch.ones(5)
        optimizer.first_step()
        for k, param in enumerate(params):
            moved = not torch.equal(param.detach(), before[k])
            assert moved is (param.grad is not None)
        descent = [None if missing == "all" or (k == 1 and missing in ("second", "both")) else torch.full((5,), k + 1.0) for k in range(3)]
        for param, grad in zip(params, descent, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.second_step()
    expected = [nn.Parameter(value.clone()) for value in before]
    plain = base(expected, **kwargs)
    for param, grad in zip(expected, descent, strict=True):
        param.grad = grad
    plain.step()
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), want.detach(), rtol=1e-6, atol=1e-7)
        if want.grad is None:
            assert torch.equal(param.detach(), want.detach())


@every_backend
@every_base
def test_row_10_rho_zero_everywhere_is_the_base_optimizer_bit_for_bit(backend: str, base: Any, kwargs: dict[str, Any]) -> None:
    model, other = make_model(), make_model()
    calls = []
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.0, **kwargs)
        plain = base(other.parameters(), **kwargs)
        for k in range(5):
            closure = closure_of(optimizer, model, make_batch(seed=k))
            optimizer.step(lambda closure=closure: calls.append(1) or closure())
            plain.step(closure_of(plain, other, make_batch(seed=k)))
    assert_same_bits(weights(model), weights(other))
    assert len(calls) == 5


def test_row_10_a_group_with_rho_zero_is_not_in_the_norm() -> None:
    still, moving = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = sam_kernels.SAM([{"params": [still], "rho": 0.0}, {"params": [moving]}], torch.optim.SGD, rho=0.05, lr=0.1)
    still.grad, moving.grad = torch.full((4,), 100.0), torch.tensor([3.0, 0.0, 4.0, 0.0])
    optimizer.first_step()
    assert torch.equal(still.detach(), torch.ones(4))
    torch.testing.assert_close(moving.detach() - 1.0, 0.05 * moving.grad / 5.0, rtol=0, atol=2**-24)
    optimizer.second_step()
    torch.testing.assert_close(still.detach(), torch.full((4,), 1.0 - 10.0))


@every_base
def test_row_11_data_pointers_never_change(base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), base, **kwargs)
    pointers = [param.data_ptr() for param in model.parameters()]
    for k in range(4):
        optimizer.step(closure_of(optimizer, model, make_batch(seed=k)))
        assert [param.data_ptr() for param in model.parameters()] == pointers


def norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.mark.parametrize("api", ["closure", "two-step"])
def test_row_12_running_statistics_are_updated_once(api: str) -> None:
    model, once, batch = norm_model(), norm_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    once(batch[0])
    if api == "closure":
        optimizer.step(closure_of(optimizer, model, batch))
    else:
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        optimizer.second_step()
    assert_same_bits(list(model.buffers()), list(once.buffers()))
    assert int(model[1].num_batches_tracked) == 1


def test_row_12_statistics_survive_an_error_in_the_second_pass() -> None:
    model, once, batch = norm_model(), norm_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    once(batch[0])
    calls = []

    def closure() -> Tensor:
        loss = closure_of(optimizer, model, batch)()
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("late")
        return loss

    with pytest.raises(RuntimeError, match="late"):
        optimizer.step(closure)
    assert_same_bits(list(model.buffers()), list(once.buffers()))


def test_row_12_any_module_with_buffers_can_be_named() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    counting, other = Counting(), Counting()
    model = nn.Sequential(nn.Linear(6, 2), counting, other)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=[counting])
    optimizer.step(closure_of(optimizer, model, make_batch()))
    assert (int(counting.calls), int(other.calls)) == (1, 2)


@pytest.mark.parametrize("preserve", [True, False])
def test_row_12_dropout_draws_the_same_mask_when_asked(preserve: bool) -> None:
    torch.manual_seed(0)
    masks = []
    dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
    model = nn.Sequential(nn.Linear(6, 64), dropout, nn.Linear(64, 2))
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, preserve_rng_state=preserve)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    optimizer.step(closure_of(optimizer, model, make_batch()))
    assert torch.equal(masks[0], masks[1]) is preserve
    assert not torch.equal(masks[1], masks[2])
    if preserve:
        optimizer.record_rng_state()
        loss_of(model, make_batch()).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, make_batch()).backward()
        optimizer.second_step(zero_grad=True)
        assert torch.equal(masks[4], masks[5])
        with pytest.raises(RuntimeError, match="record_rng_state"):
            optimizer.first_step()


@every_base
def test_row_13_gradients_accumulate_in_both_passes(base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    inputs, targets = make_batch(torch.float64)
    whole = sam_kernels.SAM(other.parameters(), base, **kwargs)
    parts = sam_kernels.SAM(model.parameters(), base, **kwargs)

    def accumulate() -> Tensor:
        parts.zero_grad()
        losses = []
        for chunk_inputs, chunk_targets in zip(inputs.chunk(4), targets.chunk(4), strict=True):
            loss = loss_of(model, (chunk_inputs, chunk_targets)) / 4
            loss.backward()
            losses.append(loss)
        return sum(losses)  # type: ignore[return-value]

    for _ in range(3):
        parts.step(accumulate)
        whole.step(closure_of(whole, other, (inputs, targets)))
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_row_14_sparse_gradients_are_an_error_that_names_the_parameter() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    for params, name in ((embedding.parameters(), r"param_groups\[0\]\['params'\]\[0\]"), (embedding.named_parameters(), "'weight'")):
        optimizer = sam_kernels.SAM(params, torch.optim.SGD, lr=0.1)
        before = embedding.weight.detach().clone()
        embedding.zero_grad()
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(TypeError, match=f"gradient of parameter {name} is a torch.sparse_coo tensor"):
            optimizer.first_step()
        assert torch.equal(embedding.weight.detach(), before)


def test_memory_is_one_copy_of_the_parameters_and_can_be_released() -> None:
    model, batch = make_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(closure_of(optimizer, model, batch))
    held = optimizer._passes.lists.backups._copies
    assert sum(copy.numel() for copy in held.values()) == sum(param.numel() for param in model.parameters())
    optimizer.release_buffers()
    assert not optimizer._passes.lists.backups._copies
    optimizer.step(closure_of(optimizer, model, batch))


def test_parameters_that_move_are_followed() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    expected = sam_kernels.SAM(other.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    for k in range(4):
        if k == 2:
            for param in model.parameters():
                param.data = param.data.clone()
        optimizer.step(closure_of(optimizer, model, batch))
        expected.step(closure_of(expected, other, batch))
    assert_same_bits(weights(model), weights(other))


def test_channels_last_models_take_the_same_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2))
    other = twin(model).to(memory_format=torch.channels_last)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    for net in (model, other):
        optimizer = sam_kernels.SAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        for _ in range(3):

            def closure(net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(images), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert functional.grad_norm([param.grad for param in net.parameters()]) > 0  # type: ignore[misc]
    for got, expected in zip(weights(other), weights(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("api", ["first_step", "second_step"])
def test_autograd_notices_that_weights_were_written(backend: str, api: str) -> None:
    model, batch = make_model(), make_batch()
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        loss_of(model, batch).backward()
        if api == "second_step":
            optimizer.first_step()
        stale = loss_of(model, batch)
        getattr(optimizer, api)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()
