"""`ALoRALinear`: one adapted linear layer of a PEFT model; the base layer plus any number of ALoRA adapters.

In:   activations; the ids of the batch come from the routing context, the fixed task or the only task.
Out:  the base output plus the low-rank part of every active adapter.
Who:  `ALoRAModel` puts it in the place of a target module; PEFT calls its housekeeping methods.

A plain frozen `nn.Linear` and the first adapter are one fused op. Every other base (Conv1D, quantised,
hooked, subclassed) is called, and the low-rank part is added to what it returns.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from ..modules.init import reset_adapter_
from ..ops import trusted_delta, trusted_linear
from ..recompute import noted
from ..routing import Layout, Routing, current_routing
from . import merging
from .config import ALoRAConfig
from .ids import BatchRouting, constant_routing
from .targets import call_base, features, output_is_fresh, quantization_backend, takes_fused_op, undo_cpu_packing


@dataclass(frozen=True)
class AdapterSpec:
    """What one adapter is at one layer.

    Attributes:
        r: rank.
        scaling: s.
        dropout: probability of dropout.
        tasks: task names; empty for soft routing.
        experts: E.
    """

    r: int
    scaling: float
    dropout: float
    tasks: tuple[str, ...]
    experts: int

    @property
    def soft(self) -> bool:
        """Whether a learned router weighs the experts."""
        return not self.tasks


class LayerState(NamedTuple):
    """What a forward reads from the model besides its inputs."""

    disabled: bool
    active: tuple[str, ...]
    fixed: dict[str, int]


class Weight(nn.Module):
    """One adapter's matrices: a module of their own, for PEFT and what builds on it name adapters `*.NAME.weight`.

    Args:
        weight: the matrices.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        # PEFT's FSDP policy shards trained modules without children on their own, and gathers them in their forward
        # only; the layer reads the weight without calling the module
        self.read_by_parent = nn.Identity()


class ALoRALayer(BaseTunerLayer):
    """Storage and housekeeping of the adapters of one layer, in the terms PEFT knows.

    Attributes:
        asymlora_A: adapter -> `Weight` `[E, R, K]`.
        asymlora_B: adapter -> `Weight` `[N, R]`.
        asymlora_router: adapter -> `Weight` `[E, K]`, only for soft routing.
        asymlora_spec: adapter -> `AdapterSpec`.
        asymlora_fixed: adapter -> the task set by `set_task`; -1 is the base.
        rows_name: the layer's name in the model.
        rows: where the batch rows are in what the layer is given; None if nobody knows.
    """

    rows_name: str | None = None
    rows: Layout | None = None

    adapter_layer_names = ("asymlora_A", "asymlora_B", "asymlora_router")
    other_param_names = ("asymlora_spec", "asymlora_fixed")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        containers: tuple[Any, ...] = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.asymlora_A: MutableMapping[str, Weight]
        self.asymlora_A, self.asymlora_B, self.asymlora_router = containers
        self.asymlora_spec: dict[str, AdapterSpec] = {}
        self.asymlora_fixed: dict[str, int] = {}
        self._disable_adapters = False
        self._paused: list[Weight] = []
        self.merged_adapters: list[str] = []
        self.merged_tasks: dict[str, int] = {}
        self.quantization_backend = quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = features(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: ALoRAConfig) -> None:
        """Add an adapter to this layer; nothing is left of an earlier one of its name.

        Args:
            adapter_name: its name.
            r: its rank here.
            lora_alpha: numerator of its scaling here.
            config: the rest.
        """
        self.forget(adapter_name)
        tasks = tuple(config.tasks) if isinstance(config.tasks, list) else ()
        self.asymlora_spec[adapter_name] = AdapterSpec(
            r, config.scaling(r, lora_alpha), config.lora_dropout, tasks, config.experts
        )
        a = torch.empty(config.experts, r, self.in_features)
        b = torch.empty(self.out_features, r)
        router = None if tasks else torch.empty(config.experts, self.in_features)
        reset_adapter_(a, b, router)
        if not config.init_weights:
            nn.init.normal_(b, std=r**-0.5)
        dtype = self._adapter_dtype()
        self.asymlora_A[adapter_name], self.asymlora_B[adapter_name] = Weight(a.to(dtype)), Weight(b.to(dtype))
        if router is not None:
            self.asymlora_router[adapter_name] = Weight(router.to(dtype))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters and not config.inference_mode)

    def forget(self, adapter_name: str) -> None:
        """Remove all that is known of an adapter, whose place another of its name may take."""
        for part in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, part):
                del getattr(self, part)[adapter_name]

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT, but what was frozen before the adapters were disabled stays so when they are enabled again."""
        if enabled is not self._disable_adapters:
            return
        if not enabled:
            weights = [weight for part in self.adapter_layer_names for weight in getattr(self, part).values()]
            self._paused = [weight for weight in weights if weight.weight.requires_grad]
        for weight in self._paused:
            weight.requires_grad_(enabled)
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; said while adapters are disabled, it holds when they are enabled."""
        super().set_adapter(adapter_names, inference_mode)
        self._paused = []

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in PEFT; said while adapters are disabled, it holds when they are enabled."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        parts = [getattr(self, part) for part in self.adapter_layer_names]
        said = {weights[name] for weights in parts for name in names if name in weights}
        self._paused = [weight for weight in self._paused if weight not in said]

    def _adapter_dtype(self) -> torch.dtype:
        """The base's dtype, if it can hold an adapter; PEFT raises 16 bits to 32 later unless told not to."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the base's device. Its dtype stays, or loading would round float32 weights to bf16."""
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if target is None or target.type == "meta":
            return
        for name in self.adapter_layer_names:
            weights = getattr(self, name)
            if adapter_name in weights and not weights[adapter_name].weight.is_meta:
                weights[adapter_name].to(target)

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """x as it is: the ops take float32 adapters over 16-bit activations, so nothing is widened."""
        return x

    def get_base_weight(self) -> Tensor:
        """The base's weight as numbers, dequantised if need be."""
        undo_cpu_packing(self.get_base_layer())
        return super().get_base_weight()

    def _state(self) -> LayerState:
        return LayerState(self.disable_adapters, tuple(self.active_adapters), dict(self.asymlora_fixed))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the set task of each adapter into the base weight; see `merging.merge`."""
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again."""
        merging.unmerge(self)


