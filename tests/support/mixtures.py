"""Tiny mixtures of experts, adapted: what tests of the tuner, of folders and of serving share."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from alora_kernels import ALoRAConfig

TASKS = ["red", "green", "blue"]
VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
}


def mixture(family: str = "Qwen3Moe", implementation: str | None = None, **settings: Any) -> Any:
    """A base model, always the same numbers, with experts of unit gain."""
    torch.manual_seed(7)
    config = getattr(tf, f"{family}Config")(**SIZES | FAMILIES[family] | settings)
    config._experts_implementation = implementation
    model = getattr(tf, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def adapted(base: Any = None, **settings: Any) -> PeftModel:
    """A mixture with adapters on its experts, B not zero."""
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 8, "tasks": TASKS, "target_parameters": "all-experts", "init_weights": False}
    return get_peft_model(mixture() if base is None else base, ALoRAConfig(**options | settings)).eval()


def tokens(rows: int, length: int = 6) -> torch.Tensor:
    """The same ids at every call."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
