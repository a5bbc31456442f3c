"""float32 masters of 16-bit parameters on two ranks: over shards, over replicas, and in checkpoints.

Every sum over ranks is exact here, so that a run over ranks has the bits of the same run in one process.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import SAM
from sam_kernels.optim._engine import masters as masters_module
from tests.distributed.masters_problem import (
    CASES,
    RANKS,
    STEPS,
    Layers,
    Training,
    in_one_process,
    masters_of,
    optimizer_of,
    placed_as,
    run,
    take_steps,
    tensors_of,
)
from tests.distributed.sharded_problem import whole
from tests.helpers.compare import assert_same_bits
from tests.helpers.ranks import on_one_rank, on_ranks, one_at_a_time

pytestmark = one_at_a_time

# --- on ranks ---

Attempt = Callable[[int, Path], Any]
ATTEMPTS: dict[str, Attempt] = {}


def attempt(function: Attempt) -> Attempt:
    """Called on every rank, with the rank and a folder; the test of that name gets what all of them return."""
    ATTEMPTS[function.__name__] = function
    return function


def _all_attempts(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, function in ATTEMPTS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                found[name] = function(rank, folder)
            except Exception as error:  # what a rank raises is what its test is about
                found[name] = "".join(traceback.format_exception(error))
        found[f"warnings of {name}"] = [str(each.message) for each in caught if str(each.message).startswith("SAM")]
        distributed.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[Any]]:
    on_all = on_ranks(_all_attempts, folder / "ranks", folder)
    return {name: [each[name] for each in on_all] for name in on_all[0]}


@attempt
def steps(rank: int, folder: Path) -> list[Any]:
    results = []
    for case in CASES:
        training = placed_as(case.layout, rank)
        try:
            tensors, perturbed, optimizer = run(case, training, (rank,) if case.is_local else (None,) * case.micro_batches)
        except Exception as error:
            results.append("".join(traceback.format_exception(error)))
            distributed.barrier()
            continue
        pairs = zip(masters_of(optimizer), (param for param in training.params if param.dtype is torch.bfloat16), strict=True)
        if optimizer._memory.has_masters:
            for master, param in pairs:
                assert isinstance(master, DTensor) is isinstance(param, DTensor)
                assert master.dtype is torch.float32
        results.append((tensors, perturbed))
    return results


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{case.layout}, {case.base}" for case in CASES])
def test_a_run_on_ranks_has_the_bits_of_one_process(i: int, found: Any) -> None:
    case = CASES[i]
    right, perturbed = in_one_process(case)
    for rank, results in enumerate(found["steps"]):
        assert not isinstance(results, str), results
        assert not isinstance(results[i], str), results[i]
        tensors, own = results[i]
        assert tensors.keys() == right.keys()
        for key, value in right.items():
            assert_same_bits(f"rank {rank}, {key}", [tensors[key]], [value])
        part = rank if case.is_local else None
        assert_same_bits(f"rank {rank}, perturbed", own[part], perturbed[part])
    assert found["warnings of steps"] == [[], []]


# --- what is looked at, and what somebody else writes ---


@attempt
def looks(rank: int, folder: Path) -> list[list[int]]:
    """How many parameters are compared with their masters, bit for bit, at each step."""
    counts = []
    usual = masters_module._follow
    for base in ("AdamW", "RMSprop"):
        training = placed_as("FSDP2", rank)
        optimizer, calls = optimizer_of(training, base), []
        masters_module._follow = lambda params, masters, calls=calls: calls.extend(params) or usual(params, masters)
        try:
            counts.append([len(calls) for _ in range(STEPS) if take_steps(training, optimizer, 1) is None])
        finally:
            masters_module._follow = usual
    return counts


def test_a_usual_step_over_shards_compares_no_bits(found: Any) -> None:
    """Steps 1, 2 and 4 look for writes that leave no version; one of FSDP2's own writes, or the optimizer's, would add others."""
    count = len(list(Layers().parameters()))
    assert found["looks"] == [[[count, 2 * count, 2 * count, 3 * count, 3 * count, 3 * count]] * 2] * RANKS


def halve(param: Tensor, rows: slice) -> None:
    with torch.no_grad():
        param[rows] *= 0.5


@attempt
def writes(rank: int, folder: Path) -> list[Any]:
    """Before the third step, which does not look at bits unasked: a part by rank 0 alone, and a whole DTensor by all."""
    results = []
    for base, writes_all in (("AdamW", False), ("RMSprop", False), ("AdamW", True)):
        training = placed_as("FSDP2", rank)
        optimizer = optimizer_of(training, base)
        take_steps(training, optimizer, 2)
        if writes_all:
            with torch.no_grad():
                training.params[0] *= 0.5
        elif rank == 0:
            halve(training.params[0].to_local(), slice(None))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            take_steps(training, optimizer, STEPS - 2)
        results.append((tensors_of(optimizer), [str(each.message) for each in caught]))
    return results


def test_masters_follow_what_one_rank_writes(found: Any) -> None:
    for i, (base, rows) in enumerate((("AdamW", slice(0, 2)), ("RMSprop", slice(0, 2)), ("AdamW", slice(None)))):
        training = Training(Layers())
        optimizer = optimizer_of(training, base)
        take_steps(training, optimizer, 2)
        halve(training.params[0], rows)
        with pytest.warns(UserWarning, match="1 of 5 parameters of a group were written by somebody else"):
            take_steps(training, optimizer, STEPS - 2)
        for rank, results in enumerate(found["writes"]):
            assert not isinstance(results, str), results
            tensors, words = results[i]
            for key, value in tensors_of(optimizer).items():
                assert_same_bits(f"rank {rank}, {key}", [tensors[key]], [value])
            assert ["1 of 5 parameters" in each for each in words] == [True] * (i == 2 or rank == 0)


@attempt
def float32_shards(rank: int, folder: Path) -> bool:
    model = Layers().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy)
    training = Training(model, parts=(rank,))
    optimizer = optimizer_of(training, "AdamW")
    take_steps(training, optimizer, 2)
    return not masters_of(optimizer)


def test_a_policy_of_bfloat16_has_float32_shards_which_need_no_masters(found: Any) -> None:
    assert found["float32_shards"] == [True] * RANKS
    for words in found["warnings of float32_shards"]:
        assert len(words) == 1
        assert "master_weights=True has nothing to do" in words[0]


@attempt
def zero(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(Layers())
    more = {"optimizer_class": torch.optim.AdamW, "lr": 0.1}
    SAM(model.parameters(), ZeroRedundancyOptimizer, model=model, master_weights=True, **more)


def test_a_base_that_shards_the_parameters_by_itself_is_refused(found: Any) -> None:
    assert all("ValueError: SAM: master_weights=True with ZeroRedundancyOptimizer" in each for each in found["zero"]), found["zero"]


# --- checkpoints ---

FORMS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "whole": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
BACK = {**FORMS, "whole": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)}
BASES_SAVED = ("AdamW", "Adagrad")
SAVED = 3  # steps


def made(base: str, *, has_masters: bool = True, is_sharded: bool = True) -> tuple[Training, SAM]:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    training = placed_as("FSDP2", rank) if is_sharded else Training(Layers())
    training.parts = (rank,) if ranks == RANKS else tuple(range(RANKS))
    training.calls = {None: 2 * SAVED}
    return training, optimizer_of(training, base, master_weights=has_masters)


def save(training: Training, optimizer: SAM, form: str, folder: Path) -> None:
    weights, state = get_state_dict(training.model, optimizer, options=FORMS[form])
    both = {"model": weights, "optimizer": state}
    if form != "whole":
        dcp.save(both, checkpoint_id=folder / form)
    elif distributed.get_rank() == 0:
        torch.save(both, folder / f"{form}.pt")


def load(training: Training, optimizer: SAM, form: str, folder: Path) -> None:
    if form == "whole":
        both = torch.load(folder / f"{form}.pt", weights_only=True) if distributed.get_rank() == 0 else {"model": {}, "optimizer": {}}
    else:
        weights, state = get_state_dict(training.model, optimizer, options=FORMS[form])
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=folder / form)
    set_model_state_dict(training.model, both["model"], options=BACK[form])
    set_optimizer_state_dict(training.model, optimizer, both["optimizer"], options=BACK[form])


def continued(folder: Path, **kwargs: Any) -> dict[tuple[str, str], dict[str, Tensor]]:
    ends = {}
    for base in BASES_SAVED:
        for form in FORMS:
            training, optimizer = made(base, **kwargs)
            load(training, optimizer, form, folder / base)
            take_steps(training, optimizer, STEPS - SAVED)
            ends[base, form] = tensors_of(optimizer)
    return ends


@attempt
def checkpoints(rank: int, folder: Path) -> Any:
    right = {}
    for base in BASES_SAVED:
        training, optimizer = made(base)
        training.calls = {}
        take_steps(training, optimizer, SAVED)
        for form in FORMS:
            save(training, optimizer, form, folder / base)
        take_steps(training, optimizer, STEPS - SAVED)
        right[base] = tensors_of(optimizer)
    return right, continued(folder)


def assert_ends(ends: dict[tuple[str, str], dict[str, Tensor]], right: dict[str, dict[str, Tensor]]) -> None:
    for (base, form), tensors in ends.items():
        assert tensors.keys() == right[base].keys(), (base, form)
        for key, value in right[base].items():
            assert_same_bits(f"{base}, {form}, {key}", [tensors[key]], [value])


def test_a_checkpoint_of_two_ranks_is_continued_on_two(found: Any) -> None:
    for on_rank in found["checkpoints"]:
        assert not isinstance(on_rank, str), on_rank
        assert_ends(on_rank[1], found["checkpoints"][0][0])
    assert found["warnings of checkpoints"] == [[], []]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    with on_one_rank(tmp_path):
        yield


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("is_sharded", [True, False])
def test_a_checkpoint_of_two_ranks_is_continued_on_one(is_sharded: bool, found: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SAM")
        assert_ends(continued(folder, is_sharded=is_sharded), found["checkpoints"][0][0])


HANDED_OVER = {**FORMS, "whole": StateDictOptions(full_state_dict=True)}  # on all ranks
WAYS = (*FORMS, *(f"{form}, handed over" for form in FORMS), "state_dict")


def hand_over(way: str, saved: tuple[Training, SAM], loading: tuple[Training, SAM], folder: Path) -> None:
    (training, optimizer), (other, its_optimizer) = saved, loading
    if way in FORMS:  # by a file
        save(training, optimizer, way, folder)
        distributed.barrier()
        load(other, its_optimizer, way, folder)
        return
    other.model.load_state_dict(training.model.state_dict())
    if way == "state_dict":
        its_optimizer.load_state_dict(optimizer.state_dict())
    else:
        options = HANDED_OVER[way.removesuffix(", handed over")]
        state = get_optimizer_state_dict(training.model, optimizer, options=options)
        set_optimizer_state_dict(other.model, its_optimizer, state, options=options)


@attempt
def mismatches(rank: int, folder: Path) -> Any:
    """By way, and whether the optimizer that loads has masters (the one that saved has none then): the error, or what it warns of."""
    results: dict[tuple[str, bool], Any] = {}
    for has_masters in (True, False):
        saved = made("AdamW", has_masters=not has_masters)
        take_steps(*saved, SAVED)
        for way in WAYS:
            other, optimizer = loading = made("AdamW", has_masters=has_masters)
            take_steps(*loading, 1)  # it has masters of other weights
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                try:
                    hand_over(way, saved, loading, folder / f"mismatches {has_masters}")
                except (Exception, dcp.api.CheckpointException) as error:
                    results[way, has_masters] = str(error)
                    continue
                masters = [whole(master) for master in masters_of(optimizer)]
                assert_same_bits("masters", masters, [whole(param).float() for param in other.params if has_masters])
                take_steps(*loading, 1)
            results[way, has_masters] = [str(each.message) for each in caught if str(each.message).startswith("SAM")]
    return results


def test_masters_that_one_side_alone_has_are_an_error_or_a_warning(found: Any) -> None:
    made_anew = "SAM: the checkpoint has no float32 masters of 5 of 5 16-bit parameters, so they are made from the weights"
    dropped = "SAM: the checkpoint has float32 masters of 5 parameters, of which 5 are dropped"
    for rank, results in enumerate(found["mismatches"]):
        assert not isinstance(results, str), results
        for way in WAYS:
            with_masters, without = results[way, True], results[way, False]
            if way in ("nested", "flat"):  # dcp.load looks at keys
                assert re.search(r"Missing key in checkpoint state_dict: .*\.master_param\.\n", with_masters)
                assert re.search(r"Missing key in checkpoint state_dict: .*sam_saved_by:gradient/plain/AdamW\.\n", without)
                continue
            assert [made_anew in each for each in with_masters] == [True], way
            is_told = way != "whole" or rank == 0  # which reads the file
            assert [dropped in each for each in without] == [True] * is_told, way
