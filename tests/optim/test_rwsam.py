"""RW-SAM's step is the formula's: exact norms, weights, draws, β = 0, groups, several closures, the two-step API."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM, functional, use_backend
from tests.optim.problem import assert_same_bits, every_backend, every_base, twin, weights
from tests.optim.rwsam_problem import (
    B,
    Recorded,
    ascent_along,
    assert_close,
    combined,
    group_grads,
    losses_of,
    make_batch,
    make_model,
    norms_of,
    skip_without_norms,
    written_out_step,
)

SCALES = [{"rho": 0.2}, {"rho": 0.2, "lambd": 0.3}, {"rho": 0.5, "lambd": 0.5, "adaptive": True, "eta": 0.01}]
KINDS = ["exact", "finite_difference", "jvp", "last_layer", "norm_layers"]


@every_backend
@every_base
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("m", [1, 3])
def test_exact_steps_are_the_formulas(backend: str, base: Any, kwargs: dict[str, Any], scale: dict[str, Any], m: int) -> None:
    skip_without_norms(backend, "exact")
    model = make_model()
    other = twin(model)
    base_of_other = base(other.parameters(), **kwargs)
    with use_backend(backend):
        optimizer = RWSAM(model, base, beta=2.0, micro_batch=m, **scale, **kwargs)
        for step in range(4):
            batch = make_batch(seed=step)
            first = losses_of(model, batch).mean()
            loss = optimizer.step(lambda batch=batch: losses_of(model, batch))
            norms, p = written_out_step(other, base_of_other, batch, beta=2.0, m=m, **scale)
            assert_close(weights(model), weights(other), 1e-9)
            assert optimizer.last_norms is not None
            assert optimizer.last_weights is not None
            assert_close(optimizer.last_norms, norms)
            assert_close(optimizer.last_weights, p)
            assert torch.equal(loss, first)
            assert not loss.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 4])
@every_base
def test_beta_of_zero_is_sam_bit_for_bit(base: Any, kwargs: dict[str, Any], kind: str, m: int) -> None:
    model = make_model(torch.float32, batch_norm=True, dropout=0.3)
    other = twin(model)
    ours = RWSAM(model, base, beta=0.0, norms=kind, micro_batch=m, rho=0.2, lambd=0.7, **kwargs)
    sam = SAM(other.parameters(), base, model=other, rho=0.2, lambd=0.7, **kwargs)
    for step in range(3):
        batch = make_batch(torch.float32, seed=step)

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            sam.zero_grad()
            loss = losses_of(other, batch).mean()
            loss.backward()
            return loss

        torch.manual_seed(step)
        ours_loss = ours.step(lambda batch=batch: losses_of(model, batch))
        torch.manual_seed(step)
        assert torch.equal(ours_loss, sam.step(closure))
        assert_same_bits([*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()])
    assert ours.last_norms is None
    assert_close(ours.last_weights, torch.full((B // m,), m / B), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_are_sam_to_rounding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A β of zero that nobody looks at, as one on a device, takes the whole path."""
    monkeypatch.setattr(RWSAM, "_is_plain", lambda self, plan: False)
    model = make_model()
    other = twin(model)
    ours = RWSAM(model, torch.optim.SGD, beta=0.0, norms=kind, lr=0.1, rho=0.2)
    sam = SAM(other.parameters(), torch.optim.SGD, lr=0.1, rho=0.2)
    batch = make_batch()

    def closure() -> Tensor:
        sam.zero_grad()
        loss = losses_of(other, batch).mean()
        loss.backward()
        return loss

    ours.step(lambda: losses_of(model, batch))
    sam.step(closure)
    assert ours.last_norms is not None
    assert_close(weights(model), weights(other), 1e-12)


def test_a_large_beta_climbs_along_the_sample_of_the_longest_gradient() -> None:
    model, batch = make_model(), make_batch()
    closure = Recorded(model, batch)
    grads = group_grads(model, batch)
    expected = ascent_along(grads[int(norms_of(grads).argmax())], list(model.parameters()), rho=0.1)
    optimizer = RWSAM(model, torch.optim.SGD, beta=1e6, rho=0.1, lr=0.1)
    optimizer.step(closure)
    assert_close(closure.ascent, expected)
    found = optimizer.diagnostics()
    assert found["effective_sample_size"].item() == found["max_weight"].item() == 1.0


