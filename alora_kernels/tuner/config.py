"""`ALoRAConfig`: what PEFT stores in `adapter_config.json` for an ALoRA adapter.

It is the last thing PEFT writes when it saves and the first it reads when it loads, so the two rules of a folder live
here: weights are safetensors, and the model card names the import that loading needs.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from ..files import written_whole
from ..modules.adapter import lora_scaling, task_names
from .card import model_card, told
from .register import NAME, extend_str_enum

WEIGHTS, PICKLE, CONFIG, CARD = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json", "README.md"
PREFIX = "base_model.model."  # of names in a file
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ROUTINGS = ("task", "soft")
ALL_EXPERTS = "all-experts"
BIASES = ("none", "all", "asymlora_only")


def unwrapped(name: str) -> str:
    """A name in the plain model, without what torch.compile, FSDP and checkpointing put in: `_orig_mod.fc` is `fc`."""
    return _WRAPPERS.sub("", name)


@dataclass
class ALoRAConfig(PeftConfig):
    """Configuration of an ALoRA adapter: several low-rank A, one shared B.

    Args:
        r: rank R >= 1.
        lora_alpha: numerator of the scaling s; defaults to 2 r.
        tasks: task routing: names of the tasks, or their number n (named "0" .. "n - 1").
        routing: "task" (the batch says which task each row belongs to) or "soft" (a learned router per layer
            weighs the experts for each token).
        num_experts: soft routing: how many A.
        lora_dropout: dropout on the input of the low-rank path, in training mode.
        use_rslora: s = lora_alpha / sqrt(r).
        target_modules: names, a regular expression, or "all-linear"; None takes LoRA's default for the model.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: only layers with these indices.
        layers_pattern: name of the list of layers, where it is not a common one.
        rank_pattern: other ranks for modules whose name matches the key.
        alpha_pattern: other lora_alpha for modules whose name matches the key.
        modules_to_save: further modules to train in full and to save, such as a classifier head.
        bias: which biases to train: "none", "all" or "asymlora_only" (those of adapted layers).
        init_weights: True: A random (each A_e its own draw), B zero. False: B random too, for tests.
        target_parameters: stacked weights of a mixture's experts, as in PEFT: ends of names such as
            "mlp.experts.gate_up_proj", or "all-experts". Task routing alone; the model's own router is never adapted.
        experts_A: "shared": one A per task for all experts; "each": one per task and expert.
        experts_B: "each": one B per expert; "shared": one for all of them. All tasks share B in either case.

    Raises:
        ValueError: settings that contradict each other; the message names the remedy.

    Example:
        >>> ALoRAConfig(r=16, tasks=["math", "code"], target_modules="all-linear", task_type="CAUSAL_LM")

    Source: Ban & Ji 2025, ALoRA.
    """

    r: int = 8
    lora_alpha: float | None = None
    tasks: list[str] | int | None = None
    routing: str = "task"
    num_experts: int | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    target_parameters: list[str] | str | None = None
    experts_A: str = "shared"  # noqa: N815, the letters of the formula
    experts_B: str = "each"  # noqa: N815

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_str_enum(PeftType, NAME)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_numbers()
        self._check_routing()
        self._check_experts()
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} works with a list of target_modules, not with a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: say which layers")

    def _check_numbers(self) -> None:
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(r, int) or r < 1:
                raise ValueError(f"the rank must be an integer >= 1, got {r!r} for {name}")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights must be True or False, got {self.init_weights!r}")

    def _check_routing(self) -> None:
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        if self.routing == "soft":
            if self.tasks is not None:
                raise ValueError('routing="soft" learns how to weigh num_experts experts: it takes no tasks')
            if not isinstance(self.num_experts, int) or self.num_experts < 1:
                raise ValueError(f'routing="soft" needs num_experts >= 1, got {self.num_experts!r}')
            return
        if self.num_experts is not None:
            raise ValueError('num_experts belongs to routing="soft"; for task routing give tasks')
        if self.tasks is None:
            raise ValueError('routing="task" needs tasks: a list of names such as ["math", "code"], or a count')
        self.tasks = list(task_names(self.tasks))

    def _check_experts(self) -> None:
        for name in ("experts_A", "experts_B"):
            if getattr(self, name) not in ("shared", "each"):
                raise ValueError(f'{name} must be "shared" or "each", got {getattr(self, name)!r}')
        targets = self.target_parameters
        if not targets:
            return
        if isinstance(targets, str) and targets != ALL_EXPERTS:
            raise ValueError(f"target_parameters must be a list of names or {ALL_EXPERTS!r}, got {targets!r}")
        if self.routing == "soft":
            raise ValueError(
                'target_parameters adapts experts by task, and routing="soft" has no tasks: use routing="task", or'
                " leave target_parameters out"
            )
        if self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform is for target_modules: name the experts of these layers in target_parameters, such"
                ' as "layers.3.mlp.experts.down_proj"'
            )

    @property
    def experts(self) -> int:
        """E: the number of A matrices per layer."""
        return len(self.tasks) if isinstance(self.tasks, list) else int(self.num_experts or 0)

    def settings_at(self, module: str) -> tuple[int, float]:
        """R and s of one module, whose full name the patterns are matched against."""
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)
        alpha: Any = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module), self.lora_alpha)
        return r, lora_scaling(alpha, r, self.use_rslora)

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT, with names of modules in the plain model: "all-linear" lists those of a compiled one."""
        settings = super().to_dict()
        for key in ("target_modules", "exclude_modules"):
            if isinstance(settings[key], set | list):
                settings[key] = type(settings[key])(map(unwrapped, settings[key]))
        return settings

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, whole or not at all; arguments as in PEFT.

        PEFT calls it after the weights and its card: then it writes a card of its own, and refuses a pickle.
        """
        by_peft = "auto_mapping_dict" in kwargs
        if by_peft and Path(save_directory, PICKLE).exists():
            raise ValueError(
                f"ALoRA adapters are saved as safetensors only: leave safe_serialization at True and delete {PICKLE}"
                f" from {save_directory}"
            )
        with written_whole(save_directory) as folder:
            super().save_pretrained(folder, **kwargs)
            if by_peft:
                Path(folder, CARD).write_text(self._card(save_directory), encoding="utf-8")

    def _card(self, folder: str | os.PathLike[str]) -> str:
        """The card of a saved folder, which may hold an older one."""
        card = Path(folder, CARD)
        return model_card(self, card.read_text(encoding="utf-8") if card.exists() else "")

    def for_hub(self, folder: str) -> None:
        """Make a saved folder ready for others: the card, and a base by the name that they know."""
        path = Path(folder, CONFIG)
        Path(folder, CARD).write_text(self._card(folder), encoding="utf-8")
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = self.base_model_name_or_path and told(self.base_model_name_or_path)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the config of a saved adapter, as in PEFT; a ValueError if the folder holds pickled weights only."""
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if Path(folder, PICKLE).exists() and not Path(folder, WEIGHTS).exists():
            raise ValueError(
                f"{folder} holds {PICKLE}, a pickle, and ALoRA adapters are read from safetensors only: convert it once"
                f" with safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), {WEIGHTS!r})"
            )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
