"""`ALoRAModel`: the tuner that PEFT puts around a base model.

In:   a base model and an `ALoRAConfig`.
Out:  the model with `ALoRALinear` in the place of every target, and calls that carry `adapter_names` to them.
Who:  stock `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and transformers'
      `model.add_adapter`, all through PEFT's tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..routing import current_routing, route
from .checkpointing import CheckpointGuard
from .files import unwrapped
from .ids import BatchRouting, batch_shape, beams
from .layer import ALoRALayer, ALoRALinear
from .loading import fitted, named_now
from .merging import check_mergeable
from .probe import Finding, probe
from .selection import keep_dense, leave_out, listened_to, rows_of, targets_of, tell_fused_experts
from .targets import check_target, guard_gradients


class ALoRAModel(BaseTuner):
    """A base model with ALoRA adapters: several low-rank A per layer, one shared B.

    Args:
        model: the base model, changed in place.
        config: `ALoRAConfig`.
        adapter_name: the adapter's name.

    Source: Ban & Ji 2025, ALoRA. Not to be confused with Activated LoRA, which PEFT calls aLoRA.
    """

    prefix = "asymlora_"
    _paused: Sequence[nn.Parameter] = ()  # heads that train when adapters are enabled again
    tuner_layer_cls = ALoRALayer
    findings: dict[str, Finding] | None  # of `probe`: the same for all adapters of the model
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find out where rows are; refuse or leave out what cannot be adapted while the model is still untouched."""
        if getattr(self, "findings", None) is None:
            self.findings = probe(model)
        leave_out(model, peft_config, self.findings, peft_config.experts if peft_config.routing == "task" else 1)
        tell_fused_experts(model, peft_config)
        for name in targets_of(model, peft_config):
            parent = model.get_submodule(name.rpartition(".")[0])
            check_target(model.get_submodule(name), parent, name, peft_config.experts, peft_config.routing == "soft")

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Add the adapter to a target, which becomes an `ALoRALinear` unless it is one."""
        if parameter_name is not None:
            raise ValueError(f"ALoRA adapts modules, not the parameter {parameter_name!r}: use target_modules")
        check_target(target, parent, current_key, peft_config.experts, peft_config.routing == "soft")
        r, alpha = peft_config.settings_at(current_key)
        if isinstance(target, ALoRALinear):
            target.update_layer(adapter_name, r, alpha, peft_config)
            return
        new = ALoRALinear(target, adapter_name, r, alpha, peft_config, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)  # a further adapter starts inactive
        new.rows_name, new.rows = current_key, rows_of(current_key, parent, self.findings)
        if isinstance(parent, nn.TransformerEncoderLayer):
            new.register_forward_pre_hook(listened_to)
            keep_dense(self.model)
        self._replace_module(parent, target_name, new, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; an adapter that has the name already is replaced, also where the new one adapts nothing.

        Raises:
            ValueError: that adapter is merged.
        """
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
        heads = [
            p
            for m in self.model.modules()
            if isinstance(m, ModulesToSaveWrapper)
            for name in m.active_adapters
            for p in m.modules_to_save[name].parameters()
        ]
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
        if names is None:
            yield
            return
        with route(BatchRouting(names, self._active_tasks()), beams(self.model, kwargs)):
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
        shape = batch_shape(("inputs",), args, kwargs)
        if shape is not None:
            routing.check_batch(*shape)
        with route(routing.repeated(max(routing.repeats, beams(model, kwargs)))):
            return model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The base model's generate_batch, for calls that need no ids: one task, or the one that `set_task` fixed.

        Raises:
            ValueError: adapter_names, or a call inside of `route`: its batches change from step to step, in a thread.
        """
        if adapter_names is not None or current_routing() is not None:
            raise ValueError(
                "generate_batch mixes tokens of requests that come and go, so it cannot take adapter_names or the ids"
                " of `route`: use model.generate(..., adapter_names=[...]); alora_kernels.serving.Engine, which mixes"
                " tasks that way; or alora_kernels.set_task(model, task) for one task at a time"
            )
        model: Any = self.model
        return model.generate_batch(*args, **kwargs)

    def _active_tasks(self) -> dict[str, list[str]]:
        """Task names of each active adapter.

        Raises:
            ValueError: all of them route softly.
        """
        configs: dict[str, Any] = {name: self.peft_config[name] for name in self.active_adapters}
        tasks = {name: config.tasks for name, config in configs.items() if config.routing == "task"}
        if not tasks:
            raise ValueError(
                f"adapter_names was given, but {', '.join(configs)} has no tasks: its router chooses by itself, so"
                " leave adapter_names out"
            )
        return tasks

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the set task of the adapters into the base weights, after checking that every layer can.

        Args:
            adapter_names: None takes the active adapters.
            safe_merge: refuse sums that are not finite.

        Raises:
            ValueError: no task set, soft routing, or a weight that two modules share.
        """
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
        tensors = named_now(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        return fitted(model, adapter_name, config, remapped)
