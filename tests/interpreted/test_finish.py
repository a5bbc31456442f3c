"""The second stage of a norm in the last program of the last launch: its bits and its counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional, use_backend
from sam_kernels._tensor_list import TensorList
from sam_kernels.backends.triton import _finish, _launch, _table
from tests.helpers.compare import assert_same_bits


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched, in order."""
    kernels: list[str] = []

    def launch(kernel: Any, programs: int, *args: Any, **kwargs: Any) -> None:
        if programs > 0:
            kernels.append(kernel.fn.__name__)
        _launch.launch(kernel, programs, *args, **kwargs)

    for module in (_finish, _table):
        monkeypatch.setattr(module, "launch", launch)
    return kernels


def rows(*sizes: int) -> list[Tensor]:
    """Of two dtypes, which take a launch each; the second has no elements in every list that ends in 0."""
    return [torch.randn(size).to(torch.bfloat16 if i == len(sizes) - 1 else torch.float32) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(700, 3, 1200), (5000, 0), (3, 0, 0, 1)], ids=str)
def test_one_norm_has_the_bits_of_the_first_of_several(sizes: tuple[int, ...], launched: list[str]) -> None:
    """Several are finished by a launch of their own."""
    grads, last = rows(*sizes), sum(1 for size in (sum(sizes[:-1]), sizes[-1]) if size)
    with use_backend("triton"):
        alone = functional.grad_norms([grads])
        assert launched == ["_norm_kernel"] * last
        several = functional.grad_norms([grads, [torch.zeros(0)]])
        assert launched == ["_norm_kernel"] * 2 * last + ["_finish_kernel"]
    assert_same_bits("norm", [alone], [several[:1]])


def test_a_list_without_elements_has_a_norm(launched: list[str]) -> None:
    found_inf, skipped, result = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(7.0)
    with use_backend("triton"):
        functional.grad_norm_(result, rows(0, 0), found_inf=found_inf, skipped=skipped)
    assert (float(result), float(found_inf), float(skipped)) == (0.0, 0.0, 3.0)
    assert launched == ["_finish_kernel"]


@pytest.mark.parametrize("tickets", [0, 1])
def test_a_counter_ends_where_it_began(tickets: int) -> None:
    """Also beside as many tickets of another stream as its launch has programs: every n-th ticket is the last one."""
    grads = TensorList([torch.randn(1300), torch.randn(40)])
    found_inf, skipped, result = torch.tensor(1.0), torch.tensor(0.0), torch.zeros(())
    with use_backend("triton"):
        table = _table.table_of({"grads": grads, "params": None}, "norm")
        (group,) = table.groups
        table.counter.fill_(tickets * group.chunks)
        for _ in range(3):  # once a step found_inf is counted, and 0 afterwards
            functional.grad_norm_(result, grads, found_inf=found_inf, skipped=skipped)
            assert int(table.counter) == tickets * group.chunks
            assert (float(skipped), float(found_inf)) == (1.0, 0.0)
            torch.testing.assert_close(result, torch.cat(list(grads)).norm())
    assert table is _table.table_of({"grads": grads, "params": None}, "norm")
