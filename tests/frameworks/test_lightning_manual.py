"""SAM's own methods on the wrappers of Lightning's manual optimization and of Fabric, and automatic optimization without SAMCallback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RSAM, RWSAM, SAM, LookSAM
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import error_of

lightning: Any = pytest.importorskip("lightning")
from sam_kernels.integrations.lightning import sam_of  # noqa: E402
from tests.frameworks.lightning_runs import (  # noqa: E402
    BATCHES,
    LR,
    Manual,
    Module,
    batches,
    loader,
    loss_of,
    manual_trainer,
    net,
    sgd,
    steps_of,
    train_by_formula,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*dataloader.*|.*GPU.*|.*logging interval.*|.*checkpoint.*:UserWarning"),
    pytest.mark.filterwarnings("error:.*a first step without an ascent.*"),
]
CLOSE = 1e-12
HALVES = [[[(x[:2], y[:2])], [(x[2:], y[2:])]] for x, y in batches()]
WHOLE = [[[batch]] for batch in batches()]
TRIPLES = [[[each] for each in step] for step in steps_of(batches(), 3)]

# Each is a training step: of a Manual module with Lightning's optimizer, or of the loop below with Fabric's.


def by_backward(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(lambda: module.closure(*batch))
    optimizer.step()


def by_two_steps(module: Any, optimizer: Any, batch: Any) -> None:
    module.closure(*batch)
    optimizer.first_step(zero_grad=True)
    module.closure(*batch)
    optimizer.second_step(zero_grad=True)


def by_closure(module: Any, optimizer: Any, batch: Any) -> None:
    loss = optimizer.step(partial(zeroing, module, optimizer, *batch))
    assert isinstance(loss, Tensor)


def by_keyword(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.step(closure=partial(zeroing, module, optimizer, *batch))


def by_micro_batches(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.step(partial(zeroing, module, optimizer), batch=batch, micro_batches=2)


def by_closures(module: Any, optimizer: Any, batch: Any) -> None:
    (x, y) = batch
    optimizer.step([partial(zeroing, module, optimizer, x[part], y[part]) for part in (slice(2), slice(2, 4))])


def by_ascent_closure(module: Any, optimizer: Any, batch: Any) -> None:
    closure = partial(zeroing, module, optimizer, *batch)
    optimizer.step(closure, ascent_closure=closure)


def by_sam_of(module: Any, optimizer: Any, batch: Any) -> None:
    sam = sam_of(optimizer)
    sam.backward(lambda: module.closure(*batch))
    optimizer.step()
    assert sam.skipped_steps == optimizer.skipped_steps == 0
    sam.zero_grad()


def by_accumulation(module: Any, optimizer: Any, batch: Any) -> None:
    count = getattr(module, "count", 0) + 1
    module.count = count
    optimizer.backward(lambda: module.closure(*batch, share=1 / 3))
    if count % 3 == 0:
        optimizer.step()
        optimizer.zero_grad()


def zeroing(module: Any, optimizer: Any, *batch: Tensor) -> Tensor:
    optimizer.zero_grad()
    result: Tensor = module.closure(*batch)
    return result


STEPS: list[tuple[str, Callable[..., Any], Any]] = [
    ("backward", by_backward, WHOLE),
    ("first_step, second_step", by_two_steps, WHOLE),
    ("step(closure)", by_closure, WHOLE),
    ("step(closure=closure)", by_keyword, WHOLE),
    ("step(closure, batch=..., micro_batches=2)", by_micro_batches, HALVES),
    ("step(closures)", by_closures, HALVES),
    ("step(closure, ascent_closure=...)", by_ascent_closure, WHOLE),
    ("sam_of(optimizer).backward", by_sam_of, WHOLE),
    ("backward, three to a step", by_accumulation, TRIPLES),
]
ways = pytest.mark.parametrize(("name", "step", "formula"), STEPS, ids=[name for name, _, _ in STEPS])


class Counting(Manual):
    """Counts the calls of hooks, and whether a gradient was there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [param.grad for param in self.parameters() if param.grad is not None]
        self.norms.append(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt().item())


