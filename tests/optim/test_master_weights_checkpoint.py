"""Checkpoints and copies of optimizers with float32 masters, and checkpoints that only one side has masters in."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from sam_kernels import SAM
from tests.helpers.compare import assert_same_bits
from tests.optim.family import MEMBERS
from tests.optim.family_runs import make
from tests.optim.master_problem import assert_whole, closure_of, masters_of, params_of, run
from tests.optim.problem import through_a_file

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("error::UserWarning")]

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16
SGD, ADAMW, RMSPROP = "sgd-momentum", "adamw", "rmsprop"
SIDES = pytest.mark.parametrize("side", ["wrapper", "base"])
BASES: dict[str, Any] = {
    "SGD": {"momentum": 0.9},
    "AdamW": {},
    "RMSprop": {},
    "NAdam": {},  # 0-dim tensors, which torch casts
    "Adafactor": {},  # factors of other shapes, which torch casts
}


def on(optimizer: Any, side: str) -> Any:
    return optimizer if side == "wrapper" else optimizer.base_optimizer


def copies_of(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def tensors_of(optimizer: Any) -> list[Tensor | None]:
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [*state, *masters_of(optimizer)]


@pytest.mark.parametrize("base", BASES)
@SIDES
def test_a_run_is_continued_bit_for_bit(base: str, side: str) -> None:
    kind = getattr(torch.optim, base)
    params = params_of((B16, F16, F32))
    optimizer = SAM(params, kind, lr=0.01, rho=0.5, master_weights=True, **BASES[base])
    run(optimizer, params, range(3))
    others = copies_of(params)
    other = SAM(others, kind, lr=0.01, rho=0.5, master_weights=True, **BASES[base])
    on(other, side).load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits("before", tensors_of(other), tensors_of(optimizer))
    run(optimizer, params, range(3, 6))
    run(other, others, range(3, 6))
    assert_same_bits("after", tensors_of(other), tensors_of(optimizer))
    assert_whole(other, others)


@pytest.mark.parametrize("name", ["VaSSO", "LookSAM", "S2SAM"])
def test_what_members_keep_lies_beside_the_masters(name: str) -> None:
    base = SGD if SGD in MEMBERS[name].bases else ADAMW
    params = params_of(B16)
    optimizer = make(name, params, base, master_weights=True)
    run(optimizer, params, range(2))
    others = copies_of(params)
    other = make(name, others, base, master_weights=True)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, params, range(2, 5))
    run(other, others, range(2, 5))
    assert_same_bits("masters", masters_of(other), masters_of(optimizer))


@pytest.mark.parametrize("options", [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)], ids=["nested", "flat"])
@pytest.mark.parametrize("base", [ADAMW, RMSPROP])
@SIDES
def test_distributed_checkpoints_of_one_process(options: StateDictOptions, base: str, side: str) -> None:
    """Loading makes a step of lr = 0 with the optimizer that it is given."""
    models = [nn.Linear(6, 2).to(B16) for _ in range(2)]
    optimizers = [make("SAM", model.parameters(), base, master_weights=True) for model in models]

    def steps(model: nn.Module, optimizer: SAM, first: int) -> None:
        for i in range(first, first + 3):
            for take in (optimizer.first_step, optimizer.second_step):
                for param in model.parameters():
                    param.grad = torch.full_like(param, 0.125 * i)
                take()

    steps(models[0], optimizers[0], 1)
    saved = through_a_file(get_optimizer_state_dict(models[0], optimizers[0], options=options))
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], on(optimizers[1], side), saved, options=options)
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 4)
    assert_same_bits("after", tensors_of(optimizers[1]), tensors_of(optimizers[0]))


NONE_SAVED = "the checkpoint has no float32 masters of 3 of 3 16-bit parameters, so they are made from the weights as they are"
DROPPED = "float32 masters of 3 parameters, of which 3 are dropped, since an optimizer without master_weights=True has none"
NOT_NEEDED = "float32 masters of 3 parameters, of which 3 are dropped, since the parameters are no 16-bit parameters here"


@pytest.mark.parametrize(
    ("dtype", "saver_has", "loader_has", "words"),
    [(B16, False, True, NONE_SAVED), (B16, True, False, DROPPED), (F32, True, False, DROPPED), (F32, True, True, NOT_NEEDED)],
)
@pytest.mark.parametrize("base", ["sgd", SGD, ADAMW, RMSPROP])
@SIDES
def test_a_checkpoint_that_one_side_has_masters_in(
    dtype: torch.dtype, saver_has: bool, loader_has: bool, words: str, base: str, side: str
) -> None:
    """One warning, and the run goes on."""
    params = params_of(B16)
    saver = make("SAM", params, base, master_weights=saver_has)
    run(saver, params, range(2))
    others = [nn.Parameter(param.detach().to(dtype)) for param in params]
    nothing_to_do = dtype is F32 and loader_has
    with pytest.warns(UserWarning, match="nothing to do") if nothing_to_do else contextlib.nullcontext():
        loader = make("SAM", others, base, master_weights=loader_has)
    with pytest.warns(UserWarning, match=words) as warned:
        on(loader, side).load_state_dict(through_a_file(saver.state_dict()))
    assert len(warned) == 1
    assert masters_of(loader) == [None] * 3
    assert not any("master_param" in entry for entry in loader.state.values())
    run(loader, others, range(2, 4))
    assert_whole(loader, others)
    assert all((master is not None) is (loader_has and dtype is B16) for master in masters_of(loader))


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
def test_torchs_own_checkpoints_and_runs(base: Any) -> None:
    params = params_of(B16)
    plain = base(params, lr=0.01)
    closure_of(params, 0)()
    plain.step()
    others = copies_of(params)
    optimizer = SAM(others, base, lr=0.01, master_weights=True)
    with pytest.warns(UserWarning, match=NONE_SAVED):
        optimizer.load_state_dict(through_a_file(plain.state_dict()))
    run(optimizer, others, range(1, 3))
    assert {value.dtype for entry in optimizer.state.values() for value in entry.values()} == {F32}
    plain.load_state_dict(through_a_file(optimizer.state_dict()))  # and back
    closure_of(params, 30)()
    plain.step()


def test_a_base_that_has_made_steps_in_16_bits_is_taken_over() -> None:
    params = params_of(B16)
    base = torch.optim.AdamW(params, lr=0.01)
    closure_of(params, 0)()
    base.step()
    before = [base.state[param]["exp_avg"].float() for param in params]
    optimizer = SAM(params, base, master_weights=True)
    run(optimizer, params, range(1, 2))
    moments = [base.state[param]["exp_avg"] for param in params]
    assert all(moment.dtype is F32 and not torch.equal(moment, early) for moment, early in zip(moments, before, strict=True))


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    params = params_of(B16)
    optimizer = make("SAM", params, ADAMW, master_weights=True)
    run(optimizer, params, range(2))
    before = [each if each is None else each.clone() for each in tensors_of(optimizer)]
    saved = through_a_file(optimizer.state_dict())
    saved["state"][1]["master_param"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"master_param in the checkpoint has shape \(7,\), its parameter \(103, 10\)"):
        optimizer.load_state_dict(saved)
    assert_same_bits("everything", tensors_of(optimizer), before)


@pytest.mark.parametrize("base", [ADAMW, RMSPROP])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(base: str, how: str) -> None:
    params = params_of((B16, F16, F32))
    optimizer = make("SAM", params, base, master_weights=True)
    run(optimizer, params, range(3))
    others, other = copy.deepcopy((params, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((params, optimizer)))
    saved = [each.clone() for each in masters_of(optimizer) if each is not None]
    run(other, others, range(3, 6))
    assert_same_bits("masters of the first", masters_of(optimizer)[:2], saved)
    run(optimizer, params, range(3, 6))
    assert_same_bits("after", tensors_of(other), tensors_of(optimizer))
    assert_whole(other, others)
