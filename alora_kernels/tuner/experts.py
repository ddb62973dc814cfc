"""`ALoRAExperts`: the experts of a mixture in a PEFT model, each with its task's A and a B that all tasks share.

transformers keeps experts as stacked parameters of one module, called with what the model's router chose. This layer
stands before that module, reads its weights and computes what it computes plus the low-rank part. Its two children
hold the adapters and are called like the parameters, so names, patterns and files are as for layers:
`mlp.experts.gate_up_proj.asymlora_A.default.weight`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import Tensor, nn

from ..ops.checks import WHOLE, check_whole
from ..ops.dispatch import choose
from ..ops.experts import SortedRows, experts_linear, experts_shrink, recomputed, sort_by_expert
from ..ops.functional import autocast
from ..recompute import replayed_state
from ..routing import RowGroups
from ..text import listed
from .base_layer import hooked
from .config import ALL_EXPERTS, ALoRAConfig
from .layer import ALoRALayer, LayerState, add_weight_to

#: classes of transformers whose experts are computed as `ALoRAExperts.forward` does, each held to it by a test
FAMILIES = ("MixtralExperts", "Qwen3MoeExperts", "GptOssExperts", "DeepseekV3Experts", "OlmoeExperts")
PARAMETERS = ("gate_up_proj", "down_proj")
BASE_LAYER = "base_layer"  # in the names of what is inside of an adapted module


class StackedWeight(nn.Module, ALoRALayer):
    """One stacked parameter of the experts, `[X, N, K]` or transposed `[X, K, N]`, and its adapters.

    A is `[T, R, K]` (`experts_A="shared"`) or `[T, X, R, K]`, B `[X, N, R]` or `[N, R]` (`experts_B="shared"`).
    """

    rows = "blocks"  # transformers flattens tokens before it routes them

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        nn.Module.__init__(self)
        self.parameter = parameter
        ALoRALayer.__init__(self, experts)

    def _stand_on(self, base_layer: nn.Module) -> tuple[int, int]:
        object.__setattr__(self, "base_layer", base_layer)  # whose child this is not: it stays that of the parent
        self.num_experts, first, second = self.get_base_weight().shape
        return (first, second) if self.transposed else (second, first)

    @property
    def transposed(self) -> bool:
        """Whether the parameter is `[X, K, N]`."""
        return bool(getattr(self.base_layer, "is_transposed", False))

    def get_base_weight(self) -> Tensor:
        """The parameter."""
        return getattr(self.base_layer, self.parameter)  # type: ignore[no-any-return]

    def set_base_weight(self, weight: Tensor) -> None:
        """Put other numbers into the parameter."""
        self.get_base_weight().data = weight

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = self.get_base_weight()
        return weight.device, weight.dtype

    def _new_matrices(self, r: int, config: ALoRAConfig) -> tuple[Tensor, Tensor]:
        each_a = (self.num_experts,) if config.experts_A == "each" else ()
        each_b = (self.num_experts,) if config.experts_B == "each" else ()
        return torch.empty(config.experts, *each_a, r, self.in_features), torch.empty(*each_b, self.out_features, r)

    def factors(self, adapter: str, task: int) -> tuple[Tensor, Tensor]:
        """A `[X, R, K]` and B `[X, N, R]` of one task, whoever shares them."""
        a, b = self.asymlora_A[adapter].weight[task], self.asymlora_B[adapter].weight
        return a.expand(self.num_experts, *a.shape[-2:]), b.expand(self.num_experts, *b.shape[-2:])

    def _merged_weight(self, adapter: str, task: int, sign: int) -> Tensor:
        """As for a layer, expert by expert: one delta at a time."""
        weight, scaling = self.get_base_weight(), sign * self.asymlora_spec[adapter].scaling
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = torch.empty_like(weight)
        for w, out, a, b in zip(weight, merged, *self.factors(adapter, task), strict=True):
            delta = scaling * (b.to(wide) @ a.to(wide))
            out.copy_(w.to(wide) + (delta.t() if self.transposed else delta))
        return merged

    def check_takes_merge(self) -> None:
        """Nothing to check: the layer computes with the parameter itself."""

    def active(self, state: LayerState) -> list[str]:
        """The active adapters that adapt this parameter; none beside what is merged into it, as for a layer."""
        return [] if self.merged else [name for name in state.active if name in self.asymlora_spec]

    def tokens(self, x: Tensor, state: LayerState) -> dict[str, RowGroups]:
        """The tokens `[M, H]` of the batch by task, for each active adapter."""
        specs = ((name, self.asymlora_spec[name]) for name in self.active(state))
        return {n: self._ids(n, s.tasks, x, state).groups(x.shape[:-1], s.experts, x.device) for n, s in specs}

    def low_rank(
        self, x: Tensor, rows: SortedRows, tokens: Mapping[str, RowGroups], key: str, per_token: bool = False
    ) -> tuple[Tensor, Tensor]:
        """h `[S, R]` and B of all active adapters, side by side; x are sorted rows, or with `per_token` tokens."""
        parts = []
        for name, groups in tokens.items():
            spec = self.asymlora_spec[name]
            h = experts_shrink(
                x, self._a(name), rows, groups, scaling=spec.scaling, dropout_p=spec.dropout, training=self.training,
                per_token=per_token, backend=key,
            )  # fmt: skip
            parts.append((h, self.asymlora_B[name].weight))
        if not parts:  # the other stacked weight alone has adapters
            return x.new_zeros(len(rows.token), 1), x.new_zeros(self.num_experts, self.out_features, 1)
        if len(parts) == 1:
            return parts[0]
        every = (self.num_experts, -1, -1)
        return torch.cat([h for h, _ in parts], 1), torch.cat([b.expand(*every) for _, b in parts], 2)

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, rows: SortedRows, key: str
    ) -> Tensor:
        """y `[S, N]` of sorted rows."""
        return experts_linear(x, weight, h, b, rows, bias=bias, transposed=self.transposed, backend=key)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        add_weight_to(state_dict, [f"{prefix}{p}.{n}" for p in self.adapter_layer_names for n in getattr(self, p)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Adapters and their tasks."""
        return ", ".join(f"{n}: r={s.r}, tasks={list(s.tasks)}" for n, s in self.asymlora_spec.items())


