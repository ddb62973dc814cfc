"""ALoRA and what it is compared with, each put into a model by one call: `adapt(model, Method("lora", ...))`.

In:   a base model and a `Method`: its name, rank, tasks, target modules.
Out:  the model with that method's adapters, everything else frozen, ready for `ALoRATrainer`.
Who:  `alora train`, by the recipe's key `method`; `method_files` saves and loads what comes out.

ALoRA and LoRA are PEFT models. HydraLoRA and a LoRA per task stay the base's own class with some `nn.Linear` replaced:
the targets are found by PEFT's own matching, so the same `target_modules` means the same layers for every method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..modules.adapter import AdaptedLinear
from ..modules.tasks import task_names
from ..tuner import ALoRAConfig
from ..tuner.probe import Finding, probe
from ..tuner.selection import leave_out, rows_of, targets_of
from ..tuner.targets import base_of, check_target, features, hooked
from .budget import ROUTED, check_method, rank_for
from .hydra import HydraLinear
from .per_task import PerTaskLinear

Findings = Mapping[str, Finding] | None

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}  # PEFT trains these for the type


@dataclass(frozen=True)
class Method:
    """One method with its settings, the same for all methods as far as they have them.

    Attributes:
        name: a key of `budget.METHODS`.
        tasks: names in the order of their ids; for methods that take ids, otherwise a record.
        r: rank.
        lora_alpha: numerator of the scaling s = lora_alpha / r; None is 2 r.
        lora_dropout: dropout on the input of the low-rank path.
        use_rslora: s = lora_alpha / sqrt(r).
        num_experts: E of alora-soft (A) and hydralora (B).
        target_modules: as in PEFT: names, a regular expression, "all-linear", or None for LoRA's default.
        task_type: as in PEFT; for "SEQ_CLS" and "TOKEN_CLS" the head is trained too.
        modules_to_save: further modules that are trained in full.

    Raises:
        ValueError: an unknown method, or a value it cannot have.
    """

    name: str
    tasks: tuple[str, ...] = ()
    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 4
    target_modules: str | tuple[str, ...] | None = "all-linear"
    task_type: str | None = "CAUSAL_LM"
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_method(self.name)
        for name in ("r", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be a whole number >= 1, got {value!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: must be in [0, 1), got {self.lora_dropout}")
        if self.name in ROUTED or self.tasks:
            task_names(self.tasks)

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return float(2 * self.r if self.lora_alpha is None else self.lora_alpha)

    @property
    def trained_in_full(self) -> tuple[str, ...]:
        """Names of the modules outside the adapters that are trained."""
        return (*HEADS.get(self.task_type or "", ()), *self.modules_to_save)

    def _shared(self) -> dict[str, Any]:
        """What PEFT's LoRA and ours are both told."""
        targets = self.target_modules
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": list(targets) if isinstance(targets, tuple) else targets,
            "task_type": self.task_type,
            "modules_to_save": list(self.modules_to_save) or None,
        }

    def peft_config(self) -> LoraConfig | ALoRAConfig:
        """For a method that PEFT holds.

        Raises:
            ValueError: for one it does not.
        """
        if self.name == "lora":
            return LoraConfig(**self._shared())
        if self.name == "alora":
            return ALoRAConfig(routing="task", tasks=list(self.tasks), **self._shared())
        if self.name == "alora-soft":
            return ALoRAConfig(routing="soft", num_experts=self.num_experts, **self._shared())
        raise ValueError(f"{self.name} is not a PEFT method: use alora_kernels.baselines.methods.adapt")

    def as_large_as_alora(self, shapes: Sequence[tuple[int, int]]) -> Method:
        """The same method with the rank with which it trains about as many parameters as ALoRA of this one; s stays.

        Args:
            shapes: `target_shapes`.

        Raises:
            ValueError: the method at rank 1 already has more.
        """
        r = rank_for(self.name, self.r, shapes, tasks=len(self.tasks), num_experts=self.num_experts)
        grown = r / self.r
        return replace(self, r=r, lora_alpha=self.alpha * (math.sqrt(grown) if self.use_rslora else grown))

    @property
    def in_peft(self) -> bool:
        """Whether the adapted model is a `PeftModel`."""
        return self.name in ("alora", "alora-soft", "lora")


