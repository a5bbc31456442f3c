"""Equal work: every provider's step is the formula's, computed here in float64 with gradients that differ between the two passes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.memory import held_bytes, reachable_tensors
from bench.providers import BASES, PROVIDERS, REFERENCE, RHO, Base
from bench.steps import COMBINATIONS, batches
from bench.workloads import DTYPES, make_grads, make_params

SHAPES = ((5, 3), (7,), (4, 2, 3), (1,))
STEPS = 3
# In units of the largest operand. float32 against float64: a few roundings. bfloat16: the published loops round the norm, the scale and the
# product e_w to bfloat16 (by design) and torch's base keeps its state in bfloat16: a few units of 2^-8.
TOLERANCE = {"fp32": 2e-6, "bf16": 3 * 2.0**-8}


def _expected_base_step(base: Base, p: Tensor, g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
    options = base.kwargs
    if base.name == "sgd":
        state["m"] = g.clone() if t == 1 else options["momentum"] * state["m"] + g
        return p - options["lr"] * state["m"]
    beta1, beta2 = options["betas"]
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
    denominator = (state["v"] / (1 - beta2**t)).sqrt() + options["eps"]
    return p * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * (state["m"] / (1 - beta1**t)) / denominator


def _gradients(step: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return make_grads(SHAPES, dtype, seed=2 * step), make_grads(SHAPES, dtype, seed=2 * step + 1)


def _assert_close(actual: list[torch.nn.Parameter], expected: list[Tensor], dtype: str, what: str) -> None:
    for i, (p, q) in enumerate(zip(actual, expected, strict=True)):
        error = (p.detach().double() - q).abs().max().item()
        bound = TOLERANCE[dtype] * q.abs().max().item()
        assert error <= bound, f"{what}, parameter {i}: off by {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize(("base_name", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "torch.compile" else name for name in PROVIDERS])
def test_step_is_the_formulas(name: str, base_name: str, dtype: str) -> None:
    if name == "torch.compile" and (base_name, dtype) != ("adamw", "bf16"):
        pytest.skip("compiling takes seconds: one combination with every feature is enough")
    reason = PROVIDERS[name].missing(len(SHAPES))
    if reason is not None:
        pytest.skip(reason)
    base = BASES[base_name]
    params = make_params(make_grads(SHAPES, DTYPES[dtype], seed=100))
    optimizer = PROVIDERS[name].make(params, base)
    expected = [p.detach().double() for p in params]
    states: list[dict[str, Tensor]] = [{} for _ in params]
    for t in range(1, STEPS + 1):
        first, second = _gradients(t, DTYPES[dtype])
        for p, g in zip(params, first, strict=True):
            p.grad = g
        norm = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in first]))
        optimizer.first_step()
        perturbed = [p + RHO / (norm + 1e-12) * g.double() for p, g in zip(expected, first, strict=True)]
        _assert_close(params, perturbed, dtype, f"step {t}, ascent")
        for p, g in zip(params, second, strict=True):
            p.grad = g
        optimizer.second_step()
        expected = [_expected_base_step(base, p, g.double(), state, t) for p, g, state in zip(expected, second, states, strict=True)]
        _assert_close(params, expected, dtype, f"step {t}, descent")


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "torch.compile"])
def test_gradients_are_not_written(name: str) -> None:
    """They are shared between the providers."""
    if PROVIDERS[name].missing(len(SHAPES)) is not None:
        pytest.skip(str(PROVIDERS[name].missing(len(SHAPES))))
    grads = make_grads(SHAPES, torch.float32)
    before = [grad.clone() for grad in grads]
    optimizer = PROVIDERS[name].make(make_params(grads), BASES["sgd"])
    optimizer.first_step()
    optimizer.second_step()
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, before, strict=True))


def test_a_missing_peer_tells_why() -> None:
    assert "installed" in str(PROVIDERS["unifiedsam/fused"].missing(1)) or PROVIDERS["unifiedsam/fused"].missing(1) is None
    assert "1000 tensors" in str(PROVIDERS["torch.compile"].missing(1000)) or "compiler" in str(PROVIDERS["torch.compile"].missing(1000))


def test_every_batch_has_the_reference_and_every_provider_one_place() -> None:
    providers = list(PROVIDERS.values())
    for room in (1, 3, 5, 100):
        groups = batches(providers, bytes_each=10, bytes_shared=5, budget=5 + 10 * room)
        names = [provider.name for group in groups for provider in group]
        assert all(group[0].name == REFERENCE for group in groups)
        assert set(names) == set(PROVIDERS)
        assert len(names) == len(PROVIDERS) + len(groups) - 1
        assert all(len(group) <= max(2, room) for group in groups)


@pytest.mark.parametrize(("name", "copies"), [("torch._foreach_/fused", 1), ("davda54/fused", 0), ("pytorch_optimizer/foreach", 0)])
def test_bytes_held_between_steps(name: str, copies: int) -> None:
    if PROVIDERS[name].missing(len(SHAPES)) is not None:
        pytest.skip(str(PROVIDERS[name].missing(len(SHAPES))))
    for base in BASES.values():
        params = make_params(make_grads(SHAPES, torch.float32))
        optimizer = PROVIDERS[name].make(params, base)
        for _ in range(2):
            optimizer.first_step()
            optimizer.second_step()
        assert held_bytes(optimizer, params, base) == copies * 4 * sum(p.numel() for p in params)


def test_reachable_tensors_enters_containers_objects_and_slots() -> None:
    class Slotted:
        __slots__ = ("tensor",)

    slotted = Slotted()
    slotted.tensor = torch.ones(1)
    holder = SimpleNamespace(extra=[{"a": (torch.ones(2),)}, slotted])
    holder.loop = holder
    assert sorted(tensor.numel() for tensor in reachable_tensors(holder)) == [1, 2]