@ways
def test_manual_optimization(name: str, step: Callable[..., Any], formula: Any, compared: Compared) -> None:
    module, trainer = Counting(step), manual_trainer()
    trainer.fit(module, loader())
    expected = train_by_formula(net(), formula)
    algorithm = "SAM" if formula is WHOLE else "m-SAM"
    compared("lightning", algorithm, f"manual, {name}: weights after {len(formula)} steps", error_of(module.net, expected), CLOSE)
    sam = sam_of(trainer.optimizers[0])
    assert trainer.global_step == len(formula) == sam.param_groups[0]["sam_step"]
    assert "step" not in vars(sam)
    assert "_descend" not in vars(sam)
    perturbed: list[float] = []  # norms of the gradients that are stepped along
    last = train_by_formula(net(), formula[:-1])
    train_by_formula(last, formula[-1:], base=lambda model: Recording(model.parameters(), perturbed))
    assert module.norms[-1] == pytest.approx(perturbed[0], rel=1e-9)
    assert len(module.norms) == len(formula)


class Recording(torch.optim.SGD):
    def __init__(self, params: Any, norms: list[float]) -> None:
        super().__init__(params, lr=0.0)
        self.norms = norms

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = [param.grad for group in self.param_groups for param in group["params"]]
        self.norms.append(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt().item())


class Loop:
    """Fabric's loop with the methods that a training step above uses."""

    def __init__(self, fabric: Any, model: Any) -> None:
        self.fabric, self.model = fabric, model

    def closure(self, *batch: Tensor, share: float = 1.0) -> Tensor:
        loss = loss_of(self.model, batch) * share  # type: ignore[arg-type]
        self.fabric.backward(loss)
        return loss


@ways
def test_fabric(name: str, step: Callable[..., Any], formula: Any, compared: Compared) -> None:
    after: list[int] = []

    class After:
        def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
            after.append(1)

    fabric = lightning.Fabric(accelerator="cpu", devices=1, callbacks=[After()])
    model = net()
    model, optimizer = fabric.setup(model, sgd(model))
    loop = Loop(fabric, model)
    for batch in batches():
        step(loop, optimizer, batch)
    algorithm = "SAM" if formula is WHOLE else "m-SAM"
    error = error_of(model.module, train_by_formula(net(), formula))
    compared("lightning", algorithm, f"Fabric, {name}: weights after {len(formula)} steps", error, CLOSE)
    assert len(after) == len(formula) == optimizer.param_groups[0]["sam_step"]


def test_members_that_choose_more_than_a_gradient(compared: Compared) -> None:
    """LookSAM, whose steps are no gradients, with the bits of a loop without Lightning; RWSAM and RSAM the same."""
    for name, make, closure in (
        ("LookSAM", lambda module: LookSAM(module.parameters(), torch.optim.SGD, lr=LR, k=2, alpha=0.5), zeroing),
        ("RSAM", lambda module: RSAM(module.parameters(), torch.optim.SGD, lr=LR), zeroing),
        ("RWSAM", lambda module: RWSAM(module.net, torch.optim.SGD, lr=LR, beta=1.0), losses_of_samples),
    ):

        def step(module: Any, optimizer: Any, batch: Any, closure: Any = closure) -> None:
            optimizer.step(partial(closure, module, optimizer, *batch))

        module, plain = Manual(step, make), Manual(step, make)
        manual_trainer().fit(module, loader())
        plain.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
        optimizer = make(plain)
        for batch in batches():
            step(plain, optimizer, batch)
        pairs = zip(module.parameters(), plain.parameters(), strict=True)
        compared(
            "lightning",
            name,
            "manual, step(closure): a loop without Lightning",
            0.0 if all(map(torch.equal, *zip(*pairs, strict=True))) else 1.0,
            0.0,
        )


def losses_of_samples(module: Any, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module.net(x), y, reduction="none")


