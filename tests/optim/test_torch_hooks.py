"""Hooks of steps and of checkpoints, global ones among them, hear what they would hear of one ordinary optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.optim.family_runs import make, memory_of, run
from tests.optim.problem import (
    assert_same_bits,
    closure_of,
    loss_of,
    make_batch,
    make_model,
    through_a_file,
    twin,
    weights,
)
from tests.optim.ways import KEEPERS, WAYS, by_closure, sam

# --- step hooks ---


every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def heard() -> Iterator[list[str]]:
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(f"pre {type(optimizer).__name__}")),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(f"post {type(optimizer).__name__}")),
    ]
    yield calls
    for handle in handles:
        handle.remove()


@every_way
@pytest.mark.parametrize("rho", [0.05, 0.0])
@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop])
def test_global_hooks_hear_one_step(base: Any, rho: float, way: Callable[..., None], heard: list[str]) -> None:
    model = make_model()
    optimizer = sam(model, base, lr=0.01, rho=rho)
    way(optimizer, model)
    assert heard == ["pre SAM", "post SAM"]


@every_way
def test_all_kinds_of_hooks_hear_one_step(way: Callable[..., None], heard: list[str]) -> None:
    model = make_model()
    optimizer = sam(model, lr=0.01)
    optimizer.register_step_pre_hook(lambda *_: heard.append("own pre"))
    optimizer.register_step_post_hook(lambda *_: heard.append("own post"))
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: heard.append("base pre"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: heard.append("base post"))
    way(optimizer, model)
    assert heard == ["pre SAM", "own pre", "base pre", "base post", "own post", "post SAM"]


def test_global_hooks_hear_the_base_where_it_is_stepped_by_itself(heard: list[str]) -> None:
    model = make_model()
    optimizer = sam(model, lr=0.01)
    loss_of(model, make_batch()).backward()
    optimizer.base_optimizer.step()
    assert heard == ["pre SGD", "post SGD"]


def test_global_hooks_are_back_after_a_base_that_raises(heard: list[str]) -> None:
    model = make_model()
    optimizer = sam(model, torch.optim.RMSprop, lr=0.01)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.base_optimizer.register_step_pre_hook(stop)
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        by_closure(optimizer, model)
    assert_same_bits(weights(model), before)
    handle.remove()
    heard.clear()
    by_closure(optimizer, model)
    assert heard == ["pre SAM", "post SAM"]


@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop])
def test_hooks_change_neither_the_step_nor_its_return_value(base: Any, heard: list[str]) -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = sam(model, base, lr=0.01), sam(other, base, lr=0.01)
    optimizer.register_step_post_hook(lambda *_: None)
    for _ in range(3):
        loss = optimizer.step(closure_of(optimizer, model, make_batch()))
        assert torch.equal(loss, expected.step(closure_of(expected, other, make_batch())))
    assert_same_bits(weights(model), weights(other))


# --- hooks of checkpoints ---


@pytest.mark.parametrize("name", ["SAM", *KEEPERS])
@pytest.mark.parametrize("value", [3, {"x": 1}, None])
def test_a_pre_hook_may_keep_something_of_its_own_in_the_state(name: str, value: Any) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), "adamw")
    run(optimizer, model, 2)
    optimizer.register_state_dict_pre_hook(lambda each: each.state.__setitem__("mine", value))
    saved = through_a_file(optimizer.state_dict())
    other_model = twin(model)
    other = make(name, other_model.parameters(), "adamw")
    other.load_state_dict(saved)
    assert saved["state"]["mine"] == other.state["mine"] == value
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 2, start=2)
    assert_same_bits(weights(model), weights(other_model))


@pytest.mark.parametrize("name", KEEPERS)
def test_hooks_see_and_change_the_averages_of_a_checkpoint(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    run(optimizer, model, 2)
    key = (*optimizer.direction.keeps, *optimizer.descent.keeps)[0]

    def doubled(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {**entry, key: 2 * entry[key]} for i, entry in state_dict["state"].items()}
        return {**state_dict, "state": state}

    before = memory_of(optimizer)
    handle = optimizer.register_state_dict_post_hook(doubled)
    saved = optimizer.state_dict()
    handle.remove()
    assert_same_bits([entry[key] for entry in saved["state"].values()], [2 * each for each in before])
    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.load_state_dict(saved)
    assert_same_bits(memory_of(optimizer), [4 * each for each in before])


def test_hooks_of_checkpoints_run_once_and_in_order() -> None:
    model = make_model()
    optimizer = sam(model, lr=0.1)
    calls: list[str] = []
    for each, who in ((optimizer, "own"), (optimizer.base_optimizer, "base")):
        each.register_state_dict_pre_hook(lambda _, who=who: calls.append(f"{who} before saving"))
        each.register_state_dict_post_hook(lambda *_, who=who: calls.append(f"{who} after saving"))
        each.register_load_state_dict_pre_hook(lambda *_, who=who: calls.append(f"{who} before loading"))
        each.register_load_state_dict_post_hook(lambda _, who=who: calls.append(f"{who} after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    saving = ["own before saving", "base before saving", "base after saving", "own after saving"]
    assert calls == [*saving, "own before loading", "base before loading", "base after loading", "own after loading"]


def test_a_post_hook_may_rename_what_a_checkpoint_holds_if_a_pre_hook_renames_it_back() -> None:
    model = make_model()
    optimizer = sam(model, lr=0.1, momentum=0.9)
    run(optimizer, model, 2)
    names = [name for name, _ in model.named_parameters()]

    def to_names(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {"by_name": {names[i]: entry for i, entry in state_dict["state"].items()}, "param_groups": state_dict["param_groups"]}

    def to_numbers(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {
            "state": {names.index(name): entry for name, entry in state_dict["by_name"].items()},
            "param_groups": state_dict["param_groups"],
        }

    optimizer.register_state_dict_post_hook(to_names)
    optimizer.register_load_state_dict_pre_hook(to_numbers)
    before = [entry["momentum_buffer"].clone() for entry in optimizer.state.values()]
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, model, 1)
    optimizer.load_state_dict(saved)
    assert_same_bits([entry["momentum_buffer"] for entry in optimizer.state.values()], before)
