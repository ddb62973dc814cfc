"""Tiny models built from a config (nothing is downloaded) and helpers shared by the integration tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from alora_kernels.tuner import ALoRAConfig, ALoRALayer

VOCAB = 64
IMAGE = VOCAB  # the id of llava's image token


def _seeded(cls: type, config: Any) -> Any:
    torch.manual_seed(1)
    return cls(config).eval()


def llama(layers: int = 2, **overrides: Any) -> Any:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"num_hidden_layers": layers, "vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": None}
    return _seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**(settings | overrides)))


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
    return _seeded(transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes, pad_token_id=0, eos_token_id=None))


def bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64, num_labels=3)
    return _seeded(transformers.BertForSequenceClassification, config)


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)
    return _seeded(transformers.T5ForConditionalGeneration, config)


def llava() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {"model_type": "llama", **sizes, "num_key_value_heads": 2, "vocab_size": VOCAB + 1, "pad_token_id": 0}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return _seeded(transformers.LlavaForConditionalGeneration, config)


class Mlp(nn.Module):
    """Two linear layers: the smallest model that PEFT takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def config(**overrides: Any) -> ALoRAConfig:
    """Two tasks, and B not zero so that adapters do something."""
    settings: dict[str, Any] = {"r": 4, "tasks": ["math", "code"], "target_modules": "all-linear"}
    settings |= {"init_weights": False, "task_type": "CAUSAL_LM"}
    if overrides.get("routing") == "soft":
        settings |= {"tasks": None, "num_experts": 3}
    return ALoRAConfig(**(settings | overrides))


def adapted(base: Any = None, **overrides: Any) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(llama() if base is None else base, config(**overrides)).eval()


def no_dropout(model: nn.Module) -> Any:
    """The model, whose training mode computes what evaluation does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tokens(rows: int = 2, length: int = 6, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def each_row_alone(model: Any, given: dict[str, Any], names: list[str], **tolerances: float) -> torch.Tensor:
    """The output of a mixed batch, after each of its rows gave the same in a batch of its own."""

    def run(rows: slice) -> torch.Tensor:
        out = model(**{key: value[rows] for key, value in given.items()}, adapter_names=names[rows])
        return getattr(out, "logits", out)

    mixed = run(slice(None))
    for row in range(len(names)):
        one = slice(row, row + 1)
        torch.testing.assert_close(mixed[one], run(one), **tolerances)
    return mixed


def layers_of(model: nn.Module) -> list[ALoRALayer]:
    return [m for m in model.modules() if isinstance(m, ALoRALayer)]


def adapter_grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n.removeprefix("base_model.model."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same bits under the same names, and not all of them zero."""
    assert one.keys() == other.keys()
    assert any(t.abs().max() > 0 for t in one.values())
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
