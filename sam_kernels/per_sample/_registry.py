"""Which rule belongs to a module, and how users add theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from sam_kernels.per_sample._terms import Term

__all__ = ["Rule", "register_rule", "rule_for"]

# rule(module, args, kwargs, grad_output) -> {name of a parameter: its gradients, of every sample}
Rule = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], dict[str, Tensor | Term]]
_R = TypeVar("_R", bound=Callable[..., Any])
_RULES: dict[type[nn.Module], Rule] = {}


@overload
def register_rule(module_type: type[nn.Module]) -> Callable[[_R], _R]: ...
@overload
def register_rule(module_type: type[nn.Module], rule: _R) -> _R: ...
def register_rule(module_type: type[nn.Module], rule: Any = None) -> Any:
    """Tells the engine how to find every sample's gradient of a module's own parameters; a decorator where ``rule`` is left out.

    ``rule(module, args, kwargs, grad_output)`` is given what the module was called with and the gradient of the sum of all losses towards
    its output (a tensor; of a tuple one for each tensor in it, None where nothing depends on one). Tensors have the batch, B samples, in
    dimension 0. It returns for each of the module's own trainable parameters, by name, a tensor (B, *parameter.shape), or, where that would
    be large, one of the forms :class:`Outer`, :class:`Convolution` and :class:`Rows`. It runs without autograd, during the backward pass::

        class Scale(nn.Module):
            def __init__(self, dim):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(dim))

            def forward(self, x):  # (B, T, dim)
                return x * self.scale

        @sam_kernels.per_sample.register_rule(Scale)
        def scale_rule(module, args, kwargs, grad_output):
            return {"scale": (args[0] * grad_output).sum(1)}

    A rule holds for subclasses that override neither ``forward``, nor a method that it calls, nor, by a property, a parameter. A later
    rule for a type replaces an earlier one.

    Raises TypeError where ``module_type`` is no class of modules or ``rule`` cannot be called.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_rule: module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if rule is None:
        return lambda function: register_rule(module_type, function)
    if not callable(rule):
        raise TypeError(f"register_rule: rule must be callable, got {rule!r}")
    _RULES[module_type] = rule
    return rule


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the module's class, or of the class that it inherits everything from that ``forward`` uses."""
    if "forward" in vars(module):  # replaced on this very module
        return None
    kind: Any = type(module)
    for base in kind.__mro__:
        rule = _RULES.get(base)
        if rule is not None:
            if kind.forward is not base.forward or (kind is not base and _differs(kind, base, module)):
                return None
            return rule
    return None


def _differs(kind: Any, base: Any, module: nn.Module) -> bool:
    """Whether a class changes what the ``forward`` that it inherits computes: by a method that this calls (``_conv_forward``), or by a
    property in the place of a parameter."""
    methods, properties = _overridden(kind, base)
    return methods or any(name in module._parameters for name in properties)


@cache
def _overridden(kind: Any, base: Any) -> tuple[bool, frozenset[str]]:
    """Whether ``kind`` has another method in the place of one that the ``forward`` of ``base`` calls; and the names that this reads which
    are descriptors in ``kind``."""
    used, stack = {"__getattr__", "__getattribute__"}, ["forward"]
    while stack:
        code = getattr(inspect.getattr_static(base, stack.pop(), None), "__code__", None)
        new = set(code.co_names if code else ()) - used
        used |= new
        stack += [name for name in new if inspect.isfunction(inspect.getattr_static(base, name, None))]
    own = {name: value for each in kind.__mro__[: kind.__mro__.index(base)] for name, value in vars(each).items() if name in used}
    methods = any(inspect.isfunction(value) for value in own.values())
    return methods, frozenset(name for name, value in own.items() if hasattr(value, "__get__") and not inspect.isfunction(value))
