"""What torch's own tests and pages do to an optimizer: flags of the base, unusual parameters and state."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import sam_kernels
from tests.optim.family_runs import run
from tests.optim.problem import (
    assert_same_bits,
    closure_of,
    loss_of,
    make_batch,
    make_model,
    through_a_file,
    twin,
    weights,
    written_out_step,
)
from tests.optim.ways import by_closure, by_gradient, by_two_steps, sam

# --- the base's flags ---

FLAGS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9, "fused": True}),
    (SGD, {"lr": torch.tensor([0.1])}),
    (Adam, {"lr": 0.01, "amsgrad": True}),
    (Adam, {"lr": torch.tensor(0.01, dtype=torch.float64), "betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": False}),
    (Adam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1, "foreach": True}),
    (AdamW, {"lr": 0.01, "fused": True}),
    (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "fused": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (torch.optim.Rprop, {"lr": 0.01}),
    (torch.optim.Adamax, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize(("base", "options"), FLAGS, ids=[f"{i}-{base.__name__}" for i, (base, _) in enumerate(FLAGS)])
def test_flags_of_the_base_mean_what_they_mean_without_sam(base: Any, options: dict[str, Any]) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    optimizer, plain = sam(model, base, **copy.deepcopy(options)), base(other.parameters(), **copy.deepcopy(options))
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, batch))
        written_out_step(other, plain, batch, rho=0.05)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("base", [SGD, Adam])
def test_a_differentiable_base_says_what_torch_says_and_moves_nothing(base: Any) -> None:
    model = make_model()
    optimizer = sam(model, base, lr=0.1, differentiable=True)
    before = weights(model)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        by_closure(optimizer, model)
    assert_same_bits(weights(model), before)


def test_a_base_for_sparse_gradients_says_what_torch_says_and_moves_nothing() -> None:
    model = make_model()
    optimizer = sam(model, torch.optim.SparseAdam)
    before = weights(model)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        by_closure(optimizer, model)
    assert_same_bits(weights(model), before)


def test_a_learning_rate_in_a_tensor_is_followed_where_it_lies() -> None:
    model = make_model()
    lr = torch.tensor(0.1)
    optimizer = sam(model, lr=lr)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    lr.zero_()
    before = weights(model)
    by_closure(optimizer, model)
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_schedulers_find_the_bases_momentum(scheduler: str, base: Any) -> None:
    options = {"max_lr": 0.1, "total_steps": 10} if scheduler == "OneCycleLR" else {"base_lr": 0.01, "max_lr": 0.1}
    model = make_model()
    optimizer = sam(model, base, lr=0.1, **({"momentum": 0.8} if base is SGD else {}))
    made = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, cycle_momentum=True, **options)
    seen = set()
    for _ in range(3):
        by_closure(optimizer, model)
        made.step()
        group = optimizer.param_groups[0]
        seen.add(group["momentum"] if base is SGD else group["betas"][0])
    assert len(seen) == 3


# --- parameters and state ---


@pytest.mark.parametrize("call", ["step", "first_step", "backward", "plain"])
def test_parameters_on_meta_are_named(call: str) -> None:
    model = make_model().to("meta")
    optimizer = sam_kernels.SAM(list(model.named_parameters()), SGD, lr=0.1)
    actions: dict[str, Callable[[], Any]] = {
        "step": lambda: optimizer.step(lambda: torch.tensor(1.0)),
        "first_step": optimizer.first_step,
        "backward": lambda: optimizer.backward(lambda: torch.tensor(1.0)),
        "plain": optimizer.step,
    }
    with pytest.raises(TypeError, match=r"SAM: parameter '0\.weight' is on the meta device and has no memory"):
        actions[call]()


def test_one_parameter_on_meta_among_others_is_named() -> None:
    model = make_model()
    late = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = sam_kernels.SAM([*model.named_parameters(), ("late", late)], SGD, lr=0.1)
    before = weights(model)
    loss_of(model, make_batch()).backward()
    late.grad = torch.ones(2, device="meta")
    with pytest.raises(TypeError, match="SAM: parameter 'late' is on the meta device"):
        optimizer.first_step()
    assert_same_bits(weights(model), before)


def test_a_model_that_gets_memory_after_its_optimizer_trains() -> None:
    model = make_model().to("meta")
    optimizer = sam(model, lr=0.1, momentum=0.9)
    other = make_model()
    expected = sam(other, lr=0.1, momentum=0.9)
    start = other.state_dict()
    for name, param in model.named_parameters():
        torch.utils.swap_tensors(param, nn.Parameter(start[name].clone()))
    for net, each in ((model, optimizer), (other, expected)):
        run(each, net, 2)
    assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("kind", ["meta", "integer"])
def test_frozen_parameters_in_the_first_place_are_ignored(kind: str) -> None:
    model = make_model()
    other = twin(model)
    frozen = nn.Parameter(torch.ones(2, device="meta") if kind == "meta" else torch.ones(2, dtype=torch.int64), requires_grad=False)
    optimizer = sam_kernels.SAM([frozen, *model.parameters()], AdamW, lr=0.01)
    expected = sam(other, AdamW, lr=0.01)
    for net, each in ((model, optimizer), (other, expected)):
        by_closure(each, net)
        by_two_steps(each, net)
        by_gradient(each, net)
    assert_same_bits(weights(model), weights(other))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    copy.deepcopy(optimizer)


def test_numbers_in_strings_are_numbers() -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    optimizer = sam_kernels.UnifiedSAM(model.parameters(), SGD, rho="0.07", lambd="0.5", lr=0.1)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer.step(closure_of(optimizer, model, batch))
    written_out_step(other, SGD(other.parameters(), lr=0.1), batch, rho=0.07, lambd=0.5)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_names_of_parameters_stay_with_their_groups() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(list(model[0].named_parameters()), SGD, lr=0.1)
    optimizer.add_param_group({"params": [(f"head.{name}", param) for name, param in model[2].named_parameters()]})
    saved = through_a_file(optimizer.state_dict())
    assert [group["param_names"] for group in saved["param_groups"]] == [["weight", "bias"], ["head.weight", "head.bias"]]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["param_names"] == ["head.weight", "head.bias"]
    run(optimizer, model, 1)


def test_none_in_the_state_is_kept() -> None:
    model = make_model()
    optimizer = sam(model, lr=0.1)
    plain = SGD(model.parameters(), lr=0.1)
    loss_of(model, make_batch()).backward()
    plain.step()  # momentum_buffer: None
    optimizer.load_state_dict(plain.state_dict())
    optimizer.param_groups[0]["momentum"] = 0.9
    run(optimizer, model, 2)
    assert all(entry["momentum_buffer"] is not None for entry in optimizer.state.values())


def test_state_stays_a_defaultdict_through_copies_and_loads() -> None:
    model = make_model()
    optimizer = sam(model, lr=0.1, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert isinstance(each.state, defaultdict)
        assert each.state is each.base_optimizer.state


def test_a_checkpoint_shares_tensors_with_the_optimizer_as_torchs_does() -> None:
    model = make_model()
    optimizer = sam(model, lr=0.1, momentum=0.9)
    run(optimizer, model, 1)
    saved = optimizer.state_dict()
    first = next(iter(optimizer.state.values()))["momentum_buffer"]
    assert saved["state"][0]["momentum_buffer"] is first
    assert all(isinstance(i, int) for group in saved["param_groups"] for i in group["params"])


def test_empty_parameters_and_empty_gradients_take_part() -> None:
    model = make_model()
    empty = nn.Parameter(torch.empty(0, 3))
    optimizer = sam_kernels.SAM([empty, *model.parameters()], AdamW, lr=0.01)
    other = twin(model)
    expected = sam(other, AdamW, lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, make_batch()) + empty.sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        by_closure(expected, other)
    for got, right in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)


def test_zero_dimensional_parameters_take_part() -> None:
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = sam_kernels.SAM([scale], SGD, rho=0.1, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = scale.square()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert scale.item() == pytest.approx(2.0 - 0.1 * 2 * 2.1, rel=1e-12)
