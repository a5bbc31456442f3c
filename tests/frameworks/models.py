"""Small models of Hugging Face, timm and peft, made from configurations: each with its losses of samples and an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BATCH", "MODELS", "Case"]

BATCH, LENGTH, VOCABULARY = 4, 7, 37
Case = tuple[nn.Module, Callable[[Any, Tensor], Tensor], Tensor]  # the model, its losses, the input
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = dict(num_key_value_heads=1, **_SIZES)
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def token_losses(model: Any, x: Tensor) -> Tensor:
    logits = model(input_ids=x).logits[:, -x.shape[1] :]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def seq2seq_losses(model: Any, x: Tensor) -> Tensor:
    logits = model(input_ids=x, decoder_input_ids=x).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def class_losses(model: Any, x: Tensor) -> Tensor:
    found = model(x)
    logits = found if isinstance(found, Tensor) else found.logits
    return F.cross_entropy(logits, torch.arange(len(x)) % 2, reduction="none")


def _hugging_face(model: str, config: str, losses: Callable[[Any, Tensor], Tensor], **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**options)), losses, ids()

    return make


def _vit() -> Case:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.ViTConfig(**sizes, num_labels=3, **_NO_DROPOUT)
    return transformers.ViTForImageClassification(config), class_losses, torch.randn(BATCH, 3, 16, 16)


def _timm(name: str, size: int = 32, *, evaluates: bool = False, **options: Any) -> Callable[[], Case]:
    """``evaluates``: random depth, or statistics of the batch, which would make samples depend on each other."""

    def make() -> Case:
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, pretrained=False, num_classes=3, **options)
        return model.train(not evaluates), class_losses, torch.randn(BATCH, 3, size, size)

    return make


def _peft(config: str, base: str = "llama", **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        peft = pytest.importorskip("peft")
        model, losses, x = MODELS[base]()
        model = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))
        for name, param in model.named_parameters():
            if "lora_B" in name and param.requires_grad:  # begins with zeros, with which others have no gradient
                nn.init.normal_(param, std=0.1)
        return model, losses, x

    return make


_LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
MODELS: dict[str, Callable[[], Case]] = {
    "gpt2": _hugging_face(
        "GPT2LMHeadModel",
        "GPT2Config",
        token_losses,
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=20,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": _hugging_face("LlamaForCausalLM", "LlamaConfig", token_losses, **_GROUPED),
    "qwen2": _hugging_face("Qwen2ForCausalLM", "Qwen2Config", token_losses, **_GROUPED),
    "qwen3": _hugging_face("Qwen3ForCausalLM", "Qwen3Config", token_losses, head_dim=8, **_GROUPED),
    "gemma": _hugging_face("GemmaForCausalLM", "GemmaConfig", token_losses, head_dim=8, **_GROUPED),
    "gemma3": _hugging_face("Gemma3ForCausalLM", "Gemma3TextConfig", token_losses, head_dim=8, **_GROUPED),
    "mistral": _hugging_face("MistralForCausalLM", "MistralConfig", token_losses, **_GROUPED),
    "phi3": _hugging_face("Phi3ForCausalLM", "Phi3Config", token_losses, **_GROUPED),
    "bert": _hugging_face("BertForSequenceClassification", "BertConfig", class_losses, **_SIZES, **_NO_DROPOUT),
    "bert, masked": _hugging_face("BertForMaskedLM", "BertConfig", token_losses, **_SIZES, **_NO_DROPOUT),
    "roberta": _hugging_face("RobertaForSequenceClassification", "RobertaConfig", class_losses, **_SIZES, **_NO_DROPOUT),
    "distilbert": _hugging_face(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        class_losses,
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=20,
        dropout=0,
        attention_dropout=0,
        seq_classif_dropout=0,
    ),
    "opt": _hugging_face(
        "OPTForCausalLM",
        "OPTConfig",
        token_losses,
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        word_embed_proj_dim=16,
        dropout=0,
        attention_dropout=0,
    ),
    "t5": _hugging_face(
        "T5ForConditionalGeneration",
        "T5Config",
        seq2seq_losses,
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0,
        decoder_start_token_id=0,
    ),
    "vit": _vit,
    "timm resnet": _timm("resnet10t", evaluates=True),
    "timm vit": _timm("vit_tiny_patch16_224", img_size=32),
    "timm convnext": _timm("convnext_atto"),
    "timm efficientnet": _timm("efficientnet_b0", evaluates=True),
    "timm mobilenet": _timm("mobilenetv3_small_050", evaluates=True),
    "timm nfnet": _timm("dm_nfnet_f0", evaluates=True),
    "timm nf_resnet": _timm("nf_resnet26"),
    "timm swin": _timm("swin_tiny_patch4_window7_224", size=64, img_size=64, window_size=2, evaluates=True),
    "lora": _peft("LoraConfig", **_LORA),
    "lora of gpt2": _peft("LoraConfig", "gpt2", r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    "lora of embeddings": _peft("LoraConfig", r=2, target_modules=["q_proj", "embed_tokens"]),
    "rslora": _peft("LoraConfig", use_rslora=True, **_LORA),
    "dora": _peft("LoraConfig", use_dora=True, **_LORA),
    "ia3": _peft("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt tuning": _peft("PromptTuningConfig", num_virtual_tokens=3),
    "prefix tuning": _peft("PrefixTuningConfig", num_virtual_tokens=3),
    "p-tuning": _peft("PromptEncoderConfig", num_virtual_tokens=3),
}
