"""m-SAM and n-SAM (arXiv 2509.18001) as their formulas say, and what must hold of several micro-batches in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import functional
from sam_kernels.optim._engine import ownership
from tests.optim.problem import (
    assert_same_bits,
    closure_of,
    every_backend,
    every_base,
    gradients,
    loss_of,
    make_batch,
    make_model,
    set_weights,
    twin,
    weights,
)

MIXES = pytest.mark.parametrize(
    "options", [{"lambd": 0.0}, {"lambd": 0.5}, {"lambd": 1.0}, {"lambd": 0.5, "adaptive": True, "eta": 0.01}], ids=str
)


def perturbed_by(
    start: list[Tensor], grads: list[Tensor], *, rho: float, lambd: float = 1.0, adaptive: bool = False, eta: float = 0.0
) -> Any:
    scaling = [w.abs() + eta if adaptive else torch.ones_like(w) for w in start]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(scaling, grads, strict=True)))
    scale = rho * (1 - lambd + lambd / (norm + 1e-12))
    return [w + scale * t * t * g for w, t, g in zip(start, scaling, grads, strict=True)]


def written_out(model: nn.Module, base: Any, ascents: list[Any], descents: list[Any], **options: Any) -> None:
    """x+ = base(x, mean_j grad f_j(x + e(grad of the j-th ascent)))."""
    start, found = weights(model), []
    for ascent, descent in zip(ascents, descents, strict=True):
        set_weights(model, perturbed_by(start, gradients(model, ascent), **options))
        found.append(gradients(model, descent))
        set_weights(model, start)
    for param, *grads in zip(model.parameters(), *found, strict=True):
        param.grad = sum(grads) / len(grads)
    base.step()


def loss_closure(optimizer: Any, model: nn.Module, calls: list[int] | None = None) -> Callable[..., Tensor]:
    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(inputs))
        return closure_of(optimizer, model, (inputs, targets))()

    return closure


def assert_close(model: nn.Module, other: nn.Module) -> None:
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@every_backend
@every_base
@MIXES
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_m_sam_is_the_formulas(backend: str, base: Any, kwargs: dict[str, Any], options: dict[str, Any], micro_batches: int) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.1, **options, **kwargs)
    other_base = base(other.parameters(), **kwargs)
    with sam_kernels.use_backend(backend):
        for seed in range(3):
            inputs, targets = make_batch(torch.float64, seed)
            pieces = list(zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True))
            first_loss = loss_of(model, (inputs, targets)).item()  # the mean of the pieces' means, as they are of one size
            calls: list[int] = []
            loss = optimizer.step(loss_closure(optimizer, model, calls), batch=(inputs, targets), micro_batches=micro_batches)
            assert loss.item() == pytest.approx(first_loss, rel=1e-13)
            assert calls == [16 // micro_batches] * 2 * micro_batches
            written_out(other, other_base, pieces, pieces, rho=0.1, **options)
            assert_close(model, other)


@every_base
@MIXES
def test_n_sam_is_the_formulas(base: Any, kwargs: dict[str, Any], options: dict[str, Any]) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.1, **options, **kwargs)
    other_base = base(other.parameters(), **kwargs)
    everything = make_batch(torch.float64, 9)
    full = closure_of(optimizer, model, everything)
    for step in range(3):
        batch = (everything[0][step::4], everything[1][step::4])
        full_loss = loss_of(model, everything).item()
        calls: list[int] = []
        closure = loss_closure(optimizer, model, calls)
        assert optimizer.step(lambda closure=closure, batch=batch: closure(*batch), ascent_closure=full).item() == full_loss
        assert calls == [4]
        written_out(other, other_base, [everything], [batch], rho=0.1, **options)
        assert_close(model, other)


def test_n_sam_without_a_radius_is_the_base_optimizer() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    loss = optimizer.step(closure_of(optimizer, model, batch), ascent_closure=lambda: pytest.fail("called"))
    assert loss.item() == closure_of(plain, other, batch)().item()
    plain.step()
    assert_same_bits(weights(model), weights(other))


@every_backend
def test_one_micro_batch_is_sam_bit_for_bit(backend: str) -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    with sam_kernels.use_backend(backend):
        sam = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, lr=0.1)
        m_sam = sam_kernels.SAM(other.parameters(), torch.optim.AdamW, lr=0.1)
        for _ in range(3):
            first = sam.step(closure_of(sam, model, batch))
            assert torch.equal(m_sam.step(loss_closure(m_sam, other), batch=batch, micro_batches=1), first)
    assert_same_bits(weights(model), weights(other))


def test_what_becomes_of_a_batch() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = sam_kernels.SAM([param], torch.optim.SGD, lr=0.1)
    seen: list[Any] = []

    def closure(*args: Any) -> Tensor:
        seen.append(args)
        param.grad = torch.ones(2)
        return torch.zeros(())

    x, y = torch.arange(6.0), torch.arange(12).reshape(6, 2)
    mode = object()
    optimizer.step(closure, batch=[x, {"y": y, "more": (x, None)}, mode, 3], micro_batches=3)
    assert len(seen) == 6
    for j, (piece, nested, *rest) in enumerate(seen[::2]):
        assert piece.tolist() == [2 * j, 2 * j + 1]
        assert piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(nested["y"], y[2 * j : 2 * j + 2])
        assert torch.equal(nested["more"][0], piece)
        assert nested["more"][1] is None
        assert rest == [mode, 3]
    seen.clear()
    optimizer.step(closure, batch=(x,))
    assert [args[0] is x for args in seen] == [True, True]


X = torch.zeros(6, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": (X,), "micro_batches": 4}, ValueError, "6 rows of batch cannot be cut into 4 equal micro-batches"),
        ({"batch": (X[:0],), "micro_batches": 2}, ValueError, "0 rows of batch"),
        ({"batch": (X, {"y": X[:5]}), "micro_batches": 2}, ValueError, r"batch\[1\]\['y'\] has 5 rows, batch\[0\] has 6"),
        ({"batch": (X, torch.ones(())), "micro_batches": 2}, ValueError, r"batch\[1\] has no dimension to cut"),
        ({"batch": (), "micro_batches": 2}, ValueError, "batch holds no tensor"),
        ({"batch": (3, "x"), "micro_batches": 1}, ValueError, "batch holds no tensor"),
        ({"batch": X, "micro_batches": 2}, TypeError, "batch must be a tuple or a list"),
        ({"batch": {"x": X}, "micro_batches": 2}, TypeError, "batch must be a tuple or a list"),
        ({"batch": (X,), "micro_batches": 0}, ValueError, "micro_batches must be at least 1, got 0"),
        ({"batch": (X,), "micro_batches": 2.0}, TypeError, "micro_batches must be an integer, got 2.0"),
        ({"batch": (X,), "micro_batches": True}, TypeError, "micro_batches must be an integer, got True"),
        ({"micro_batches": 2}, ValueError, "micro_batches needs batch"),
        ({"closure": [print], "batch": (X,)}, ValueError, "batch and micro_batches go with one closure"),
        ({"closure": [print], "micro_batches": 1}, ValueError, "batch and micro_batches go with one closure"),
        ({"closure": None, "batch": (X,)}, ValueError, "batch needs a closure"),
        ({"closure": None, "ascent_closure": print}, ValueError, "ascent_closure needs a closure"),
        ({"ascent_closure": 3}, TypeError, "ascent_closure must be a callable, got 3"),
        ({"ascent_closure": print, "batch": (X,)}, ValueError, "with ascent_closure there is one perturbation"),
        ({"closure": [print, print], "ascent_closure": print}, ValueError, "with ascent_closure there is one perturbation"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = sam_kernels.SAM(make_model().parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(error, match=message):
        optimizer.step(**{"closure": lambda *_: pytest.fail("called"), **arguments})


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool | None]]:
    """The operations that a step calls, and for a perturbation whether it reads saved weights."""
    calls: list[tuple[str, bool | None]] = []
    for name in ("grad_norm_", "perturb_", "restore_", "direction_norm_", "check_finite_", "sgd_step_"):
        real = getattr(functional, name)

        def count(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            calls.append((name, kwargs.get("from_old")))
            return real(*args, **kwargs)

        monkeypatch.setattr(functional, name, count)
    return calls


def test_the_passes_are_those_of_the_byte_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    calls = counted(monkeypatch)
    for _ in range(2):
        calls.clear()
        optimizer.step(loss_closure(optimizer, model), batch=make_batch(), micro_batches=4)
        first = [("grad_norm_", None), ("perturb_", False), ("restore_", None)]
        later = [("grad_norm_", None), ("perturb_", True), ("direction_norm_", None), ("restore_", None)]
        assert calls == [*first, *later, *later, *later[:-1], ("sgd_step_", None)]


@every_base
def test_data_pointers_stay_and_memory_is_one_mean_gradient(base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), base, **kwargs)
    pointers = [param.data_ptr() for param in model.parameters()]
    for _ in range(3):
        optimizer.step(loss_closure(optimizer, model), batch=make_batch(), micro_batches=4)
        assert [param.data_ptr() for param in model.parameters()] == pointers
    held = list(optimizer._passes.lists.backups._copies.values())
    assert sum(copy.numel() for copy in held) == sum(param.numel() for param in model.parameters())


@every_backend
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_in_place_does_not_zero_the_mean(backend: str, set_to_none: bool) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)

    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = loss_of(model, (inputs, targets))
        loss.backward()
        return loss

    pieces = list(zip(*(tensor.chunk(4) for tensor in batch), strict=True))
    with sam_kernels.use_backend(backend):
        for _ in range(3):
            optimizer.step(closure, batch=batch, micro_batches=4)
            written_out(other, base, pieces, pieces, rho=0.05)
            assert_close(model, other)


def test_who_has_a_gradient() -> None:
    param = nn.Parameter(torch.ones(4))

    def ours() -> bool:
        grads = [param.grad]
        param.grad = None
        return ownership.nobody_else_has(grads)[0]

    (param * 2).sum().backward()
    assert ours()
    param.grad = kept = torch.ones(4)
    assert not ours()
    param.grad = kept.detach()
    assert not ours()
    param.grad = torch.ones(8)[:4]
    assert not ours()
    (param * 2).sum().backward()
    noted = [param.grad]
    assert not ours()
    assert noted[0].sum() == 8


@every_backend
@pytest.mark.parametrize("layout", ["kept", "flat", "shared", "expanded", "transposed"])
def test_gradients_that_somebody_else_has_are_not_written(backend: str, layout: str) -> None:
    """Buffers that are used again for the next micro-batch, gradients that share memory, strides that are not the parameter's."""
    params = [nn.Parameter(torch.full((2, 3), float(i + 1), dtype=torch.float64)) for i in range(2)]
    flat = torch.zeros(12, dtype=torch.float64)
    made = iter(torch.arange(1.0, 9.0, dtype=torch.float64))
    used: list[Tensor] = []

    def closure() -> None:
        value = next(made)
        if layout in ("kept", "flat"):  # always in the same memory
            flat.copy_(value * torch.arange(1.0, 13.0, dtype=torch.float64))
            grads = [flat[:6].view(2, 3), flat[6:].view(2, 3)]
        elif layout == "shared":
            grads = [value * torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)] * 2
        elif layout == "expanded":
            grads = [value.expand(2, 3), (2 * value).expand(2, 3)]
        else:
            grads = [(value * torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2)).t() for _ in range(2)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        used[:] = [grad.clone() for grad in grads]
        if len(seconds) * 2 + 1 == int(value) - 1:
            seconds.append(list(used))

    seconds: list[list[Tensor]] = []
    optimizer = sam_kernels.SAM(params, torch.optim.SGD, lr=1.0)
    start = [param.detach().clone() for param in params]
    with sam_kernels.use_backend(backend):
        optimizer.step([closure] * 4)
    assert len(seconds) == 4
    for i, param in enumerate(params):
        mean = torch.stack([grads[i] for grads in seconds]).mean(0)
        torch.testing.assert_close(param.detach(), start[i] - mean, rtol=1e-13, atol=1e-13)


