"""Reading a saved adapter: rows go by the names of their tasks, and what does not fit is refused before a write.

In:   the tensors of an adapter file, where PEFT reads them from, and the model they are meant for.
Out:  the tensors by their names and with their rows in the model's order, or an error that names both sides.
Who:  `ALoRAModel`, on PEFT's way from the file to `load_state_dict`.

Into an adapter that is there already PEFT takes the tensors alone and leaves the folder's config unread, so that only
shapes would be compared; `register` therefore lets `PeftModel.load_adapter` say which folder it reads. A bare state
dict has no config: of it the shapes are compared.

An adapter that was created only to be loaded is taken out again, so that a failed
`PeftModel.from_pretrained(base, folder)` gives the base back as it was.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from .config import ALoRAConfig
from .files import Source, source_read, unwrapped
from .layer import ALoRALayer

DIMENSIONS = {
    "asymlora_A": "(experts, r, in_features)",
    "asymlora_B": "(out_features, r)",
    "asymlora_router": "(experts, in_features)",
}
PREFIX = "base_model.model."
OPTIMIZER = ("optimizer.pt", "optimizer.bin")  # of transformers' Trainer, beside an adapter or above its folder
_BARE = re.compile(r"\.asymlora_(A|B|router)$")
_OURS = re.compile(r"(.+)\.asymlora_(?:A|B|router)(?:\..+)?")


def named_now(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter file by their names of today.

    The first files said `asymlora_A`, without `.weight`, and those of compiled models had `_orig_mod.` in their names.

    Args:
        tensors: by their names in the file.
    """
    found = {unwrapped(key) if ".asymlora_" in key else key: tensor for key, tensor in tensors.items()}
    return {f"{key}.weight" if _BARE.search(key) else key: tensor for key, tensor in found.items()}


def fitted(
    model: nn.Module, adapter_name: str, config: ALoRAConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors as this model has them: A's rows in the order of its tasks.

    Args:
        model: the PEFT model, or a base model with injected layers.
        adapter_name: the adapter that is loaded.
        config: the adapter's.
        tensors: by their names in the model.

    Raises:
        ValueError: no such adapter; other shapes; from a folder: another kind of adapter, other tasks, modules or
            scalings, or another order of tasks where an optimizer goes on.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ALoRALayer) and adapter_name in m.asymlora_spec}
    if not layers:
        raise ValueError(
            f"the model has no ALoRA layers for adapter {adapter_name!r}: add the adapter before loading it"
        )
    source = source_read()
    try:
        order = None
        if source is not None:
            saved = PeftConfig.from_pretrained(source.folder, **source.download)
            order = _rows(source, saved, adapter_name, config)
            _check_modules(source, adapter_name, layers, tensors)
        _check_shapes(adapter_name, layers, tensors)
        if source is not None:
            _check_scaling(source, saved, adapter_name, config, layers)
    except ValueError:
        if source is not None and source.new:
            _take_out(model, adapter_name)
        raise
    if order is None:
        return dict(tensors)
    stacked = re.compile(rf"\.asymlora_A\.{re.escape(adapter_name)}\.weight$")
    return {key: t[order] if stacked.search(key) else t for key, t in tensors.items()}


def _rows(source: Source, saved: PeftConfig, adapter_name: str, config: ALoRAConfig) -> list[int] | None:
    """Which row of the file is which row of the model; None where they are the same."""
    if not isinstance(saved, ALoRAConfig):
        raise ValueError(
            f"{source.folder} holds a {saved.peft_type} adapter and adapter {adapter_name!r} is an ALoRA adapter: load"
            " it under a name of its own"
        )
    if saved.routing != config.routing:
        raise ValueError(f"{_both(source, adapter_name)} differ in routing, {saved.routing!r} there and"
                         f" {config.routing!r} here: {_remedy(source)}")  # fmt: skip
    theirs: Any = saved.tasks or []
    ours: Any = config.tasks or []
    if theirs == ours:
        return None
    if set(theirs) != set(ours):
        raise ValueError(
            f"{_both(source, adapter_name)} differ in their tasks, {', '.join(theirs)} there and {', '.join(ours)}"
            f" here, and rows of A go by the names of the tasks: make the adapter with tasks={theirs}, or"
            f" {_remedy(source)}"
        )
    folder = Path(source.folder)
    if any((place / name).exists() for place in (folder, folder.parent) for name in OPTIMIZER):
        raise ValueError(
            f"{_both(source, adapter_name)} have their tasks in another order, {', '.join(theirs)} there and"
            f" {', '.join(ours)} here, and the optimizer's state beside it goes by rows: go on with"
            f" tasks={theirs}"
        )
    return [theirs.index(task) for task in ours]


