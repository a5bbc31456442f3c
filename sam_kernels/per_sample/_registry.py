"""Which rule belongs to a module, and how users add theirs."""

from __future__ import annotations

from collections.abc import Callable
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

    A rule holds for subclasses that do not override ``forward``. A later rule for a type replaces an earlier one.

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
    """The rule of the module's class, or of the class whose ``forward`` it inherits."""
    if "forward" in vars(module):  # replaced on this very module
        return None
    for base in type(module).__mro__:
        if base in _RULES:
            return _RULES[base] if type(module).forward is base.forward else None
    return None
