"""A small GPT-2 of Hugging Face, made from its configuration, trained on Python's help topics by AdamW and by SAM.

    pip install "sam_kernels[transformers]"
    python examples/finetune_transformers.py

It prints the loss on topics that were not trained on, in bits per byte, before training and after both.
"""

from __future__ import annotations

import math
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor

from sam_kernels.integrations.transformers import SAMTrainer

LENGTH, STEPS, BATCH, RHO = 64, 120, 16, 0.1
transformers.logging.set_verbosity_error()


def sequences(text: str) -> list[dict[str, Tensor]]:
    rows = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long().split(LENGTH)[:-1]
    return [{"input_ids": row, "labels": row} for row in rows]


def new_model() -> Any:
    transformers.set_seed(0)
    config = transformers.GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=96, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


@torch.no_grad()
def bits(model: Any, data: list[dict[str, Tensor]]) -> float:
    model.eval()
    ids = torch.stack([each["input_ids"] for each in data])
    return model(input_ids=ids, labels=ids).loss.item() / math.log(2)


def main() -> None:
    pages = sorted(topics.values(), key=len)[-24:]
    training, held_out = (sequences("\n".join(part)) for part in (pages[:6], pages[6:12]))
    print(f"before training: {bits(new_model(), held_out[:200]):.3f} bits per byte on held-out text")
    for name, rho in (("AdamW", 0.0), ("SAM", RHO)):
        model = new_model()
        with tempfile.TemporaryDirectory() as folder:
            args = transformers.TrainingArguments(
                folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=2e-3, lr_scheduler_type="cosine", seed=0,
                report_to=[], use_cpu=not torch.cuda.is_available(), save_strategy="no", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            SAMTrainer(model, args, train_dataset=training, sam={"rho": rho}).train()
        print(f"{name}: {bits(model.cpu(), held_out[:200]):.3f}")


if __name__ == "__main__":
    main()
