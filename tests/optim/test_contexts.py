"""What surrounds a step: weights that somebody loads, generators, default dtypes and devices, tensors that are none."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sam_kernels import RWSAM, SAM
from sam_kernels.optim._engine import skipped
from tests.optim.family import CLOSURES_ONLY, MEMBERS
from tests.optim.family_runs import base_of, make, run, two_steps
from tests.optim.problem import add_gradient, assert_same_bits, closure_of, make_batch, make_model, twin, weights

# --- weights that somebody else writes between the two steps ---


def norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))


def load(how: str, model: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        if how == "load_state_dict":
            model.load_state_dict(copy.deepcopy(source.state_dict()))
            return
        if how == "vector_to_parameters":
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(source.parameters()), model.parameters())
        for param, value in zip(model.parameters(), source.parameters(), strict=True):
            if how == "copy_":
                param.copy_(value)
            elif how == "data =":
                param.data = value.detach().clone()
        for buffer, value in zip(model.buffers(), source.buffers(), strict=True):
            buffer.copy_(value)


LOADS = ["load_state_dict", "copy_", "data =", "vector_to_parameters"]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("how", LOADS)
def test_a_checkpoint_loaded_after_an_unfinished_first_step_is_kept(how: str, base: Any) -> None:
    model, source = norm_model(), norm_model()
    run(make("SAM", source.parameters()), source, 2)
    optimizer = SAM(model.parameters(), base, lr=0.1, model=model)
    add_gradient(model)
    optimizer.first_step(zero_grad=True)
    load(how, model, source)
    add_gradient(model)
    is_moved = how in ("data =", "vector_to_parameters")  # perturbed weights that lie elsewhere would look the same
    with pytest.raises(RuntimeError, match="lie elsewhere" if is_moved else "were written between first_step and second_step"):
        optimizer.second_step()
    if is_moved:
        with pytest.raises(RuntimeError, match="load the weights to go on from"):
            optimizer.step(closure_of(optimizer, model, make_batch()))
    load(how, model, source)
    expected = SAM(source.parameters(), base, lr=0.1, model=source)
    for opt, net in ((optimizer, model), (expected, source)):
        opt.step(closure_of(opt, net, make_batch()))
    assert_same_bits(weights(model), weights(source))
    assert_same_bits(list(model.buffers()), list(source.buffers()))


def test_a_checkpoint_for_a_part_of_the_model_keeps_the_part() -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = make("SAM", model.parameters()), make("SAM", other.parameters())
    add_gradient(model)
    optimizer.first_step(zero_grad=True)
    for net in (model, other):
        net[0].load_state_dict({"weight": torch.ones(9, 6), "bias": torch.ones(9)})
    for opt, net in ((optimizer, model), (expected, other)):
        opt.step(closure_of(opt, net, make_batch()))
    assert_same_bits(weights(model), weights(other))


# --- random generators ---


class Draws(nn.Module):
    """A dropout whose number of draws is told."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.counts, self.first = counts, list[Tensor]()

    def forward(self, inputs: Tensor) -> Tensor:
        numbers = torch.rand(self.counts.pop(0))
        self.first.append(numbers[:3].clone())
        return inputs * numbers[0]


COUNTS = [(5, 5), (5, 700), (700, 5), (3000, 4), (4, 3000), (624, 1248)]


@pytest.mark.parametrize("api", ["closure", "two steps", "backward"])
@pytest.mark.parametrize("counts", COUNTS)
def test_generators_end_where_the_further_pass_left_them(counts: tuple[int, int], api: str) -> None:
    draws = Draws(list(counts))
    model = nn.Sequential(nn.Linear(6, 4), draws, nn.Linear(4, 2))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, preserve_rng_state=True)
    torch.manual_seed(4)
    if api == "closure":
        optimizer.step(closure_of(optimizer, model, make_batch()))
    elif api == "backward":
        optimizer.backward(partial(add_gradient, model))
        optimizer.step()
    else:
        optimizer.record_rng_state()
        add_gradient(model)
        optimizer.first_step(zero_grad=True)
        add_gradient(model)
        optimizer.second_step()
    following = torch.rand(4)
    torch.manual_seed(4)
    torch.rand(max(counts))
    assert torch.equal(following, torch.rand(4))
    assert torch.equal(draws.first[0], draws.first[1])


@pytest.mark.parametrize("api", ["closure", "backward"])
def test_after_an_exception_in_the_second_pass_no_number_is_drawn_again(api: str) -> None:
    draws, calls = Draws([5, 2]), []
    model = nn.Sequential(nn.Linear(6, 4), draws, nn.Linear(4, 2))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, preserve_rng_state=True)

    def closure() -> Tensor:
        loss = closure_of(optimizer, model, make_batch())()
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return loss

    torch.manual_seed(4)
    with pytest.raises(MemoryError):
        (optimizer.step if api == "closure" else optimizer.backward)(closure)
    following = torch.rand(4)
    torch.manual_seed(4)
    torch.rand(5)
    assert torch.equal(following, torch.rand(4))


def test_a_step_that_was_given_up_takes_no_generator_back() -> None:
    model = nn.Sequential(nn.Linear(6, 4), Draws([50, 5, 5]), nn.Linear(4, 2))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, preserve_rng_state=True)
    torch.manual_seed(4)
    optimizer.record_rng_state()
    add_gradient(model)
    optimizer.first_step(zero_grad=True)
    torch.manual_seed(4)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    following = torch.rand(4)
    torch.manual_seed(4)
    torch.rand(5)
    assert torch.equal(following, torch.rand(4))


