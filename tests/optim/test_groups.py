"""``param_groups``, ``norm_layers``, ``last_layers``: which parameters are in which group, and with which options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sam_kernels
from sam_kernels import RWSAM, SAM, last_layers, norm_layers, param_groups
from sam_kernels.schedules import Interval
from tests.optim.problem import closure_of


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, size))  # two dimensions, and yet no weight


class PreNorm(nn.Module):
    """Has a name like a normalisation layer's, and owns none of the parameters inside of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Language(nn.Module):
    """The head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 6))
        self.tokens = nn.Embedding(5, 6)
        self.block = PreNorm(nn.Linear(6, 6))
        self.norm, self.other = nn.LayerNorm(6), LlamaRMSNorm(6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.tokens.weight

    def no_weight_decay(self) -> set[str]:
        return {"position"}


def named(groups: list[dict[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    return [([name for name, _ in group["params"]], {key: value for key, value in group.items() if key != "params"}) for group in groups]


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.Linear(4, 2))


NORMS, OTHERS = ["1.weight", "1.bias", "3.weight", "3.bias"], ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]


def test_norm_layers() -> None:
    assert named(norm_layers(convolutional(), 0.2)) == [(OTHERS, {"rho": 0.0}), (NORMS, {"rho": 0.2})]
    assert named(norm_layers(convolutional())) == [(OTHERS, {"rho": 0.0}), (NORMS, {})]
    weights = ["0.weight", "2.weight", "4.weight"]
    assert named(norm_layers(convolutional(), weight_decay=0.1)) == [
        (weights, {"weight_decay": 0.1, "rho": 0.0}),
        (["0.bias", "4.bias"], {"weight_decay": 0.0, "rho": 0.0}),
        (NORMS, {"weight_decay": 0.0}),
    ]


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4),
        LlamaRMSNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_every_normalisation_layer_is_one(layer: nn.Module) -> None:
    resting, moving = named(norm_layers(nn.Sequential(nn.Linear(4, 4), layer)))
    assert resting[0] == ["0.weight", "0.bias"]
    assert moving[0] == [f"1.{name}" for name, _ in layer.named_parameters()]


def test_last_layers() -> None:
    model = convolutional()
    assert named(last_layers(model, 1, 0.2)) == [
        ([*OTHERS[:2], *NORMS[:2], OTHERS[2], *NORMS[2:]], {"rho": 0.0}),
        (OTHERS[3:], {"rho": 0.2}),
    ]
    assert named(last_layers(model, 2))[1] == ([*NORMS[2:], *OTHERS[3:]], {})
    assert named(last_layers(model, 5)) == [([name for name, _ in model.named_parameters()], {})]
    model[4].requires_grad_(False)
    assert named(last_layers(model, 1))[1] == (NORMS[2:], {})


def test_layers_are_in_the_order_of_the_model_where_a_weight_is_tied() -> None:
    """The last layer is the head, whose weight is found at the embedding."""
    resting, moving = named(last_layers(Language(), 1))
    assert moving == (["tokens.weight"], {})
    assert "tokens.weight" not in resting[0]
    assert named(last_layers(Language(), 2))[1][0] == ["tokens.weight", "other.weight"]


def test_a_layer_that_is_used_twice_is_one_layer() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Linear(3, 3), layer)
    assert named(last_layers(model, 1))[1][0] == ["1.weight", "1.bias"]
    with pytest.raises(ValueError, match="the model has 2 layers"):
        last_layers(model, 3)


@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: nn.Sequential(nn.Linear(3, 3), layer)], ids=["alone", "inside"])
def test_a_parametrized_layer_is_one_layer(wrap: Any) -> None:
    model = wrap(parametrizations.weight_norm(nn.Linear(3, 3)))
    moving = named(last_layers(model, 1))[-1][0]
    assert [name.rpartition(".")[2] for name in moving] == ["bias", "original0", "original1"]


def test_weight_decay() -> None:
    groups = named(param_groups(Language(), weight_decay=0.1))
    assert groups == [
        (["position", "block.inner.bias", "norm.weight", "norm.bias", "other.weight"], {"weight_decay": 0.0}),
        (["tokens.weight", "block.inner.weight"], {"weight_decay": 0.1}),  # the head's too
    ]


def test_embeddings_decay_on_request() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.EmbeddingBag(4, 3), nn.Linear(3, 3))
    assert named(param_groups(model, weight_decay=0.1))[1] == (["2.weight"], {"weight_decay": 0.1})
    assert named(param_groups(model, weight_decay=0.1, decay_embeddings=True)) == [
        (["0.weight", "1.weight", "2.weight"], {"weight_decay": 0.1}),
        (["2.bias"], {"weight_decay": 0.0}),
    ]


def test_a_bias_of_two_dimensions_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].bias = nn.Parameter(torch.zeros(1, 3))
    assert named(param_groups(model, weight_decay=0.1))[1] == (["0.bias"], {"weight_decay": 0.0})


def test_a_weight_of_one_dimension_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.PReLU(3))
    assert named(param_groups(model, weight_decay=0.1))[1] == (["1.weight"], {"weight_decay": 0.0})


def test_what_a_normalisation_layer_shares_is_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].bias = model[0].bias
    assert named(norm_layers(model)) == [(["0.weight"], {"rho": 0.0}), (["0.bias", "1.weight"], {})]


def test_names_of_no_weight_decay_are_found_inside_of_a_wrapper() -> None:
    assert "position" in named(param_groups(PreNorm(Language()), weight_decay=0.1))[0][0][0]
    compiled: Any = torch.compile(Language(), backend="eager")
    assert named(param_groups(compiled, weight_decay=0.1))[0][0][0] == "_orig_mod.position"


def test_nothing_given_is_one_group() -> None:
    model = convolutional()
    assert named(param_groups(model)) == [([name for name, _ in model.named_parameters()], {})]


def test_equal_settings_share_a_group() -> None:
    radius = Interval(0.1, every=2)
    seen: list[str] = []

    def rho_of(name: str, param: nn.Parameter) -> Any:
        assert isinstance(param, nn.Parameter)
        seen.append(name)
        return {"0": radius, "1": 0.5, "2": 0.25 + 0.25, "3": radius, "4": None}[name[0]]

    model = convolutional()
    groups = param_groups(model, rho_of=rho_of, weight_decay=0.0)
    assert named(groups) == [
        (["0.weight", "0.bias", "3.weight", "3.bias"], {"weight_decay": 0.0, "rho": radius}),
        (["1.weight", "1.bias", "2.weight"], {"weight_decay": 0.0, "rho": 0.5}),
        (["4.weight", "4.bias"], {"weight_decay": 0.0}),
    ]
    assert seen == [name for name, _ in model.named_parameters()]  # once each


def test_frozen_parameters_are_left_out() -> None:
    model = convolutional()
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    assert named(norm_layers(model)) == [(["0.weight", "2.weight", "4.weight", "4.bias"], {"rho": 0.0}), (["3.weight", "3.bias"], {})]


def test_an_optimizer_takes_them_and_its_errors_name_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 2))
    optimizer = SAM(norm_layers(model, weight_decay=0.1), torch.optim.AdamW, rho=0.3, lr=0.01, weight_decay=0.5)
    assert [(group["rho"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.0, 0.1), (0.0, 0.0), (0.3, 0.0)]
    assert optimizer.param_groups[2]["param_names"] == ["1.weight", "1.bias"]
    batch = torch.randn(4, 6), torch.randn(4, 2)
    optimizer.step(closure_of(optimizer, model, batch))
    model[1].weight.grad = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (9,))
    with pytest.raises(TypeError, match=r"gradient of parameter '1.weight' is a torch.sparse_coo tensor"):
        optimizer.first_step()


def test_rwsam_means_the_same_normalisation_layers() -> None:
    class OwnLayerNorm(nn.LayerNorm):
        pass

    for layer in (OwnLayerNorm(3), nn.RMSNorm(3)):
        model = nn.Sequential(nn.Linear(3, 3), layer)
        RWSAM(model, torch.optim.SGD, beta=1.0, norms="norm_layers", params=norm_layers(model), rho=0.1, lr=0.1)
    with pytest.raises(ValueError, match="no such layer"):
        RWSAM(nn.Sequential(nn.Linear(3, 3)), torch.optim.SGD, beta=1.0, norms="norm_layers", rho=0.1, lr=0.1)


LINEAR = nn.Sequential(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rho_of": "norm_layers"}, ValueError, "no normalisation layer with trainable parameters"),
        ({"rho_of": "last:0"}, ValueError, "'last:0', and the model has 1 layers"),
        ({"rho_of": "last:2"}, ValueError, "'last:2', and the model has 1 layers"),
        ({"rho_of": "last"}, ValueError, '"last:k" such as "last:2", or a callable, got \'last\''),
        ({"rho_of": lambda name, param: 0.0}, ValueError, "rho is 0 for every parameter"),
        ({"rho_of": "last:1", "rho": 0.0}, ValueError, "rho is 0 for every parameter"),
        ({"rho_of": 0.1}, TypeError, "rho_of must be a callable"),
        ({"rho": 0.1}, ValueError, "rho is that of a subset"),
        ({"rho": 0.1, "rho_of": lambda name, param: None}, ValueError, "rho is that of a subset"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"weight_decay": "much"}, TypeError, "weight_decay"),
        ({"decay_embeddings": 1}, TypeError, "decay_embeddings"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        param_groups(LINEAR, **options)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_number_of_layers_is_one(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="last_layers: k"):
        last_layers(LINEAR, k)


def test_models_without_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has no trainable parameters"):
        param_groups(nn.Tanh())
    with pytest.raises(ValueError, match=r"parameter '0.weight' is not initialised yet; run a forward pass"):
        param_groups(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        param_groups([Tensor()])  # type: ignore[arg-type]
    assert {"norm_layers", "last_layers", "param_groups"} <= set(sam_kernels.__all__)
