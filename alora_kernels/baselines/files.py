"""Adapter folders of every method: PEFT's own where PEFT holds the method, else a state dict and a small JSON file.

`alora train` saves, `alora eval` loads. `method.json` lies beside the weights of every method and says which one it is,
so that the next run may save another method to the same folder; what the last one left is then removed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapters.method import SETTINGS, STATE, Method, read_method
from ..adapters.writer import save_adapter
from ..files import written_whole
from ..tuner.config import CONFIG, WEIGHTS, unwrapped
from .methods import adapt, take_out, trained


def save_method(model: Any, folder: Path, method: Method, record: Mapping[str, Any] | None = None) -> None:
    """Save what trains of a model that `adapt` returned; an adapter in the folder is replaced.

    `record` holds further facts for `method.json`, such as how the rank was chosen.
    """
    kept: tuple[str, ...]
    if method.in_peft:
        save_adapter(model, folder)
        kept = (CONFIG, WEIGHTS)
    else:
        kept = (STATE,)
    with written_whole(folder) as temporary:
        if not method.in_peft:
            tensors = {unwrapped(name): p.detach().cpu().contiguous() for name, p in trained(model).items()}
            save_file(tensors, Path(temporary, STATE), metadata={"format": "pt"})
        settings = {"settings": dataclasses.asdict(method), "record": dict(record or {})}
        Path(temporary, SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name in {CONFIG, WEIGHTS, STATE} - set(kept):
        Path(folder, name).unlink(missing_ok=True)


def load_method(model: nn.Module, folder: Path) -> Any:
    """Put the adapters of a folder by `save_method`, or of any PEFT adapter, into their base; gives what `adapt` does.

    Names and shapes are checked before a number is copied. Raises ValueError, naming the remedy, if there is no adapter
    or it does not read or fit; the model then has its `nn.Linear` back.
    """
    method = read_method(folder)
    if method is None or method.in_peft:
        return PeftModel.from_pretrained(model, str(folder))
    tensors = {unwrapped(name): tensor for name, tensor in _read_state(folder / STATE).items()}
    model = adapt(model, method)
    own = {unwrapped(name): parameter for name, parameter in trained(model).items()}
    try:
        _check_fit(folder / STATE, tensors, own)
    except ValueError:
        take_out(model)
        raise
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return model


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {SETTINGS} alone is no adapter; copy the whole folder") from None
    except SafetensorError as error:
        raise ValueError(f"{path} does not read ({error}): copy it again, or train again") from None


def _check_fit(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError unless the file has every parameter the model trains, in its shape, and no other."""
    remedy = "load it on the base it was trained on"
    for name, parameter in own.items():
        if name not in tensors:
            raise ValueError(f"{path} has no {name}, which this model needs: {remedy}")
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)} in the file but {tuple(parameter.shape)} here"
            raise ValueError(f"{path} does not fit: {name} is {shapes}; {remedy}")
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ValueError(
            f"{path} has {unknown[0]} and {len(unknown) - 1} more that this model has no place for: {remedy}"
        )
