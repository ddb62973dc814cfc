"""Writing adapter folders: whole or not at all, so a folder always holds a complete adapter, old or new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from ..files import written_whole
from ..tensor_file import in_order, sums
from ..tuner.config import CARD, CONFIG, WEIGHTS
from .config import AdapterConfig


def save_adapter(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save the adapters of a PEFT model so that an interruption leaves the previous ones whole.

    Adapters not called "default" go to subfolders, as in PEFT. kwargs are those of `PeftModel.save_pretrained`; without
    safetensors (`safe_serialization=False`) it is a ValueError.

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


def target_names(configs: Iterable[AdapterConfig], modules: Iterable[str]) -> list[str]:
    """`target_modules` that select these modules without any other setting: servers besides PEFT know no more of them.

    The names that all the configs list, where a list alone says it; otherwise the modules' full names.
    """
    exact = sorted(modules)
    names, *others = {config.targets for config in configs}
    if names is None or others or not all(any(m == t or m.endswith(f".{t}") for t in names) for m in exact):
        return exact
    return sorted(names)


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise unless the folder is free, or holds nothing but an adapter that may be replaced."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the path of a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not empty and holds no adapter: give another folder")
    if not overwrite:
        raise ValueError(
            f"{folder} holds an adapter: say overwrite (--overwrite) to replace it, or another folder (--out)"
        )


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: PeftConfig, card: str) -> int:
    """Write a folder from tensors by their names in the file; how many bytes its weights have."""
    with written_whole(folder) as temporary:
        dense = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(dense, Path(temporary, WEIGHTS), metadata={"format": "pt"} | sums(dense))
        in_order(Path(temporary, WEIGHTS))
        config.save_pretrained(temporary)
        Path(temporary, CARD).write_text(card, encoding="utf-8")
    return (folder / WEIGHTS).stat().st_size
