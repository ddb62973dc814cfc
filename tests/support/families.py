"""Tiny random models of many families, adapted for two tasks, and rows that fit them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn

from alora_kernels.tuner import ALoRAConfig

TASKS = ["a", "b"]
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 2,
}  # fmt: skip
ENCODER = {**WIDTH, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}

# family: sizes of its config, modules to adapt
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Bert": (ENCODER, ["query", "value"]),
    "Roberta": (ENCODER, ["query", "value"]),
    "XLMRoberta": (ENCODER, ["query", "value"]),
    "Camembert": (ENCODER, ["query", "value"]),
    "Esm": ({**ENCODER, "pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "absolute"}, ["query"]),
    "MPNet": (ENCODER, ["q", "v"]),
    "Electra": (ENCODER, ["query", "value"]),
    "Albert": (ENCODER, ["query", "value"]),
    "DebertaV2": (
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
        ["query_proj", "value_proj"],
    ),
    "DistilBert": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, ["q_lin", "v_lin"]),
    "ModernBert": ({**ENCODER, **SPECIAL}, ["Wqkv"]),
    "Llama": (ENCODER, ["q_proj", "down_proj"]),
    "Gemma": ({**ENCODER, "num_key_value_heads": 2, "head_dim": 8}, ["q_proj", "down_proj"]),
    "GPT2": (GPT, ["c_attn"]),
    "GPTNeoX": (ENCODER, ["query_key_value"]),
    "OPT": ({**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}, ["q_proj", "v_proj"]),
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, ["query_key_value"]),
    "BioGpt": (ENCODER, ["q_proj", "fc1"]),
    "Qwen2Moe": (
        {
            **ENCODER, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        ["q_proj"],
    ),
    "RecurrentGemma": (
        {**ENCODER, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16},
        ["linear_y", "q_proj"],
    ),
    "T5": (T5, ["q", "wi"]),
    "UMT5": (T5, ["q", "wi"]),
    "Bart": (BART, ["q_proj", "fc1"]),
    "MBart": (BART, ["q_proj", "fc1"]),
    "Pegasus": (BART, ["q_proj", "fc1"]),
    "Marian": ({**BART, "pad_token_id": 0, "eos_token_id": 1}, ["q_proj", "fc1"]),
}  # fmt: skip
SUFFIXES = {
    "lm": ("ForCausalLM", "LMHeadModel"),
    "seq2seq": ("ForConditionalGeneration", "MTModel"),
    "masked": ("ForMaskedLM",),
    "row": ("ForSequenceClassification",),
    "token": ("ForTokenClassification",),
}


def head_class(family: str, head: str) -> Any:
    """The family's class with this head, None where it has none."""
    return next((c for s in SUFFIXES[head] if (c := getattr(transformers, family + s, None)) is not None), None)


def build(family: str, head: str, **config: Any) -> nn.Module:
    """A random model of the family, adapted for `TASKS`, whose tasks differ; no dropout, large weights."""
    sizes, targets = FAMILIES[family]
    made = getattr(transformers, f"{family}Config")(**{"vocab_size": 64, "num_labels": 3, **sizes, **config})
    if head == "row" and made.pad_token_id is None:
        made.pad_token_id = 0
    torch.manual_seed(0)
    base = head_class(family, head)(made)
    model = get_peft_model(base, ALoRAConfig(r=2, tasks=TASKS, target_modules=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or name == "p"):
                setattr(module, name, 0.0)
    return model.eval()


def rows(model: nn.Module, head: str, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of different lengths in turn of both tasks; sequence-to-sequence labels are longer and shorter than they."""
    generator = torch.Generator().manual_seed(seed)
    config = model.get_base_model().config
    made = []
    for i, length in enumerate([9, 3, 6, 2]):
        ids = torch.randint(10, 60, (length,), generator=generator).tolist()
        if config.is_encoder_decoder:
            ids[-1] = config.eos_token_id
        target = torch.randint(10, 60, ([4, 11, 2, 6][i],), generator=generator).tolist()
        labels = {"lm": list(ids), "row": i % 3, "seq2seq": target}.get(head, [token % 3 for token in ids])
        made.append({"input_ids": ids, "labels": labels, "task": TASKS[i % 2]})
    return made


def alone(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The row in a batch of one as a user would write it: no padding, no mask, no positions."""
    labels = {"labels": torch.tensor([row["labels"]])} if "labels" in row else {}
    return {"input_ids": torch.tensor([row["input_ids"]]), **labels}
