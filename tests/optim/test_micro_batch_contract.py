"""What docs/internals/contracts.md promises of a step (rows 2, 5, 6, 7, 12, 14), for a step of several micro-batches and for n-SAM."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels.operations import Operands, Perturb
from sam_kernels.validation.backends import backend_of
from tests.optim.problem import (
    BACKENDS,
    assert_same_bits,
    closure_of,
    every_backend,
    every_base,
    loss_of,
    make_batch,
    make_model,
    twin,
    weights,
)

SCALE = 1024.0


@every_backend
@every_base
@pytest.mark.parametrize("raising_call", range(6))
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_row_07_a_closure_that_raises_leaves_the_weights(
    backend: str, base: Any, kwargs: dict[str, Any], raising_call: int, error: BaseException
) -> None:
    model, batches = make_model(), [make_batch(seed=seed) for seed in range(3)]
    other = twin(model)
    calls: list[int] = []

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        loss = closure_of(optimizer, model, batch)()
        if len(calls) == raising_call + 1:
            raise error
        return loss

    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.5, **kwargs)
        before = weights(model)
        with pytest.raises(type(error)):
            optimizer.step([lambda batch=batch: closure(batch) for batch in batches])
        assert_same_bits(weights(model), before)
        expected = sam_kernels.SAM(other.parameters(), base, rho=0.5, **kwargs)
        optimizer.step([closure_of(optimizer, model, batch) for batch in batches])
        expected.step([closure_of(expected, other, batch) for batch in batches])
    assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("done", "interrupted_call"), [(0.0, 0), (1.0, 0), (0.0, 1), (1.0, 1), *((d, i) for d in (0.0, 0.5, 1.0) for i in range(2, 6))]
)
def test_row_07_interrupt_around_a_perturbation(monkeypatch: pytest.MonkeyPatch, name: str, done: float, interrupted_call: int) -> None:
    """Of three micro-batches and two groups: the backups hold this step's weights in the later ones, an older step's in the first."""
    model, batches = make_model(), [make_batch(seed=seed) for seed in range(3)]
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    optimizer = sam_kernels.SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1)
    backend = backend_of(name)
    real, calls = backend.operations[Perturb], []

    def perturb_(op: Perturb, lists: Operands) -> None:
        calls.append(1)
        if len(calls) != 7 + interrupted_call or done:
            real(op, lists)
        if len(calls) == 7 + interrupted_call:
            if done == 0.5:  # in the middle of a tensor
                lists["params"][0].detach().flatten()[1::2] = lists["old_params"][0].flatten()[1::2]
            raise KeyboardInterrupt

    monkeypatch.setitem(backend.operations, Perturb, perturb_)
    closures = [closure_of(optimizer, model, batch) for batch in batches]
    with sam_kernels.use_backend(name):
        optimizer.step(closures)
        before = weights(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closures)
        assert_same_bits(weights(model), before)
        optimizer.step(closures)
    assert not torch.equal(weights(model)[0], before[0])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_06_the_mean_of_sixteen_bit_gradients_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(4096, dtype=dtype))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(4096, generator=generator).to(dtype) for _ in range(7)]
    given = iter([grad for grad in grads for _ in range(2)])

    def closure() -> None:
        param.grad = next(given).clone()

    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM([param], torch.optim.SGD, lr=1.0)
        optimizer.step([closure] * 7)
    mean = torch.stack([grad.double() for grad in grads]).mean(0)
    half_a_unit = 0.5 * torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(mean.abs().clamp_min(2.0**-14)))
    assert ((param.grad.double() - mean).abs() <= half_a_unit + 14 * 2.0**-24 * 4).all()  # two roundings of float32 a micro-batch
    assert torch.equal(param.detach(), -param.grad)
    sixteen_bit_mean = torch.zeros(4096, dtype=dtype)
    for j, grad in enumerate(grads, 1):
        sixteen_bit_mean.lerp_(grad, 1 / j)
    assert not torch.equal(sixteen_bit_mean, param.grad)


@every_base
@pytest.mark.parametrize("lambd", [1.0, 0.3])
@pytest.mark.parametrize("way", ["batch", "n-SAM"])
def test_row_05_scaled_training_is_unscaled_training(base: Any, kwargs: dict[str, Any], lambd: float, way: str) -> None:
    model = make_model()
    other = twin(model)
    results = []
    for net, scaler in ((model, torch.amp.GradScaler("cpu", init_scale=SCALE)), (other, torch.amp.GradScaler("cpu", enabled=False))):
        optimizer = sam_kernels.SAM(net.parameters(), base, lambd=lambd, **kwargs)

        def closure(*batch: Tensor, net: Any = net, scaler: Any = scaler, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            scaler.scale(loss).backward()
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(4):
                batch = make_batch(seed=seed)
                if way == "batch":
                    optimizer.step(closure, grad_scaler=scaler, batch=batch, micro_batches=4)
                else:
                    optimizer.step(
                        lambda closure=closure, batch=batch: closure(batch[0][:4], batch[1][:4]),
                        grad_scaler=scaler,
                        ascent_closure=lambda closure=closure, batch=batch: closure(*batch),
                    )
                scaler.update()
        results.append((weights(net), scaler.get_scale(), optimizer.skipped_steps))
    for got, expected in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)
    assert results[0][1:] == (SCALE, 0)


@pytest.mark.parametrize("bad_pass", range(4))
def test_row_05_inf_in_any_pass_halves_the_scale(bad_pass: int) -> None:
    model, batch = make_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before, calls = weights(model), []

    def closure(*piece: Tensor) -> Tensor:
        optimizer.zero_grad()
        calls.append(1)
        loss = loss_of(model, piece) * (float("inf") if len(calls) == bad_pass + 1 else 1.0)
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure, grad_scaler=scaler, batch=batch, micro_batches=2)
    scaler.update()
    assert_same_bits(weights(model), before)
    assert (optimizer.skipped_steps, scaler.get_scale()) == (1, SCALE / 2)
    optimizer.step(closure, grad_scaler=scaler, batch=batch, micro_batches=2)
    assert optimizer.skipped_steps == 1
    assert not torch.equal(weights(model)[0], before[0])


def norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.mark.parametrize("guarded", [True, False])
def test_row_12_running_statistics_see_every_micro_batch_once(guarded: bool) -> None:
    model, once, batch = norm_model(), norm_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model if guarded else None)
    optimizer.step(lambda x, y: closure_of(optimizer, model, (x, y))(), batch=batch, micro_batches=4)
    for piece in batch[0].chunk(4):  # at the weights of before the step, which every first pass sees
        once(piece)
    assert int(model[1].num_batches_tracked) == (4 if guarded else 8)
    if guarded:
        assert_same_bits(list(model.buffers()), list(once.buffers()))
    else:
        assert not torch.equal(model[1].running_mean, once[1].running_mean)


def test_row_12_n_sam_keeps_the_statistics_of_the_ascent() -> None:
    model, once, batch = norm_model(), norm_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    optimizer.step(closure_of(optimizer, model, (batch[0][:4], batch[1][:4])), ascent_closure=closure_of(optimizer, model, batch))
    once(batch[0])
    assert_same_bits(list(model.buffers()), list(once.buffers()))


def test_row_12_statistics_survive_an_error_in_a_later_second_pass() -> None:
    model, once, batch = norm_model(), norm_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    calls: list[int] = []

    def closure(*piece: Tensor) -> Tensor:
        loss = closure_of(optimizer, model, piece)()
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("late")
        return loss

    with pytest.raises(RuntimeError, match="late"):
        optimizer.step(closure, batch=batch, micro_batches=4)
    for piece in batch[0].chunk(4)[:2]:
        once(piece)
    assert_same_bits(list(model.buffers()), list(once.buffers()))


def test_row_12_each_micro_batch_has_dropout_masks_of_its_own() -> None:
    torch.manual_seed(0)
    masks = []
    dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
    model = nn.Sequential(nn.Linear(6, 64), dropout, nn.Linear(64, 2))
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, preserve_rng_state=True)
    optimizer.step(lambda x, y: closure_of(optimizer, model, (x, y))(), batch=make_batch(), micro_batches=2)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("sparse_call", range(4))
def test_row_14_a_sparse_gradient_in_any_pass_is_an_error_that_names_the_parameter(sparse_call: int) -> None:
    params = [("dense", nn.Parameter(torch.ones(3))), ("embedding", nn.Parameter(torch.ones(3)))]
    optimizer = sam_kernels.SAM(params, torch.optim.SGD, lr=0.1)
    calls: list[int] = []

    def closure() -> None:
        calls.append(1)
        for name, param in params:
            grad = torch.ones(3)
            param.grad = grad.to_sparse() if name == "embedding" and len(calls) == sparse_call + 1 else grad

    with pytest.raises(TypeError, match=r"'embedding' is a torch\.sparse_coo tensor"):
        optimizer.step([closure] * 2)
    for _, param in params:
        assert torch.equal(param.detach(), torch.ones(3))


@every_base
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_row_10_without_a_radius_the_base_optimizer_sees_the_mean(base: Any, kwargs: dict[str, Any], micro_batches: int) -> None:
    model, batches = make_model(torch.float64), [make_batch(torch.float64, seed) for seed in range(micro_batches)]
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.0, **kwargs)
    plain = base(other.parameters(), **kwargs)
    for step in range(3):
        optimizer.step([closure_of(optimizer, model, batch) for batch in batches])
        plain.zero_grad()
        torch.stack([loss_of(other, batch) for batch in batches]).mean().backward()
        plain.step()
        for got, expected in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13, msg=f"step {step}")


@every_base
def test_row_10_without_a_radius_a_mean_that_is_not_finite_skips_the_step(base: Any, kwargs: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = sam_kernels.SAM([param], base, rho=0.0, **kwargs)
    for skipped, values in enumerate([(1.0, float("nan")), (float("inf"), 1.0)], 1):
        given = iter(values)

        def closure(given: Any = given) -> None:
            param.grad = torch.full((3,), next(given))

        optimizer.step([closure] * 2)
        assert torch.equal(param.detach(), torch.ones(3))
        assert optimizer.skipped_steps == skipped


@every_backend
def test_groups_of_which_one_has_no_radius(backend: str) -> None:
    still, moving = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    seen: list[Tensor] = []

    def closure() -> None:
        seen.append(moving.detach().clone())
        assert torch.equal(still.detach(), torch.ones(4))
        still.grad, moving.grad = torch.full((4,), 100.0), torch.tensor([3.0, 0.0, 4.0, 0.0])

    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM([{"params": [still], "rho": 0.0}, {"params": [moving]}], torch.optim.SGD, rho=0.05, lr=0.1)
        optimizer.step([closure] * 3)
    for here, there in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(here, torch.ones(4))
        torch.testing.assert_close(there - 1.0, torch.tensor([0.03, 0.0, 0.04, 0.0]), rtol=0, atol=2**-23)
    torch.testing.assert_close(still.detach(), torch.full((4,), 1.0 - 10.0))
    torch.testing.assert_close(moving.detach(), torch.tensor([0.7, 1.0, 0.6, 1.0]))


def test_row_11_capturable_steps_have_the_same_bits() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    for net, capturable in ((model, True), (other, False)):
        optimizer = sam_kernels.SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho="0.1/k^0.5", lambd="1/t", capturable=capturable)
        for _ in range(3):
            optimizer.step(lambda x, y, o=optimizer, n=net: closure_of(o, n, (x, y))(), batch=batch, micro_batches=4)
    assert_same_bits(weights(model), weights(other))


def test_row_02_hooks_schedulers_and_the_signature() -> None:
    model, batch = make_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    given: list[Any] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: given.append(sorted(kwargs)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda x, y: closure_of(optimizer, model, (x, y))(), batch=batch, micro_batches=2)
        scheduler.step()
        optimizer.step(closure_of(optimizer, model, batch), ascent_closure=closure_of(optimizer, model, batch))
        scheduler.step()
    assert given == [["batch", "micro_batches"], ["ascent_closure"]]
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert optimizer.param_groups[0]["sam_step"] == 2
    assert "grad_scaler" not in inspect.signature(optimizer.step).parameters  # GradScaler.step would hand itself over, and warn
