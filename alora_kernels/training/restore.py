"""Adapters of a checkpoint back into the model that is trained, each under its own name.

In:   the model and a folder that `Trainer` saved: the adapter "default" in it, others in folders of their names.
Out:  the same adapters with the file's weights; which are active and which are trained stays as it was.
Who:  `ALoRATrainer`, when it resumes and when it ends with the best model.

transformers looks for the best model in the folder itself only, reads it into the first active adapter whatever that is
called, leaves one adapter active, and cannot read an adapter that `model.add_adapter` made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict

from ..tuner.files import Source, reading


def load_adapters(model: Any, folder: str) -> bool:
    """Read every adapter of the model that the checkpoint holds.

    Args:
        model: a PEFT model, or one with adapters that transformers added; others are left alone.
        folder: the checkpoint.

    Returns:
        Whether the checkpoint is one of adapters; everything else is Trainer's.

    Raises:
        ValueError: an active adapter is not in the checkpoint, or what is there does not fit it.
    """
    names = list(getattr(model, "peft_config", None) or ())
    if not names or not Path(folder).is_dir():
        return False
    wrapped, active = isinstance(model, PeftModel), active_adapters(model)
    # the folder itself holds "default"; transformers saves its one active adapter there, whatever it is called
    root = "default" if "default" in names and wrapped else active[0] if len(active) == 1 else ""
    places = {name: Path(folder, name) if _holds(Path(folder, name)) else Path(folder) for name in names}
    found = {name: place for name, place in places.items() if _holds(place) and (place != Path(folder) or name == root)}
    if not found and not any(_holds(place) for place in (Path(folder), *Path(folder).iterdir())):
        return False
    missing = [name for name in active if name not in found]
    if missing:
        raise ValueError(
            f"{folder} has no weights of the active adapter {', '.join(missing)}: make the adapter under the name that"
            " it was saved with, or another one active"
        )
    for name, place in found.items():
        trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        _load(model, name, place, wrapped)
        for parameter, value in trained.items():
            parameter.requires_grad_(value)
    return True


def active_adapters(model: Any) -> list[str]:
    """Names of the active adapters; an attribute in PEFT, a method in transformers."""
    active = getattr(model, "active_adapters", [])
    return list(active() if callable(active) else active)


def _holds(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def _load(model: Any, name: str, place: Path, wrapped: bool) -> None:
    if wrapped:
        model.load_adapter(str(place), name, is_trainable=True)
        return
    with reading(Source(str(place), {}, new=False)):
        result: Any = set_peft_model_state_dict(model, load_peft_weights(str(place), device="cpu"), adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(f"{place} has weights that adapter {name!r} does not: {', '.join(result.unexpected_keys[:5])}")