class ALoRAExperts(nn.Module):
    """The experts of one block with ALoRA adapters.

    Formula: `y_e = W_e x + bias_e + s B_e A_{t(,e)} x` for both stacked weights, the model's own gate between them.
    """

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer, self.rows_name = base_layer, name
        self.gate_up_proj, self.down_proj = (StackedWeight(base_layer, parameter) for parameter in PARAMETERS)
        for stack in self.stacks:
            stack.rows_name = f"{name}.{stack.parameter}"

    @property
    def stacks(self) -> tuple[StackedWeight, StackedWeight]:
        """The two holders of adapters."""
        return self.gate_up_proj, self.down_proj

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in this layer's place."""
        if merge:
            for stack in self.stacks:
                stack.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def _check(self, x: Tensor, weights: Sequence[Tensor | None]) -> None:
        """Raise a ValueError for what came after the adapter and what this layer would pass over without a word."""
        base, why, present = self.base_layer, "", [w for w in weights if w is not None]
        if base._is_expert_parallel:
            why = f"is split over processes by expert, and {WHOLE}"
        elif hooked(base):
            why = "has hooks, or is offloaded, which adapted experts would not ask: put hooks on the block around it"
        elif torch.is_grad_enabled() and any(w.requires_grad for w in present):
            why = "trains, and adapted experts give their base no gradient: freeze it, or train it without the adapter"
        elif any(w.device != x.device for w in present):
            why = f"has weights on another device than its input, {x.device}: move the model there"
        if why:
            raise ValueError(f"{self.rows_name} {why}")

    def _states(self) -> tuple[LayerState, LayerState]:
        return self.gate_up_proj._state(), self.down_proj._state()

    def forward(self, hidden_states: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """The block's output `[M, H]` from tokens `[M, H]` and the router's choice of k experts and their weights.

        A row that no expert takes (an id below 0 or from X on) adds nothing. Raises ValueError as a layer does.
        """
        up, down = self.stacks
        many = any(len(spec.tasks) > 1 for stack in self.stacks for spec in stack.asymlora_spec.values())
        states = replayed_state(self, self._states, many)
        for stack in self.stacks:
            if states[0].disabled:
                stack.unmerge()
            else:
                stack._check_no_ids()
        if states[0].disabled or not any(s.active(state) for s, state in zip(self.stacks, states, strict=True)):
            return self.base_layer(hidden_states, expert_ids, expert_weights)  # type: ignore[no-any-return]
        base: Any = self.base_layer
        weights = [getattr(base, name, None) for name in (*PARAMETERS, *(f"{p}_bias" for p in PARAMETERS))]
        self._check(hidden_states, weights)
        x, *frozen = autocast(hidden_states, *weights)
        x = x.to(frozen[0].dtype)
        rows, key = sort_by_expert(expert_ids, up.num_experts), choose(x, None)
        groups = [stack.tokens(x, state) for stack, state in zip(self.stacks, states, strict=True)]
        h, b = up.low_rank(x, rows, groups[0], key, per_token=True)
        gate_up = up.product(rows.of_tokens(x), frozen[0], frozen[2], h, b, rows, key)
        hidden = recomputed(base._apply_gate, gate_up)
        h, b = down.low_rank(hidden, rows, groups[1], key)
        out = down.product(hidden, frozen[1], frozen[3], h, b, rows, key)
        weight = expert_weights.reshape(-1)[rows.source].masked_fill(rows.ids >= up.num_experts, 0)
        out = rows.restored(out * weight.unsqueeze(1))
        return out.view(*expert_ids.shape, out.shape[1]).sum(1).to(hidden_states.dtype)


def _is_known(module: nn.Module) -> bool:
    """Whether it is a class of `FAMILIES` and computes as transformers wrote it."""
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.") and kind.forward.__module__.startswith("transformers.")
    return own and kind.__name__ in FAMILIES


class _Match(NamedTuple):
    """A parameter that `target_parameters` names: the module that has it, and that module's parent."""

    name: str  # of the parameter in the plain model
    module: nn.Module
    block: nn.Module


def _matches(model: nn.Module, targets: Any) -> Iterator[_Match]:
    """The parameters of the plain model that are called so, by their names' ends as in PEFT, or all of `FAMILIES`."""
    for name, module in model.named_modules():
        if not name or BASE_LAYER in name.split(".") or isinstance(module, BaseTunerLayer):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        module = module.base_layer if isinstance(module, ALoRAExperts) else module
        for key in module._parameters:
            full = f"{name}.{key}"
            all_of = targets == ALL_EXPERTS and _is_known(module) and key in PARAMETERS
            if all_of or (targets != ALL_EXPERTS and any(f".{full}".endswith(f".{t}") for t in targets)):
                yield _Match(full, module, block)


def stacked_sizes(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """(X, N, K) of stacked weights by their full names; a ValueError for one that is not there or cannot be adapted."""
    resolved = resolve_parameters(model, ALoRAConfig(tasks=1, target_parameters=list(names))) if names else []
    stacks = {
        name: StackedWeight(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in resolved
    }
    return {name: (s.num_experts, s.out_features, s.in_features) for name, s in stacks.items()}


def resolve_parameters(model: nn.Module, config: ALoRAConfig) -> list[str]:
    """The stacked weights that `target_parameters` means, by their full names, which the config keeps from here on.

    Raises a ValueError, naming it, for a target that is not there, or whose weights `ALoRAExperts` cannot compute with.
    """
    targets: Any = config.target_parameters
    if not targets:
        return []
    found = [
        m
        for m in _matches(model, targets)
        if not any(
            isinstance(check_target_module_exists(config, name), _ExcludedModule)
            for name in (m.name, m.name.rpartition(".")[0])
        )
    ]
    if targets == ALL_EXPERTS and not found:
        kinds = {type(m).__name__ for m in model.modules() if "expert" in type(m).__name__.lower()}
        raise ValueError(
            f"target_parameters={ALL_EXPERTS!r}, but the model has none of the experts that ALoRA adapts:"
            f" {listed(FAMILIES, 9)}" + (f"; it has {listed(sorted(kinds), 9)}" if kinds else "")
        )
    for target in () if targets == ALL_EXPERTS else targets:
        if not any(f".{match.name}".endswith(f".{target}") for match in found):
            raise ValueError(f"target_parameters names {target!r}, and no parameter of the model is called so")
    blocks = Counter(
        id(child)
        for block in model.modules()
        if not isinstance(block, ALoRAExperts)
        for child in block._modules.values()
    )
    for match in found:
        shared = "belongs to experts that several blocks share, of which one would be adapted: give each its own"
        if why := shared if blocks[id(match.module)] > 1 else _why_not(match):
            raise ValueError(f"{match.name}, of target_parameters, {why}")
    config.target_parameters = [match.name for match in found]
    return config.target_parameters


def _why_not(match: _Match) -> str:
    """Why a parameter cannot be adapted, or ""."""
    module, kind, leaf = match.module, type(match.module).__name__, match.name.rpartition(".")[2]
    if not _is_known(module) or leaf not in PARAMETERS:
        other = " of other code" if kind in FAMILIES else ""
        return f"belongs to a {kind}{other}: ALoRA adapts {' and '.join(PARAMETERS)} of {listed(FAMILIES, 9)}"
    weight: Any = getattr(module, leaf)
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        what = f"{type(weight).__name__} of {weight.dtype}".replace("torch.", "")
        return f"is quantised (a {what}): load the base unquantised, or adapt its attention alone"
    if getattr(module, "_is_expert_parallel", False) or getattr(module, "_hf_tp_plan", None) is not None:
        return f"is split over processes, and {WHOLE}"
    if hooked(module) or "forward" in match.block.__dict__:
        who = "the experts" if hooked(module) else f"their block, a {type(match.block).__name__},"
        return (
            f"would not be asked: {who} runs other code than its own (a kernel of the hub, offloading): load it plainly"
        )
    return ""


def inject_experts(
    model: nn.Module, config: ALoRAConfig, adapter_name: str, active: Sequence[str], *, empty: bool = False
) -> list[str]:
    """Give the config's target_parameters, as `resolve_parameters` left them, an adapter; `empty`: without numbers."""
    names: list[str] = list(config.target_parameters or ())
    for name in names:
        path, _, parameter = name.rpartition(".")
        experts = model.get_submodule(path)
        if not isinstance(experts, ALoRAExperts):
            check_whole(experts._parameters, path)
            experts = ALoRAExperts(experts, path)
            model.set_submodule(path, experts)
        stack: StackedWeight = getattr(experts, parameter)
        stack._active_adapter = list(active)
        with init_empty_weights() if empty else nullcontext():
            stack.update_layer(adapter_name, *config.settings_at(name), config)
    return names
