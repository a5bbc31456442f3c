"""Lightning's and Fabric's wrappers of an optimizer, which take its class among their bases: they make the steps of the one inside.

Such a wrapper is an object of ``type("LightningSAM", (LightningOptimizer, SAM), {})``. Python finds SAM's methods in it and runs them on an
object without SAM's state. Here they are sent to the optimizer inside, while the framework counts steps, scales and calls its hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch.optim import Optimizer

from sam_kernels.optim._engine.warn import warn_user

__all__ = ["check_strategy", "is_imitation", "made_by_closure", "replaced", "send_inside"]

_SCALED = ("backward", "first_step", "weighted_backward")  # methods that take the framework's GradScaler
_MISSING = object()
_CALLBACK = "pass lightning.Trainer(callbacks=[sam_kernels.integrations.lightning.SAMCallback()], ...)"
_RUNS_TWICE = (
    "SAM: Lightning runs training_step twice in a step without knowing it: self.log counts both passes and on_before_optimizer_step is "
    f"called twice; {_CALLBACK}"
)


def is_imitation(cls: type) -> bool:
    """Whether the class is a framework's wrapper of an optimizer, with the optimizer's class as its second base."""
    first = cls.__bases__[0]
    has_inner = isinstance(inspect.getattr_static(first, "optimizer", None), property)
    return has_inner and hasattr(first, "__getattr__") and "step" in vars(first) and not issubclass(first, Optimizer)


def send_inside(cls: type) -> None:
    """Gives an imitation methods and properties that are those of ``self.optimizer``, but for those that the framework has itself."""
    framework, imitated = cls.__bases__[:2]
    own = {name for each in framework.__mro__[:-1] for name in vars(each)}
    members: dict[str, Any] = {
        "_step_supports_amp_scaling": _property("_step_supports_amp_scaling"),
        "step": _step(vars(framework)["step"]),
    }
    for each in imitated.__mro__[: imitated.__mro__.index(Optimizer)]:
        for name, value in vars(each).items():
            if name.startswith("_") or name in own or name in members:
                continue
            if isinstance(value, property):
                members[name] = _property(name)
            elif inspect.isfunction(value):
                members[name] = _second_step(value) if name == "second_step" else _method(name, value)
    for name, value in members.items():
        setattr(cls, name, value)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` within it."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def made_by_closure(optimizer: Any, *, grad_scaler: Any = None, skips_blank: bool = False) -> Iterator[None]:
    """Within it ``optimizer.step(closure)`` calls the closure once, whatever it does, and then steps along ``.grad``.

    ``skips_blank``: it does not step where ``backward`` has made no gradient since the last step.
    """
    step: Any = optimizer.step if grad_scaler is None else partial(optimizer.step, grad_scaler=grad_scaler)

    def once(closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not skips_blank or optimizer._calls_made():
            step()
        return result

    with replaced(optimizer, "step", once), replaced(optimizer, "_is_led", True):
        yield


def check_strategy(strategy: Any) -> None:
    """Raises RuntimeError for a strategy of Lightning or Fabric that updates, or gathers, weights of its own."""
    name = strategy.__class__.__name__  # the strategy may be a weak proxy
    if "DeepSpeed" in name or "FSDP" in name:
        raise RuntimeError(
            f"SAM: {name} updates, or gathers, weights of its own, which SAM would not perturb; use strategy='ddp', or "
            "ModelParallelStrategy with fully_shard"
        )


def _property(name: str) -> property:
    return property(lambda self: getattr(self.optimizer, name), lambda self, value: setattr(self.optimizer, name, value))


def _method(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(value)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _SCALED:
            check_strategy(self._strategy)
            kwargs.setdefault("grad_scaler", getattr(_precision(self), "scaler", None))
        return getattr(self.optimizer, name)(*args, **kwargs)

    return method


def _second_step(value: Callable[..., Any]) -> Callable[..., Any]:
    """SAM's, which makes its step through the framework's."""

    @wraps(value)
    def second_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self.optimizer
        usual = inner.step

        def step(*, grad_scaler: Any = None) -> Any:
            with replaced(inner, "step", usual):
                return self.step(grad_scaler=grad_scaler)

        with replaced(inner, "step", step):
            return inner.second_step(*args, **kwargs)

    return second_step


def _step(framework_step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(framework_step)
    def step(self: Any, closure: Any = None, *, grad_scaler: Any = None, **kwargs: Any) -> Any:
        """SAM's step, with all its arguments, through the framework's. A ``GradScaler`` of the framework need not be given."""
        inner, precision = self.optimizer, _precision(self)
        if vars(inner).get("_is_led"):  # by SAMCallback
            return framework_step(self, closure, **kwargs)
        check_strategy(self._strategy)
        scaler = getattr(precision, "scaler", None)
        module = getattr(self._strategy, "lightning_module", None)
        if closure is not None and module is not None and module.automatic_optimization:
            _check_automatic(inner, module, scaler)
            return framework_step(self, closure, **kwargs)
        if closure is None and not kwargs:
            with made_by_closure(inner, grad_scaler=None if grad_scaler is scaler else grad_scaler):
                return framework_step(self)
        return _whole_step(self, framework_step, partial(inner.step, closure, grad_scaler=grad_scaler or scaler, **kwargs))

    return step


def _whole_step(wrapper: Any, framework_step: Callable[..., Any], step: Callable[[], Any]) -> Any:
    """Makes ``step``, of the optimizer inside, where the framework makes its own.

    The framework does not know of a scaler meanwhile: ``GradScaler.step`` takes no closure, so that SAM's reads and reports to the scaler.
    """
    inner, precision = wrapper.optimizer, _precision(wrapper)
    scaler, descend = getattr(precision, "scaler", None), inner._descend

    def call(closure: Callable[[], Any] | None = None) -> Any:
        """``closure``: Lightning's, in which it calls its hooks."""

        def after_hooks(*args: Any, **kwargs: Any) -> Any:
            if closure is not None:
                closure()
            return descend(*args, **kwargs)

        with replaced(inner, "_descend", after_hooks), _scaler_of(precision, scaler, scaler):
            return step()

    with replaced(inner, "step", call), _scaler_of(precision, scaler, None):
        result = framework_step(wrapper)
    if scaler is not None:
        scaler.update()
    return result


