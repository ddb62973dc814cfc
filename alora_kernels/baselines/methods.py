"""ALoRA and what it is compared with, each put into a model by one call: `adapt(model, Method("lora", ...))`.

For `alora train` (the recipe's key `method`), which trains the result by `ALoRATrainer`; ranks of equal cost; and the
folders that `alora train` saves and `alora eval` loads.

ALoRA and LoRA are PEFT models. HydraLoRA and a LoRA per task stay the base's own class with some `nn.Linear` replaced:
the targets are found by PEFT's own matching, so the same `target_modules` means the same layers for every method.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapters.method import EXPERTS, SETTINGS, STATE, Method, check_method, read_method
from ..adapters.writer import save_adapter
from ..files import written_whole
from ..modules.adapter import AdaptedLinear
from ..tuner.base_layer import base_of, features, hooked
from ..tuner.config import CONFIG, WEIGHTS, unwrapped
from ..tuner.experts import resolve_parameters, stacked_sizes
from ..tuner.layer import ALoRALayer
from ..tuner.probe import Finding, probe
from ..tuner.targets import check_target, leave_out, rows_of, targets_of, tell_unmatched
from .layers import HydraLinear, PerTaskLinear

Findings = Mapping[str, Finding] | None
Shapes = Sequence[tuple[int, int]]


def adapt(model: Any, method: Method) -> Any:
    """Put a method's adapters into a model, in place, and freeze everything else; the model begins as its base.

    Gives a `PeftModel` for alora, alora-soft and lora; for the others the same model with layers replaced, whose own
    `save_pretrained` then writes what trains and nothing else, as a checkpoint of PEFT does. Raises ValueError if no
    module matches or one cannot be adapted; the model is then as it was.
    """
    if any(isinstance(m, AdaptedLinear | BaseTunerLayer) for m in model.modules()):
        raise ValueError("the model has adapters already: load the base anew")
    if not method.name.startswith("alora"):  # whose model tells itself
        tell_unmatched(model, LoraConfig(**method.shared_options))
    if method.in_peft:
        return get_peft_model(model, method.peft_config())
    findings = probe(model)
    targets, heads = _replaceable(model, method, findings), _heads(model, method)
    model.requires_grad_(False)
    for name, linear in targets.items():
        layer = _layer(linear, method)
        layer.rows_name, layer.rows = name, rows_of(model, name, findings)
        model.set_submodule(name, layer)
    for head in heads:
        head.requires_grad_(True)
    if hasattr(model, "_keys_to_ignore_on_save"):  # transformers': checkpoints then hold what trains, and resume
        model._keys_to_ignore_on_save = set(model.state_dict()) - set(trained(model))
    return model


def _layer(linear: nn.Linear, method: Method) -> AdaptedLinear:
    """What takes the place of a linear layer; 16-bit adapters as float32, as PEFT's: bfloat16 loses steps of 1e-3."""
    settings: dict[str, Any] = {k: method.shared_options[k] for k in ("lora_alpha", "lora_dropout", "use_rslora")}
    layer: AdaptedLinear
    if method.name == "hydralora":
        layer = HydraLinear(linear, method.r, num_experts=method.num_experts, **settings)
    else:
        layer = PerTaskLinear(linear, method.r, tasks=method.tasks, **settings)
    for parameter in trained(layer).values():
        if parameter.dtype.itemsize == 2:
            parameter.data = parameter.data.float()
    return layer


def take_out(model: Any) -> None:
    """Give a model that `adapt` changed in place its `nn.Linear` back, with the same weights; they stay frozen."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear.train(layer.training))
    if hasattr(model, "_keys_to_ignore_on_save"):
        model._keys_to_ignore_on_save = set(type(model)._keys_to_ignore_on_save or ())


def _targets(model: nn.Module, method: Method, findings: Findings) -> dict[str, nn.Module]:
    """The modules that `target_modules` selects, by PEFT's matching, without those that ALoRA leaves alone."""
    config = LoraConfig(**method.shared_options)
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        default: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind or "")
        if default is None:
            raise ValueError(f"target_modules: there is no default for {kind or type(model).__name__}: name them")
        config.target_modules = default
    config.modules_to_save = [*method.trained_in_full]
    leave_out(model, config, findings, method.num_routed)
    found = {name: model.get_submodule(name) for name in targets_of(model, config)}
    if not found:
        raise ValueError(f"target_modules: {method.target_modules!r} matches no module of this model")
    return found