@every_backend
@every_base
@pytest.mark.parametrize("anywhere", [True, False])
def test_a_parameter_without_a_gradient_in_some_micro_batches_counts_as_zero_there(
    backend: str, base: Any, kwargs: dict[str, Any], anywhere: bool
) -> None:
    """All ways of being absent from the passes of three micro-batches (or, of second passes, from the first alone); clipped too."""
    masks = [[(i >> bit) & 1 for bit in range(6)] for i in range(64) if anywhere or i & 0b101000 == 0b101000]
    for max_grad_norm in (None, 0.5):
        params = [nn.Parameter(torch.full((3,), 1.0 + i, dtype=torch.float64)) for i in range(len(masks))]
        others = [nn.Parameter(param.detach().clone()) for param in params]
        plain = base(others, **kwargs)
        optimizer = sam_kernels.SAM(params, base, rho=0.1, max_grad_norm=max_grad_norm, **kwargs)
        sums = [torch.zeros(3, dtype=torch.float64) for _ in params]
        calls = iter(range(6))

        def closure(params: Any = params, sums: Any = sums, calls: Any = calls) -> None:
            call = next(calls)
            for param, mask, total in zip(params, masks, sums, strict=True):
                param.grad = param.detach() * (0.01 * (call + 1)) if mask[call] else None
                if mask[call] and call % 2:
                    total += param.grad

        with sam_kernels.use_backend(backend):
            optimizer.step([closure] * 3)
        for other, mask, total in zip(others, masks, sums, strict=True):
            other.grad = total / 3 if any(mask[1::2]) else None
        if max_grad_norm is not None:
            assert nn.utils.clip_grad_norm_(others, max_grad_norm) > max_grad_norm
        plain.step()
        for i, (param, other) in enumerate(zip(params, others, strict=True)):
            torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-13, atol=1e-13, msg=f"{masks[i]}")


