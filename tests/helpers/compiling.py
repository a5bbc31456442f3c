"""Functions under ``torch.compile``, beside the same functions called eagerly."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers.compare import assert_same_bits

__all__ = ["assert_same", "clone", "compiled", "operator"]


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True)


def operator(name: str) -> Any:
    return getattr(torch.ops.sam_kernels, name).default


def clone(tree: Any) -> Any:
    """In memory laid out alike, on which random numbers depend."""
    return copy.deepcopy(tree)


def assert_same(name: str, actual: Any, expected: Any) -> None:
    assert_same_bits(name, *([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (actual, expected)))
