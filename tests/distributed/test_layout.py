"""How unlike the squared norms of gradients may be that all ranks have alike, and when that is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sam_kernels._reading import Reading
from sam_kernels.optim._shards.layout import _ALIKE, _SUMS_LATE, _SUMS_WAITED_FOR, ADDITIONS, Meshes
from sam_kernels.validation import roundings

MESH = SimpleNamespace(mesh=torch.arange(2))


def moments(left: float, right: float) -> Reading:
    """The mean, and that of the squares, of what two ranks have."""
    pair = torch.tensor([left, right], dtype=torch.float64)
    return Reading(torch.stack([pair.mean(), pair.square().mean()]))


@pytest.mark.parametrize("backend", ["native.cuda", "triton"])
def test_no_backends_norm_makes_more_additions_than_the_bound_is_for(backend: str) -> None:
    pytest.importorskip("triton" if backend == "triton" else "sam_kernels._cuda")
    terms = roundings.roundings_of(SimpleNamespace(name=backend), "grad_norm", [2**32]).terms  # type: ignore[arg-type]
    assert terms is not None
    assert terms <= ADDITIONS


def test_equal_gradients_pass_whatever_their_length_and_others_do_not() -> None:
    for square in (1e-90, 0.1, 3.0, 1e150):
        for unlike in (0.0, 0.99 * _ALIKE):
            Meshes()._compare(moments((1 - unlike) * square, (1 + unlike) * square), MESH, late=0)
        with pytest.raises(RuntimeError, match="not the same on these ranks"):
            Meshes()._compare(moments((1 - 1.01 * _ALIKE) * square, (1 + 1.01 * _ALIKE) * square), MESH, late=0)


def test_the_first_sums_are_waited_for_and_the_others_compared_later() -> None:
    alike, unlike = moments(2.0, 2.0), moments(2.0, 2.1)
    for first in range(_SUMS_WAITED_FOR):
        meshes = Meshes()
        for _ in range(first):
            meshes._compare(alike, MESH, late=_SUMS_LATE)
        with pytest.raises(RuntimeError, match="not the same"):
            meshes._compare(unlike, MESH, late=_SUMS_LATE)
    meshes = Meshes()
    read: list[int] = []
    for i in range(_SUMS_WAITED_FOR + 3):
        number: Any = SimpleNamespace(value=lambda i=i: (read.append(i), alike.value())[1])
        meshes._compare(number, MESH, late=_SUMS_LATE)
    assert read == [0, 1, 2]
    meshes._compare(unlike, MESH, late=_SUMS_LATE)
    for _ in range(_SUMS_LATE - 1):
        meshes._compare(alike, MESH, late=_SUMS_LATE)
    with pytest.raises(RuntimeError, match="not the same"):
        meshes._compare(alike, MESH, late=_SUMS_LATE)
