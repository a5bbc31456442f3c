"""MultiheadAttention and torch's transformers, in every way that they read their weights, against autograd through the same graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_close, assert_right, group_norms, run_engine

B, T, S, E = 4, 5, 3, 8
f64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")


def losses_of(output: Tensor, batch_dim: int = 0) -> Tensor:
    flat = output.movedim(batch_dim, 0).flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def tokens(length: int = T, dim: int = E, *, batch_first: bool = True) -> Tensor:
    return torch.randn(*((B, length) if batch_first else (length, B)), dim, dtype=f64)


def random_(module: Any) -> Any:
    for param in module.parameters():
        nn.init.normal_(param, std=0.5)
    return module.double()


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "distinct", "dims", "no_bias", "masks", "zero_attn", "frozen_in", "frozen_out"])
def test_attention(kind: str, batch_first: bool, need_weights: bool, micro_batch: int) -> None:
    options: dict[str, Any] = {"dims": {"kdim": 3, "vdim": 7}, "no_bias": {"bias": False}, "zero_attn": {"add_zero_attn": True}}.get(
        kind, {}
    )
    attention = random_(nn.MultiheadAttention(E, 2, batch_first=batch_first, **options))
    q = tokens(batch_first=batch_first)
    k = v = q
    if kind == "cross":
        k = v = tokens(S, batch_first=batch_first)
    elif kind in ("distinct", "no_bias"):
        k, v = tokens(S, batch_first=batch_first), tokens(S, batch_first=batch_first)
    elif kind == "dims":
        k, v = tokens(S, 3, batch_first=batch_first), tokens(S, 7, batch_first=batch_first)
    if kind.startswith("frozen"):
        (attention.in_proj_weight if kind == "frozen_in" else attention.out_proj.weight).requires_grad_(False)
    masks: dict[str, Any] = {}
    if kind == "masks":
        masks = {"attn_mask": torch.ones(T, T, dtype=torch.bool).triu(1), "key_padding_mask": torch.arange(T).expand(B, T) > 2}

    def forward() -> Tensor:
        output, weights = attention(q, k, v, need_weights=need_weights, **masks)
        losses = losses_of(output, 0 if batch_first else 1)
        return losses + (weights.square().sum((1, 2)) if need_weights else 0.0)

    assert_right(attention, forward, micro_batch=micro_batch)


class Several(nn.Module):
    """One attention called in ways that read different rows of its weights: what they share has cross terms."""

    def __init__(self, ways: str) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True)
        self.ways = ways

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        calls = {"s": (x, x, x), "c": (x, y, y), "d": (x, y, z), "o": (y, x, x)}
        return torch.stack([self.attention(*calls[way])[0].mean(1) for way in self.ways]).sum(0)


@pytest.mark.parametrize("ways", ["ss", "so", "cd", "sc", "sd", "scd", "co"])
def test_attention_called_twice(ways: str) -> None:
    model, inputs = random_(Several(ways)), [tokens() for _ in range(3)]
    assert_right(model, lambda: losses_of(model(*inputs)), micro_batch=2)


def test_attention_in_windows_is_refused() -> None:
    """Its batch is not that of the losses: which sample a window belongs to is not known."""
    attention = random_(nn.MultiheadAttention(E, 2, batch_first=True))
    x = torch.randn(2 * B, T, E, dtype=f64)
    with pytest.raises(ValueError, match=rf"MultiheadAttention\) was called with a batch of {2 * B}, but there are {B} losses"):
        run_engine(attention, lambda: losses_of(attention(x, x, x)[0].reshape(B, -1)))


def test_attention_without_a_batch_is_refused() -> None:
    attention, x = random_(nn.MultiheadAttention(E, 2)), torch.randn(B, E, dtype=f64)
    with pytest.raises(ValueError, match="called with a batch of 1, but"):
        run_engine(attention, lambda: losses_of(attention(x, x, x)[0]))


@pytest.mark.parametrize("unsupported", ["error", "vmap"])
def test_added_keys_are_refused(unsupported: str) -> None:
    with pytest.raises(NotImplementedError, match=r"bias_k|add_bias_kv"):
        GradNorms(nn.MultiheadAttention(E, 2, add_bias_kv=True), unsupported=unsupported).__enter__()


def layers(kind: str, **options: Any) -> tuple[nn.Module, int]:
    options = {"d_model": E, "nhead": 2, "dim_feedforward": 6, **options}
    encoder, decoder = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    if kind == "encoder_layer":
        return encoder(**options), 1
    if kind == "decoder_layer":
        return decoder(**options), 2
    if kind == "encoder":
        return nn.TransformerEncoder(encoder(**options), 2, norm=nn.LayerNorm(E)), 1
    if kind == "decoder":
        return nn.TransformerDecoder(decoder(**options), 2, norm=nn.LayerNorm(E)), 2
    return nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **options), 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer", "encoder", "decoder", "transformer"])
def test_transformers(kind: str, batch_first: bool, norm_first: bool, dropout: float) -> None:
    """The engine is told nothing about where the batch is: these modules say so."""
    model, inputs = layers(kind, batch_first=batch_first, norm_first=norm_first, dropout=dropout)
    model = random_(model)
    given = [tokens(length, batch_first=batch_first) for length in (T, S)[:inputs]]
    assert_right(model, lambda: losses_of(model(*given), 0 if batch_first else 1), micro_batch=2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_evaluation_takes_no_fast_path(batch_first: bool) -> None:
    model = random_(layers("encoder", batch_first=batch_first, activation="gelu", bias=False)[0]).eval()
    x = tokens(batch_first=batch_first)
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=f64)
    assert_right(model, lambda: losses_of(model(x, mask=mask, is_causal=True), 0 if batch_first else 1))


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_time_major(micro_batch: int) -> None:
    """The batch is dimension 1, and dimension 0 behind a mean over time."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.mix, self.head = nn.Embedding(9, E), nn.LayerNorm(E), nn.Linear(E, E), nn.Linear(E, 3)
            self.encoder = nn.TransformerEncoderLayer(E, 2, 6, dropout=0.0)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.encoder(self.mix(self.norm(self.embed(ids)))).mean(0))

    model, ids = random_(Model()), torch.randint(0, 9, (T, B))
    assert_right(model, lambda: losses_of(model(ids)), micro_batch=micro_batch, batch_first=False)


