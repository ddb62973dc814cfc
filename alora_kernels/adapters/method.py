"""A method's settings, and `method.json`, which keeps them beside the weights of every method.

Importing this loads nothing heavy: the command line lists `METHODS`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..tuner import ALoRAConfig

#: method -> how tables call it
METHODS = {
    "alora": "ALoRA",
    "alora-soft": "ALoRA, soft",
    "lora": "LoRA",
    "lora-per-task": "LoRA per task",
    "hydralora": "HydraLoRA",
}
ROUTED = ("alora", "lora-per-task")  # the ids of a batch matter to these
EXPERTS = ("alora-soft", "hydralora")  # and these have num_experts under a learned router
OF_EXPERTS = ("target_parameters", "experts_A", "experts_B")  # settings of alora alone
SETTINGS, STATE = "method.json", "adapter.safetensors"  # the second holds what PEFT does not
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}  # PEFT trains these for the type


def check_method(method: object) -> None:
    """Raise a ValueError unless this is a method's name."""
    if method not in list(METHODS):  # a list: what YAML or JSON gives may have no hash
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {method!r}")


@dataclass(frozen=True)
class Method:
    """One method with its settings, as in `ALoRAConfig`; a ValueError for a method or value that there is not."""

    name: str
    tasks: tuple[str, ...] = ()  # in the order of their ids; a record for methods that take none
    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 4  # of alora-soft (A) and hydralora (B)
    target_modules: str | tuple[str, ...] | None = "all-linear"
    task_type: str | None = "CAUSAL_LM"  # for SEQ_CLS and TOKEN_CLS the head is trained too
    modules_to_save: tuple[str, ...] = ()
    target_parameters: str | tuple[str, ...] | None = None
    experts_A: str = "shared"  # noqa: N815, the letters of the formula
    experts_B: str = "each"  # noqa: N815

    def __post_init__(self) -> None:
        check_method(self.name)
        for name in ("r", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be a whole number >= 1, got {value!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: must be in [0, 1), got {self.lora_dropout}")
        if self.target_parameters and self.name != "alora":
            raise ValueError(f"target_parameters: {self.name} does not adapt experts: leave it out, or use alora")
        if self.name in ROUTED or self.tasks:
            from ..modules.adapter import task_names

            task_names(self.tasks)

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return float(2 * self.r if self.lora_alpha is None else self.lora_alpha)

    @property
    def num_routed(self) -> int:
        """How many tasks the ids of a batch choose from: one where they do not matter."""
        return len(self.tasks) if self.name in ROUTED else 1

    @property
    def trained_in_full(self) -> tuple[str, ...]:
        """Names of the modules outside the adapters that are trained."""
        return (*HEADS.get(self.task_type or "", ()), *self.modules_to_save)

    @property
    def in_peft(self) -> bool:
        """Whether the adapted model is a `PeftModel`."""
        return self.name in ("alora", "alora-soft", "lora")

    @property
    def shared_options(self) -> dict[str, Any]:
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
        """PEFT's config of a method that PEFT holds; a ValueError for one it does not."""
        from peft import LoraConfig

        from ..tuner import ALoRAConfig

        if self.name == "lora":
            return LoraConfig(**self.shared_options)
        if self.name == "alora":
            experts = {key: getattr(self, key) for key in OF_EXPERTS}
            if isinstance(self.target_parameters, tuple):
                experts["target_parameters"] = list(self.target_parameters)
            return ALoRAConfig(tasks=list(self.tasks), **self.shared_options, **experts)
        if self.name == "alora-soft":
            return ALoRAConfig(routing="soft", num_experts=self.num_experts, **self.shared_options)
        raise ValueError(f"{self.name} is not a PEFT method: use alora_kernels.baselines.methods.adapt")


def read_method(folder: Path) -> Method | None:
    """The settings in a folder, None of a PEFT adapter from elsewhere; a ValueError for no adapter or no such file."""
    from ..tuner.config import CONFIG

    path = folder / SETTINGS
    if not path.is_file():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} holds neither {SETTINGS} nor {CONFIG}: give the folder of a saved adapter")
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        settings: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        return Method(**settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not what `alora train` writes ({error}): train again, or restore it") from None
