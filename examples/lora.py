"""RW-SAM on LoRA's adapters: a frozen Llama of Hugging Face, made from its configuration, and peft's low-rank matrices.

    pip install "sam_kernels[transformers]" peft
    python examples/lora.py

Norms of every sample's gradient over the adapters come from the same backward pass (``GradNorms``, without rules of one's own).
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from sam_kernels import RWSAM
from sam_kernels.per_sample import GradNorms

LENGTH, STEPS, BATCH = 48, 60, 16


def sample_losses(model: Any, ids: Tensor) -> Tensor:  # (B, T) -> (B,)
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=LENGTH
    )  # fmt: skip
    adapters = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)
    text = torch.frombuffer(bytearray(topics["class"].encode("ascii", "replace")), dtype=torch.uint8).long()
    rows = text.unfold(0, LENGTH, LENGTH)
    trainable = [param for param in model.parameters() if param.requires_grad]
    print(f"{sum(param.numel() for param in trainable):,} of {sum(param.numel() for param in model.parameters()):,} parameters are trained")

    engine = GradNorms(model)
    with engine:
        losses = sample_losses(model, rows[:BATCH])
    norms = engine(losses, keep=False)
    print(f"gradient norms of {BATCH} samples: {norms.min():.3f} to {norms.max():.3f}")

    optimizer = RWSAM(model, torch.optim.AdamW, lr=1e-2, rho=0.05, beta=1.0, params=trainable)
    for step in range(STEPS + 1):
        batch = rows[torch.randint(0, len(rows), (BATCH,))]
        loss = optimizer.step(lambda batch=batch: sample_losses(model, batch))
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
