"""Second derivatives on a device: parameters of two devices, and the words for the fused operations that have none."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_kernels import monitors
from sam_kernels.optim._seeds import derived_seed
from tests.test_hessian import reference_vector

pytestmark = [pytest.mark.cuda, pytest.mark.only_cuda]


def test_parameters_of_two_devices_are_one_vector() -> None:
    options = {"dtype": torch.float64, "requires_grad": True}
    a, b, c = torch.ones(3, device="cuda", **options), torch.ones(3, **options), torch.ones(2, device="cuda", **options)
    matrix = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = matrix + matrix.T

    def closure() -> Tensor:
        w = torch.cat([a.cpu(), b, c.cpu()])
        return w @ matrix @ w / 2

    top = monitors.hessian_top_eigenvalue(closure, [a, b, c])
    assert top.device == a.device
    assert top.item() == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-10)
    z = reference_vector([a, b, c], derived_seed(0, 0), "rademacher")
    assert monitors.hessian_trace(closure, [a, b, c], num_samples=1).item() == pytest.approx((z @ matrix @ z).item(), rel=1e-12)


@pytest.mark.parametrize("fused", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], ids=str)
def test_fused_attention(fused: SDPBackend) -> None:
    q = torch.randn(1, 2, 64, 16, device="cuda", dtype=torch.float16, requires_grad=True)

    def closure() -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q).float().square().sum()

    with sdpa_kernel(fused), pytest.raises(RuntimeError, match=re.escape("sdpa_kernel(SDPBackend.MATH)")):
        monitors.hessian_trace(closure, [q])
    with sdpa_kernel(SDPBackend.MATH):
        assert monitors.hessian_trace(closure, [q]).isfinite()


def test_recurrent_layers() -> None:
    lstm, x = nn.LSTM(4, 3).cuda(), torch.randn(5, 2, 4, device="cuda")
    with pytest.raises(RuntimeError, match=r"cudnn.flags\(enabled=False\)"):
        monitors.hessian_trace(lambda: lstm(x)[0].square().sum(), lstm.parameters())

    def plain() -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return lstm(x)[0].square().sum()

    assert monitors.hessian_trace(plain, lstm.parameters()).isfinite()
