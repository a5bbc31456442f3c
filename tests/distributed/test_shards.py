"""Steps over DTensors are those of one process: FSDP2, HSDP, tensor parallel, and both, for every member of the family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed

from tests.distributed.sharded_problem import CASES, largest_difference, make_model, run, sharded_as, whole
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
LAYOUTS = {2: ("FSDP2", "tensor parallel"), 4: ("HSDP", "tensor parallel and FSDP2")}  # by number of ranks
# The other two add nothing to a member of the family but their sums over ranks, which these cases have in every form.
FEW = ("SAM, SGD", "ASAM, AdamW", "mix, clipped, Adam", "base's own step", "m-SAM", "GSAM", "RWSAM")
RUNS = [(layout, name) for layout in ("FSDP2", "tensor parallel and FSDP2") for name in CASES]
RUNS += [(layout, name) for layout in ("HSDP", "tensor parallel") for name in FEW]
AGAIN = "mix, clipped, Adam"  # the case that is run twice
PARTS = {"FSDP2": 2, "tensor parallel": 1, "HSDP": 4, "tensor parallel and FSDP2": 2}  # that batches are cut into
# Sums over ranks are taken in another order: some hundred roundings of 1.1e-16 a step, at weights and gradients of about 1.
CLOSE = 1e-12


def _runs(rank: int, layouts: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    """By layout and case: the weights on this rank as whole tensors, or the words of the error."""
    torch.manual_seed(0)
    found: dict[tuple[str, str], Any] = {}
    for layout, name in [each for each in RUNS if each[0] in layouts]:
        model, part, parts = sharded_as(layout)
        try:
            run(CASES[name], model, [(part, parts)])
        except (TypeError, ValueError) as error:
            found[layout, name] = str(error)
        else:
            found[layout, name] = [whole(param) for param in model.parameters()]
        distributed.barrier()
    for layout in layouts:
        model, part, parts = sharded_as(layout)
        run(CASES[AGAIN], model, [(part, parts)])
        found[layout, "again"] = [whole(param) for param in model.parameters()]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """By layout and case, what every rank has at the end."""
    results: dict[tuple[str, str], list[Any]] = {}
    for ranks, layouts in LAYOUTS.items():
        on_all = on_ranks(_runs, tmp_path_factory.mktemp("ranks"), layouts, ranks=ranks)
        results |= {key: [each[key] for each in on_all] for key in on_all[0]}
    return results


@cache
def expected(name: str, parts: int) -> list[torch.Tensor]:
    """The weights after the same steps in one process. Micro-batch j is made of micro-batch j of every part."""
    model = make_model()
    run(CASES[name], model, [(part, parts) for part in range(parts)])
    return [whole(param) for param in model.parameters()]


@pytest.mark.parametrize(("layout", "name"), RUNS)
def test_a_sharded_run_is_that_of_one_process(layout: str, name: str, found: Any) -> None:
    on_all, case = found[layout, name], CASES[name]
    if layout in case.refused_with:
        assert all(case.refused_with[layout] in each for each in on_all), on_all
        return
    for each in on_all:
        assert not isinstance(each, str), each
        assert largest_difference(each, expected(name, PARTS[layout])) <= CLOSE
        assert largest_difference(each, on_all[0]) == 0.0  # replicas do not drift apart


@pytest.mark.parametrize("layout", PARTS)
def test_a_run_that_is_repeated_has_the_same_bits(layout: str, found: Any) -> None:
    for first, again in zip(found[layout, AGAIN], found[layout, "again"], strict=True):
        assert all(map(torch.equal, first, again))