def adapt(model: Any, method: Method) -> Any:
    """Put a method's adapters into a model and freeze everything else; the model begins as its base.

    Args:
        model: the base, changed in place.
        method: which adapters.

    Returns:
        A `PeftModel` for alora, alora-soft and lora. For the others the same model with layers replaced; its own
        `save_pretrained` then writes what trains and nothing else, as a checkpoint of PEFT does.

    Raises:
        ValueError: no module matches, or one of them cannot be adapted; the model is as it was.

    Example:
        >>> model = adapt(base, Method("hydralora", tasks=("math", "code"), r=8, num_experts=3))
    """
    if any(isinstance(m, AdaptedLinear | BaseTunerLayer) for m in model.modules()):
        raise ValueError("the model has adapters already: load the base anew")
    if method.in_peft:
        return get_peft_model(model, method.peft_config())
    findings = probe(model)
    targets, heads = _replaceable(model, method, findings), _heads(model, method)
    model.requires_grad_(False)
    for name, linear in targets.items():
        layer = _widened(_layer(linear, method))
        layer.rows_name, layer.rows = name, rows_of(name, model.get_submodule(name.rpartition(".")[0]), findings)
        model.set_submodule(name, layer)
    for head in heads:
        head.requires_grad_(True)
    if hasattr(model, "_keys_to_ignore_on_save"):  # transformers': checkpoints then hold what trains, and resume
        model._keys_to_ignore_on_save = set(model.state_dict()) - set(trained(model))
    return model


def _layer(linear: nn.Linear, method: Method) -> AdaptedLinear:
    """What takes the place of a linear layer."""
    settings: dict[str, Any] = {
        "lora_alpha": method.alpha,
        "lora_dropout": method.lora_dropout,
        "use_rslora": method.use_rslora,
    }
    if method.name == "hydralora":
        return HydraLinear(linear, method.r, num_experts=method.num_experts, **settings)
    return PerTaskLinear(linear, method.r, tasks=method.tasks, **settings)


def take_out(model: Any) -> None:
    """Give a model that `adapt` changed in place its `nn.Linear` back, with the same weights; they stay frozen."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear.train(layer.training))
    if hasattr(model, "_keys_to_ignore_on_save"):
        model._keys_to_ignore_on_save = set(type(model)._keys_to_ignore_on_save or ())


def _widened(layer: AdaptedLinear) -> AdaptedLinear:
    """16-bit adapters as float32, as PEFT's are: steps of 1e-3 vanish in bfloat16."""
    for parameter in layer.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize == 2:
            parameter.data = parameter.data.float()
    return layer


def _targets(model: nn.Module, method: Method, findings: Findings) -> dict[str, nn.Module]:
    """The modules that `target_modules` selects, by PEFT's matching, without those that ALoRA leaves alone.

    Raises:
        ValueError: there are none.
    """
    config = LoraConfig(**method._shared())
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        default: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind or "")
        if default is None:
            raise ValueError(f"target_modules: there is no default for {kind or type(model).__name__}: name them")
        config.target_modules = default
    config.modules_to_save = [*method.trained_in_full]
    leave_out(model, config, findings, len(method.tasks) if method.name in ROUTED else 1)
    found = {name: model.get_submodule(name) for name in targets_of(model, config)}
    if not found:
        raise ValueError(f"target_modules: {method.target_modules!r} matches no module of this model")
    return found


def _replaceable(model: nn.Module, method: Method, findings: Findings) -> dict[str, nn.Linear]:
    """The same, all of them plain `nn.Linear`.

    Raises:
        ValueError: naming the module and the remedy.
    """
    targets = _targets(model, method, findings)
    routed = len(method.tasks) if method.name in ROUTED else 1
    linears: dict[str, nn.Linear] = {}
    for name, module in targets.items():
        check_target(module, model.get_submodule(name.rpartition(".")[0]), name, routed, method.name not in ROUTED)
        if type(module) is not nn.Linear or hooked(module):
            kind = type(module).__name__ + (" with hooks" if type(module) is nn.Linear else "")
            raise ValueError(
                f"{name} is a {kind}: {method.name} replaces plain nn.Linear layers of an untouched model. Load the"
                " base without adapters, quantisation and offloading, name other target_modules, or use alora or lora"
            )
        linears[name] = module
    return linears


def _heads(model: nn.Module, method: Method) -> list[nn.Module]:
    """The modules that are trained in full; PEFT matches the ends of names, and so does this.

    Raises:
        ValueError: one shares its weights with a module that stays frozen.
    """
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

    Raises:
        ValueError: no module matches.
    """
    return [features(base_of(module)) for module in _targets(model, method, probe(model)).values()]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in trained(model).values())


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
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
