"""`ALoRALinear`: one adapted linear layer of a PEFT model; the base layer plus any number of ALoRA adapters.

A plain frozen `nn.Linear` and the first adapter are one fused op. Every other base (Conv1D, quantised, hooked,
subclassed) is called, and the low-rank part is added to what it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..modules.adapter import delta_weight, reset_adapter_
from ..ops import trusted_alora
from ..ops.checks import check_whole
from ..ops.dispatch import prepare
from ..recompute import replayed_state
from ..routing import Layout, Routing, constant_routing, current_routing
from .base_layer import call_base, features, hooked, quantization_backend, takes_fused_op, undo_cpu_packing
from .config import ALoRAConfig
from .parallel import MATRICES, Split

TRIAL, TRIAL_ROWS = 0.25, 4  # of `_takes_weights`: what is quantised anew may be a quarter off


@dataclass(frozen=True)
class AdapterSpec:
    """What one adapter is at one layer: R, s, dropout, task names (none: a learned router weighs the experts), E."""

    r: int
    scaling: float
    dropout: float
    tasks: tuple[str, ...]
    experts: int

    @property
    def soft(self) -> bool:
        """Without tasks."""
        return not self.tasks


class TrainedPart(NamedTuple):
    """Which tasks of an adapter train, and whether B does."""

    rows: tuple[int, ...]
    b: bool


class _OnlyRows(torch.autograd.Function):
    """A itself, to which only some rows of the gradient go back; zeros keep the others for any optimiser's hooks."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: Sequence[int]) -> Tensor:
        ctx.rows = list(rows)
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
        kept = torch.zeros_like(da)
        kept[ctx.rows] = da[ctx.rows]
        return kept, None


class LayerState(NamedTuple):
    """What a forward reads from the model besides its inputs."""

    disabled: bool
    active: tuple[str, ...]
    fixed: dict[str, int]


