"""The floor library moves what it says it moves, whatever the flags."""

import ctypes
import shutil

import pytest
import torch
from torch import Tensor

from bench import floor
from bench.byte_model import CALLS, MASTER_OPS, NARROW_LISTS, OPS, Traffic, master_bytes

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH")
N = 65536 * 2 + 16 * 5  # two chunks and a short one


def _random(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(N, generator=generator) for _ in range(count)]


@needs_compiler
def test_library_compiles() -> None:
    assert isinstance(floor.library(), ctypes.CDLL), floor.library()


@needs_compiler
@pytest.mark.parametrize("op", [op for op, traffic in CALLS.items() if traffic.updates or traffic.writes])
def test_every_pass_reads_and_writes_every_element(op: str) -> None:
    traffic = CALLS[op]
    reads, updates = len(traffic.reads), len(traffic.updates)
    passes = {name: run for name, run in floor.candidates(traffic).items() if name.startswith("C++")}
    assert len(passes) == 4 * (2 if updates else 1) * (2 if traffic.writes else 1)
    for name, run in passes.items():
        buffers = _random(len(traffic.lists))
        before = [buffer.clone() for buffer in buffers]
        run(buffers)
        total = sum(before[:reads], torch.full_like(before[0], 0.0 if reads else 0.5))
        for i in range(reads):
            assert torch.equal(buffers[i], before[i]), name
        for i in range(reads, reads + updates):
            torch.testing.assert_close(buffers[i], (before[i] + total) / 2, msg=name)
        if traffic.writes:
            torch.testing.assert_close(buffers[-1], sum(before[reads : reads + updates], total), msg=name)


@needs_compiler
@pytest.mark.parametrize("op", [op for op, traffic in MASTER_OPS.items() if traffic.writes])
def test_passes_over_lists_of_two_widths_do_too(op: str) -> None:
    traffic = MASTER_OPS[op]
    passes = floor.candidates_of_widths(traffic, NARROW_LISTS)
    assert len(passes) == 8 * (2 if traffic.updates else 1)
    buffers = floor.buffers_of_widths(traffic, 2 * N, NARROW_LISTS)
    assert sum(buffer.nbytes for buffer in buffers) + sum(buffer.nbytes for buffer in buffers[len(traffic.reads) : -1]) == master_bytes(
        op, 2 * N
    )
    wide = [buffer.numel() == 2 * N for buffer in buffers]
    updates = range(len(traffic.reads), len(buffers) - 1)
    for name, run in passes.items():
        filled = [torch.rand(2 * N if is_wide else N, generator=torch.Generator().manual_seed(i)) for i, is_wide in enumerate(wide)]
        for buffer, values in zip(buffers, filled, strict=True):
            buffer.copy_(values)
        run(buffers)
        halves = [each.view(-1, 2, 16) if is_wide else each.view(-1, 1, 16) for each, is_wide in zip(filled, wide, strict=True)]
        total = sum((each for each, is_wide in zip(halves[:-1], wide, strict=False) if not is_wide), torch.tensor(0.5))
        for i in updates:
            torch.testing.assert_close(buffers[i], ((halves[i] + total) / 2).flatten(), msg=name)
        expected = sum((each.sum(1, keepdim=True) for each, is_wide in zip(halves[:-1], wide, strict=False) if is_wide), total)
        torch.testing.assert_close(buffers[-1], expected.flatten(), msg=name)


@needs_compiler
@pytest.mark.parametrize("op", ["grad_norm", "grad_dots"])
def test_sums_are_sums(op: str) -> None:
    buffers = _random(len(OPS[op].lists))
    sums = {name: run for name, run in floor.candidates(OPS[op]).items() if "sum" in name}
    assert len(sums) == 5
    for name, run in sums.items():
        expected = sum(buffer.double().sum().item() for buffer in buffers)
        assert float(run(buffers)) == pytest.approx(expected, rel=1e-4), name  # type: ignore[arg-type]


def test_without_a_compiler_torch_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "library", lambda: "no C++ compiler on PATH")
    assert set(floor.candidates(OPS["restore_"])) == {"torch copy_"}
    assert set(floor.candidates(OPS["sgd_step_"])) == {"torch copy_ (no compiler)"}
    assert "torch.sum" in floor.candidates(OPS["grad_norm"])
    for op in OPS:
        for run in floor.candidates(OPS[op]).values():
            run(floor.flat_buffers(OPS[op], 1 << 12))


@needs_compiler
def test_a_mix_that_is_not_there_is_an_error() -> None:
    traffic = Traffic(reads=("a", "b", "c"), writes=("d",))
    with pytest.raises(ValueError, match="no pass"):
        next(iter(floor.candidates(traffic).values()))(floor.flat_buffers(traffic, 1024))


def test_finalists_are_candidates() -> None:
    passes = floor.candidates(OPS["restore_"])
    found = floor.finalists(passes, [floor.flat_buffers(OPS["restore_"], 1 << 16)], rounds=1, count=2)
    assert len(found) == 2
    assert set(found) <= set(passes)


def test_buffers_are_rounded_up_to_whole_lines() -> None:
    (buffer,) = floor.flat_buffers(OPS["grad_norm"], 65)
    assert buffer.numel() * 4 == 128
    assert buffer.data_ptr() % 64 == 0
