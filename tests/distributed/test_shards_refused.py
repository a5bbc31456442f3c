"""Checkpoints of shards that do not fit: an error on all ranks alike, before anything changes, also where one rank alone can see it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import sam_kernels
from tests.distributed.sharded_problem import ADAMW, SGD, batch_of, closure_of, fully_sharded, make_model
from tests.distributed.test_shards_checkpoint import BACK, FORMS
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time


def _narrow() -> nn.Module:
    model: Any = make_model()
    model[0], model[2] = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
    return model  # type: ignore[no-any-return]


def _short() -> nn.Module:
    model: Any = make_model()
    return nn.Sequential(*list(model)[:4])


MODELS: dict[str, Callable[[], nn.Module]] = {"usual": make_model, "narrow": _narrow, "short": _short}
MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "SAM": (sam_kernels.SAM, SGD),
    "VaSSO": (sam_kernels.VaSSO, SGD),
    "AdamW": (sam_kernels.SAM, ADAMW),
    "Adam": (sam_kernels.SAM, {**ADAMW, "base_optimizer": torch.optim.Adam}),
}
# Saver and loader (optimizer, model), and the error's words: of load_state_dict; of dcp.load, which looks for keys and sizes before it
# reads. Torch's own words where torch raises first. None: torch loads what the loader asks for.
MISSING = "Missing key in checkpoint state_dict"
CASES = {
    "a member that keeps more": (("VaSSO", "usual"), ("SAM", "usual"), "the checkpoint is of direction 'vasso'", MISSING),
    "a member that keeps less": (("SAM", "usual"), ("VaSSO", "usual"), "the checkpoint is of direction 'gradient'", MISSING),
    "a base with the same keys": (("Adam", "usual"), ("AdamW", "usual"), "is of gradient/plain/Adam ", MISSING),
    "a base with other keys": (("SAM", "usual"), ("AdamW", "usual"), "is of gradient/plain/SGD|param_groups.0.weight.betas", MISSING),
    "another shape": (("VaSSO", "narrow"), ("VaSSO", "usual"), r"in the checkpoint has shape \(6, 5\), its parameter \(8, 5\)", "[Ss]ize"),
    "more parameters": (("VaSSO", "usual"), ("VaSSO", "short"), "has 2 parameters that the optimizer has not", None),
    "fewer parameters": (("VaSSO", "short"), ("VaSSO", "usual"), "Missing optimizer state for parameter '4|4.weight", MISSING),
}
LEFT_OUT = {("fewer parameters", "whole")}  # torch raises on rank 0 while the others wait for it
ITEMS = [(case, form) for case in CASES for form in FORMS if (case, form) not in LEFT_OUT]
ON_DISK = [(case, form) for case in CASES for form in ("nested", "flat") if CASES[case][3] is not None]
ALTERED = ("direction", "mark", "rho", "shape of a buffer", "part of a buffer", "part of an average", "flat mark")
ON_ONE_RANK = (*ALTERED, "groups", "stage")

Outcome = tuple[str, str, bool]  # type and words of the error, whether all is as before


def _made(key: tuple[str, str], rank: int) -> tuple[nn.Module, Any]:
    model = fully_sharded(MODELS[key[1]](), init_device_mesh("cpu", (2,)))
    make, options = MADE[key[0]]
    optimizer = make(model.parameters(), **options)
    _step(model, optimizer, 0, rank)
    _step(model, optimizer, 1, rank)
    return model, optimizer


def _step(model: nn.Module, optimizer: Any, step: int, rank: int) -> Tensor:
    closure = closure_of(optimizer, model)
    return optimizer.step(lambda: closure(*batch_of(step, rank, 2)))  # type: ignore[no-any-return]


def _everything(model: nn.Module, optimizer: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    saved = optimizer.state_dict()
    tensors = [*model.parameters(), *(value for entry in saved["state"].values() for value in entry.values())]
    parts = [tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return [part.clone() for part in parts], copy.deepcopy(saved["param_groups"])


def _outcome(model: nn.Module, optimizer: Any, load: Callable[[], Any]) -> Outcome:
    tensors, groups = _everything(model, optimizer)
    error: BaseException | None = None
    try:
        load()
    except (Exception, dcp.api.CheckpointException) as raised:
        error = raised
    now, groups_now = _everything(model, optimizer)
    is_same = len(now) == len(tensors) and all(map(torch.equal, now, tensors)) and groups_now == groups
    return type(error).__name__, str(error), is_same


def _altered(saved: Any, what: str) -> None:
    """As one rank's file of another run would make it."""
    group, entry = (None, None) if "state" not in saved else (saved["param_groups"][0], saved["state"]["0.weight"])
    if what == "flat mark":
        saved["param_groups.2.weight.sam_saved_by:friendly/plain/SGD"] = True
    elif what == "direction":
        group["direction"] = "friendly"
    elif what == "mark":
        group["sam_saved_by:vasso/plain/Adam"] = True
    elif what == "rho":
        group["rho"] = -1.0
    else:
        key = "direction_average" if what.endswith("average") else "momentum_buffer"
        like = entry[key]
        shape = (like.shape[0] - 1, 5) if what.startswith("shape") else like.shape
        part = like.to_local()[:-1].clone()
        entry[key] = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=like.stride()
        )