class Weight(nn.Module):
    """One adapter's matrices: a module of their own, for PEFT and what builds on it name adapters `*.NAME.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        # PEFT's FSDP policy shards trained modules without children on their own, and gathers them in their forward
        # only; the layer reads the weight without calling the module
        self.read_by_parent = nn.Identity()


def add_weight_to(tensors: dict[str, Any], names: Iterable[str]) -> None:
    """Name matrices as today: the first versions wrote `*.asymlora_A` and `*.asymlora_A.NAME`, without `.weight`."""
    for name in names:
        if name in tensors:
            tensors[f"{name}.weight"] = tensors.pop(name)


class ALoRALayer(BaseTunerLayer):
    """Storage, housekeeping and merging of the adapters of one layer, all by the adapter's name, as PEFT knows them."""

    rows_name: str | None = None  # in the model
    rows: Layout | None = None  # where the batch rows are in its input; None if nobody knows
    adapter_layer_names = ("asymlora_A", "asymlora_B", "asymlora_router")
    other_param_names = ("asymlora_spec", "asymlora_fixed", "asymlora_trained")

    def __init__(self, base_layer: nn.Module, split: Split | None = None, **quantization: Any) -> None:
        self.in_features, self.out_features = self._stand_on(base_layer)
        containers: tuple[Any, ...] = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.asymlora_A: MutableMapping[str, Weight]  # [E, R, K]; B [N, R]; for soft routing a router [E, K]
        self.asymlora_A, self.asymlora_B, self.asymlora_router = containers
        self.asymlora_spec: dict[str, AdapterSpec] = {}
        self.asymlora_fixed: dict[str, int] = {}  # the task that `set_task` chose; -1 is the base
        self.asymlora_trained: dict[str, TrainedPart] = {}  # what `train_only` chose
        self._disable_adapters = False
        self._paused: list[tuple[str, Weight]] = []  # these train when adapters are enabled again
        self.merged_tasks: dict[str, int] = {}
        self.split = split
        self.quantization_backend = quantization_backend(self.get_base_layer(), **quantization)

    def _stand_on(self, base_layer: nn.Module) -> tuple[int, int]:
        """Keep the module below; its K and N."""
        self.base_layer = base_layer
        return features(self.get_base_layer())

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """In the order they were merged."""
        return list(self.merged_tasks)

    def update_layer(self, adapter_name: str, r: int, scaling: float, config: ALoRAConfig) -> None:
        """Add an adapter to this layer, with its R and s here; nothing is left of an earlier one of its name."""
        self.forget(adapter_name)
        tasks = tuple(config.tasks) if isinstance(config.tasks, list) else ()
        self.asymlora_spec[adapter_name] = AdapterSpec(r, scaling, config.lora_dropout, tasks, config.experts)
        a, b = self._new_matrices(r, config)
        router = None if tasks else torch.empty(config.experts, self.in_features)
        reset_adapter_(a, b, router)
        if not config.init_weights:
            nn.init.normal_(b, std=r**-0.5)
        _, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        fits = base_dtype is not None and base_dtype.is_floating_point and base_dtype.itemsize > 1
        dtype = base_dtype if fits else torch.float32  # PEFT raises 16 bits to 32 later unless told not to
        self.asymlora_A[adapter_name], self.asymlora_B[adapter_name] = Weight(a.to(dtype)), Weight(b.to(dtype))
        if router is not None:
            self.asymlora_router[adapter_name] = Weight(router.to(dtype))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if self.split is not None:
            for name, weights in zip(MATRICES, (self.asymlora_A, self.asymlora_router, self.asymlora_B), strict=True):
                if adapter_name in weights:
                    weights[adapter_name].weight = self.split.part(name, weights[adapter_name].weight.detach())
        prepare(self.asymlora_A[adapter_name].weight.device)
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters and not config.inference_mode)

    def _new_matrices(self, r: int, config: ALoRAConfig) -> tuple[Tensor, Tensor]:
        """A and B of an adapter, without numbers."""
        return torch.empty(config.experts, r, self.in_features), torch.empty(self.out_features, r)

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
            named = [item for part in self.adapter_layer_names for item in getattr(self, part).items()]
            self._paused = [(name, weight) for name, weight in named if weight.weight.requires_grad]
        for _, weight in self._paused:
            weight.requires_grad_(enabled)
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; said while adapters are disabled, it holds when they are enabled."""
        super().set_adapter(adapter_names, inference_mode)
        self._paused = []
        self._freeze_b()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in PEFT; said while adapters are disabled, it holds when they are enabled."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._paused = [(name, weight) for name, weight in self._paused if name not in names]
        self._freeze_b()

    def train_only(self, adapter_name: str, part: TrainedPart | None) -> None:
        """Train a part of an adapter and leave the rest as it is; None trains all of it."""
        self.asymlora_trained.pop(adapter_name, None)
        self.set_requires_grad(adapter_name)
        if part is not None:
            self.asymlora_trained[adapter_name] = part
            self._freeze_b()

    @property
    def left_alone(self) -> int:
        """Numbers of A that require gradients and belong to tasks that do not train."""
        parts = ((self.asymlora_A[name].weight, part) for name, part in self.asymlora_trained.items())
        return sum(a[0].numel() * (len(a) - len(part.rows)) for a, part in parts if a.requires_grad)

    def _freeze_b(self) -> None:
        for name, part in self.asymlora_trained.items():
            if not part.b:
                self.asymlora_B[name].requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the base's device. Its dtype stays, or loading would round float32 weights to bf16."""
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if target is None or target.type == "meta":
            return
        for name in self.adapter_layer_names:
            weights = getattr(self, name)
            if adapter_name in weights and not weights[adapter_name].weight.is_meta:
                weights[adapter_name].to(target)

    def get_base_weight(self) -> Tensor:
        """The base's weight as numbers, dequantised if need be."""
        undo_cpu_packing(self.get_base_layer())
        return super().get_base_weight()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold each adapter's set task into the base weight, `W0 + s B A_task`; arguments as in PEFT.

        Raises as `task_to_merge` and `check_takes_merge`; with safe_merge also where the sum is not finite. The weight
        is then unchanged.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.asymlora_spec:
                continue
            self.check_takes_merge()
            task = self.task_to_merge(adapter)
            weight = self._merged_weight(adapter, task, +1)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(
                    f"merging adapter {adapter!r} gives weights that are not finite: the adapter is broken"
                )
            self.set_base_weight(weight)
            self.merged_tasks[adapter] = task

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what was merged, in the opposite order; the weight is the old one to rounding."""
        for adapter, task in reversed(list(self.merged_tasks.items())):
            self.set_base_weight(self._merged_weight(adapter, task, -1))
            del self.merged_tasks[adapter]

    def _merged_weight(self, adapter: str, task: int, sign: int) -> Tensor:
        """The base's weight + sign s B A_task, added in float32 or wider and rounded once."""
        weight, scaling = self.get_base_weight(), sign * self.asymlora_spec[adapter].scaling
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = delta_weight(self.asymlora_A[adapter].weight[task], self.asymlora_B[adapter].weight, scaling, wide)
        if isinstance(self.get_base_layer(), Conv1D):
            delta = delta.t()
        return (weight.to(wide) + delta.to(weight.device)).to(weight.dtype)

    def task_to_merge(self, adapter: str) -> int:
        """The task of the adapter that a merge takes; a ValueError for soft routing, no task set, or the base set."""
        spec = self.asymlora_spec[adapter]
        if spec.soft:
            raise ValueError(
                f"adapter {adapter!r} routes softly: it weighs the experts per token, so no single weight equals it and"
                " it cannot be merged; keep it as an adapter"
            )
        task = self.asymlora_fixed.get(adapter, 0 if len(spec.tasks) == 1 else None)
        if task is None:
            raise ValueError(
                f"adapter {adapter!r} has the tasks {', '.join(spec.tasks)} and a merge takes one: choose it with"
                " alora_kernels.set_task(model, task)"
            )
        if task < 0:
            raise ValueError(
                f"adapter {adapter!r} is set to the base, which has nothing to merge: set_task another task"
            )
        return task

    def check_takes_merge(self) -> None:
        """Raise a ValueError, naming the layer, unless a weight put into the base is the one it computes with."""
        backend, base = self.quantization_backend, self.get_base_layer()
        name = f"{self.rows_name or 'a layer'}, a {type(base).__name__},"
        remedy = "merge into a base that is loaded unquantised and whole, or keep the adapter"
        if self.split is not None:
            raise ValueError(f"{name} is split over processes, and merging takes a whole weight: {remedy}")
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"{name} has weights quantised by {backend.backend_name}, which cannot be merged into: {remedy}"
            )
        plain = type(base) in (nn.Linear, Conv1D) and type(base._parameters.get("weight")) is nn.Parameter
        if backend is None and not plain and not self._takes_weights():
            raise ValueError(
                f"{name} does not compute with a weight that is put into it, so a merge would be lost or another than"
                f" the adapter: {remedy}"
            )

    @torch.no_grad()
    def _takes_weights(self) -> bool:
        """Whether a random change of the base's weight is read back and changes its output as much; taken back."""
        base, old = self.get_base_layer(), self.get_base_weight().detach().clone()
        change = torch.randn_like(old, dtype=torch.float32) * (old.float().std().nan_to_num() + TRIAL)
        x = torch.randn(TRIAL_ROWS, self.in_features, device=old.device).to(old.dtype)
        before = base(x).float()
        self.set_base_weight((old + change).to(old.dtype))
        after, read = base(x).float(), self.get_base_weight().float()
        self.set_base_weight(old)
        wanted = x.float() @ (change if isinstance(base, Conv1D) else change.t())
        pairs = ((read - old.float(), change), (after - before, wanted))
        return all(bool((got - want).norm() < TRIAL * want.norm()) for got, want in pairs)

    def _check_no_ids(self) -> None:
        """Raise if the merged layer is called with task ids, which it could not obey."""
        if current_routing() is not None and any(not self.asymlora_spec[n].soft for n in self.merged_adapters):
            merged = {n: self.asymlora_spec[n].tasks[t] for n, t in self.merged_tasks.items()}
            raise ValueError(f"task ids were given but {merged} is merged into the base: call unmerge_adapter() first")

    def _state(self) -> LayerState:
        return LayerState(self.disable_adapters, tuple(self.active_adapters), dict(self.asymlora_fixed))

    def _a(self, name: str) -> Tensor:
        """A of an adapter; gradients reach the tasks that train."""
        a, part = self.asymlora_A[name].weight, self.asymlora_trained.get(name)
        return a if part is None else _OnlyRows.apply(a, part.rows)  # type: ignore[no-any-return]

    def _ids(self, name: str, tasks: tuple[str, ...], x: Tensor, state: LayerState) -> Routing:
        """The batch's ids; without any, the task that `set_task` fixed, else the only one."""
        routing = current_routing()
        if routing is not None:
            return routing.for_tasks(tasks).at(self, self.rows)
        task = state.fixed.get(name, 0 if len(tasks) == 1 else None)
        if task is None:
            raise ValueError(
                f"adapter {name!r} has the tasks {', '.join(tasks)} and this call says none: pass"
                " adapter_names=[...] (one task per row) to the PEFT model, call the model inside"
                " `with alora_kernels.route(ids):`, or fix one with alora_kernels.set_task(model, task);"
                " in TRL: alora_kernels.integrations.trl.with_tasks(SFTTrainer)(...) and a column `task` in the dataset"
            )
        return constant_routing(task, x.shape[:-1], x.device)


