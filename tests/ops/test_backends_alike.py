"""Modules of one family are interchangeable: the same names, taking the same arguments. (Operations over lists: test_operations.py.)"""

import importlib
import inspect
from types import ModuleType

import pytest

OWN = {"REASON_MISSING"}  # of a module that can be imported without its needs
SHARPNESS = ("native.sharpness", "native.cuda_sharpness", "triton.sharpness", "foreach.sharpness")
PER_SAMPLE = ("native.per_sample", "triton.per_sample", "foreach.per_sample")
PAIRS = [(name, other) for family in (PER_SAMPLE, SHARPNESS) for i, name in enumerate(family) for other in family[i + 1 :]]


def module_named(name: str) -> ModuleType:
    """Also one that has no kernels for this machine's devices."""
    try:
        backend = importlib.import_module(f"sam_kernels.backends.{name}")
    except ImportError as error:
        pytest.skip(f"backend {name}: {error}")
    reason = getattr(backend, "REASON_MISSING", None)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return backend


def arguments_of(backend: ModuleType, name: str) -> list[tuple[str, str, object]] | None:
    """None where it is no function. Annotations are not compared: the numbers of their shapes are comments."""
    function = getattr(backend, name)
    if not inspect.isroutine(function):
        return None
    return [(argument.name, str(argument.kind), argument.default) for argument in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_backends_offer_the_same_names(one: str, other: str) -> None:
    first, second = module_named(one), module_named(other)
    assert set(first.__all__) - OWN == set(second.__all__) - OWN
    for backend in (first, second):
        assert [name for name in backend.__all__ if not hasattr(backend, name)] == []


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_functions_take_the_same_arguments(one: str, other: str) -> None:
    first, second = module_named(one), module_named(other)
    for name in sorted(set(first.__all__) & set(second.__all__) - OWN):
        if name == "conv_square_norms_" and None in (first.conv_square_norms_, second.conv_square_norms_):
            continue  # a backend may leave convolutions to its caller, who unfolds them
        assert arguments_of(first, name) == arguments_of(second, name), name