def _remedy(source: Source) -> str:
    """What gives the file's adapter as it was saved."""
    return "leave config= out, so that the file's own is taken" if source.new else "load it under a name of its own"


def _both(source: Source, adapter_name: str) -> str:
    return f"{source.folder} and adapter {adapter_name!r}"


def _check_modules(
    source: Source, adapter_name: str, layers: Mapping[str, ALoRALayer], tensors: Mapping[str, Tensor]
) -> None:
    """Refuse a file for other modules: PEFT would drop what it cannot place and leave the rest as it is."""
    found = {match[1].removeprefix(PREFIX) for key in tensors if (match := _OURS.fullmatch(key))}
    wanted = {name.removeprefix(PREFIX) for name in layers}
    if found == wanted:
        return
    there, here = (_some(names) for names in (found - wanted, wanted - found))
    raise ValueError(
        f"{_both(source, adapter_name)} differ in the modules they adapt, only there: {there}; only here: {here}; load"
        " it on the base it was trained on, with its own target_modules"
    )


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"


def _check_shapes(adapter_name: str, layers: Mapping[str, ALoRALayer], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless every tensor has the shape of the parameter it is for."""
    for name, layer in layers.items():
        for part, meaning in DIMENSIONS.items():
            weights = getattr(layer, part)
            key = f"{name}.{part}.{adapter_name}.weight"
            found = next((tensors[k] for k in (key, f"{PREFIX}{key}") if k in tensors), None)
            if found is None or adapter_name not in weights or found.shape == weights[adapter_name].weight.shape:
                continue
            wanted = tuple(weights[adapter_name].weight.shape)
            module = name.removeprefix(PREFIX)
            raise ValueError(
                f"the adapter does not fit this base: {module}.{part} {meaning} is {tuple(found.shape)} in the file but"
                f" {wanted} here, where {module} is a {type(layer.get_base_layer()).__name__} with"
                f" in_features={layer.in_features}, out_features={layer.out_features}; load it on the base it was"
                " trained on"
            )


def _check_scaling(
    source: Source, saved: ALoRAConfig, adapter_name: str, config: ALoRAConfig, layers: Mapping[str, ALoRALayer]
) -> None:
    """Raise unless every layer scales the file's matrices as they were trained."""
    for name, layer in layers.items():
        module, spec = name.removeprefix(PREFIX), layer.asymlora_spec[adapter_name]
        theirs = saved.scaling(*saved.settings_at(module))
        if math.isclose(theirs, spec.scaling, rel_tol=1e-9):
            continue
        settings = ", ".join(
            f"{key}={getattr(saved, key)!r} there and {getattr(config, key)!r} here"
            for key in ("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
            if getattr(saved, key) != getattr(config, key)
        )
        raise ValueError(
            f"{_both(source, adapter_name)} differ in the scaling of {module}, {theirs:g} there and {spec.scaling:g}"
            f" here ({settings}): make the adapter with the file's settings, or {_remedy(source)}"
        )
    if saved.lora_dropout != config.lora_dropout:
        warnings.warn(f"{_both(source, adapter_name)} differ in lora_dropout, {saved.lora_dropout} there and"
                      f" {config.lora_dropout} here, which stays", stacklevel=2)  # fmt: skip


def _take_out(model: Any, adapter_name: str) -> None:
    """Take out an adapter that was made for a file that does not fit; the first one goes with its layers."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        model.base_model.unload()