class ALoRALinear(nn.Module, ALoRALayer):
    """A linear layer with ALoRA adapters; `quantization` is what PEFT's backends need to know about the model."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        scaling: float,
        config: ALoRAConfig,
        split: Split | None = None,
        **quantization: Any,
    ) -> None:
        super().__init__()
        ALoRALayer.__init__(self, base_layer, split, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, scaling, config)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        add_weight_to(state_dict, [f"{prefix}{p}.{n}" for p in self.adapter_layer_names for n in getattr(self, p)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y `[..., N]` from x `[..., K]`: the base output plus that of every active adapter.

        args and kwargs go to the base layer. Raises ValueError for an adapter with several tasks and no ids, ids that
        do not fit the batch, or ids for a merged layer.
        """
        state = replayed_state(self, self._state, any(len(spec.tasks) > 1 for spec in self.asymlora_spec.values()))
        active: list[str] = []
        if state.disabled:
            self.unmerge()
        elif self.merged:
            self._check_no_ids()
        else:
            active = [name for name in state.active if name in self.asymlora_spec]
        if not active:
            return call_base(self.base_layer, x, *args, **kwargs)
        if takes_fused_op(self.base_layer) and not args and not kwargs:
            base, first = cast(nn.Linear, self.base_layer), active.pop(0)
            out = trusted_alora(x, weight=base.weight, bias=base.bias, **self._adapter(first, x, state))
        else:
            if self.split is None:
                check_whole(self.base_layer._parameters, self.rows_name)
            out = call_base(self.base_layer, x, *args, **kwargs)
            if self.quantization_backend is not None:
                out = self.quantization_backend.maybe_clone_base_result(out)
            elif type(self.base_layer) not in (nn.Linear, Conv1D) or hooked(self.base_layer):
                out = out.clone()  # hooks or the base itself may hold it, and the op writes into it
        for name in active:
            adapter = self._adapter(name, x, state)
            out = trusted_alora(x, base=out, **adapter) if self.split is None else self.split.delta(x, out, adapter)
        return out

    def _adapter(self, name: str, x: Tensor, state: LayerState) -> dict[str, Any]:
        """The op's arguments for one adapter."""
        spec = self.asymlora_spec[name]
        return {
            "lora_A": self._a(name),
            "lora_B": self.asymlora_B[name].weight,
            "router": self.asymlora_router[name].weight if spec.soft else None,
            "task_ids": None if spec.soft else self._ids(name, spec.tasks, x, state),
            "scaling": spec.scaling,
            "dropout_p": spec.dropout,
            "training": self.training,
        }

    def extra_repr(self) -> str:
        """Adapters and their tasks."""
        parts = [f"{n}: r={s.r}, " + (f"tasks={list(s.tasks)}" if s.tasks else f"num_experts={s.experts}")
                 for n, s in self.asymlora_spec.items()]  # fmt: skip
        return ", ".join(filter(None, [quantization_extra_repr(self), *parts]))