def test_the_wrapper_has_the_methods_and_values_of_the_optimizer_inside() -> None:
    seen: list[Any] = []

    def step(module: Any, optimizer: Any, batch: Any) -> None:
        by_backward(module, optimizer, batch)
        sam = sam_of(optimizer)
        seen.append(optimizer)
        assert isinstance(optimizer, SAM)
        assert optimizer is not sam
        assert optimizer.param_groups is sam.param_groups
        assert optimizer.state is sam.state
        assert optimizer.state_dict().keys() == sam.state_dict().keys()
        optimizer.release_buffers()
        assert set(vars(optimizer)) <= {"_optimizer", "_strategy", "_on_before_step", "_on_after_step"}  # no state of its own

    manual_trainer().fit(Manual(step), loader())
    assert len(seen) == BATCHES


def test_errors_are_those_of_sam() -> None:
    def without_first(module: Any, optimizer: Any, batch: Any) -> None:
        optimizer.second_step()

    def adding(module: Any, optimizer: Any, batch: Any) -> None:
        optimizer.step(lambda: module.closure(*batch))
        optimizer.step(lambda: module.closure(*batch))

    def empty(module: Any, optimizer: Any, batch: Any) -> None:
        optimizer.backward(lambda: None)

    def without_closure(module: Any, optimizer: Any, batch: Any) -> None:
        optimizer.step(batch=batch, micro_batches=2)

    for step, error, words in (
        (without_first, RuntimeError, "call first_step first"),
        (adding, RuntimeError, "the closure added its gradient to one that was in .grad before"),
        (empty, RuntimeError, "the closure left no gradient"),
        (without_closure, ValueError, "batch needs a closure"),
    ):
        module, trainer = Manual(step), manual_trainer()
        with pytest.raises(error, match=words):
            trainer.fit(module, loader())
        assert not {"step", "_descend", "_is_led"} & vars(sam_of(trainer.optimizers[0])).keys()


def test_a_loop_of_plain_steps_is_not_silent() -> None:
    def plain(module: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        module.closure(*batch)
        optimizer.step()

    with pytest.raises(UserWarning, match="a first step without an ascent"):
        manual_trainer().fit(Manual(plain), loader())


# --- automatic optimization without SAMCallback ---


def test_without_the_callback_steps_are_right_and_a_warning_says_what_is_not(compared: Compared) -> None:
    class Logging(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses.append(1)
            return super().training_step(batch, batch_idx)

    losses: list[int] = []
    module, trainer = Logging(), manual_trainer()
    with pytest.warns(UserWarning, match=r"runs training_step twice.*self.log counts both.*callbacks=\[.*SAMCallback\(\)\]") as caught:
        trainer.fit(module, loader())
    assert len([each for each in caught if "runs training_step twice" in str(each.message)]) == 1
    assert len(losses) == 2 * BATCHES
    error = error_of(module.net, train_by_formula(net(), WHOLE))
    compared("lightning", "SAM", "automatic without SAMCallback: weights after 6 steps", error, CLOSE)


def test_without_the_callback_what_would_be_another_step_is_an_error() -> None:
    class Clipping(Module):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    scaled = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    for module, options, words in (
        (Module(), {"accumulate_grad_batches": 2}, "accumulates gradients of which only the last"),
        (Module(), {"gradient_clip_val": 0.3}, "clips the gradient of the first pass too"),
        (Clipping(), {}, "clips the gradient of the first pass too"),
        (Module(model=net(torch.float32)), {"plugins": [scaled]}, r"calls step\(\) alone with a GradScaler"),
    ):
        data = loader(batches(dtype=module.net[0].weight.dtype))  # type: ignore[index]
        with pytest.raises(RuntimeError, match=words + r".*callbacks=\[.*SAMCallback\(\)\]"):
            manual_trainer(**options).fit(module, data)


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_of_fabric_with_weights_of_their_own_are_refused(name: str) -> None:
    strategy = type(name, (lightning.fabric.strategies.SingleDeviceStrategy,), {})("cpu")
    fabric = lightning.Fabric(strategy=strategy)
    model = net()
    model, optimizer = fabric.setup(model, sgd(model))
    loop = Loop(fabric, model)
    for step in (by_backward, by_two_steps, by_closure):
        with pytest.raises(RuntimeError, match=rf"{name} updates, or gathers, weights of its own"):
            step(loop, optimizer, batches()[0])
