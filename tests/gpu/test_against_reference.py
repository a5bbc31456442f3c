"""Every operation, backend, dtype, case and keyword set on the device against the float64 reference on the CPU.

The benchmarks look at this file alone: an operation that is red here on a backend has no speed there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner

from sam_kernels._dispatch import available
from sam_kernels.cli.validate import validate
from sam_kernels.validation.backends import AUTOMATIC, dtypes_of
from sam_kernels.validation.cases import DTYPES, MIXED_NARROW
from sam_kernels.validation.check import check, combinations
from sam_kernels.validation.options import OPTIONS
from tests.helpers.devices import KERNELS, reason_without

pytestmark = pytest.mark.cuda
EVERY = "every"  # where all is skipped, one line an operation says so
# A keyword set is a test of its own: most of the time goes into compiling, which processes share.
PAIRS = [(op, option) for op in OPTIONS for option in (OPTIONS[op] if torch.cuda.is_available() else [EVERY])]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend_name", [*KERNELS, "foreach", AUTOMATIC])
@pytest.mark.parametrize(("op", "option"), PAIRS)
def test_matches_the_reference(
    op: str, option: str, backend_name: str, device: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("op", op)
    record_property("backend", backend_name)
    if backend_name in KERNELS and (reason := reason_without(backend_name)) is not None:
        pytest.skip(f"backend {backend_name}: {reason}")
    wrong, checked = [], 0
    for dtype in (*DTYPES, MIXED_NARROW):
        if dtype in dtypes_of(backend_name, device):
            for case, other in combinations(op, dtype):
                if option in (other, EVERY):
                    checked += 1
                    worst = check(op, [backend_name], dtype, case, other, device=device)[backend_name]
                    if not worst.passed:
                        wrong.append(f"{dtype}, case {case}, option {other}: {worst}")
    assert not wrong, f"{len(wrong)} of {checked} wrong:\n" + "\n".join(wrong[:20])


@pytest.mark.only_cuda
def test_validate_on_the_device(device: str) -> None:
    result = CliRunner().invoke(validate, ["--device", device, "--op", "restore_"])
    assert result.exit_code == 0, result.output
    assert all(f" {name} " in result.output for name in (*available(device), AUTOMATIC))
