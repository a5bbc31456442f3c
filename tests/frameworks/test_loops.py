"""The code of docs/guides/loops.md, as it stands there, against SAM written out in float64 after five steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import SAM
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import LR, RHO, STEPS, by_formula, error_of
from tests.frameworks.hugging_face import forget_accelerate
from tests.helpers.pages import blocks_under, code_after, code_before

PAGE = "docs/guides/loops.md"
CLIP = 0.2  # of the page
BAR = 1e-12  # float64, five steps
WITHOUT_SAM = r"a first step without an ascent.*step\(closure\)"
Batch = tuple[Tensor, Tensor]


class Net(nn.Sequential):
    """The same weights every time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.double()


def batches(count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [(x, torch.randint(0, 3, (4,), generator=generator)) for x in inputs]


def loss_of(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def share_of(count: int) -> Callable[[Any, Batch, int], Tensor]:
    """The loss of one of ``count`` micro-batches."""
    return lambda model, batch, _: loss_of(model, batch) / count


class Followed:
    """A base optimizer, after each of whose steps something else happens: schedulers, averages."""

    def __init__(self, base: torch.optim.Optimizer, *others: Callable[[], Any]) -> None:
        self.base, self.others = base, others

    def step(self) -> None:
        self.base.step()
        for other in self.others:
            other()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def sam(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, rho=RHO)


def expected_of(steps: list[list[Batch]], *, whole: bool = False, clip: float = 0.0, make: Callable[[nn.Module], Any] = sgd) -> nn.Module:
    model = Net()
    by_formula(model, make(model), steps, share_of(len(steps[0])), whole=whole, clip=clip)
    return model


def in_pairs(loader: list[Batch]) -> list[list[Batch]]:
    return [loader[i : i + 2] for i in range(0, len(loader), 2)]


def singly(loader: list[Batch]) -> list[list[Batch]]:
    return [[each] for each in loader]


# --- a loop of one's own ---


def run(code: str, **names: Any) -> dict[str, Any]:
    space: dict[str, Any] = {"torch": torch, "F": F, "SAM": SAM, "model": Net(), "device": "cpu", **names}
    exec(code, space)
    return space


def test_the_page_turns_sgd_into_sam(compared: Compared) -> None:
    (diff,) = blocks_under(PAGE, "From SGD to SAM", "diff")
    loader = batches()
    before, after = (run(code, loader=loader) for code in (code_before(diff), code_after(diff)))
    plain = Net()
    optimizer = sgd(plain)
    for batch in loader:
        optimizer.zero_grad()
        loss_of(plain, batch).backward()
        optimizer.step()
    assert error_of(before["model"], plain) == 0
    compared("torch", "SAM", f"step(closure): weights after {STEPS} steps", error_of(after["model"], expected_of(singly(loader))), BAR)


def one_cycle(model: nn.Module) -> Followed:
    base = sgd(model)
    return Followed(base, torch.optim.lr_scheduler.OneCycleLR(base, max_lr=LR, total_steps=STEPS).step)


@pytest.mark.parametrize(
    ("heading", "what", "algorithm", "count", "options"),
    [
        ("GradScaler", "step(closure, grad_scaler=)", "SAM", 1, {}),
        ("Accumulation, m-SAM", "backward(closure)", "m-SAM by accumulation", 2, {}),
        ("Accumulation, whole batch", "step(closure)", "SAM of the accumulated batch", 2, {"whole": True}),
        ("Clipping", f"max_grad_norm={CLIP}", "SAM", 1, {"clip": CLIP}),
        ("Clipping by the loop", f"backward(closure), clip_grad_norm_ {CLIP}", "SAM", 1, {"clip": CLIP}),
        ("Schedulers", "step(closure), OneCycleLR", "SAM", 1, {"make": one_cycle}),
    ],
)
def test_a_loop_of_the_page(heading: str, what: str, algorithm: str, count: int, options: dict[str, Any], compared: Compared) -> None:
    (code,) = blocks_under(PAGE, heading, "python")
    loader = batches(STEPS * count)
    model = run(code, loader=loader)["model"]
    steps = in_pairs(loader) if count == 2 else singly(loader)
    expected = expected_of(steps, **options)
    assert not options or error_of(expected, expected_of(steps)) > 1e-5  # the option makes a difference
    compared("torch", algorithm, f"{what}: weights after {STEPS} steps", error_of(model, expected), BAR)


def test_the_pages_average_is_of_the_weights_after_steps(compared: Compared) -> None:
    (code,) = blocks_under(PAGE, "EMA and SWA", "python")
    loader, averages = batches(), list[Any]()
    space = run(code, loader=loader)

    def followed(model: nn.Module) -> Followed:
        averages.append(torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)))
        return Followed(sgd(model), lambda: averages[0].update_parameters(model))

    expected = expected_of(singly(loader), make=followed)
    error = max(error_of(space["model"], expected), error_of(space["ema"], averages[0]))
    compared("torch", "SAM", f"step(closure), EMA: weights and averages after {STEPS} steps", error, BAR)


