"""The pointer table: made once, brought up to date by the addresses that changed and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import functional, use_backend
from sam_kernels._tensor_list import TensorList
from sam_kernels.backends.triton import _staging, _table
from sam_kernels.backends.triton._config import Config, tuned
from sam_kernels.backends.triton._lists import trust
from tests.helpers.compare import assert_same_bits
from tests.helpers.interpreter import CHUNK

SIZES = (3, CHUNK + 188, 0, CHUNK, 2 * CHUNK + 1)


class Events:
    """Tables made and blocks of addresses copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tables = self.writes = 0
        real_init, real_write = _table.ChunkTable.__init__, _staging.Staging.write

        def init(table: _table.ChunkTable, *args: object) -> None:
            self.tables += 1
            real_init(table, *args)  # type: ignore[arg-type]

        def write(staging: _staging.Staging, *args: object) -> None:
            self.writes += 1
            real_write(staging, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(_table.ChunkTable, "__init__", init)
        monkeypatch.setattr(_staging.Staging, "write", write)

    def since_last(self) -> tuple[int, int]:
        seen = self.tables, self.writes
        self.tables = self.writes = 0
        return seen


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    with use_backend("triton"):
        yield Events(monkeypatch)


def lists(count: int) -> list[list[Tensor]]:
    return [[torch.randn(size) for size in SIZES] for _ in range(count)]


def make_optimizer(base: type[torch.optim.Optimizer], **kwargs: float) -> tuple[nn.Module, sam_kernels.SAM]:
    model = nn.Sequential(nn.Linear(7, 40), nn.Tanh(), nn.Linear(40, 3))
    return model, sam_kernels.SAM(model.parameters(), base, rho=0.5, lr=0.1, **kwargs)


def step(model: nn.Module, optimizer: sam_kernels.SAM, set_to_none: bool = False) -> None:
    batch = torch.randn(5, 7)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = model(batch).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize(
    ("base", "kwargs", "tables"),
    [(torch.optim.SGD, {"momentum": 0.9}, 3), (torch.optim.AdamW, {}, 4)],  # norm, perturb, update, Adam's counters
    ids=["SGD", "AdamW"],
)
def test_a_steady_step_makes_no_table_and_copies_nothing(
    events: Events, base: type[torch.optim.Optimizer], kwargs: dict[str, float], tables: int
) -> None:
    model, optimizer = make_optimizer(base, **kwargs)
    step(model, optimizer)
    events.since_last()
    step(model, optimizer)  # the second step of SGD is its first with a momentum buffer to read
    step(model, optimizer)
    assert events.since_last()[0] <= tables
    for _ in range(3):
        step(model, optimizer)
        assert events.since_last() == (0, 0)


def test_gradients_that_move_are_copied_and_nothing_else_is(events: Events) -> None:
    model, optimizer = make_optimizer(torch.optim.SGD, momentum=0.9)
    kept = []
    for _ in range(4):
        step(model, optimizer)
        kept.append([param.grad for param in model.parameters()])  # so that the next ones lie elsewhere
        optimizer.zero_grad(set_to_none=True)
    events.since_last()
    step(model, optimizer, set_to_none=True)
    tables, writes = events.since_last()
    assert tables == 0
    assert 0 < writes <= 4  # norm, perturb, check, update


def test_results_follow_tensors_that_move(events: Events) -> None:
    """Trusted lists over the same parameters, with gradients elsewhere at every call."""
    params, olds = lists(2)
    trusted, trusted_olds = trust(params), trust(olds)
    assert trusted is not None
    assert trusted_olds is not None
    for _ in range(3):
        (grads,) = lists(1)
        given = trust(grads, trusted)
        assert given is not None
        before = [param.clone() for param in params]
        functional.perturb_(trusted, given, trusted_olds, torch.tensor(1.0), rho=1.0, lambd=0.0)
        assert_same_bits("old_params", olds, before)
        assert_same_bits("params", params, [b + g for b, g in zip(before, grads, strict=True)])
    assert events.since_last() == (1, 3 + 2)  # three roles when it was made, then the gradients twice


def test_a_change_of_dtype_makes_another_table(events: Events) -> None:
    (params,) = lists(1)
    trusted = trust(params)
    assert trusted is not None
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32):
        grads = trust([torch.ones(size, dtype=dtype) for size in SIZES], trusted)
        assert grads is not None
        assert functional.grad_norm(grads).item() == pytest.approx(sum(SIZES) ** 0.5, rel=1e-6)
    assert events.since_last()[0] == 3


def test_a_list_on_another_device_is_not_trusted() -> None:
    """Step counters may lie on the host beside parameters on a device."""
    params = trust([torch.ones(3)])
    assert params is not None
    assert trust([torch.zeros(())], params) is not None
    _table.describe_list(params).device = torch.device("cuda", 0)
    assert trust([torch.zeros(())], params) is None


