"""``verify``, and losses whose order is not that of the batch: refused where the graph shows it, and not where it shows nothing wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_kernels.per_sample import GradNorms, _order
from tests.per_sample.brute import assert_close, assert_right, group_norms, run_engine

B, T, C = 6, 4, 5
f64 = torch.float64
BACK = torch.tensor([3, 0, 5, 1, 4, 2])  # a permutation
LABELS, TOKENS = torch.arange(B) % C, (torch.arange(B * T) % C).view(B, T)


class Model(nn.Module):
    """A layer, what lies in the middle, another layer."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | None = None, *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), norm, nn.Linear(4, C)
        self.middle = middle or torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.first(x))
        return self.last(h if self.norm is None else self.norm(h))


def rows(*shape: int) -> Tensor:
    return torch.randn(B, *shape, dtype=f64)


def squares(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1)


def in_place(out: Tensor) -> Tensor:
    losses = torch.zeros(B, dtype=f64)
    for i in range(B):
        losses[BACK[i]] = out[i].square().sum()
    return losses


WRONG: dict[str, Callable[[Tensor], Tensor]] = {  # (B, C) to losses in another order
    "sort": lambda out: squares(out).sort().values,
    "sort of a view": lambda out: squares(out).view(B, 1).sort(0, descending=True).values[:, 0],
    "topk": lambda out: squares(out).topk(B).values,
    "index": lambda out: squares(out)[BACK],
    "index of rows and columns": lambda out: out[BACK, LABELS],
    "index by a list": lambda out: squares(out)[[1, 0, 2, 3, 4, 5]],
    "index_select": lambda out: squares(out.index_select(0, BACK)),
    "gather": lambda out: squares(out).gather(0, BACK),
    "take": lambda out: squares(out).take(BACK),
    "flip": lambda out: squares(out).flip(0),
    "flip of rows": lambda out: squares(out.flip((0, 1))),
    "roll": lambda out: squares(out).roll(1),
    "roll of rows": lambda out: squares(out.roll(2, 0)),
    "halves exchanged": lambda out: torch.cat([squares(out)[3:], squares(out)[:3]]),
    "one by one": lambda out: torch.stack([out[i].square().sum() for i in BACK.tolist()]),
    "in place": in_place,
    "scatter": lambda out: torch.zeros(B, dtype=f64).scatter(0, BACK, squares(out)),
    "index_add": lambda out: torch.zeros(B, dtype=f64).index_add(0, BACK, squares(out)),
    "index_put": lambda out: torch.zeros(B, dtype=f64).index_put((BACK,), squares(out)),
    "embedding": lambda out: squares(F.embedding(BACK, out)),
    "masked halves": lambda out: torch.cat([squares(out)[LABELS > 2], squares(out)[LABELS <= 2]]),
    "pairs": lambda out: squares(out)[:, None].repeat(2, 1).view(B, 2).sum(1),
    "less the mean": lambda out: squares(out) - squares(out).mean(),
    "each with all": lambda out: F.cross_entropy(out @ out.T, torch.arange(B), reduction="none"),
    "softmax over the batch": lambda out: squares(out.softmax(0)),
    "two samples alone": lambda out: squares(out)[[0, 1, 2, 3, 5, 4]],
}
WRONG_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {  # (B, T, C)
    "positions before samples": lambda out: F.cross_entropy(
        out.transpose(0, 1).reshape(-1, C), TOKENS.flatten(), reduction="none"
    ).view(B, T).mean(1),
    "permuted": lambda out: out.permute(1, 0, 2).reshape(B, T, C).square().sum((1, 2)),
    "index of all tokens": lambda out: out.view(-1, C)[torch.arange(B * T).roll(1)].view(B, T, C).square().sum((1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", [*WRONG, *WRONG_TOKENS])
def test_losses_in_another_order_are_refused(case: str) -> None:
    model, x = Model().double(), rows(3) if case in WRONG else rows(T, 3)
    function = (WRONG | WRONG_TOKENS)[case]
    with pytest.raises(
        ValueError, match=r"losses\[i\] does not belong to row i of the output of last \(Linear\).*in the order of the batch"
    ):
        run_engine(model, lambda: function(model(x)))
    engine = GradNorms(model)
    with engine:
        losses = function(model(x))
    with pytest.raises(ValueError, match=r"Backward0|CopySlices"):
        engine.verify(losses, 0)
    losses.sum().backward()  # no hook is left, and the graph is there


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {  # (B, C), in order
    "cross_entropy": lambda out: F.cross_entropy(out, LABELS, reduction="none", label_smoothing=0.1),
    "picked": lambda out: -out.log_softmax(1)[torch.arange(B), LABELS],
    "gathered": lambda out: -out.log_softmax(-1).gather(-1, LABELS[:, None])[:, 0],
    "columns": lambda out: out[:, [2, 0, 1]].square().sum(1),
    "sorted columns": lambda out: (out.sort(-1).values * torch.arange(C)).sum(-1),
    "hardest": lambda out: out.topk(2, 1).values.sum(1),
    "flipped columns": lambda out: (out.flip(-1) * torch.arange(C)).sum(1),
    "rolled columns": lambda out: (out.roll(1, 1) * torch.arange(C)).sum(1),
    "there and back": lambda out: squares(out)[BACK][BACK.argsort()],
    "sorted by hand": lambda out: squares(out)[torch.arange(B)],
    "one by one": lambda out: torch.stack([each.square().sum() for each in out]),
    "halves": lambda out: torch.cat([squares(each) for each in out.chunk(2)]),
    "in place": lambda out: torch.zeros(B, dtype=f64).index_put((torch.arange(B),), squares(out)),
    "class token": lambda out: torch.cat([torch.ones(B, 1, dtype=f64), out], 1).square().sum(1),
    "some without a loss": lambda out: torch.zeros(B, dtype=f64).masked_scatter(LABELS > 0, squares(out)[LABELS > 0]),
    "a column each": lambda out: (out.T[LABELS] * torch.eye(B)).sum(1),
    "margins": lambda out: (out.unsqueeze(2) - out.unsqueeze(1)).relu().sum((1, 2)),
    "normalised": lambda out: F.cosine_similarity(out, out.roll(1, 1).detach()),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_in_order_is_right(case: str) -> None:
    model, x = Model().double(), rows(3)
    assert_right(model, lambda: RIGHT[case](model(x)), micro_batch=2)


def test_tokens_in_order() -> None:
    model, x = Model().double(), rows(T, 3)
    flat: Any = lambda out: F.cross_entropy(out.reshape(-1, C), TOKENS.flatten(), reduction="none").view(B, T).mean(1)  # noqa: E731
    assert_right(model, lambda: flat(model(x)))
    assert_right(model, lambda: flat(model(x.transpose(0, 1)).transpose(0, 1)), batch_first=False)


@pytest.mark.parametrize("case", RIGHT)
def test_the_usual_losses_cost_no_pass(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[int] = []
    monkeypatch.setattr(_order, "_probe", lambda *args: probes.append(1))
    model, x = Model(), rows(3).float()
    run_engine(model, lambda: RIGHT[case](model(x).double()))
    costly = ("there and back", "one by one", "halves", "in place", "some without a loss")
    assert bool(probes) is (case in costly)


INSIDE: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # between the layers; whether rows keep their places
    "permuted": (lambda h: h[BACK].tanh(), False),
    "permuted and back": (lambda h: h[BACK].tanh()[BACK.argsort()], True),
    "sorted by a column": (lambda h: h.index_select(0, h[:, 0].argsort()), False),
    "mixed up": (lambda h: 0.7 * h + 0.3 * h[BACK], False),
    "flipped": (lambda h: h.flip(0), False),
    "rows as they are": (lambda h: h[torch.arange(B)], True),
    "columns": (lambda h: h[:, [3, 1, 0, 2]].sort(1).values, True),
}


@pytest.mark.parametrize("through", ["layers", "a checkpoint"])
@pytest.mark.parametrize("case", INSIDE)
def test_order_inside_the_model(case: str, through: str) -> None:
    middle, is_right = INSIDE[case]
    model, x = Model(middle if through == "layers" else lambda h: checkpoint(middle, h, use_reentrant=False)).double(), rows(3)
    if is_right:
        assert_right(model, lambda: squares(model(x)), again=True)
        return
    with pytest.raises(ValueError, match=r"losses\[i\] does not belong to row i of the output of first \(Linear\)"):
        run_engine(model, lambda: squares(model(x)))


def test_order_inside_a_model_that_normalises_over_the_batch() -> None:
    model, x = Model(lambda h: h[BACK], norm=nn.BatchNorm1d(4)).double(), rows(3)
    with pytest.raises(ValueError, match=r"IndexBackward0 puts rows into another order.*norm \(BatchNorm1d\) takes its statistics"):
        run_engine(model, lambda: squares(model(x)))
    model.middle = torch.tanh
    run_engine(model, lambda: squares(model(x)))


def test_a_frozen_model_may_do_as_it_likes_before_the_layers() -> None:
    model, x = Model().double(), rows(3).requires_grad_()
    table = nn.Parameter(rows(3))
    assert_right(model, lambda: squares(model(table[BACK] + x[BACK].exp())))


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"micro_batch": 2, "reduction": "mean"}])
@pytest.mark.parametrize("called", [False, True])
def test_verify(options: dict[str, Any], called: bool) -> None:
    model, x = Model().double(), rows(3)
    m, reduction = options.get("micro_batch", 1), options.get("reduction", "sum")
    for i in range(B // m):
        engine = GradNorms(model, **options)
        with engine:
            losses = squares(model(x))
        if called:
            engine(losses, retain_graph=True)
        norm, own = engine.verify(losses, i, retain_graph=True)
        assert norm.shape == own.shape == ()
        expected = group_norms(model, losses, m, reduction)
        assert_close(norm[None], expected[i : i + 1], 1e-12)
        assert_close(own[None], expected[i : i + 1], 1e-12)
        engine.weighted_grads_(torch.ones(B // m, dtype=f64))
    assert model.first.weight.grad is not None


def test_verify_over_some_parameters() -> None:
    model, x = Model().double(), rows(3)
    engine = GradNorms(model, over=model.last.parameters())
    with engine:
        losses = squares(model(x))
    norm, own = engine.verify(losses, 4, retain_graph=True)
    whole = group_norms(model, losses)[4]
    assert_close(norm[None], own[None], 1e-12)
    assert own < 0.99 * whole


def test_verify_shows_what_the_graph_does_not() -> None:
    """The product with a permutation, as a matrix."""
    model, x = Model(lambda h: torch.eye(B, dtype=f64)[BACK] @ h).double(), rows(3)
    engine = GradNorms(model)
    with engine:
        losses = squares(model(x))
    norm, own = engine.verify(losses, 1, retain_graph=True)
    assert_close(own[None], group_norms(model, losses)[1:2], 1e-12)
    assert abs(norm - own) > 1e-3 * own


def test_verify_through_a_checkpoint() -> None:
    model, x = Model().double(), rows(3)
    engine = GradNorms(model)
    with engine:
        losses = squares(checkpoint(model, x, use_reentrant=False))
    norm, own = engine.verify(losses, 2)
    assert_close(norm[None], own[None], 1e-12)


def test_bad_arguments_of_verify() -> None:
    model, x = Model().double(), rows(3)
    engine = GradNorms(model)
    with engine:
        losses = squares(model(x))
    for i, error, words in ((B, ValueError, "i must be at most 5, got 6"), (-1, ValueError, "at least 0"), (0.0, TypeError, "integer")):
        with pytest.raises(error, match=words):
            engine.verify(losses, i)  # type: ignore[arg-type]
    engine(losses)
    with pytest.raises(RuntimeError, match=r"graph of losses is gone.*retain_graph=True"):
        engine.verify(losses, 0)
    with pytest.raises(RuntimeError, match="no call of a layer"):
        engine.verify(squares(model(x)), 0)


def test_two_samples_whose_first_seeds_are_equal() -> None:
    """Samples 0 and 8 of more than eight."""
    model, x = nn.Linear(3, 2).double(), torch.randn(10, 3, dtype=f64)
    order = torch.tensor([8, 1, 2, 3, 4, 5, 6, 7, 0, 9])
    with pytest.raises(ValueError, match="does not belong to row"):
        run_engine(model, lambda: squares(model(x)).take(order))
    assert_right(model, lambda: squares(model(x)).take(torch.arange(10)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_order_in_few_bits(dtype: torch.dtype) -> None:
    model, x = Model().to(dtype), rows(3).to(dtype)
    for function in (squares, RIGHT["one by one"], RIGHT["halves"]):
        run_engine(model, lambda function=function: function(model(x)).float())
    with pytest.raises(ValueError, match="does not belong to row"):
        run_engine(model, lambda: squares(model(x)).float().flip(0))
