"""``nn.EmbeddingBag``, whose bags may have lengths of their own, and recurrent layers made of cells of Linear layers, as Opacus' are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_right, run_engine

B, T = 6, 4
f64 = torch.float64
INDICES = torch.tensor([3, 1, 1, 0, 2, 2, 2, 4, 0, 1, 3, 3, 4, 0])
STARTS = torch.tensor([0, 3, 3, 4, 9, 10])  # the second bag is empty


def losses_of(output: Tensor) -> Tensor:
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def bag(mode: str, **options: Any) -> nn.Module:
    return nn.EmbeddingBag(5, 3, mode=mode, **options).double()


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("form", ["rows", "offsets", "the last offset too", "keywords", "32 bits"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str, form: str, padding_idx: int | None, micro_batch: int) -> None:
    layer = bag(mode, padding_idx=padding_idx, include_last_offset=form == "the last offset too")
    model = nn.ModuleList([layer, nn.Linear(3, 2).double()])
    rows = torch.randint(0, 5, (B, T))
    end = torch.tensor([len(INDICES)])

    def forward() -> Tensor:
        if form == "rows":
            h = layer(rows)
        elif form == "keywords":
            h = layer(input=INDICES, offsets=STARTS)
        elif form == "32 bits":
            h = layer(INDICES.int(), STARTS.int())
        else:
            h = layer(INDICES, STARTS if form == "offsets" else torch.cat([STARTS, end]))
        return losses_of(model[1](h))

    assert_right(model, forward, micro_batch=micro_batch)


@pytest.mark.parametrize("form", ["rows", "offsets", "keywords"])
@pytest.mark.parametrize("trainable", [False, True])
def test_weights_in_a_bag(form: str, trainable: bool) -> None:
    """``trainable``: weights that come from another layer, whose gradient is autograd's."""
    layer, weigh = bag("sum"), nn.Linear(T, T).double()
    rows, x, weights = torch.randint(0, 5, (B, T)), torch.randn(B, T, dtype=f64), torch.randn(len(INDICES), dtype=f64)
    model = nn.ModuleList([layer, weigh] if trainable and form == "rows" else [layer])

    def forward() -> Tensor:
        if form == "rows":
            return losses_of(layer(rows, per_sample_weights=weigh(x) if trainable else x))
        if form == "keywords":
            return losses_of(layer(INDICES, per_sample_weights=weights, offsets=STARTS))
        return losses_of(layer(INDICES, STARTS, weights))

    assert_right(model, forward)


def test_a_bag_called_twice_and_tied() -> None:
    layer, head = bag("mean"), nn.Linear(3, 5, bias=False).double()
    head.weight = layer.weight
    model = nn.ModuleList([layer, head])
    rows = torch.randint(0, 5, (B, T))
    assert_right(model, lambda: losses_of(layer(rows) * layer(INDICES, STARTS)))
    assert_right(model, lambda: losses_of(head(layer(INDICES, STARTS).tanh())), micro_batch=2)


def test_bags_of_ties_and_of_nothing() -> None:
    layer, rows = bag("max"), torch.tensor([[0, 1, 2, 0]] * B)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([1.0, 1.0, 0.0])  # equal rows: the first of a bag has the gradient
    assert_right(layer, lambda: losses_of(layer(rows)))
    empty = torch.zeros(0, dtype=torch.int64)
    norms = run_engine(layer, lambda: losses_of(layer(empty, torch.zeros(B, dtype=torch.int64))))[2]
    assert not norms.any()


def test_counts_over_the_batch_are_refused() -> None:
    layer = bag("sum", scale_grad_by_freq=True)
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq"):
        run_engine(layer, lambda: losses_of(layer(torch.randint(0, 5, (B, T)))))


class Cell(nn.Module):
    """A cell of two Linear layers, of a step each."""

    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(3, 16), nn.Linear(4, 16)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.ih(x) + self.hh(state[0])).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 3)
        state = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        outputs = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_cells_of_linear_layers(micro_batch: int) -> None:
    model, x = nn.Sequential(Recurrent(), nn.Linear(4, 2)).double(), torch.randn(B, T, 3, dtype=f64)
    assert_right(model, lambda: losses_of(model(x)), micro_batch=micro_batch)
    assert_right(model, lambda: losses_of(model(x)[:, -1]), micro_batch=micro_batch)


class First(nn.Module):
    """A recurrent layer's output, or its states, batch first."""

    def __init__(self, inner: nn.Module, batch_first: bool, states: bool) -> None:
        super().__init__()
        self.inner, self.batch_first, self.states = inner, batch_first, states

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 3)
        output, states = self.inner(x if self.batch_first else x.transpose(0, 1))
        if self.states:
            return (states[0] if isinstance(states, tuple) else states).transpose(0, 1)
        return output if self.batch_first else output.transpose(0, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("name", ["DPLSTM", "DPGRU", "DPRNN"])
def test_recurrent_layers_of_opacus(name: str, options: Any, states: bool) -> None:
    layers = pytest.importorskip("opacus.layers")
    inner = getattr(layers, name)(3, 4, **options)
    model, x = First(inner, options.get("batch_first", False), states).double(), torch.randn(B, T, 3, dtype=f64)
    assert_right(model, lambda: losses_of(model(x)), micro_batch=2)


@pytest.mark.filterwarnings("ignore")
def test_an_attention_of_opacus() -> None:
    layers = pytest.importorskip("opacus.layers")
    inner = layers.DPMultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(B, T, 4, dtype=f64)
    assert_right(inner, lambda: losses_of(inner(x, x, x)[0]))


@pytest.mark.filterwarnings("ignore")
def test_a_packed_sequence_is_refused() -> None:
    """Its steps have other batches."""
    layers = pytest.importorskip("opacus.layers")
    inner = layers.DPLSTM(3, 4, batch_first=True).double()
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(B, T, 3, dtype=f64), torch.tensor([4, 4, 3, 2, 2, 1]), batch_first=True)
    engine = GradNorms(inner)
    with engine:
        losses = losses_of(inner(packed)[1][0].transpose(0, 1))
    with pytest.raises(NotImplementedError, match=r"DPLSTM\) owns trainable parameters and has no rule"):
        engine(losses)
