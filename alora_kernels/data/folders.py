"""Whether a local folder is a model's, before transformers says it in its own words.

In:   a folder.
Out:  nothing, or an error that names what is missing and the remedy.
Who:  `models.load_model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json")
TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")


def check_model_folder(folder: Path) -> None:
    """Raise unless the folder holds a config, weights and a tokenizer.

    Raises:
        OSError: one of them is missing, or it is a file, or an adapter's folder.
    """
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