# --- pytorch-ignite ---


def test_ignite(compared: Compared) -> None:
    pytest.importorskip("ignite")
    (code,) = blocks_under(PAGE, "pytorch-ignite", "py")
    model, radii = Net(), list[float]()
    optimizer = sam(model)
    optimizer.register_step_post_hook(lambda *_: radii.append(optimizer.param_groups[0]["rho"]))
    loader = batches()
    trainer = run(code, model=model, optimizer=optimizer)["trainer"]
    state = trainer.run(loader, max_epochs=1)
    assert radii == pytest.approx([0.0, RHO / 3, 2 * RHO / 3, RHO, RHO])

    expected = Net()
    base = sgd(expected)
    for rho, batch in zip(radii, loader, strict=True):
        loss = loss_of(expected, batch).item()
        by_formula(expected, base, [[batch]], share_of(1), whole=False, clip=0.0, rho=lambda _, rho=rho: rho)
    assert state.output == pytest.approx(loss, rel=1e-12)  # at the weights
    compared("pytorch-ignite", "SAM", f"Engine, PiecewiseLinear of ρ: weights after {STEPS} steps", error_of(model, expected), BAR)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ignites_own_trainer_is_not_silent(accumulation: int) -> None:
    engine = pytest.importorskip("ignite.engine")
    model = Net()
    trainer = engine.create_supervised_trainer(model, sam(model), F.cross_entropy, gradient_accumulation_steps=accumulation)
    with pytest.warns(UserWarning, match=WITHOUT_SAM):
        trainer.run(batches(2 * accumulation), max_epochs=1)


# --- skorch ---


def arrays(loader: list[Batch]) -> tuple[Any, Any]:
    return tuple(torch.cat(each).numpy() for each in zip(*loader, strict=True))


def skorch_net(**options: Any) -> Any:
    """The page's, with the batches of the formula."""
    pytest.importorskip("skorch")
    net = run(blocks_under(PAGE, "skorch", "py")[0], Module=Net)["net"]
    return net.set_params(**{"train_split": None, "iterator_train__shuffle": False, "max_epochs": 1, "verbose": 0, **options})


def test_skorch(compared: Compared) -> None:
    loader = batches()
    net = skorch_net()
    net.fit(*arrays(loader))
    expected = expected_of(singly(loader))
    compared("skorch", "SAM", f"NeuralNetClassifier: weights after {STEPS} steps", error_of(net.module_, expected), BAR)
    first = net.history[0, "batches", 0, "train_loss"]
    assert first == pytest.approx(loss_of(Net(), loader[0]).item(), rel=1e-12)  # at the weights


def test_skorchs_clipping_callback_clips_the_step(compared: Compared) -> None:
    callbacks = pytest.importorskip("skorch.callbacks")
    loader = batches()
    net = skorch_net(callbacks=[("clip", callbacks.GradientNormClipping(CLIP))]).fit(*arrays(loader))
    expected = expected_of(singly(loader), clip=CLIP)
    error = error_of(net.module_, expected)
    compared("skorch", "SAM", f"GradientNormClipping: weights after {STEPS} steps", error, BAR)


def test_skorch_sets_options_pickles_and_continues() -> None:
    import pickle

    loader = batches()
    data = arrays(loader)
    net = skorch_net().fit(*data)
    net.set_params(optimizer__rho=0.2, lr=0.05)
    assert [(group["rho"], group["lr"]) for group in net.optimizer_.param_groups] == [(0.2, 0.05)]
    copied = pickle.loads(pickle.dumps(net))
    assert copied.optimizer_.param_groups[0]["rho"] == 0.2
    for each in (net, copied):
        each.partial_fit(*data)
    assert all(map(torch.equal, net.module_.parameters(), copied.module_.parameters()))
    assert error_of(copied.module_, skorch_net().fit(*data).module_) > 1e-3  # it has gone on


def test_skorch_cannot_set_an_option_of_the_whole_optimizer_later() -> None:
    data = arrays(batches())
    net = skorch_net().fit(*data).set_params(optimizer__max_grad_norm=CLIP)
    with pytest.raises(ValueError, match=r"'max_grad_norm'\] is an option of the whole optimizer"):
        net.partial_fit(*data)
    fresh = skorch_net().set_params(optimizer__max_grad_norm=CLIP).fit(*data)
    assert fresh.optimizer_.max_grad_norm == CLIP