@pytest.mark.parametrize("between", ["closure", "plain"])
def test_a_recorded_state_is_of_one_step_alone(between: str) -> None:
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, preserve_rng_state=True)
    optimizer.record_rng_state()
    optimizer.step(*([closure_of(optimizer, model, make_batch())] if between == "closure" else []))
    add_gradient(model)
    with pytest.raises(RuntimeError, match="needs record_rng_state"):
        optimizer.first_step()


# --- defaults of torch ---


def under_default_dtype(dtype: torch.dtype, name: str) -> list[Tensor]:
    model = make_model()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        optimizer = make(name, model.parameters(), **({"k": 2} if name == "LookSAM" else {}))
        run(optimizer, model, 3)
    finally:
        torch.set_default_dtype(before)
    return weights(model)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_default_dtype_of_bfloat16_changes_nothing(name: str) -> None:
    assert_same_bits(under_default_dtype(torch.bfloat16, name), under_default_dtype(torch.float32, name))


@pytest.mark.parametrize("api", ["closure", "two steps", "m-SAM", "backward"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_default_device_of_meta_changes_nothing(name: str, api: str) -> None:
    refuses = {
        "m-SAM": ("VaSSO", "FriendlySAM", "GSAM", "WSAM-coupled", "WSAM-decoupled", *CLOSURES_ONLY, "MomentumSAM", "S2SAM", "SAMSPS")
    }
    refuses |= {"two steps": CLOSURES_ONLY, "backward": (*CLOSURES_ONLY, "SAMSPS", "WSAM-decoupled")}
    if name in refuses.get(api, ()):
        pytest.skip("refused")
    model, batch = make_model(), make_batch()
    other = twin(model)
    expected = make(name, other.parameters(), lambd=0.5, max_grad_norm=None, preserve_rng_state=api != "two steps")
    steps(api, expected, other, batch)
    with torch.device("meta"):
        optimizer = make(name, model.parameters(), lambd=0.5, max_grad_norm=None, preserve_rng_state=api != "two steps")
        steps(api, optimizer, model, batch)
    assert_same_bits(weights(model), weights(other))


def steps(api: str, optimizer: Any, model: nn.Module, batch: Any) -> None:
    for _ in range(3):
        closure = closure_of(optimizer, model, batch)
        if api == "closure":
            optimizer.step(closure)
        elif api == "m-SAM":
            optimizer.step([closure, closure])
        elif api == "backward":
            optimizer.backward(partial(add_gradient, model, batch))
            optimizer.step()
            optimizer.zero_grad()
        else:
            two_steps(optimizer, model, batch)


@pytest.mark.filterwarnings("ignore:SAM. 25 steps in a row were skipped")
def test_skipped_steps_are_counted_exactly_under_a_default_of_bfloat16() -> None:
    param = nn.Parameter(torch.ones(3))
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = SAM([param], torch.optim.SGD, lr=0.1)

        def closure() -> None:
            param.grad = torch.full_like(param, torch.nan)

        for _ in range(300):
            optimizer.step(closure)
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.skipped_steps == 300


def test_skipped_steps_are_counted_beyond_what_float32_counts_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipped, "_FOLD_EVERY", 3)
    param = nn.Parameter(torch.ones(3))
    optimizer = SAM([param], torch.optim.SGD, lr=0.1)
    optimizer._passes.skips._skipped_before.fill_(2**24)

    def closure() -> None:
        param.grad = torch.full_like(param, torch.nan)

    for step in range(1, 9):
        optimizer.step(closure)
        assert optimizer.skipped_steps == 2**24 + step


# --- tensors that have no memory of their own ---


@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_takes_steps_of_fake_tensors(name: str, base: str) -> None:
    if base_of(name, base) not in MEMBERS[name].bases:
        pytest.skip("not with this base")
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
        batch = torch.randn(4, 6), torch.randn(4, 2)
        optimizer = make(name, model.parameters(), base, model=model)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, model, batch))
        if name not in (*CLOSURES_ONLY, "SAMSPS", "WSAM-decoupled"):
            optimizer.backward(partial(add_gradient, model, batch))
            optimizer.step()
        if name not in CLOSURES_ONLY:
            two_steps(optimizer, model, batch)


@pytest.mark.parametrize("norms", ["finite_difference", "jvp", "last_layer", "exact"])
def test_rwsam_takes_steps_of_fake_tensors(norms: str) -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2))
        inputs, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
        optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=norms, lr=0.1)
        optimizer.step(lambda: nn.functional.cross_entropy(model(inputs), labels, reduction="none"))


def named(param: Tensor) -> Any:
    return SAM([("head.weight", param)], torch.optim.SGD, lr=0.1)


def test_a_tensor_of_a_transform_is_refused_by_name() -> None:
    def inside(x: Tensor) -> Tensor:
        with pytest.raises(TypeError, match=r"'head\.weight' belongs to a transform"):
            named(x)
        return x.sum()

    torch.func.grad(inside)(torch.ones(3))


def test_a_wrapper_is_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(TypeError, match=r"'head\.weight' is a TwoTensor, which wraps other tensors"):
        named(nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))))