def test_attention_in_a_checkpoint() -> None:
    model, x = random_(layers("encoder_layer", batch_first=True, dropout=0.3)[0]), tokens().requires_grad_()
    assert_right(model, lambda: losses_of(checkpoint(model, x, use_reentrant=False)), micro_batch=2, again=True)


def test_two_engines_around_one_pass() -> None:
    model, x = random_(layers("encoder_layer", batch_first=True)[0]), tokens()
    one, two = GradNorms(model), GradNorms(model, micro_batch=2)
    with one, two:
        losses = losses_of(model(x))
    assert_close(one(losses, retain_graph=True), group_norms(model, losses), 1e-10)
    assert_close(two(losses, retain_graph=True), group_norms(model, losses, 2), 1e-10)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_attention_leaves_nothing(error: type[BaseException]) -> None:
    """No hook, and no mode that would go on listening to ``linear``."""
    attention, x = random_(nn.MultiheadAttention(E, 2, batch_first=True)), tokens()

    class Broken(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.bmm or func is nn.functional.scaled_dot_product_attention or func is nn.functional.linear:
                raise error("stop")
            return super().__torch_function__(func, types, args, kwargs or {})

    engine, before = GradNorms(attention), torch._C._len_torch_function_stack()
    with pytest.raises(error, match="stop"), engine:
        attention(x.as_subclass(Broken), x, x)
    assert torch._C._len_torch_function_stack() == before
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert_right(attention, lambda: losses_of(attention(x, x, x)[0]))
