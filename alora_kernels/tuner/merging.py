"""Folding one fixed task of an adapter into the base weight, and taking it out again.

In:   an adapted layer whose task is set by `set_task` (or which has only one).
Out:  a base weight `W0 + s B A_task`; the layer then runs as its base.
Who:  PEFT's `merge_adapter`, `unmerge_adapter` and `merge_and_unload`, through `ALoRALayer` and `ALoRAModel`.

Soft routing weighs the experts anew for each token, so no single weight equals it. A weight that two modules
share must not be merged either: the second module would change with the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..routing import current_routing

TRIAL, TRIAL_ROWS = 0.25, 4  # of `_takes_weights`: what is quantised anew may be a quarter off

if TYPE_CHECKING:
    from .layer import ALoRALayer


def task_to_merge(layer: ALoRALayer, adapter: str) -> int:
    """The task of the adapter that a merge takes.

    Raises:
        ValueError: soft routing, no task set, or the base set as the task.
    """
    spec = layer.asymlora_spec[adapter]
    if spec.soft:
        raise ValueError(
            f"adapter {adapter!r} routes softly: it weighs the experts per token, so no single weight equals it and it"
            " cannot be merged; keep it as an adapter"
        )
    task = layer.asymlora_fixed.get(adapter, 0 if len(spec.tasks) == 1 else None)
    if task is None:
        raise ValueError(
            f"adapter {adapter!r} has the tasks {', '.join(spec.tasks)} and a merge takes one: choose it with"
            " alora_kernels.set_task(model, task)"
        )
    if task < 0:
        raise ValueError(f"adapter {adapter!r} is set to the base, which has nothing to merge: set_task another task")
    return task


def check_no_ids(layer: ALoRALayer) -> None:
    """Raise if a merged layer is called with task ids, which it could not obey.

    Raises:
        ValueError: with the remedy.
    """
    if current_routing() is not None and any(not layer.asymlora_spec[n].soft for n in layer.merged_adapters):
        merged = {n: layer.asymlora_spec[n].tasks[t] for n, t in layer.merged_tasks.items()}
        raise ValueError(f"task ids were given but {merged} is merged into the base: call unmerge_adapter() first")


@torch.no_grad()
def _merged_weight(layer: ALoRALayer, weight: Tensor, adapter: str, task: int, sign: int) -> Tensor:
    """weight + sign s B A_task, added in float32 or wider and rounded once."""
    spec = layer.asymlora_spec[adapter]
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = layer.asymlora_A[adapter].weight[task].to(wide), layer.asymlora_B[adapter].weight.to(wide)
    delta = (sign * spec.scaling) * (b @ a)
    if isinstance(layer.get_base_layer(), Conv1D):
        delta = delta.t()
    return (weight.to(wide) + delta.to(weight.device)).to(weight.dtype)


def _check_base(layer: ALoRALayer) -> None:
    """Raise unless a weight that is put into the base is the weight it computes with.

    Raises:
        ValueError: names the layer.
    """
    backend, base = layer.quantization_backend, layer.get_base_layer()
    name = f"{layer.rows_name or 'a layer'}, a {type(base).__name__},"
    remedy = "merge into a base that is loaded unquantised, or keep the adapter"
    if backend is not None and not backend.supports_merge:
        raise ValueError(
            f"{name} has weights quantised by {backend.backend_name}, which cannot be merged into: {remedy}"
        )
    plain = type(base) in (nn.Linear, Conv1D) and type(base._parameters.get("weight")) is nn.Parameter
    if backend is None and not plain and not _takes_weights(layer):
        raise ValueError(
            f"{name} does not compute with a weight that is put into it, so a merge would be lost or another than the"
            f" adapter: {remedy}"
        )


@torch.no_grad()
def _takes_weights(layer: ALoRALayer) -> bool:
    """Whether a random change of the base's weight is read back and changes its output as much; it is taken back."""
    base, old = layer.get_base_layer(), layer.get_base_weight().detach().clone()
    change = torch.randn_like(old, dtype=torch.float32) * (old.float().std().nan_to_num() + TRIAL)
    x = torch.randn(TRIAL_ROWS, layer.in_features, device=old.device).to(old.dtype)
    before = base(x).float()
    layer.set_base_weight((old + change).to(old.dtype))
    after, read = base(x).float(), layer.get_base_weight().float()
    layer.set_base_weight(old)
    wanted = x.float() @ (change if isinstance(base, Conv1D) else change.t())
    pairs = ((read - old.float(), change), (after - before, wanted))
    return all(bool((got - want).norm() < TRIAL * want.norm()) for got, want in pairs)


@torch.no_grad()
def merge(layer: ALoRALayer, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Fold each adapter's set task into the layer's base weight.

    Args:
        layer: the layer.
        safe_merge: raise, with the weight unchanged, if the sum is not finite.
        adapter_names: which adapters; None takes the active ones.

    Raises:
        ValueError: see `task_to_merge`; a sum that is not finite.
    """
    for adapter in check_adapters_to_merge(layer, adapter_names):
        if adapter not in layer.asymlora_spec:
            continue
        _check_base(layer)
        task = task_to_merge(layer, adapter)
        weight = _merged_weight(layer, layer.get_base_weight(), adapter, task, +1)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"merging adapter {adapter!r} gives weights that are not finite: the adapter is broken")
        layer.set_base_weight(weight)
        layer.merged_adapters.append(adapter)
        layer.merged_tasks[adapter] = task


@torch.no_grad()
def unmerge(layer: ALoRALayer) -> None:
    """Subtract what was merged, in the opposite order; the weight is the old one to rounding."""
    while layer.merged_adapters:
        adapter = layer.merged_adapters[-1]
        weight = _merged_weight(layer, layer.get_base_weight(), adapter, layer.merged_tasks[adapter], -1)
        layer.set_base_weight(weight)
        layer.merged_adapters.pop()
        layer.merged_tasks.pop(adapter)


def check_mergeable(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise, before any weight is touched, if some layer could not be merged.

    Args:
        model: the base model with its adapted layers.
        adapter_names: which adapters; None takes the active ones.

    Raises:
        ValueError: see `task_to_merge`; a weight shared by two modules.
    """
    from .layer import ALoRALayer

    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    for name, layer in model.named_modules():
        if not isinstance(layer, ALoRALayer):
            continue
        chosen = layer.active_adapters if adapter_names is None else adapter_names
        chosen = [n for n in chosen if n in layer.asymlora_spec and n not in layer.merged_adapters]
        for adapter in chosen:
            task_to_merge(layer, adapter)
        if chosen:
            _check_base(layer)
            _check_owner(name, owners.get(id(layer.get_base_layer()._parameters.get("weight")), []))


def _check_owner(name: str, owners: list[str]) -> None:
    others = sorted(set(owners) - {name})
    if others:
        raise ValueError(
            f"the weight of {name} is also that of {', '.join(others)}, and merging would change both: untie them first"
            " (load the model with tie_word_embeddings=False and copy the weight), or leave it out of target_modules"
        )
