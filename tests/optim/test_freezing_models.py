"""``freeze_unperturbed=True`` with layers of many kinds, torch.compile, activation checkpointing, and RW-SAM's first pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sam_kernels
from sam_kernels import RWSAM, SAM, last_layers, norm_layers
from tests.optim import rwsam_problem
from tests.optim.family_runs import everything_of
from tests.optim.problem import BACKENDS, assert_same_bits, twin


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm, self.head = nn.LSTM(6, 8, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.lstm(inputs.view(-1, 4, 6))[0][:, -1]))
        return out


class Transformer(nn.Module):
    def __init__(self, checkpointing: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 16)
        layer = partial(nn.TransformerEncoderLayer, 16, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList([layer(), layer()])
        self.norm, self.head, self.checkpointing = nn.LayerNorm(16), nn.Linear(16, 2), checkpointing

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embedding(inputs.view(-1, 4, 6))
        for layer in self.layers:
            hidden = layer(hidden) if self.checkpointing is None else checkpoint(layer, hidden, **self.checkpointing)
        out: Tensor = self.head(self.norm(hidden.mean(1)))
        return out


def convolutions() -> nn.Module:
    first = nn.Unflatten(1, (3, 2, 4)), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8), nn.GELU(), nn.ConvTranspose2d(8, 4, 2, stride=2)
    return nn.Sequential(*first, *second, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(128, 2))


def tied() -> nn.Module:
    """A weight that is used twice."""
    layer = nn.Linear(24, 24)
    return nn.Sequential(layer, nn.RMSNorm(24), nn.Tanh(), layer, nn.LayerNorm(24), nn.Linear(24, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions,
    "recurrent": Recurrent,
    "transformer": Transformer,
    "checkpointed": lambda: Transformer({"use_reentrant": False}),
    "tied": tied,
}


def built(name: str) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[name]()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 24, generator=generator), torch.randn(5, 2, generator=generator)


def trained(model: nn.Module, groups: Any, *, freeze: bool, call: Any = None, steps: int = 3, **options: Any) -> list[Tensor]:
    """Everything after some steps. ``call``: in the place of the model."""
    optimizer = SAM(groups, torch.optim.AdamW, lr=0.01, rho=0.2, model=model, freeze_unperturbed=freeze, **options)
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            inputs, targets = batch(step)
            loss = nn.functional.mse_loss((model if call is None else call)(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [*everything_of(optimizer, model), *(each.clone() for each in model.buffers())]


@pytest.mark.parametrize("subset", [norm_layers, partial(last_layers, k=2)], ids=["norm layers", "last layers"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_of_every_kind_have_the_same_bits(name: str, subset: Callable[[nn.Module], Any]) -> None:
    model, other = built(name), built(name)
    assert_same_bits(trained(model, subset(model), freeze=True), trained(other, subset(other), freeze=False))


def test_reentrant_checkpointing_that_loses_gradients_is_told() -> None:
    """The embedding is frozen, so no input of a block requires a gradient, and torch drops those of its parameters."""
    torch.manual_seed(5)
    model = Transformer({"use_reentrant": True})
    with pytest.warns(UserWarning, match=r"parameter 'layers.0.norm1.weight' and 7 more had a gradient in the second pass") as caught:
        trained(model, norm_layers(model), freeze=True)
    assert len([each for each in caught if "SAM" in str(each.message)]) == 1  # of three steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, norm_layers(model), freeze=False)


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_a_compiled_model_has_two_graphs(name: str) -> None:
    """One for each pass: what requires a gradient is a guard. The steps are those of the model that is not compiled."""
    model, other = built(name), built(name)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    found = trained(model, norm_layers(model), freeze=True, call=torch.compile(model, backend=backend), steps=5)
    assert len(graphs) == 2
    torch._dynamo.reset()
    graphs.clear()
    same = trained(other, norm_layers(other), freeze=False, call=torch.compile(other, backend=backend), steps=5)
    assert len(graphs) == 1
    assert_same_bits(found, same)


# --- RW-SAM ---

WAYS: dict[str, dict[str, Any]] = {
    **rwsam_problem.WAYS,
    "norm_layers": {"norms": "norm_layers"},
    "plain": {"beta": 0.0},
    "pairs": {"norms": "exact", "micro_batch": 2, "max_grad_norm": 0.5},
}
IN_LAST = ("last_layer",)  # norms over the last layer alone, which must then move


def rwsam(model: nn.Module, way: str, freeze: bool) -> RWSAM:
    groups = last_layers(model, 1) if way in IN_LAST else norm_layers(model)
    options = {"rho": 0.3, "beta": 2.0, "lr": 0.1, **WAYS[way]}
    return RWSAM(model, torch.optim.SGD, params=groups, freeze_unperturbed=freeze, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["step", "micro-batches", "backward"])
def test_rwsam_steps_have_the_same_bits(how: str, way: str, backend: str) -> None:
    rwsam_problem.skip_without_norms(backend, str(WAYS[way].get("norms", "exact")))
    model = rwsam_problem.make_model(torch.float32)
    other = twin(model)
    required: list[list[bool]] = []

    def losses(trained: nn.Module, *pair: Tensor) -> Tensor:
        if trained is model and torch.is_grad_enabled():
            required.append([param.requires_grad for param in model.parameters()])
        return rwsam_problem.losses_of(trained, pair)

    with sam_kernels.use_backend(backend):
        optimizers = [rwsam(model, way, True), rwsam(other, way, False)]
        for seed in range(3):
            pair = rwsam_problem.make_batch(torch.float32, seed=seed)
            for optimizer, each in zip(optimizers, (model, other), strict=True):
                if how == "backward":
                    optimizer.backward(partial(losses, each, *pair))
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    optimizer.step(partial(losses, each), batch=pair, micro_batches=2 if how == "micro-batches" else 1)
        assert_same_bits(everything_of(optimizers[0], model), everything_of(optimizers[1], other))
    if way != "jvp":
        assert {tuple(each) for each in required[::2]} == {
            tuple(optimizers[0].param_groups[i]["rho"] > 0 for i in _group_of(optimizers[0], model))
        }
        assert all(map(all, required[1::2]))


def _group_of(optimizer: Any, model: nn.Module) -> list[int]:
    """The number of each parameter's group."""
    where = {id(param): i for i, group in enumerate(optimizer.param_groups) for param in group["params"]}
    return [where[id(param)] for param in model.parameters()]


def test_rwsam_halves() -> None:
    model = rwsam_problem.make_model(torch.float32)
    other = twin(model)
    optimizers = [rwsam(model, "exact", True), rwsam(other, "exact", False)]
    pair = rwsam_problem.make_batch(torch.float32)
    for _ in range(2):
        for optimizer, each in zip(optimizers, (model, other), strict=True):
            with optimizer.ascent():
                with optimizer.recording():
                    losses = rwsam_problem.losses_of(each, pair)
                optimizer.weighted_backward(losses)
            optimizer.first_step(zero_grad=True)
            rwsam_problem.losses_of(each, pair).mean().backward()
            optimizer.second_step(zero_grad=True)
    assert_same_bits(everything_of(optimizers[0], model), everything_of(optimizers[1], other))
    with optimizers[0].recording():
        losses = rwsam_problem.losses_of(model, pair)
    optimizers[0].weighted_backward(losses)
    with pytest.raises(RuntimeError, match=r"under `with optimizer.ascent\(\):`"):
        optimizers[0].first_step()
