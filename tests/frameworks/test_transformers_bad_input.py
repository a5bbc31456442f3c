"""What a trainer with SAM refuses, or warns of: with the lines to write, and never another algorithm in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from tests.frameworks.formula import LR
from tests.frameworks.hugging_face import arguments, forget_accelerate, gpt2, texts

integration: Any = pytest.importorskip("sam_kernels.integrations.transformers")
transformers: Any = pytest.importorskip("transformers")
fresh = pytest.fixture(autouse=True)(forget_accelerate)
RW = {"rho": 0.05, "beta": 1.0}
OVERRIDE = r"override compute_sample_losses:\n    def compute_sample_losses\(self, model, inputs\):\n"


def trainer_of(folder: Path, kind: Any = integration.SAMTrainer, sam: Any = None, model: Any = None, **options: Any) -> Any:
    given = {name: options.pop(name) for name in ("optimizers", "compute_loss_func") if name in options}
    return kind(gpt2() if model is None else model, arguments(folder, **options), train_dataset=texts(), sam=sam, **given)


# --- trainers that call step() alone ---


@pytest.mark.parametrize("steps", [1, 3])
def test_a_trainer_without_the_mixin_is_not_silent(tmp_path: Path, steps: int) -> None:
    """The first step warns, so that a run of one step does; it warns once."""
    model = gpt2()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=LR)
    trainer = transformers.Trainer(model, arguments(tmp_path, max_steps=steps), train_dataset=texts(), optimizers=(optimizer, None))
    with pytest.warns(UserWarning, match=r"a first step without an ascent.*step\(closure\).*transformers\.SAMTrainer") as said:
        trainer.train()
    assert sum("without an ascent" in str(each.message) for each in said) == 1


def test_a_loop_of_plain_accelerate_is_not_silent() -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    model = nn.Linear(3, 2)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, SAM(model.parameters(), torch.optim.SGD, lr=LR))
    accelerator.backward(model(torch.randn(4, 3)).sum())
    with pytest.warns(UserWarning, match=r"a first step without an ascent.*accelerate\.Accelerator"):
        optimizer.step()


def test_a_step_of_ones_own_that_leaves_the_mixins_out(tmp_path: Path) -> None:
    class Mine(integration.SAMTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = trainer_of(tmp_path, Mine, {"rho": 0.05}, max_steps=1)
    with pytest.raises(RuntimeError, match=r"step\(\) without a gradient of SAM[\s\S]*call super\(\)\.training_step\(model, inputs, "):
        trainer.train()


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    class Changed(integration.SAMTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
            return self.optimizer

    with pytest.raises(RuntimeError, match=r"Changed\(..., sam=dict\(rho=0.05\)\)"):
        trainer_of(tmp_path, Changed).train()


# --- options ---


@pytest.mark.parametrize(
    ("sam", "error", "words"),
    [
        ({"ascent": "all"}, ValueError, "one of 'micro_batch', 'batch', got 'all'"),
        ({"ascent": "batch", "beta": 1.0}, ValueError, r"ascent='batch' is SAM's; RWSAM \(beta\) weights each micro-batch's samples"),
        ({"local_ascent": 1}, TypeError, "local_ascent"),
    ],
    ids=["ascent", "beta", "local_ascent"],
)
def test_options_that_are_none(tmp_path: Path, sam: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        trainer_of(tmp_path, sam=sam)


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "MEGATRON_LM"])
def test_weights_of_their_own_are_refused(tmp_path: Path, plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``TrainingArguments(deepspeed=...)`` needs the package: the accelerator says what it would say with it."""
    from accelerate.utils import DistributedType

    class WithPlugin(integration.SAMTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            monkeypatch.setattr(type(self.accelerator), "distributed_type", DistributedType[plugin])

    with pytest.raises(ValueError, match=f"SAMTrainer: {plugin} updates its own copies of the weights.*use DDP .torchrun"):
        trainer_of(tmp_path, WithPlugin, {"rho": 0.05})


def test_fsdp_version_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SAMTrainer: FSDP version 1 flattens parameters, which SAM refuses; set fsdp_version=2"):
        trainer_of(tmp_path, sam={"rho": 0.05}, fsdp=True, fsdp_config={"version": 1})


# --- RW-SAM needs losses of samples ---


class OwnLoss(integration.SAMTrainer):  # type: ignore[misc]
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss


class Reduced(integration.SAMTrainer):  # type: ignore[misc]
    def compute_sample_losses(self, model: Any, inputs: Any) -> Any:
        return model(**inputs).loss


class OwnStep(transformers.Trainer):  # type: ignore[misc]
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class Behind(integration.SAMMixin, OwnStep):  # type: ignore[misc]
    pass


@pytest.mark.parametrize("way", ["sam=dict(beta=...)", "optimizers=(RWSAM(...), None)"])
@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (OwnLoss, {}, rf"needs the losses of samples, and OwnLoss\.compute_loss returns one number; {OVERRIDE}"),
        (
            integration.SAMTrainer,
            {"compute_loss_func": lambda *args, **kwargs: None},
            rf"and compute_loss_func returns one number; {OVERRIDE}",
        ),
        (Reduced, {}, r"compute_sample_losses must return the samples' losses, shape \(B,\).*reduction='none'"),
        (Behind, {}, r"makes a step of its own, without OwnStep\.training_step; use SAM: leave beta out"),
    ],
    ids=["compute_loss", "compute_loss_func", "compute_sample_losses", "training_step"],
)
def test_a_reduced_loss_is_refused(tmp_path: Path, way: str, kind: Any, options: dict[str, Any], words: str) -> None:
    model = gpt2()
    before = [param.clone() for param in model.parameters()]
    if way.startswith("sam"):
        options = {**options, "sam": RW}
    else:
        options = {**options, "optimizers": (RWSAM(model, torch.optim.SGD, lr=LR, **RW), None)}  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=words):
        trainer_of(tmp_path, kind, model=model, **options).train()
    assert all(map(torch.equal, model.parameters(), before))


def test_an_own_loss_with_losses_of_samples_is_taken(tmp_path: Path) -> None:
    class Both(OwnLoss):
        def compute_sample_losses(self, model: Any, inputs: Any) -> Tensor:
            labels = inputs.pop("labels")
            logits: Tensor = model(**inputs).logits
            return logits.square().mean((1, 2)) + labels.sum(1)

    trainer_of(tmp_path, Both, RW, max_steps=1).train()


def test_data_parallel_has_no_norms_of_samples(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, sam=RW, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match=r"DataParallel takes no norms of samples; start a process for each GPU: torchrun"):
        trainer.training_step(nn.DataParallel(trainer.model), texts()[0])


def test_a_model_without_known_losses_of_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, max_position_embeddings=16
    )
    trainer = trainer_of(tmp_path, sam=RW, model=transformers.BertForMaskedLM(config))
    with pytest.raises(NotImplementedError, match=rf"the samples' losses of BertForMaskedLM are not known here; {OVERRIDE}"):
        trainer.train()