def _scaler_of(precision: Any, known: Any, value: Any) -> Any:
    return nullcontext() if known is None else replaced(precision, "scaler", value)


def _precision(wrapper: Any) -> Any:
    """The precision plugin of Lightning's, or Fabric's, strategy."""
    strategy = wrapper._strategy
    return getattr(strategy, "precision_plugin", getattr(strategy, "precision", None))


def _check_automatic(optimizer: Any, module: Any, scaler: Any) -> None:
    """Automatic optimization without SAMCallback: Lightning's closure makes both passes as it makes one.

    Raises RuntimeError where the step would then not be SAM's; warns once otherwise.
    """
    trainer, clips = module.trainer, type(module).configure_gradient_clipping
    has_own_clipping = clips.__qualname__ != "LightningModule.configure_gradient_clipping"
    why = ""
    if trainer.accumulate_grad_batches > 1:
        why = "accumulates gradients of which only the last batch's would be at the perturbed weights"
    elif trainer.gradient_clip_val or has_own_clipping:
        why = "clips the gradient of the first pass too"
    elif scaler is not None:
        why = "calls step() alone with a GradScaler, which is no step of SAM"
    if why:
        raise RuntimeError(f"SAM: Lightning's automatic optimization {why}; {_CALLBACK}")
    if not vars(optimizer).get("_has_warned_of_lightning"):
        optimizer._has_warned_of_lightning = True
        warn_user(_RUNS_TWICE)