@pytest.mark.parametrize("kind", ["exact", "finite_difference"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("replacement", [True, False])
def test_draws_climb_along_the_mean_of_what_was_drawn(kind: str, m: int, replacement: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    sample = functional.sharpness_sample

    def remembered(norms: Tensor, num_samples: int, **options: Any) -> tuple[Tensor, Tensor]:
        assert options["replacement"] is replacement
        assert options["beta"] == 2.0
        indices, corrections = sample(norms, num_samples, **options)
        drawn.append(indices)
        return indices, corrections

    monkeypatch.setattr(functional, "sharpness_sample", remembered)
    model = make_model()
    optimizer = RWSAM(
        model, torch.optim.SGD, beta=2.0, norms=kind, sampling="draw", draws=4, replacement=replacement, micro_batch=m, rho=0.2, lr=0.1
    )
    for step in range(4):
        closure = Recorded(model, make_batch(seed=step))
        grads = group_grads(model, closure.batch, m)
        optimizer.step(closure)
        counts = torch.bincount(drawn[-1], minlength=B // m).double()
        assert counts.sum() == 4
        assert replacement or counts.max() == 1
        assert_close(closure.ascent, ascent_along(combined(grads, counts / 4), [*closure.calls[0]], rho=0.2))
    assert len({tuple(indices.tolist()) for indices in drawn}) > 1, "every step draws anew"


def test_beta_is_followed() -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=lambda t: 0.5 * t, lr=0.0)
    norms = norms_of(group_grads(model, batch))
    for t in (1, 2, 3):
        optimizer.step(lambda: losses_of(model, batch))
        assert_close(optimizer.last_weights, (0.5 * t * norms).softmax(0))
    optimizer.param_groups[0]["beta"] = torch.tensor(7.0)
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_weights, (7.0 * norms).softmax(0))


def test_norms_leave_out_groups_without_a_radius() -> None:
    model, batch = make_model(), make_batch()
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "rho": 0.0}, {"params": [model[4].weight]}]
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, params=groups, rho=0.2, lr=0.1)
    grads = group_grads(model, batch)
    takes_part = {0, 1, 4}  # weight and bias of the first, weight of the last layer; its bias is not the optimizer's
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_norms, norms_of(grads, takes_part.__contains__))
    optimizer.param_groups[1]["rho"] = 0.1
    grads = group_grads(model, batch)
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_norms, norms_of(grads, {0, 1, 2, 3, 4}.__contains__))


@pytest.mark.parametrize(
    ("norms", "counted"), [("last_layer", {4, 5}), ("norm_layers", {2, 3}), ("first_and_last", {0, 1, 4, 5})], ids=lambda value: str(value)
)
def test_proxies_are_norms_over_their_layers(norms: Any, counted: set[int]) -> None:
    model, batch = make_model(), make_batch()
    closure = Recorded(model, batch)
    grads = group_grads(model, batch)
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, norms=[model[0], model[4]] if norms == "first_and_last" else norms, rho=0.2, lr=0.1)
    optimizer.step(closure)
    expected = norms_of(grads, counted.__contains__)
    assert_close(optimizer.last_norms, expected)
    assert_close(closure.ascent, ascent_along(combined(grads, (2.0 * expected).softmax(0)), closure.calls[0], rho=0.2))


