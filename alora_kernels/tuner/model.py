"""`ALoRAModel`: the tuner that PEFT puts around a base model, and how a saved adapter gets into it.

PEFT and transformers find it in PEFT's tables. A file's tensors are renamed, and their rows put in order, to fit this
model, or an error names both sides before anything is written.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..routing import current_routing, route
from ..text import listed
from .base_layer import guard_gradients, refuse_split
from .config import PREFIX, ALoRAConfig, unwrapped
from .experts import inject_experts, resolve_parameters
from .layer import ALoRALayer, ALoRALinear, add_weight_to
from .parallel import is_split, refuse_copies, split_of
from .probe import Finding, probe
from .register import Source, adjust_peft, source_read
from .router import BatchRouting, CheckpointGuard, batch_shape, beams
from .targets import (
    check_target,
    keep_dense,
    leave_out,
    listened_to,
    rows_of,
    targets_of,
    tell_fused_experts,
    tell_unmatched,
)

DIMENSIONS = {
    "asymlora_A": "(experts, r, in_features)",
    "asymlora_B": "(out_features, r)",
    "asymlora_router": "(experts, in_features)",
}
OPTIMIZER = ("optimizer.pt", "optimizer.bin")  # of transformers' Trainer, beside an adapter or above its folder
_OURS = re.compile(r"(.+)\.asymlora_(?:A|B|router)(?:\..+)?")


class ALoRAModel(BaseTuner):
    """A base model, changed in place, with ALoRA adapters: every target becomes an `ALoRALinear`.

    Source: Ban & Ji 2025, ALoRA. Not to be confused with Activated LoRA, which PEFT calls aLoRA.
    """

    prefix = "asymlora_"
    _paused: Sequence[nn.Parameter] = ()  # heads that train when adapters are enabled again
    tuner_layer_cls = ALoRALayer
    findings: dict[str, Finding] | None  # of `probe`: the same for all adapters of the model
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Copies and pickles come by here too, and they are saved and called like the first."""
        adjust_peft()
        return super().__new__(cls)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """As in PEFT, but target_parameters alone mean these alone, for models with default modules too."""
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find out where rows are; refuse or leave out what cannot be adapted while the model is still untouched."""
        splits = [split_of(model, name) for name in targets_of(model, peft_config)] if is_split(model) else []
        if any(splits):
            refuse_copies(model, peft_config.modules_to_save)
        else:
            refuse_split(model)
        if getattr(self, "findings", None) is None:
            self.findings = probe(model)
        tasks = len(peft_config.tasks or ())
        adapted = resolve_parameters(model, peft_config)
        tell_unmatched(model, peft_config)
        leave_out(model, peft_config, self.findings, tasks)
        tell_fused_experts(model, peft_config, adapted)
        for name in targets_of(model, peft_config):
            check_target(model, name, tasks, split=True)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # stacked weights go another way: `_inject_parameters`
    ) -> None:
        """Add the adapter to a target, which becomes an `ALoRALinear` unless it is one."""
        check_target(self.model, current_key, len(peft_config.tasks or ()), split=True)
        r, scaling = peft_config.settings_at(current_key)
        if isinstance(target, ALoRALinear):
            target.update_layer(adapter_name, r, scaling, peft_config)
            return
        split = split_of(self.model, current_key)
        new = ALoRALinear(target, adapter_name, r, scaling, peft_config, split, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)  # a further adapter starts inactive
        new.rows_name, new.rows = current_key, rows_of(self.model, current_key, self.findings)
        if isinstance(parent, nn.TransformerEncoderLayer):
            new.register_forward_pre_hook(listened_to)
            keep_dense(self.model)
        self._replace_module(parent, target_name, new, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        return inject_experts(model, peft_config, adapter_name, self.active_adapters, empty=low_cpu_mem_usage)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; an adapter of that name is replaced, if not merged, also where the new one adapts nothing."""
        layers = [m for m in model.modules() if isinstance(m, ALoRALayer)]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(f"adapter {adapter_name!r} is merged into the base: call unmerge_adapter() first")
        before = [layer.asymlora_spec.get(adapter_name) for layer in layers]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for layer, spec in zip(layers, before, strict=True):
            if layer.asymlora_spec.get(adapter_name) is spec:
                layer.forget(adapter_name)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """As in PEFT, but modules_to_save that were frozen before adapters were disabled stay so."""
        wrappers = [m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)]
        heads = [p for m in wrappers for name in m.active_adapters for p in m.modules_to_save[name].parameters()]
        self._paused = [*self._paused, *(p for p in heads if p.requires_grad)]
        super()._enable_adapter_layers(enabled)
        if enabled:
            trained = {id(p) for p in self._paused}
            for p in heads:
                p.requires_grad_(id(p) in trained)
            self._paused = []

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        CheckpointGuard.install(model)
        guard_gradients(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route the batch by `adapter_names` for the time of one forward or generate call."""
        names = kwargs.get("adapter_names")
        if names is not None:
            with route(BatchRouting(names, self._active_tasks()), beams(self.model, kwargs)):
                yield
        elif torch.compiler.is_compiling() and (routing := current_routing()) is not None:
            with route(routing.in_graph()):
                yield
        else:
            yield

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The base model's forward; PEFT passes adapter_names on for some models (MPT) instead of routing by them."""
        with self._enable_peft_forward_hooks(adapter_names=adapter_names):
            return super().forward(*args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in its place. PEFT's own also copies `weight`, which a saved head that is a block has not."""
        setattr(parent, child_name, new_module)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, where the beams or returned sequences of a row share its id."""
        model: Any = self.model
        routing = current_routing()
        if routing is None:
            return model.generate(*args, **kwargs)
        if shape := batch_shape(("inputs",), args, kwargs):
            routing.check_batch(*shape)
        with route(routing.repeated(max(routing.repeats, beams(model, kwargs)))):
            return model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The base model's generate_batch, for calls that need no ids; a ValueError for others."""
        if adapter_names is not None or current_routing() is not None:
            raise ValueError(
                "generate_batch mixes tokens of requests that come and go, so it cannot take adapter_names or the ids"
                " of `route`: use model.generate(..., adapter_names=[...]); alora_kernels.serving.Engine, which mixes"
                " tasks that way; or alora_kernels.set_task(model, task) for one task at a time"
            )
        model: Any = self.model
        return model.generate_batch(*args, **kwargs)

    def _active_tasks(self) -> dict[str, list[str]]:
        """Task names of each active adapter; a ValueError if all of them route softly."""
        configs: dict[str, Any] = {name: self.peft_config[name] for name in self.active_adapters}
        tasks = {name: config.tasks for name, config in configs.items() if config.routing == "task"}
        if not tasks:
            raise ValueError(
                f"adapter_names was given, but {', '.join(configs)} has no tasks: its router chooses by itself, so"
                " leave adapter_names out"
            )
        return tasks

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """`ALoRALayer.merge` of every layer, after checking with `check_mergeable` that each can."""
        check_mergeable(self.model, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            check_mergeable(self.model, adapter_names)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        CheckpointGuard.remove(model)
        keep_dense(model, False)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As in PEFT; matrices are saved, and found again, by their names in the model before it was compiled."""
        name = super()._remove_adapter_name_from_key(key, adapter_name)
        return unwrapped(name) if ".asymlora_" in name else name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, for tensors by the names of earlier versions too; see `fitted`."""
        tensors = {unwrapped(key) if ".asymlora_" in key else key: tensor for key, tensor in state_dict.items()}
        add_weight_to(tensors, [key for key in tensors if key.rpartition(".")[2] in DIMENSIONS])
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        return fitted(model, adapter_name, config, remapped)


def check_mergeable(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise before any weight is touched if some layer cannot be merged, or shares its weight with another module."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(name.removesuffix(".base_layer"))
    for name, layer in model.named_modules():
        if not isinstance(layer, ALoRALayer):
            continue
        chosen = layer.active_adapters if adapter_names is None else adapter_names
        chosen = [n for n in chosen if n in layer.asymlora_spec and n not in layer.merged_adapters]
        for adapter in chosen:
            layer.task_to_merge(adapter)
        if not chosen:
            continue
        layer.check_takes_merge()
        key = getattr(layer, "parameter", "weight")  # of experts, whose stacked weights have layers within theirs
        weight = layer.get_base_layer()._parameters.get(key)
        others = sorted(owners[id(weight)] - {name.removesuffix(f".{key}")}) if weight is not None else []
        if others:
            raise ValueError(
                f"the weight of {name} is also that of {', '.join(others)}, and merging would change both: untie them"
                " first (load the model with tie_word_embeddings=False and copy the weight), or leave it out of"
                " target_modules"
            )


def fitted(
    model: nn.Module, adapter_name: str, config: ALoRAConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The file's tensors, by their names in the model, as this model has them: A's rows in the order of its tasks.

    A ValueError if they are no adapter for this model, or for its optimizer; an adapter made for the file goes then.
    """
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, ALoRALayer) and adapter_name in module.asymlora_spec
    }
    if not layers:
        raise ValueError(
            f"the model has no ALoRA layers for adapter {adapter_name!r}: add the adapter before loading it"
        )
    source = source_read.get()
    if source is None:
        _check_shapes(adapter_name, layers, tensors)
        return dict(tensors)
    try:
        saved = PeftConfig.from_pretrained(source.folder, **source.download)
        order = _rows(source, saved, config)
        _check_modules(source, layers, tensors)
        _check_shapes(adapter_name, layers, tensors)
        _check_scaling(source, saved, config, layers)
    except ValueError:
        peft_model: Any = model
        if source.new and len(peft_model.peft_config) > 1:
            peft_model.delete_adapter(adapter_name)
        elif source.new:  # the first goes with its layers
            peft_model.base_model.unload()
        raise
    a = f".asymlora_A.{adapter_name}.weight"
    return {key: t[order] if order and key.endswith(a) else t for key, t in tensors.items()}


def _rows(source: Source, saved: PeftConfig, config: ALoRAConfig) -> list[int] | None:
    """Which row of the file is which row of the model; None where they are the same."""
    if not isinstance(saved, ALoRAConfig):
        raise ValueError(
            f"{source.folder} holds a {saved.peft_type} adapter and adapter {source.adapter!r} is an ALoRA adapter:"
            " load it under a name of its own"
        )
    if saved.routing != config.routing:
        there, here = saved.routing, config.routing
        raise ValueError(f"{source} differ in routing, {there!r} there and {here!r} here: {source.remedy}")
    theirs: Any = saved.tasks or []
    ours: Any = config.tasks or []
    if theirs == ours:
        return None
    both = f"{', '.join(theirs)} there and {', '.join(ours)} here"
    if set(theirs) != set(ours):
        raise ValueError(
            f"{source} differ in their tasks, {both}, and rows of A go by the names of the tasks: make the adapter with"
            f" tasks={theirs}, or {source.remedy}"
        )
    folder = Path(source.folder)
    if any((place / name).exists() for place in (folder, folder.parent) for name in OPTIMIZER):
        raise ValueError(
            f"{source} have their tasks in another order, {both}, and the optimizer's state beside it goes by rows: go"
            f" on with tasks={theirs}"
        )
    return [theirs.index(task) for task in ours]


def _check_modules(source: Source, layers: Mapping[str, ALoRALayer], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file for other modules: PEFT would drop what it cannot place and leave the rest as it is."""
    found = {match[1].removeprefix(PREFIX) for key in tensors if (match := _OURS.fullmatch(key))}
    if found == layers.keys():
        return
    extra = found - layers.keys(), layers.keys() - found
    there, here = (listed(sorted(names), 5) or "none" for names in extra)
    raise ValueError(
        f"{source} differ in the modules they adapt, only there: {there}; only here: {here}; load it on the base it was"
        " trained on, with its own target_modules"
    )


def _check_shapes(adapter_name: str, layers: Mapping[str, ALoRALayer], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless every tensor has the shape of the parameter it is for."""
    for module, layer in layers.items():
        for part, meaning in DIMENSIONS.items():
            weights, key = getattr(layer, part), f"{module}.{part}.{adapter_name}.weight"
            found = tensors.get(key, tensors.get(f"{PREFIX}{key}"))
            if found is None or adapter_name not in weights or found.shape == weights[adapter_name].weight.shape:
                continue
            wanted = tuple(weights[adapter_name].weight.shape)
            raise ValueError(
                f"the adapter does not fit this base: {module}.{part} {meaning} is {tuple(found.shape)} in the file but"
                f" {wanted} here, where {module} is a {type(layer.get_base_layer()).__name__} with"
                f" in_features={layer.in_features}, out_features={layer.out_features}; load it on the base it was"
                " trained on"
            )


def _check_scaling(source: Source, saved: ALoRAConfig, config: ALoRAConfig, layers: Mapping[str, ALoRALayer]) -> None:
    """Raise unless every layer scales the file's matrices as they were trained."""
    for module, layer in layers.items():
        (_, theirs), ours = saved.settings_at(module), layer.asymlora_spec[source.adapter].scaling
        if math.isclose(theirs, ours, rel_tol=1e-9):
            continue
        settings = ", ".join(
            f"{key}={getattr(saved, key)!r} there and {getattr(config, key)!r} here"
            for key in ("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
            if getattr(saved, key) != getattr(config, key)
        )
        raise ValueError(
            f"{source} differ in the scaling of {module}, {theirs:g} there and {ours:g} here ({settings}): make the"
            f" adapter with the file's settings, or {source.remedy}"
        )
    there, here = saved.lora_dropout, config.lora_dropout
    if there != here:
        warnings.warn(f"{source} differ in lora_dropout, {there} there and {here} here, which stays", stacklevel=2)
