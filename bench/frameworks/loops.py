"""The training loops that are compared: plain PyTorch, and each framework with AdamW and with SAM through its integration.

Every function returns a :data:`~bench.frameworks.paced.Loop` of ``steps`` steps. Frameworks are used as their users use them, but that
nothing is logged or saved; learning rates are so small that every step is the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench.frameworks.operators import define_operators
from bench.frameworks.paced import Loop
from bench.frameworks.problem import Problem
from bench.providers import RHO
from sam_kernels import SAM

__all__ = ["FRAMEWORKS", "PLAIN", "PLAIN_BACKWARD", "PLAIN_SAM", "be_quiet", "make_loop", "missing", "names_of"]

FRAMEWORKS = {"transformers": "Trainer", "accelerate": "accelerate", "lightning": "Lightning"}  # package: title
PLAIN, PLAIN_SAM, PLAIN_BACKWARD = "plain, AdamW", "plain, SAM, step(closure)", "plain, SAM, backward(closure)"
ADAMW: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.0, "fused": True}


def missing(framework: str) -> str | None:
    """Return why a framework cannot be measured here, or None."""
    define_operators()
    try:
        import_module(framework)
        import_module(f"sam_kernels.integrations.{framework}")
    except ImportError as error:
        return str(error)
    return None


def be_quiet() -> None:
    """Let the frameworks that are there say nothing but errors."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if missing("transformers") is None:
        import transformers

        transformers.logging.set_verbosity_error()


def names_of(framework: str) -> tuple[str, str]:
    """Return the names of its two loops: with AdamW, and with SAM."""
    return f"{framework}, AdamW", f"{framework}, SAM"


def make_loop(name: str, problem: Problem, steps: int) -> Loop:
    """Return a new loop on a new model. ``name``: PLAIN, PLAIN_SAM, PLAIN_BACKWARD or one of :func:`names_of`."""
    framework, optimizer, *_ = name.split(", ")
    if framework == "plain":
        return _plain(problem, steps, name)
    make = {"transformers": _transformers, "accelerate": _accelerate, "lightning": _lightning}[framework]
    return make(problem, steps, with_sam=optimizer == "SAM")


def _optimizer(model: torch.nn.Module, with_sam: bool) -> Any:
    if with_sam:
        return SAM(model.parameters(), torch.optim.AdamW, rho=RHO, model=model, **ADAMW)
    return torch.optim.AdamW(model.parameters(), **ADAMW)


def _plain(problem: Problem, steps: int, kind: str) -> Loop:
    model: Any = problem.model()
    optimizer, loader = _optimizer(model, kind != PLAIN), DataLoader(problem.rows(steps), problem.batch)

    def loop(pause: Callable[[], None]) -> None:
        for batch in loader:

            def closure(batch: Any = batch) -> Tensor:
                if kind != PLAIN_BACKWARD:
                    optimizer.zero_grad()
                loss: Tensor = model(**batch)["loss"]
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
                return loss

            if kind == PLAIN_BACKWARD:
                optimizer.backward(closure)
                optimizer.step()
                optimizer.zero_grad()
            else:
                optimizer.step(closure)
            pause()

    return loop


def _transformers(problem: Problem, steps: int, *, with_sam: bool) -> Loop:
    import transformers

    from sam_kernels.integrations.transformers import SAMTrainer

    class AtStepEnd(transformers.TrainerCallback):  # type: ignore[misc]  # Any where transformers is not installed
        def __init__(self, pause: Callable[[], None]) -> None:
            self.pause = pause

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.pause()

    options: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    options |= {"max_steps": steps, "per_device_train_batch_size": problem.batch, "learning_rate": ADAMW["lr"]}
    with TemporaryDirectory() as folder:  # which the trainer makes, and writes nothing into
        args = transformers.TrainingArguments(folder, dataloader_pin_memory=False, **options)
        trained: dict[str, Any] = {"model": problem.model(), "args": args, "train_dataset": problem.rows(steps)}
        trainer: Any = SAMTrainer(**trained, sam={"rho": RHO}) if with_sam else transformers.Trainer(**trained)
    trainer.remove_callback(transformers.PrinterCallback)

    def loop(pause: Callable[[], None]) -> None:
        trainer.add_callback(AtStepEnd(pause))
        trainer.train()

    return loop


def _accelerate(problem: Problem, steps: int, *, with_sam: bool) -> Loop:
    import accelerate

    from sam_kernels.integrations.accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True) if with_sam else accelerate.Accelerator(cpu=True)
    model: Any = problem.model()
    optimizer: Any
    model, optimizer, loader = accelerator.prepare(model, _optimizer(model, with_sam), DataLoader(problem.rows(steps), problem.batch))

    def loop(pause: Callable[[], None]) -> None:
        for batch in loader:
            with accelerator.accumulate(model):

                def closure(batch: Any = batch) -> Tensor:
                    loss: Tensor = model(**batch)["loss"]
                    accelerator.backward(loss)
                    return loss

                if with_sam:
                    optimizer.backward(closure)
                else:
                    closure()
                optimizer.step()
                optimizer.zero_grad()
            pause()

    return loop


def _lightning(problem: Problem, steps: int, *, with_sam: bool) -> Loop:
    import lightning

    from sam_kernels.integrations.lightning import SAMCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]  # Any where lightning is not installed
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = problem.model()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return _optimizer(self, with_sam)

    class AtStepEnd(lightning.pytorch.callbacks.Callback):  # type: ignore[misc]  # as above
        def __init__(self, pause: Callable[[], None]) -> None:
            self.pause = pause

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            self.pause()

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    module, loader = Module(), DataLoader(problem.rows(steps), problem.batch)

    def loop(pause: Callable[[], None]) -> None:
        callbacks = [*([SAMCallback()] if with_sam else []), AtStepEnd(pause)]
        lightning.Trainer(max_steps=steps, accelerator="cpu", devices=1, callbacks=callbacks, **quiet).fit(module, loader)

    return loop