@pytest.mark.parametrize("way", ["list", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_closures_are_reweighted_each_by_itself(way: str, kind: str) -> None:
    """m-SAM, whose micro-batches climb along reweighted gradients of their own."""
    model, (inputs, labels) = make_model(), make_batch()
    other = twin(model)
    ours = RWSAM(model, torch.optim.SGD, beta=2.0, norms=kind, rho=0.2, lr=0.1)
    pieces = list(zip(inputs.split(4), labels.split(4), strict=True))
    start, total = weights(other), [torch.zeros_like(param) for param in other.parameters()]
    for i, piece in enumerate(pieces):  # one step with each piece alone, from the same weights; the seeds are those of piece i
        alone = twin(other)
        single = RWSAM(alone, torch.optim.SGD, beta=2.0, norms=kind, rho=0.2, lr=1.0)
        if kind in ("finite_difference", "jvp"):
            closures = [Recorded(alone, piece) for _ in pieces]
            single.step(closures)
            closure = closures[i]
        else:
            closure = Recorded(alone, piece)
            single.step(closure)
        moved = twin(other)
        with torch.no_grad():
            for param, value in zip(moved.parameters(), closure.calls[-1], strict=True):
                param.copy_(value)
        losses_of(moved, piece).mean().backward()
        total = [t + param.grad / len(pieces) for t, param in zip(total, moved.parameters(), strict=True)]
    if way == "list":
        loss = ours.step([lambda piece=piece: losses_of(model, piece) for piece in pieces])
    else:
        loss = ours.step(lambda x, y: losses_of(model, (x, y)), batch=(inputs, labels), micro_batches=3)
    assert_close(weights(model), [w - 0.1 * t for w, t in zip(start, total, strict=True)], 1e-9)
    assert_close(loss, losses_of(other, (inputs, labels)).mean().detach())
    assert ours.last_weights is not None
    assert_close(ours.last_weights.view(3, -1).sum(1), torch.ones(3))
    assert ours.diagnostics()["effective_sample_size"].item() < 4


@pytest.mark.parametrize("kind", ["exact", "last_layer"])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@every_base
def test_two_step_api(base: Any, kwargs: dict[str, Any], kind: str, beta: float) -> None:
    model = make_model(torch.float32)
    other = twin(model)
    options = {"beta": lambda t: beta * t, "norms": kind, "rho": 0.2, **kwargs}
    ours, theirs = RWSAM(model, base, **options), RWSAM(other, base, **options)
    for step in range(3):
        batch = make_batch(torch.float32, seed=step)
        theirs.step(lambda batch=batch: losses_of(other, batch))
        with ours.recording():
            losses = losses_of(model, batch)
        ours.weighted_backward(losses)
        ours.first_step(zero_grad=True)
        losses_of(model, batch).mean().backward()
        ours.second_step(zero_grad=True)
        assert_same_bits(weights(model), weights(other))
        assert_same_bits([ours.last_weights], [theirs.last_weights])  # type: ignore[list-item]  # there are some


@pytest.mark.parametrize("change", ["freeze", "replace", "unfreeze"])
def test_layers_may_change_between_steps(change: str) -> None:
    """What is the last layer, and which parameters count, is looked up at every step."""
    model, batch = make_model(), make_batch()
    if change == "unfreeze":
        model[4].requires_grad_(False)
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, norms="last_layer", rho=0.2, lr=0.1)
    optimizer.step(lambda: losses_of(model, batch))
    if change == "replace":
        model[4] = nn.Linear(7, 3).double()
        optimizer.add_param_group({"params": model[4].parameters()})
    else:
        model[4].requires_grad_(change == "unfreeze")
    last = model[1] if change == "freeze" else model[4]
    norms = [torch.autograd.grad(loss, list(last.parameters()), retain_graph=True) for loss in losses_of(model, batch)]
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_norms, norms_of(norms))


def test_rho_may_begin_at_zero_in_the_two_step_api() -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, rho=lambda t: 0.1 * (t - 1), lr=0.1)
    for step in range(2):
        expected = norms_of(group_grads(model, batch))
        with optimizer.recording():
            losses = losses_of(model, batch)
        optimizer.weighted_backward(losses)
        assert (optimizer.last_norms is None) is (step == 0)
        if step == 1:
            assert_close(optimizer.last_norms, expected)
        optimizer.first_step(zero_grad=True)
        losses_of(model, batch).mean().backward()
        optimizer.second_step()


def test_diagnostics() -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, lr=0.1)
    assert optimizer.diagnostics() == {}
    assert optimizer.last_norms is None
    assert optimizer.last_weights is None
    norms = norms_of(group_grads(model, batch))
    p = (2.0 * norms).softmax(0)
    optimizer.step(lambda: losses_of(model, batch))
    expected = {
        "effective_sample_size": 1 / p.square().sum(),
        "max_weight": p.max(),
        "mean_norm": norms.mean(),
        "min_norm": norms.min(),
        "max_norm": norms.max(),
    }
    found = optimizer.diagnostics()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == ()
        assert_close(found[name], value)


@pytest.mark.parametrize("unsupported", ["error", "vmap"])
def test_a_model_that_has_no_rule(unsupported: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model, batch = nn.Sequential(Own()), make_batch()
    norms = norms_of(group_grads(model, batch))
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, unsupported=unsupported, lr=0.1)
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_norms, norms)


def test_an_operation_that_has_no_rule() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.weight)

    model, batch = nn.Sequential(Distances()), make_batch()
    before = model[0].weight.detach().clone()
    with pytest.raises(NotImplementedError, match=r"has no rule.*register_rule"):
        RWSAM(model, torch.optim.SGD, beta=2.0, lr=0.1).step(lambda: losses_of(model, batch))
    assert torch.equal(model[0].weight, before)