class ALoRALinear(nn.Module, ALoRALayer):
    """A linear layer with ALoRA adapters.

    Args:
        base_layer: the module to adapt.
        adapter_name: name of the first adapter.
        r: its rank.
        lora_alpha: numerator of its scaling.
        config: the rest.
        quantization: what PEFT's quantisation backends need to know about the model.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: ALoRAConfig,
        **quantization: Any,
    ) -> None:
        super().__init__()
        ALoRALayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in torch; state dicts of the first versions name matrices `*.asymlora_A.NAME`, without `.weight`."""
        for part in self.adapter_layer_names:
            for name in getattr(self, part):
                if (key := f"{prefix}{part}.{name}") in state_dict:
                    state_dict[f"{key}.weight"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base output plus that of every active adapter.

        Args:
            x: activations `[..., K]`.
            args, kwargs: passed to the base layer.

        Raises:
            ValueError: a task-routed adapter with several tasks and no ids, ids that do not fit the batch, or ids
                for a merged layer.
        """
        state = noted(self, self._state, any(len(spec.tasks) > 1 for spec in self.asymlora_spec.values()))
        if state.disabled:
            self.unmerge()
            return call_base(self.base_layer, x, *args, **kwargs)
        if self.merged:
            merging.check_no_ids(self)
            return call_base(self.base_layer, x, *args, **kwargs)
        active = [name for name in state.active if name in self.asymlora_spec]
        if not active:
            return call_base(self.base_layer, x, *args, **kwargs)
        if takes_fused_op(self.base_layer) and not args and not kwargs:
            base, first = cast(nn.Linear, self.base_layer), active.pop(0)
            out = trusted_linear(x, base.weight, bias=base.bias, **self._adapter(first, x, state))
        else:
            out = call_base(self.base_layer, x, *args, **kwargs)
            if self.quantization_backend is not None:
                out = self.quantization_backend.maybe_clone_base_result(out)
            elif active and not output_is_fresh(self.base_layer):
                out = out.clone()  # hooks or the base itself may hold it, and the op writes into it
        for name in active:
            out = trusted_delta(x, base=out, **self._adapter(name, x, state))
        return out

    def _adapter(self, name: str, x: Tensor, state: LayerState) -> dict[str, Any]:
        """The op's arguments for one adapter."""
        spec = self.asymlora_spec[name]
        return {
            "lora_A": self.asymlora_A[name].weight,
            "lora_B": self.asymlora_B[name].weight,
            "router": self.asymlora_router[name].weight if spec.soft else None,
            "task_ids": None if spec.soft else self._ids(name, spec, x, state),
            "scaling": spec.scaling,
            "dropout_p": spec.dropout,
            "training": self.training,
        }

    def _ids(self, name: str, spec: AdapterSpec, x: Tensor, state: LayerState) -> Routing:
        """The batch's ids; without any, the fixed task or the only one."""
        routing = current_routing()
        if isinstance(routing, BatchRouting):
            routing = routing.for_tasks(spec.tasks)
        if routing is not None:
            return routing.at(self, self.rows)
        task = state.fixed.get(name, 0 if len(spec.tasks) == 1 else None)
        if task is None:
            raise ValueError(
                f"adapter {name!r} has the tasks {', '.join(spec.tasks)} and this call says none: pass"
                " adapter_names=[...] (one task per row) to the PEFT model, call the model inside"
                " `with alora_kernels.route(ids):`, or fix one with alora_kernels.set_task(model, task)"
            )
        return constant_routing(task, x.shape[:-1], x.device)

    def extra_repr(self) -> str:
        """Adapters and their tasks."""
        parts = [f"{n}: r={s.r}, " + (f"tasks={list(s.tasks)}" if s.tasks else f"num_experts={s.experts}")
                 for n, s in self.asymlora_spec.items()]  # fmt: skip
        return ", ".join(filter(None, [quantization_extra_repr(self), *parts]))