def _replaceable(model: nn.Module, method: Method, findings: Findings) -> dict[str, nn.Linear]:
    """The same, all of them plain `nn.Linear`."""
    targets: Any = _targets(model, method, findings)
    for name, module in targets.items():
        check_target(model, name, method.num_routed)
        if type(module) is not nn.Linear or hooked(module):
            kind = type(module).__name__ + (" with hooks" if type(module) is nn.Linear else "")
            raise ValueError(
                f"{name} is a {kind}: {method.name} replaces plain nn.Linear layers of an untouched model. Load the"
                " base without adapters, quantisation and offloading, name other target_modules, or use alora or lora"
            )
    return targets


def _heads(model: nn.Module, method: Method) -> list[nn.Module]:
    """The modules that are trained in full, none sharing weights with a frozen one; PEFT matches ends of names too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    heads = {n: m for n, m in model.named_modules() if n and n.endswith(method.trained_in_full)}
    for name, head in heads.items():
        shared = {owner for p in head.parameters() for owner in owners[id(p)] if not owner.startswith(f"{name}.")}
        if shared:
            raise ValueError(
                f"modules_to_save: {name} shares its weights with {min(shared)}, which would be trained too: untie them"
                " (tie_word_embeddings=False), or leave it out"
            )
    return list(heads.values())


def target_shapes(model: nn.Module, method: Method) -> list[tuple[int, int]]:
    """(in_features, out_features) of every layer the method would adapt, in the model's order.

    Stacked weights of X experts follow, X times as wide where each expert has an A or a B of its own.
    """
    config: Any = method.peft_config() if method.target_parameters else None
    stacks = stacked_sizes(model, resolve_parameters(model, config)).values() if config else ()
    wide_a, wide_b = method.experts_A == "each", method.experts_B == "each"
    experts = [(k * (x if wide_a else 1), n * (x if wide_b else 1)) for x, n, k in stacks]
    if method.target_parameters and method.target_modules is None:
        return experts
    return [features(base_of(module)) for module in _targets(model, method, probe(model)).values()] + experts


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers are trained, without the A that `train_only` leaves as they are."""
    layers = (module for module in model.modules() if isinstance(module, ALoRALayer))
    return sum(p.numel() for p in trained(model).values()) - sum(layer.left_alone for layer in layers)