def test_tables_do_not_pile_up(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_table, "_TABLES_KEPT", 3)
    (params,) = lists(1)
    trusted = trust(params)
    assert trusted is not None
    for count in range(1, 8):
        grads = TensorList([grad for _ in range(count) for grad in params])
        described = _table.describe_list(grads)
        described.owner = _table.describe_list(trusted)
        functional.grad_norms([grads])
        functional.restore_(trusted, trusted)
    assert len(_table.describe_list(trusted).tables) <= 3


def test_chunks_cover_every_element_once_in_order() -> None:
    """Random lists; the elements of each row, cut by the table, are the row."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        count = int(torch.randint(1, 40, (), generator=generator))
        sizes = torch.randint(0, 2000, (count,), generator=generator) * torch.randint(0, 2, (count,), generator=generator)
        dtypes = [torch.float32 if i % 3 else torch.bfloat16 for i in range(count)]
        tensors = [torch.zeros(int(size), dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
        table = _table.table_of({"grads": TensorList(tensors)}, "norm")
        chunk = table.chunk_size
        pieces = [
            (int(slot), int(row), int(index))
            for group in table.groups
            for slot, row, index in zip(group.slots, group.rows, group.chunk_indices, strict=True)
        ]
        expected = [(row, index) for row, size in enumerate(sizes.tolist()) for index in range(-(-size // chunk))]
        assert [piece[1:] for piece in sorted(pieces)] == expected
        assert [slot for slot, *_ in sorted(pieces)] == list(range(len(expected)))
        for group in table.groups:
            assert group.chunks == 0 or {dtypes[row] for row in group.rows.tolist()} == {
                {v: k for k, v in _table.TRITON_DTYPES.items()}[group.dtypes["grads"]]
            }


def test_chunks_shrink_where_they_would_be_few() -> None:
    """Not below 4,096 elements, by the sum of the sizes alone."""
    config = Config(16384, 2048)
    for numel, size in ((0, 4096), (11_689_512, 4096), (25_557_032, 8192), (2**25 - 1, 8192), (2**25, 16384), (10**9, 16384)):
        assert config.chunk_of(numel) == size
        assert size == 4096 or numel // size >= 2048
    assert Config(1, 1).chunk_of(0) == 1  # smaller ones stay
    with tuned("norm", chunk=16384, block=2048):
        table = _table.table_of({"grads": TensorList([torch.zeros(size) for size in (9000, 4096, 1)])}, "norm")
    assert table.chunk_size == 4096
    assert [group.rows.tolist() for group in table.groups] == [[0, 0, 0, 1, 2]]


def test_no_chunk_cuts_a_slice() -> None:
    """Random slices: chunks are whole ones, as many as fit or one that is longer, and each group is of one width."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        count = int(torch.randint(1, 40, (), generator=generator))
        lines, sizes = (torch.randint(low, high, (count,), generator=generator).tolist() for low, high in ((1, 60), (0, 90)))
        tensors = [torch.zeros(line * max(size, 1)) for line, size in zip(lines, sizes, strict=True)]
        table = _table.table_of({"grads": TensorList(tensors)}, "centralize", tuple(sizes))
        chunk, block = table.chunk_size, table.constants["BLOCK_SIZE"]
        found: list[tuple[int, int, int]] = []
        for group in table.groups:
            found += zip(group.slots.tolist(), group.rows.tolist(), group.chunk_indices.tolist(), strict=True)
            for row in set(group.rows.tolist()):
                fits = group.columns is not None and sizes[row] <= group.columns <= block // 2
                assert group.columns == 0 if sizes[row] == 0 else fits or (group.columns is None and 2 * sizes[row] > block)
        expected = []
        for row, size in enumerate(sizes):
            elements = chunk if size == 0 else size if 2 * size > block else chunk // size * size
            expected += [(row, index) for index in range(-(-tensors[row].numel() // elements))]
        assert [piece[1:] for piece in sorted(found)] == expected


def test_a_change_of_slices_makes_another_table(events: Events) -> None:
    params = trust([torch.ones(12)])
    assert params is not None
    for shape in ((3, 4), (4, 3), (3, 4)):
        grads = trust([torch.arange(12.0).reshape(shape)], params)
        assert grads is not None
        norm = functional.centralize_(grads)
        assert norm.item() == pytest.approx((shape[0] * shape[1] * (shape[1] ** 2 - 1) / 12) ** 0.5, rel=1e-6)
    assert events.since_last()[0] == 2


def test_lists_of_different_sizes_are_refused(events: Events) -> None:
    params, grads = TensorList([torch.ones(3)]), TensorList([torch.ones(4)])
    with pytest.raises(ValueError, match="different sizes"):
        functional.perturb_(params, grads, TensorList([torch.ones(3)]), torch.tensor(1.0), rho=1.0)
    assert torch.equal(params[0], torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused_before_anything_is_written(events: Events, dtype: torch.dtype) -> None:
    params, grads = [torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(4, dtype=dtype)]
    with pytest.raises(TypeError, match=r"float64|complex64"):
        functional.perturb_(params, grads, [torch.zeros(3), torch.zeros(4)], torch.tensor(1.0), rho=1.0)
    assert_same_bits("params", params, [torch.ones(3), torch.ones(4)])