@every_backend
@every_base
@pytest.mark.parametrize("bad_pass", range(6))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_08_a_gradient_of_any_micro_batch_that_is_not_finite_skips_the_step(
    backend: str, base: Any, kwargs: dict[str, Any], bad_pass: int, bad: float
) -> None:
    model, batch = make_model(), tuple(tensor[:15] for tensor in make_batch())
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), base, **kwargs)
        optimizer.step(loss_closure(optimizer, model), batch=batch, micro_batches=3)
        before = weights(model)
        state = [value.clone() for s in optimizer.state.values() for value in s.values() if isinstance(value, Tensor)]
        calls: list[int] = []

        def closure(inputs: Tensor, targets: Tensor) -> Tensor:
            loss = loss_closure(optimizer, model, calls)(inputs, targets)
            if len(calls) == bad_pass + 1:
                model[2].bias.grad[1] = bad
            return loss

        optimizer.step(closure, batch=batch, micro_batches=3)
        assert_same_bits(weights(model), before)
        assert_same_bits([value for s in optimizer.state.values() for value in s.values() if isinstance(value, Tensor)], state)
        assert optimizer.skipped_steps == 1
        optimizer.step(closure, batch=batch, micro_batches=3)
        assert optimizer.skipped_steps == 1
        assert not torch.equal(weights(model)[0], before[0])