class Normed(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.double()


def test_the_pages_classifier_updates_running_statistics_once_a_step() -> None:
    skorch = pytest.importorskip("skorch")
    code = blocks_under(PAGE, "skorch", "py")[2]
    kind = run(code, NeuralNetClassifier=skorch.NeuralNetClassifier)["SAMClassifier"]
    data, counts = arrays(batches()), {}
    for each in (skorch.NeuralNetClassifier, kind):
        options = skorch_net().get_params(deep=False)
        net = each(**{**options, "module": Normed}).fit(*data)
        counts[each] = int(net.module_[1].num_batches_tracked)
    assert counts == {skorch.NeuralNetClassifier: 2 * STEPS, kind: STEPS}


def test_scikit_learn_searches_the_radius() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    X, y = arrays(batches(15))
    net = skorch_net(max_epochs=20)
    search = run(blocks_under(PAGE, "skorch", "py")[1], net=net, X=X, y=y)["search"]
    results = search.cv_results_
    assert [each["optimizer__rho"] for each in results["params"]] == [0.0, 0.05, 0.2]
    train, test = next(selection.StratifiedKFold(3).split(X, y))
    for rho, score in zip((0.0, 0.05, 0.2), results["split0_test_score"], strict=True):
        by_hand = skorch_net(max_epochs=20, optimizer__rho=rho).fit(X[train], y[train])
        assert score == by_hand.score(X[test], y[test])
    assert search.best_estimator_.optimizer_.param_groups[0]["rho"] == search.best_params_["optimizer__rho"]


forgets_accelerate = pytest.fixture(forget_accelerate)


@pytest.mark.usefixtures("forgets_accelerate")
def test_skorchs_accelerate_mixin_is_not_silent() -> None:
    skorch, hf = pytest.importorskip("skorch"), pytest.importorskip("skorch.hf")
    accelerate = pytest.importorskip("accelerate")

    class Accelerated(hf.AccelerateMixin, skorch.NeuralNetClassifier):
        pass

    options = {**skorch_net().get_params(deep=False), "accelerator": accelerate.Accelerator(cpu=True), "device": None}
    with pytest.warns(UserWarning, match=WITHOUT_SAM):
        Accelerated(**options).fit(*arrays(batches()))


# --- fastai ---


def learner(loader: list[Batch], *, callbacks: tuple[Any, ...] = (), has_sam: bool = True, **names: Any) -> Any:
    """The page's, or fastai's own loop with SAM in it."""
    core = pytest.importorskip("fastai.data.core")
    pytest.importorskip("fastai.callback.progress")  # adds no_bar
    from fastai.callback.core import Callback

    class Logged(Callback):
        """fastai smooths losses in float32."""

        def after_loss(self) -> None:
            self.learn.loss = self.loss.float()

    pairs = [pair for batch in loader for pair in zip(*batch, strict=True)]
    loaders = [core.TfmdDL(pairs, bs=4, shuffle=False, num_workers=0) for _ in range(2)]
    learn = run(blocks_under(PAGE, "fastai", "py")[0], dls=core.DataLoaders(*loaders), loss_func=F.cross_entropy, **names)["learn"]
    if not has_sam:
        learn.remove_cbs(learn.cbs.filter(lambda each: each.name == "sam"))
    return learn.add_cbs((Logged, *callbacks))


def fit(learn: Any) -> nn.Module:
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    return learn.model


def test_fastai(compared: Compared) -> None:
    loader = batches()
    learn = learner(loader)
    error = error_of(fit(learn), expected_of(singly(loader)))
    compared("fastai", "SAM", f"SAMCallback of the page: weights after {STEPS} steps", error, BAR)


def test_fastai_accumulates_and_clips(compared: Compared) -> None:
    training = pytest.importorskip("fastai.callback.training")
    loader = batches(2 * STEPS)
    model = fit(learner(loader, callbacks=(training.GradientAccumulation(8), training.GradientClip(CLIP))))
    error = error_of(model, expected_of(in_pairs(loader), clip=CLIP))
    compared("fastai", "m-SAM by accumulation", f"SAMCallback, GradientAccumulation, GradientClip: weights after {STEPS} steps", error, BAR)


def test_fastai_logs_losses_at_the_weights_and_updates_running_statistics_once_a_step() -> None:
    (batch,) = loader = batches(1)
    learn = learner(loader)
    fit(learn)
    assert learn.recorder.losses[0].item() == pytest.approx(loss_of(Net(), batch).item(), rel=1e-6)  # in float32
    model = Normed()
    learn = learner(batches(), model=model)
    learn.opt_func.keywords["model"] = model
    fit(learn)
    assert int(model[1].num_batches_tracked) == STEPS


def test_fastai_without_the_callback_is_not_silent() -> None:
    learn = learner(batches(), has_sam=False)
    with pytest.warns(UserWarning, match=WITHOUT_SAM):
        fit(learn)


def test_fastai_with_mixed_precision_is_refused() -> None:
    fp16 = pytest.importorskip("fastai.callback.fp16")
    with pytest.raises(RuntimeError, match=r"leave to_fp16\(\) and to_bf16\(\) out"):
        fit(learner(batches(), callbacks=(fp16.MixedPrecision(),)))
