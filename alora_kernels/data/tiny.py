"""A tiny random Llama, for tests that need a model's shape and not its knowledge.

In:   nothing; `load_model("tiny-random")`.
Out:  a two-layer Llama with 64 features and random weights, always the same ones, and a tokenizer.
Who:  `models.load_model`.

The tokenizer is SmolLM2's where its package is installed. Elsewhere it is built in memory: one token per byte, plus
one per label word of the built-in tasks with its leading space, so that they are as short there too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from alora_kernels.data.convert import PACKAGE, smollm2_tokenizer_folder
from alora_kernels.data.packages import is_installed
from alora_kernels.data.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tiny_random(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The tiny random Llama and its tokenizer; leaves torch's global random state alone."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: PreTrainedTokenizerBase
    if is_installed(PACKAGE) and is_installed("gguf"):
        tokenizer = AutoTokenizer.from_pretrained(smollm2_tokenizer_folder())
    else:
        tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # fewer than heads, as in SmolLM2: k_proj and v_proj are not square
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.to(dtype), tokenizer  # type: ignore[arg-type]  # transformers wraps `to` and loses self


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 256 bytes, `<|pad|>`, `<|eos|>` and the label words, built without any file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = sorted({label for task in TASKS.values() for label in task.labels})
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")
