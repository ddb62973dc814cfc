"""Adapter folders: safetensors only, written whole, with the import line on the model card; which one is read.

In:   a PEFT model, or the folder PEFT is writing.
Out:  a folder that always holds a complete adapter, the old one or the new one.
Who:  `ALoRAConfig` (through stock `save_pretrained`) and users, by `save_adapter`.

PEFT writes weights straight into their final file, where an interruption destroys the previous adapter. Here every
file is written beside its target and renamed (`register` makes stock `save_pretrained` of ALoRA do so too).
`save_adapter` goes one step further: it renames only after all files are complete, weights before config.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS, PICKLE, CONFIG, CARD = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json", "README.md"
IMPORT = "import alora_kernels"
SECTION = f"""
## Loading

This is an asymmetric LoRA (ALoRA) adapter, PEFT type `ASYMLORA`. PEFT can load it after this import:

```python
{IMPORT}  # registers the adapter type
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/adapter")
```
"""


_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(name: str) -> str:
    """A module's or tensor's name in the plain model: without what torch.compile, FSDP and checkpointing put in.

    Args:
        name: e.g. `model._orig_mod.layers.0.q_proj`.
    """
    return _WRAPPERS.sub("", name)


class Source(NamedTuple):
    """What `PeftModel.load_adapter` reads.

    Attributes:
        folder: path or name on the Hub.
        download: what PEFT was told about the Hub.
        new: whether the adapter was made for it.
    """

    folder: str
    download: dict[str, Any]
    new: bool


_source: ContextVar[Source | None] = ContextVar("source of the adapter that is loaded", default=None)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Say where the tensors come from that are loaded inside the block."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def source_read() -> Source | None:
    """What is read at this moment, None where nobody said."""
    return _source.get()


def check_weights_file(folder: str | os.PathLike[str], saving: bool) -> None:
    """Raise if the folder holds pickled weights that were just written, or no others to load.

    Raises:
        ValueError: with the remedy.
    """
    pickled, tensors = Path(folder, PICKLE).exists(), Path(folder, WEIGHTS).exists()
    if pickled and saving:
        raise ValueError(
            f"ALoRA adapters are saved as safetensors only: leave safe_serialization at True and delete {PICKLE}"
            f" from {folder}"
        )
    if pickled and not tensors:
        raise ValueError(
            f"{folder} holds {PICKLE}, a pickle, and ALoRA adapters are read from safetensors only: convert it once"
            f" with safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), {WEIGHTS!r})"
        )


def describe_import(folder: str | os.PathLike[str]) -> None:
    """Add the import that loading needs to the folder's model card, once."""
    card = Path(folder, CARD)
    text = card.read_text(encoding="utf-8") if card.exists() else "---\nlibrary_name: peft\n---\n"
    if IMPORT not in text:
        with written_whole(folder) as new:
            Path(new, CARD).write_text(text.rstrip("\n") + "\n" + SECTION, encoding="utf-8")


def _rank(path: Path) -> tuple[int, str]:
    """Weights first, the config last: a config never describes weights that are not there yet."""
    return {WEIGHTS: 0, CONFIG: 2}.get(path.name, 1), str(path)


def _flush(path: Path) -> None:
    """Ask the system to put a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary folder to write into; its files replace those in `folder` when the block ends well.

    Files are renamed one by one, weights before config. If the block raises, the files in `folder` are untouched.
    The temporary folder lies inside `folder`: only within one file system is a rename atomic.

    Yields:
        The path to write to.
    """
    final = Path(folder).resolve()
    if final.is_file():
        raise ValueError(f"{folder} is a file: give the path of a folder")
    final.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=final))
    try:
        yield str(temporary)
        written = sorted((p for p in temporary.rglob("*") if p.is_file()), key=_rank)
        for path in written:
            _flush(path)
        for path in written:
            target = final / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        if os.name == "posix":
            _flush(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_adapter(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save the adapters of a PEFT model so that an interruption leaves the previous ones whole.

    Args:
        model: what `get_peft_model` returned.
        folder: where; created if needed. Adapters not called "default" go to subfolders, as in PEFT.
        kwargs: further arguments of `PeftModel.save_pretrained`.

    Raises:
        ValueError: `safe_serialization=False`.

    Example:
        >>> save_adapter(model, "runs/step-100")
        >>> PeftModel.from_pretrained(base, "runs/step-100")
    """
    if not kwargs.get("safe_serialization", True):
        raise ValueError("ALoRA adapters are saved as safetensors only: leave safe_serialization at True")
    with written_whole(folder) as temporary:
        card = Path(folder, CARD)
        if card.exists():  # PEFT updates an existing card instead of starting over
            shutil.copy(card, temporary)
        model.save_pretrained(temporary, **kwargs)