def _stage(rank: int) -> tuple[nn.Module, Any]:
    """A rank that holds a part of the model whole."""
    stage = nn.Linear(5, 1).double()
    optimizer = sam_kernels.VaSSO(stage.parameters(), process_group=distributed.group.WORLD, **SGD)
    _step(stage, optimizer, 0, rank)
    return stage, optimizer


def _given(made: dict[Any, tuple[nn.Module, Any]]) -> dict[Any, Outcome]:
    found: dict[Any, Outcome] = {}
    for case, form in ITEMS:
        saver, loader, _, _ = CASES[case]
        saved = copy.deepcopy(get_optimizer_state_dict(*made[saver], options=FORMS[form]))
        found[case, form] = _outcome(*made[loader], partial(set_optimizer_state_dict, *made[loader], saved, options=BACK[form]))
    return found


def _on_disk(made: dict[Any, tuple[nn.Module, Any]], folder: Path) -> dict[Any, Outcome]:
    found: dict[Any, Outcome] = {}
    for case, form in ON_DISK:
        saver, loader, _, _ = CASES[case]
        states = [
            {"model": get_model_state_dict(made[key][0]), "optimizer": get_optimizer_state_dict(*made[key], options=FORMS[form])}
            for key in (saver, loader)
        ]
        dcp.save(states[0], checkpoint_id=folder / f"{case} {form}")
        found[case, form, "disk"] = _outcome(*made[loader], partial(dcp.load, states[1], checkpoint_id=folder / f"{case} {form}"))
    return found


def _on_one_rank(rank: int, model: nn.Module, optimizer: Any, stage: nn.Module, of_stage: Any) -> dict[Any, Outcome]:
    found: dict[Any, Outcome] = {}
    for is_wrapper in (True, False):
        side, side_of_stage = (each if is_wrapper else each.base_optimizer for each in (optimizer, of_stage))
        for what in ALTERED:
            form = "flat" if what.startswith("flat") else "nested"
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FORMS[form]))
            if rank == 1:
                _altered(saved, what)
            load = partial(set_optimizer_state_dict, model, side, saved, options=BACK[form])
            found[what, is_wrapper] = _outcome(model, optimizer, load)
        saved, of_a_stage = copy.deepcopy((optimizer.state_dict(), of_stage.state_dict()))
        if rank == 1:
            saved["param_groups"][0]["params"].pop()
            of_a_stage["state"][0]["direction_average"] = torch.zeros(2, 5)
        found["groups", is_wrapper] = _outcome(model, optimizer, partial(side.load_state_dict, saved))
        found["stage", is_wrapper] = _outcome(stage, of_stage, partial(side_of_stage.load_state_dict, of_a_stage))
    return found


def _all(rank: int, folder: Path) -> dict[Any, Outcome]:
    made: dict[Any, tuple[nn.Module, Any]] = {}
    for saver, loader, _, _ in CASES.values():
        made.update({key: _made(key, rank) for key in (saver, loader) if key not in made})
    made["stage"] = _stage(rank)
    found = {**_given(made), **_on_disk(made, folder), **_on_one_rank(rank, *made["VaSSO", "usual"], *made["stage"])}
    for key, (model, optimizer) in made.items():  # no rank waits for another
        assert _step(model, optimizer, 2, rank).isfinite(), key
    distributed.barrier()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Outcome]]:
    folder = tmp_path_factory.mktemp("refused")
    return on_ranks(_all, folder / "ranks", folder)


@pytest.mark.parametrize(("case", "form"), ITEMS)
def test_a_checkpoint_that_does_not_fit_is_refused_on_all_ranks(case: str, form: str, outcomes: Any) -> None:
    for on_rank in outcomes:
        kind, _, is_same = on_rank[case, form]
        assert kind != "NoneType"
        assert is_same
    # Of a whole one, rank 0 alone sees what its own state has no place for.
    assert_words(CASES[case][2], outcomes[0][case, form][1])
    assert_words(f"{CASES[case][2]}|on another rank", outcomes[1][case, form][1])


@pytest.mark.parametrize(("case", "form"), ON_DISK)
def test_torch_refuses_to_read_it_on_all_ranks(case: str, form: str, outcomes: Any) -> None:
    for on_rank in outcomes:
        kind, words, is_same = on_rank[case, form, "disk"]
        assert kind == "CheckpointException"
        assert is_same
        assert_words(CASES[case][3], words)


@pytest.mark.parametrize("what", ON_ONE_RANK)
@pytest.mark.parametrize("on_wrapper", [True, False])
def test_what_one_rank_alone_sees_is_refused_on_all(what: str, on_wrapper: bool, outcomes: Any) -> None:
    first, second = (on_rank[what, on_wrapper] for on_rank in outcomes)
    assert first == ("ValueError", "SAM: nothing is loaded, since the checkpoint was refused on another rank, whose error says why", True)
    assert second[0] == "ValueError"
    assert_words("SAM: |rho must be", second[1])
    assert second[2]


def assert_words(pattern: str, words: str) -> None:
    assert re.search(pattern, words), f"{words!r} has none of {pattern!r}"
