"""What the launchers read of a list of tensors: alike in C++ and in Python, for installations without the compiled core."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import SAM
from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING

REASON = REASON_MISSING or ("kernels are interpreted here, not compiled" if IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench.offline import compiling_only  # noqa: E402 - after the skip
from sam_kernels.backends.triton import _contents  # noqa: E402 - after the skip
from sam_kernels.backends.triton._contents import PythonContents  # noqa: E402 - after the skip

CLASSES = [PythonContents, _contents._contents_class()]


@pytest.fixture(params=CLASSES, ids=lambda each: each.__name__)
def contents(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setattr(_contents, "_class", request.param)
    return request.param


def _tensors() -> list[Tensor]:
    base = torch.zeros(4, 6, 5, 3)
    return [base, base.permute(0, 2, 3, 1), base[:, :1].to(torch.bfloat16), base[0].half(), base[:0, ::2], nn.Parameter(base.clone())]


def test_both_are_tested() -> None:
    pytest.importorskip("sam_kernels._cpu", reason="the native core is not built")
    assert len({each.__name__ for each in CLASSES}) == 2


def test_what_is_read_is_torchs(contents: type) -> None:
    tensors = _tensors()
    found = contents(tensors)
    assert list(found.numels) == [tensor.numel() for tensor in tensors]
    assert tuple(found.dtypes) == tuple(tensor.dtype for tensor in tensors)
    assert list(found.non_contiguous) == [i for i, tensor in enumerate(tensors) if not tensor.is_contiguous()]
    assert (found.has_float64, found.only_float32) == (False, False)
    assert contents([tensors[0]]).only_float32
    assert contents([tensors[0].double()]).has_float64
    written = torch.full((len(tensors) + 1,), -1)
    found.write_pointers(written.data_ptr())
    assert written.tolist() == [*(tensor.data_ptr() for tensor in tensors), -1]


def test_lists_are_compared(contents: type) -> None:
    tensors = _tensors()
    found = contents(tensors)
    moved = [torch.empty_like(tensor) for tensor in tensors]
    assert found.has_kinds_of(contents(moved))
    assert not found.has_pointers_of(contents(moved))
    assert found.has_pointers_of(contents(tensors))
    assert not found.has_kinds_of(contents([*tensors[:2], tensors[2].float(), *tensors[3:]]))
    assert not found.has_kinds_of(contents(tensors[:-1]))
    assert not found.has_pointers_of(contents(tensors[:-1]))


def test_moves_and_missing_gradients_are_noticed(contents: type) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    found = contents(params)
    assert found.is_current(params)
    assert not found.is_current([*params[1:], params[0]])
    assert not found.is_current(params[:2])
    assert found.current_grads(params) is None
    for param in params:
        param.grad = torch.ones(3)
    grads, described = found.current_grads(params)
    assert [id(grad) for grad in grads] == [id(param.grad) for param in params]
    assert described.is_current(grads)
    params[1].data = torch.ones(3)
    assert not found.is_current(params)
    assert found.current_grads(params) is None


def test_tensors_that_kernels_cannot_read_are_an_error(contents: type) -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"tensor 1 of the list, a Tensor, has no memory"):
        contents([torch.ones(2), freed])
    with pytest.raises(TypeError, match=r"dtype torch\.int32 has no kernel"):
        contents([torch.ones(2), torch.ones(2, dtype=torch.int32)])
    with pytest.raises(RuntimeError, match="storage"):
        contents([torch.eye(2).to_sparse()])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_launch_the_same(contents: type, memory_format: torch.memory_format) -> None:
    """Step counters fit parameters of any memory order: three steps describe them once."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=memory_format)), nn.Parameter(torch.randn(7))]
    optimizer = SAM(params, torch.optim.AdamW, rho=0.05, lr=0.1)
    with compiling_only() as launches:
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.first_step()
            optimizer.second_step()
        lists = next(iter(optimizer._passes._lists.values()))
    assert [name for name, _ in launches] == 3 * ["_norm_kernel", "_perturb_kernel", "_norm_kernel", "_advance_kernel", "_adamw_kernel"]
    assert all("triton" in lists._state_tensors[key].descriptions for key in ("step", "exp_avg", "exp_avg_sq"))
