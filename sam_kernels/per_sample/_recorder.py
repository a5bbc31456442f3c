"""Listens to one forward pass of a model, and leaves nothing behind on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from sam_kernels._sharding import is_dtensor
from sam_kernels.per_sample import _rules
from sam_kernels.per_sample._aliases import distinct, is_alias_alone
from sam_kernels.per_sample._attention import LinearCalls, attention_params, rows_of
from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._extents import Extent, extent_of
from sam_kernels.per_sample._graph_reads import Loose
from sam_kernels.per_sample._hidden import has_graph, refuse_inside_function
from sam_kernels.per_sample._reads import now
from sam_kernels.per_sample._registry import Rule, rule_for
from sam_kernels.per_sample._rereading import Rereadable
from sam_kernels.per_sample._rules import linear_terms, with_statistics
from sam_kernels.per_sample._shards import WholeParams
from sam_kernels.per_sample._vmap import by_vmap

__all__ = ["Recorder", "refuse_compiled"]


_READ = frozenset(("weight", "bias"))  # what the built-in rules give


@dataclass
class _Watched:
    """A module that owns trainable parameters."""

    path: str  # in the model, with a dot at the end
    module: nn.Module
    batch_dim: int
    params: dict[str, nn.Parameter]
    rule: Rule | None  # None: nn.MultiheadAttention, or by vmap
    by_vmap: bool = False
    extent: Extent | None = None  # by vmap, where layers inside have its parameters too

    @property
    def name(self) -> str:
        return _described(self.path[:-1], self.module)


class Recorder:
    """``calls`` are those of the layers that own trainable parameters, in the order in which they were made."""

    def __init__(self, model: nn.Module, *, batch_first: bool, unsupported: str) -> None:
        self.calls: list[Call] = []
        self.loose: list[Loose] = []  # modules without a rule
        self.model = model
        self._batch_dim = 0 if batch_first else 1
        self._unsupported = unsupported
        self._handles: list[RemovableHandle] = []
        self._layers: list[_Watched] = []
        self._modes: list[LinearCalls] = []  # of the attentions that are being called
        self._extents: list[Extent] = []  # of the modules that are being called
        self._spans: list[int] = []  # the numbers of nodes at which they began
        self._listens = self._records = False
        self.whole = WholeParams()
        self._rereadable = Rereadable()

    @property
    def is_on(self) -> bool:
        return self._listens

    @property
    def params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters of the model that was started with, some more than once, with their names."""
        layers = ((f"{each.path}{name}", param) for each in self._layers for name, param in each.params.items())
        return chain(layers, ((f"{each.name}.{name}", param) for each in self.loose for name, param in each.params.items()))

    def start(self) -> None:
        """Raises NotImplementedError for a module that owns trainable parameters and has no rule, TypeError for a compiled one."""
        self.whole = WholeParams(self.model)
        self.loose = []
        self._layers = list(self._watched())
        self.calls = []
        self._listens = self._records = True
        self._listen()

    def stop(self) -> None:
        self._listens = self._records = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._extents, self._spans = [], []
        self._rereadable.stop()
        while self._modes:  # an interrupt left an attention without its hook
            self._leave_attention()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """For a backward pass in which checkpoints run parts of the model again: they must save what they saved the first time."""
        self._listens = True
        self._listen()
        try:
            yield
        finally:
            self.stop()

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """While a rule calls modules itself."""
        self._listens, before = False, self._listens
        try:
            yield
        finally:
            self._listens = before

    def _listen(self) -> None:
        try:
            self._put_hooks()
        except BaseException:  # Ctrl-C: no hook may stay
            self.stop()
            raise

    def _put_hooks(self) -> None:
        # Modules in whose calls values of loose parameters may meet the batch, or outputs of layers that have none. Every model's, the
        # first time, which shows whether there are checkpoints.
        for module in self.model.modules() if self.loose or self._rereadable.may_be_needed else ():
            if module._modules or any(param.requires_grad for param in module._parameters.values() if param is not None):
                self._handles.append(module.register_forward_pre_hook(self._rereadable.enter))
                self._handles.append(module.register_forward_hook(self._rereadable.leave, always_call=True))
        for loose in self.loose:
            if any(map(is_dtensor, loose.params.values())):  # while it is called it has the whole ones
                self._handles.append(loose.module.register_forward_pre_hook(partial(self._on_loose, loose)))
        for each in self._layers:
            if each.extent is not None:
                self._handles.append(each.module.register_forward_pre_hook(partial(self._enter_extent, each.extent)))
                self._handles.append(each.module.register_forward_hook(self._leave_extent, always_call=True))
            if each.by_vmap or (each.rule is not None and not _is_built_in(each.rule)):
                self._handles.append(each.module.register_forward_pre_hook(self._enter_span, prepend=True))
                self._handles.append(each.module.register_forward_hook(self._leave_span, always_call=True))
            if each.rule is not None or each.by_vmap:  # before the model's own hooks, which may change the output
                self._handles.append(each.module.register_forward_hook(partial(self._on_call, each), with_kwargs=True, prepend=True))
                continue
            self._handles.append(each.module.register_forward_pre_hook(partial(self._enter_attention, each), with_kwargs=True))
            self._handles.append(each.module.register_forward_hook(self._leave_attention, always_call=True, prepend=True))

    def _on_call(self, watched: _Watched, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._listens:
            return output
        tensors = [output] if isinstance(output, Tensor) else [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not has_graph(watched.name, tensors):
            return output
        if len(tensors) > 1:  # one may come from another, or be another: aliases get only the gradients from outside
            output = pytree.tree_map_only(Tensor, lambda tensor: tensor.view_as(tensor), output)
        # (B, features), as behind a mean over time, has no dimension for time
        batch_dim = watched.batch_dim if any(tensor.dim() > 2 for tensor in tensors) else 0
        rule = watched.rule
        if rule is None:
            device_type = _any(watched.params).device.type
            dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
            rule = partial(self._by_vmap, batch_dim, partial(torch.autocast, device_type, dtype, enabled))
        reads_once = watched.rule is not None and _is_built_in(watched.rule)
        read = self.whole.read_by(watched.name, module, watched.params)
        call = Call(
            watched.name, module, rule, watched.params, args, kwargs, output, batch_dim=batch_dim, reads_once=reads_once, anchor=_any(read)
        )
        if isinstance(output, Tensor) and not call.is_recomputed:
            call.rule = with_statistics(rule, output)
        if not reads_once and self._spans:
            call.span = (self._spans[-1], now())
        if watched.extent is not None and self._extents:
            call.extent = self._extents[-1]
        self._record(call)
        return output

    def _record(self, call: Call) -> None:
        if not self._records:
            return
        if self._extents:
            call.extents = [extent for extent in self._extents if id(call.module) in extent.inside]
        self.calls.append(call)

    def _on_loose(self, loose: Loose, module: nn.Module, args: Any) -> None:
        if self._records:
            self.whole.read_by(loose.name, module, loose.params)

    def _enter_span(self, *_: Any) -> None:
        if self._listens:
            self._spans.append(now())

    def _leave_span(self, *_: Any) -> None:
        if self._spans:
            self._spans.pop()

    def _enter_extent(self, extent: Extent, *_: Any) -> None:
        if self._listens:
            self._extents.append(Extent(extent.aliased, extent.inside))

    def _leave_extent(self, *_: Any) -> None:
        if self._listens and self._extents:
            self._extents.pop()

    def _by_vmap(self, batch_dim: int, autocast: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Any) -> Any:
        with self.deaf(), autocast():
            return by_vmap(module, args, kwargs, grad, batch_dim=batch_dim)

    def _enter_attention(self, watched: _Watched, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listens:
            if not torch.is_grad_enabled():  # torch's fused attention calls no ``linear`` then
                refuse_inside_function(watched.name)
            query = args[0] if args else kwargs["query"]
            batch = 1 if query.dim() < 3 else query.shape[0 if module.batch_first else 1]
            self._spans.append(now())
            read = self.whole.read_by(watched.name, module, watched.params)
            mode: Any = LinearCalls(partial(self._on_linear, watched, read, batch))
            self._modes.append(mode.__enter__())

    def _leave_attention(self, *_: Any) -> None:
        if self._modes:
            mode: Any = self._modes.pop()
            mode.__exit__(None, None, None)
            self._leave_span()

    def _on_linear(
        self,
        watched: _Watched,
        read: Mapping[str, nn.Parameter],
        batch: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
    ) -> None:
        found = {"weight": rows_of(weight, read), "bias": rows_of(bias, read)}
        used = {name: each for name, each in found.items() if each is not None}
        if not used or not has_graph(watched.name, [output]):
            return
        call = Call(
            watched.name,
            watched.module,
            partial(_linear_rule, "weight" in used, "bias" in used),
            {name: watched.params[param] for name, (param, _) in used.items()},
            (x,),
            {},
            output,
            anchor=_any(read),
            places={name: place for name, (_, place) in used.items()},
            merged=batch,  # attention works on (positions, batch, features), whatever it is given
        )
        if self._spans:
            call.span = (self._spans[-1], now())
        self._record(call)

    def _watched(self) -> Iterator[_Watched]:
        seen: set[nn.Module] = set()
        stack = [("", self.model, self._batch_dim)]
        while stack:
            name, module, batch_dim = stack.pop()
            if module in seen:
                continue
            seen.add(module)
            refuse_compiled(name, module)
            batch_dim = _batch_dim_within(module, batch_dim)
            if type(module).forward is nn.MultiheadAttention.forward:
                seen.update(module.children())  # out_proj is not called
                yield from self._attention(name, module)
                continue
            # What named_parameters and named_children give, in a third of the time: a small model is walked at every step.
            prefix = f"{name}." if name else ""
            params = {each: param for each, param in module._parameters.items() if param is not None and param.requires_grad}
            if params:
                yield from self._watched_itself(prefix, module, batch_dim, params)
            stack += [(prefix + each, child, batch_dim) for each, child in module._modules.items() if child is not None]

    def _watched_itself(self, prefix: str, module: nn.Module, batch_dim: int, params: dict[str, nn.Parameter]) -> Iterator[_Watched]:
        name, rule = prefix[:-1], rule_for(module)
        _refuse_complex(name, module, params)
        if rule is not None:
            if not params.keys() <= _READ and _is_built_in(rule):  # a second name of its weight, or of its bias
                own = {id(param) for each, param in params.items() if each in _READ}
                more = {each: param for each, param in params.items() if each not in _READ and id(param) not in own}
                params = {each: param for each, param in params.items() if each in _READ}
                if more:  # torch.nn.utils.weight_norm: the rule knows nothing of them
                    self._look_for(name, module, more)
            if params:
                yield _Watched(prefix, module, batch_dim, params, rule)
            return
        if self._unsupported != "vmap" or isinstance(module, ParametrizationList):
            self._look_for(name, module, params)
            return
        params = distinct(params)
        self.whole.refuse(_described(name, module), params.values())
        yield _Watched(prefix, module, batch_dim, params, None, by_vmap=True, extent=extent_of(module, params))

    def _look_for(self, name: str, module: nn.Module, params: dict[str, nn.Parameter]) -> None:
        is_alias = is_alias_alone(params, self.model, _counts_reads)
        self.loose.append(Loose(_described(name, module), module, params, partial(_no_rule, name, module, params), is_alias))

    def _attention(self, name: str, module: Any) -> Iterator[_Watched]:
        params = attention_params(module)
        _refuse_complex(name, module, params)
        added = {each: param for each, param in params.items() if each in ("bias_k", "bias_v")}
        if not added:
            if params:
                yield _Watched(f"{name}." if name else "", module, 0, params, None)
            return
        if self._unsupported != "vmap":
            raise _no_rule(name, module, added, "they are added to the keys and values of an attention")
        raise NotImplementedError(f"GradNorms: {_described(name, module)}: add_bias_kv=True is not supported")


def _any(params: Mapping[str, nn.Parameter]) -> nn.Parameter:
    return next(iter(params.values()))


def _linear_rule(weight: bool, bias: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Any:
    return linear_terms(args[0], grad_output, weight=weight, bias=bias)


def _is_built_in(rule: Rule) -> bool:
    """Whether it is one of the package's, of layers that read each of their parameters once a call."""
    return getattr(rule, "__module__", None) == _rules.__name__


def _counts_reads(module: nn.Module) -> bool | None:
    """None for a module without a rule; of others whether their reads are counted."""
    if type(module).forward is nn.MultiheadAttention.forward:
        return False
    rule = rule_for(module)
    return None if rule is None else _is_built_in(rule)


def _refuse_complex(name: str, module: nn.Module, params: dict[str, nn.Parameter]) -> None:
    for each, param in params.items():
        if param.is_complex():
            raise NotImplementedError(
                f"GradNorms: {_described(name, module)}: parameter {each} has dtype {param.dtype}; complex parameters are not supported: "
                "freeze it, or hold its real and imaginary parts in two real parameters"
            )


def _batch_dim_within(module: Any, batch_dim: int) -> int:
    """torch's transformers say where their batch is."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return 0 if module.self_attn.batch_first else 1
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder) and len(module.layers):
        return _batch_dim_within(module.layers[0], batch_dim)
    return batch_dim


def refuse_compiled(name: str, module: nn.Module) -> None:
    """Raises TypeError where ``torch.compile`` has taken the place of a layer's call."""
    if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
        raise TypeError(
            f"GradNorms: {name or 'the model'} is compiled, and its layers cannot be listened to; pass the module it was compiled from"
        )


def _described(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _no_rule(name: str, module: nn.Module, params: dict[str, nn.Parameter], why: str) -> NotImplementedError:
    kind = type(module).__name__
    if isinstance(module, ParametrizationList):
        return NotImplementedError(
            f"GradNorms: {_described(name, module)}: this parametrization is not supported ({why}); freeze the weight, or make it a plain "
            "one with torch.nn.utils.parametrize.remove_parametrizations"
        )
    shapes = ", ".join(f'"{each}": (B, {", ".join(map(str, param.shape))})' for each, param in params.items())
    return NotImplementedError(
        f"GradNorms: {_described(name, module)} owns trainable parameters and has no rule, and the graph shows no gradients of samples "
        f"({why}). Write a rule with @sam_kernels.per_sample.register_rule({kind}) that returns {{{shapes}}}, the gradients of every "
        "sample, from the module's inputs and the gradient of its output (where that is not enough, move the parameters into a small "
        'module of their own); or freeze them; or ask for unsupported="vmap", which runs the module once more for every sample'
    )