def tasks_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the tasks whose ids the model takes, in order; empty where it takes none."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    tasks = getattr(configs.get(getattr(model, "active_adapter", "")), "tasks", None)
    if tasks:
        return tuple(tasks)
    return next((m.tasks for m in model.modules() if isinstance(m, AdaptedLinear)), ())


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    """The base without adapters, for the time of a block; of a plain model trained heads stay as they are."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
        return
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear) and m.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def as_large_as_alora(method: Method, shapes: Shapes) -> Method:
    """The same method and s, at the rank with which it trains about as many parameters as ALoRA of the present rank."""
    r = rank_for(method.name, method.r, shapes, tasks=len(method.tasks), num_experts=method.num_experts)
    grown = r / method.r
    return replace(method, r=r, lora_alpha=method.alpha * (math.sqrt(grown) if method.use_rslora else grown))


def parameters_of(method: str, r: int, shapes: Iterable[tuple[int, int]], *, tasks: int, num_experts: int) -> int:
    """How many parameters a method's adapters have; `method` is a key of `METHODS`, `shapes` has (K, N) of each layer.

    Formula, per layer of K inputs and N outputs, with T tasks and E experts:
        alora `T r K + N r`; alora-soft `E r K + N r + E K`; lora `r K + N r`; lora-per-task `T (r K + N r)`;
        hydralora `r K + E N r + E K`.
    """
    check_method(method)
    copies_of_a = {"alora": tasks, "lora-per-task": tasks, "alora-soft": num_experts}.get(method, 1)
    copies_of_b = {"lora-per-task": tasks, "hydralora": num_experts}.get(method, 1)
    routers = num_experts if method in EXPERTS else 0
    return sum(r * (copies_of_a * k + copies_of_b * n) + routers * k for k, n in shapes)


def rank_for(method: str, r: int, shapes: Shapes, *, tasks: int, num_experts: int) -> int:
    """The rank >= 1 with which a method trains as many parameters as task-routed ALoRA of rank r, to the nearest.

    Of two that are equally near the smaller. Other arguments as for `parameters_of`. Raises ValueError if there is no
    layer, or none but rank 0 is near: the message names the smallest r that will do.
    """
    if not shapes:
        raise ValueError("budget: no layer is adapted, so there is nothing to count: check target_modules")
    size = partial(parameters_of, shapes=shapes, tasks=tasks, num_experts=num_experts)
    if (found := _nearest(method, r, size)) >= 1:
        return found
    enough = next(more for more in count(r + 1) if _nearest(method, more, size) >= 1)
    raise ValueError(
        f"budget: {method} needs {size(method, 1)} trainable parameters at rank 1, far more than the"
        f" {size('alora', r)} of alora with r={r} and {tasks} tasks: give r of at least {enough}, or budget: rank"
    )


def _nearest(method: str, r: int, size: Callable[[str, int], int]) -> int:
    """The rank >= 0 whose count is nearest to ALoRA's."""
    target, fixed = size("alora", r), size(method, 0)
    below = max(0, (target - fixed) // (size(method, 1) - fixed))
    return min((below, below + 1), key=lambda rank: (abs(size(method, rank) - target), rank))


def save_method(
    model: Any,
    folder: Path,
    method: Method,
    record: Mapping[str, Any] | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Save what trains of a model that `adapt` returned: PEFT's own folder where PEFT holds the method, else a state.

    `method.json` lies beside the weights and says which method it is; `record` holds further facts for it, such as how
    the rank was chosen. `state` are the whole tensors of a sharded model. An adapter in the folder is replaced.
    """
    if method.in_peft:
        save_adapter(model, folder, state_dict=state)
    with written_whole(folder) as temporary:
        if not method.in_peft:
            kept = {name: p if state is None else state[name] for name, p in trained(model).items()}
            tensors = {unwrapped(name): p.detach().cpu().contiguous() for name, p in kept.items()}
            save_file(tensors, Path(temporary, STATE), metadata={"format": "pt"})
        settings = {"settings": asdict(method), "record": dict(record or {})}
        Path(temporary, SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name in (STATE,) if method.in_peft else (CONFIG, WEIGHTS):
        Path(folder, name).unlink(missing_ok=True)


def load_method(model: nn.Module, folder: Path) -> Any:
    """Put the adapters of a folder by `save_method`, or of any PEFT adapter, into their base; gives what `adapt` does.

    Names and shapes are checked before a number is copied. Raises ValueError, naming the remedy, if there is no adapter
    or it does not read or fit; the model then has its `nn.Linear` back.
    """
    method = read_method(folder)
    if method is None or method.in_peft:
        return PeftModel.from_pretrained(model, str(folder))
    path = folder / STATE
    try:
        tensors = {unwrapped(name): tensor for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {SETTINGS} alone is no adapter; copy the whole folder") from None
    except SafetensorError as error:
        raise ValueError(f"{path} does not read ({error}): copy it again, or train again") from None
    model = adapt(model, method)
    own = {unwrapped(name): parameter for name, parameter in trained(model).items()}
    if misfit := _misfit(tensors, own):
        take_out(model)
        raise ValueError(f"{path} {misfit} load it on the base it was trained on")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return model


def _misfit(tensors: Mapping[str, Tensor], own: Mapping[str, nn.Parameter]) -> str:
    """Why a file does not have every parameter the model trains, in its shape, and no other; nothing if it has."""
    for name, parameter in own.items():
        if name not in tensors:
            return f"has no {name}, which this model needs:"
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)} in the file but {tuple(parameter.shape)} here"
            return f"does not fit: {name} is {shapes};"
    unknown = sorted(set(tensors) - set(own))
    return f"has {unknown[0]} and {len(unknown) - 1} more that this model has no place for:" if unknown else ""
