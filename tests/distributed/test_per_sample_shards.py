"""Gradient norms of samples over the shards of FSDP2, and Reweighted SAM on them, beside the same model in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from sam_kernels import RWSAM
from sam_kernels.per_sample import GradNorms
from tests.distributed.sharded_problem import batch_of, fully_sharded, losses_of, make_model, whole
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
WORDS, WIDTH, SAMPLES, LENGTH = 11, 8, 4, 6
CLOSE = 1e-12  # some hundred roundings
OPTIONS: dict[str, Any] = {"lr": 0.1, "rho": 0.1, "beta": 2.0}


class Translator(nn.Module):
    """Attention, a weight that two layers have, and blocks that may be checkpointed."""

    def __init__(self, *, checkpoints: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True) for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embedding.weight
        self._checkpoints = checkpoints

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embedding(words)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self._checkpoints else block(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


def _losses(model: nn.Module, words: Tensor) -> Tensor:  # (B,)
    return F.cross_entropy(model(words).flatten(0, 1), words.flatten(), reduction="none").view(len(words), -1).mean(1)


def _sharded(kind: type[Translator | Free], mesh: Any, *, checkpoints: bool, **options: Any) -> Any:
    torch.manual_seed(3)
    model = kind(checkpoints=checkpoints).double()
    if mesh is not None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(model, mesh=mesh)
    return model


def _norms_and_gradients(rank: int, mesh: Any, kind: type[Translator | Free], *, checkpoints: bool, reshards: bool) -> float:
    """The largest difference from the same in one process: norms of the rank's samples, and their weighted gradient over all ranks."""
    words = torch.randint(0, WORDS, (2 * SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(2 * SAMPLES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alone, own = GradNorms(_sharded(kind, None, checkpoints=checkpoints)), slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    with alone:
        losses = _losses(alone._recorder.model, words)
    expected = alone(losses)
    alone.weighted_grads_(weights)
    model = _sharded(kind, mesh, checkpoints=checkpoints, reshard_after_forward=reshards)
    with torch.no_grad():
        model(words)  # leaves what the root module has gathered
    engine = GradNorms(model)
    with engine:
        losses = _losses(model, words[own])
    norms = engine(losses, keep=False, retain_graph=True)
    engine.weighted_backward(losses, 2 * weights[own])  # of which fully_shard takes the mean over 2 ranks
    pairs = [(norms, expected[own])]
    pairs += [(whole(a.grad), b.grad) for a, b in zip(model.parameters(), alone._recorder.model.parameters(), strict=True)]  # type: ignore[arg-type]
    return max((a - b).abs().max().item() / b.abs().max().item() for a, b in pairs)


class Norm(nn.Module):
    """Has no rule. ``divides``: by a function of the weight, which autograd takes back by tensors that are freed with the shards."""

    def __init__(self, *, divides: bool = False) -> None:
        super().__init__()
        self.weight, self._divides = nn.Parameter(torch.randn(WIDTH)), divides

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x / (self.weight.square() + 1) if self._divides else x * (1 + self.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.gamma = Norm(), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.linear(self.norm(x)).tanh()  # type: ignore[no-any-return]


class Free(nn.Module):
    """A class token, positions without a batch, a weight under a second name that is read, and blocks without a rule."""

    def __init__(self, *, checkpoints: bool) -> None:
        super().__init__()
        self.first, self.token = Norm(divides=True), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places, self.blocks = nn.Embedding(LENGTH + 1, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)
        self.second, self._checkpoints = self.head.weight, checkpoints

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.first(F.one_hot(words, WORDS)[..., :WIDTH] + words.unsqueeze(2).sin().to(torch.float64))
        hidden = torch.cat([self.token.expand(len(words), -1, -1), hidden], 1) + self.places(torch.arange(LENGTH + 1))
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self._checkpoints else block(hidden)
        hidden = hidden.cumsum(1)[:, 1:]
        return self.head(hidden) * (1 + F.linear(hidden, self.second).sin())  # type: ignore[no-any-return]


def _words_of(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return str(error)
    return "nothing was raised"


class Scaled(nn.Module):
    """Has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


class Holder(nn.Module):
    """Its parameter is another module's, which is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.linear = nn.ParameterList([torch.ones(5, dtype=torch.float64)]), nn.Linear(5, 5).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) * self.all[0]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(1, 5, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return self.logs.exp()


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Table()

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.inner(inputs)  # type: ignore[no-any-return]


def _refusals(rank: int, mesh: Any) -> dict[str, str]:
    inputs, targets = batch_of(0, rank, 2)

    def called(model: nn.Module, penalty: nn.Parameter | None = None, **options: Any) -> None:
        engine = GradNorms(model, **options)
        with engine:
            losses = losses_of(model, inputs, targets)
        norms = engine(losses if penalty is None else losses + whole(penalty).square().sum())
        engine.weighted_grads_(norms)

    sharded = fully_sharded(make_model(), mesh)
    without_rule = fully_sharded(nn.Sequential(Scaled(), *make_model()), mesh)
    parallel = parallelize_module(make_model(), mesh, {"0": ColwiseParallel()})
    holder, elsewhere = fully_sharded(nn.Sequential(Holder(), *make_model()), mesh), nn.Sequential(Elsewhere(), *make_model())
    fully_shard(elsewhere[0].inner, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(elsewhere, mesh=mesh)
    return {
        "weighted": _words_of(called, sharded),
        "penalty": _words_of(called, sharded, next(sharded.parameters())),
        "vmap": _words_of(called, without_rule, unsupported="vmap"),
        "verify": _words_of(called, sharded, unsupported="verify"),
        "parallel": _words_of(called, parallel),
        "holder": _words_of(called, holder),
        "elsewhere": _words_of(called, elsewhere),
    }


def _diagnostics(rank: int, mesh: Any, **options: Any) -> dict[str, float]:
    model = make_model() if mesh is None else fully_sharded(make_model(), mesh)
    optimizer = RWSAM(model, torch.optim.SGD, **OPTIONS, **options)
    optimizer.step(partial(losses_of, model, *batch_of(0, rank, 1 if mesh is None else 2)))
    return {name: value.item() for name, value in optimizer.diagnostics().items()}


def _not_finite_on_one_rank(rank: int, mesh: Any) -> list[Tensor]:
    """The weights after a step in which one sample of rank 1 has a norm that is not finite."""
    model = fully_sharded(make_model(), mesh)
    optimizer = RWSAM(model, torch.optim.SGD, **OPTIONS)
    inputs, targets = batch_of(0, rank, 2)
    if rank == 1:
        inputs[3] = float("inf")
    optimizer.step(partial(losses_of, model, inputs, targets))
    assert optimizer.skipped_steps == 1
    return [whole(param) for param in model.parameters()]


def _along_random_directions(rank: int, mesh: Any) -> tuple[list[Tensor], Tensor]:
    model = fully_sharded(make_model(), mesh)
    optimizer = RWSAM(model, torch.optim.SGD, norms="finite_difference", num_directions=200, **OPTIONS)
    optimizer.step(partial(losses_of, model, *batch_of(0, rank, 2)))
    assert optimizer.last_norms is not None
    return [whole(param) for param in model.parameters()], optimizer.last_norms


def _uneven(rank: int, mesh: Any) -> list[float]:
    """The weights of 7 and 5 samples, in both ways to use them."""
    sums = []
    for options in ({}, {"sampling": "draw", "draws": 4}):
        model = fully_sharded(make_model(), mesh)
        optimizer = RWSAM(model, torch.optim.SGD, **OPTIONS, **options)
        inputs, targets = batch_of(0, rank, 2)
        optimizer.step(partial(losses_of, model, inputs[: 7 - 2 * rank], targets[: 7 - 2 * rank]))
        assert optimizer.last_weights is not None
        assert len(optimizer.last_weights) == 7 - 2 * rank
        sums.append(optimizer.last_weights.sum().item())
    return sums


def _all(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return {
        "norms": {
            (kind.__name__, checkpoints, reshards): _norms_and_gradients(rank, mesh, kind, checkpoints=checkpoints, reshards=reshards)
            for kind in (Translator, Free)
            for checkpoints, reshards in ((False, True), (True, False))
        },
        "refusals": _refusals(rank, mesh),
        "diagnostics": [_diagnostics(rank, mesh), _diagnostics(rank, mesh, sampling="draw", draws=3)],
        "not finite": _not_finite_on_one_rank(rank, mesh),
        "directions": _along_random_directions(rank, mesh),
        "uneven": _uneven(rank, mesh),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_all, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", [(False, True), (True, False)], ids=["resharded", "checkpointed"])
@pytest.mark.parametrize("kind", ["Translator", "Free"])
def test_norms_and_weighted_gradients_are_those_of_one_process(found: Any, kind: str, case: tuple[bool, bool]) -> None:
    assert all(each["norms"][(kind, *case)] <= CLOSE for each in found)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("weighted", "is a DTensor; use weighted_backward(losses, weights)"),
        ("penalty", "the losses read 0.weight 2 times, of which 1 are calls of its layer"),
        ("vmap", "over shards unsupported='vmap' cannot run it again; leave the option out"),
        ("verify", 'unsupported="verify" is not for shards'),
        ("holder", "its module was not called, so that it is not known what its shards were gathered into"),
        ("elsewhere", "its value meets the batch while its shards are not gathered, outside of its fully_shard module"),
        ("parallel", "parameter weight is a DTensor while the layer is called (tensor parallelism)"),
    ],
)
def test_what_would_be_wrong_is_refused(found: Any, case: str, words: str) -> None:
    for each in found:
        assert words in each["refusals"][case]


def test_diagnostics_are_of_the_samples_of_all_ranks(found: Any) -> None:
    for i, options in enumerate(({}, {"sampling": "draw", "draws": 3})):
        expected = _diagnostics(0, None, **options)
        assert len(expected) == 5
        for each in found:
            assert each["diagnostics"][i] == pytest.approx(expected, rel=CLOSE)


def test_all_ranks_skip_where_a_norm_of_one_is_not_finite(found: Any) -> None:
    for each in found:
        assert all(map(torch.equal, each["not finite"], (param.detach() for param in make_model().parameters())))


def test_norms_along_random_directions_are_estimates_of_the_exact_ones(found: Any) -> None:
    model = make_model()
    engine = GradNorms(model)
    with engine:
        losses = losses_of(model, *batch_of(0, 0, 1))
    exact = engine(losses)
    estimates = torch.cat([each["directions"][1] for each in found])
    # Of 200 directions: a square has a relative standard deviation of √(2 / 200) = 0.1, its root of 0.05; 24 samples, 5 of them.
    assert ((estimates / exact).log().abs() <= 0.25).all()
    assert all(map(torch.equal, found[0]["directions"][0], found[1]["directions"][0]))


def test_weights_of_uneven_batches_add_up_over_ranks(found: Any) -> None:
    for i in range(2):
        assert sum(each["uneven"][i] for each in found) == pytest.approx(1.0, rel=CLOSE)
