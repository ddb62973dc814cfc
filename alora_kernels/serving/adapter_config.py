"""adapter_config.json of a folder that may come from anybody: what serving needs of it, checked by hand.

In:   the folder.
Out:  `ServedConfig`: kind, tasks, base, and rank and scale of each module.
Who:  `read_adapter`.

Settings that are not known to leave the adapter at A and B are refused, not ignored: an adapter that was trained with
one of them and served without it answers wrongly and nobody is told. Pattern keys are regular expressions, so they are
kept to a length and to two repetitions: `(a+)+b` would let a folder keep a processor busy for years.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft.utils.other import get_pattern_key

from ..integrations.peft.files import CONFIG
from ..integrations.peft.register import NAME as ALORA
from ..modules.init import lora_scaling
from ..modules.tasks import task_names
from .errors import AdapterRefusedError

MAX_BYTES = 2**20
MAX_PATTERN, MAX_REPEATS = 200, 2
#: settings that say where, how or when A and B were trained; the tensors themselves decide the rest
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "routing", "target_modules", "task_type", "tasks",
    "use_rslora",
}  # fmt: skip
#: ways to start a LoRA that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ change them
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def refused(folder: Path, why: str) -> AdapterRefusedError:
    """The error for a folder."""
    return AdapterRefusedError(f"{folder}: {why}")


@dataclass(frozen=True)
class ServedConfig:
    """What serving needs of an adapter's config.

    Attributes:
        kind: how it was saved.
        tasks: names of its tasks.
        base: name of the base model, if given.
        r: rank of modules without a pattern.
        alpha: numerator of s for them.
        rslora: s = alpha / sqrt(r).
        ranks: pattern -> another rank.
        alphas: pattern -> another alpha.
    """

    kind: Literal["alora", "lora"]
    tasks: tuple[str, ...]
    base: str | None
    r: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    def rank(self, module: str) -> int:
        """R of one module."""
        return self.ranks.get(get_pattern_key(list(self.ranks), module), self.r)

    def scaling(self, module: str, r: int) -> float:
        """s of one module of rank r."""
        return lora_scaling(self.alphas.get(get_pattern_key(list(self.alphas), module), self.alpha), r, self.rslora)


def read_config(folder: Path) -> ServedConfig:
    """Read and check the config.

    Raises:
        AdapterRefusedError: missing, not valid, or of an adapter that cannot be served per task.
    """
    config = _json(folder)
    kind = config.get("peft_type")
    if kind not in (ALORA, "LORA"):
        raise refused(folder, f"is a {kind!r} adapter: only {ALORA} (ALoRA) and LORA can be served per task")
    if kind == ALORA and config.get("routing") == "soft":
        raise refused(folder, "weighs its experts per token: it has no tasks to choose from; serve it with generate")
    _check_settings(folder, config)
    base, rslora = config.get("base_model_name_or_path"), config.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise refused(folder, f"{CONFIG} is not valid: use_rslora must be true or false, got {str(rslora)[:80]!r}")
    return ServedConfig(
        kind="alora" if kind == ALORA else "lora",
        tasks=_tasks(folder, config) if kind == ALORA else (folder.name,),
        base=base if isinstance(base, str) and base else None,
        r=int(_number(folder, "r", config.get("r"), whole=True)),
        alpha=_number(folder, "lora_alpha", config.get("lora_alpha")),
        rslora=rslora,
        ranks={k: int(v) for k, v in _pattern(folder, "rank_pattern", config.get("rank_pattern"), whole=True).items()},
        alphas=_pattern(folder, "alpha_pattern", config.get("alpha_pattern")),
    )


def _json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))[:5]
        hint = f"give one of its subfolders: {', '.join(inside)}" if inside else "is it an adapter's folder?"
        raise refused(folder, f"has no {CONFIG}: {hint}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise refused(folder, f"{CONFIG} is larger than {MAX_BYTES} bytes: that is not a config")
        config = json.loads(data)
    except AdapterRefusedError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise refused(folder, f"{CONFIG} does not read ({error}): copy it again") from None
    if not isinstance(config, dict):
        raise refused(folder, f"{CONFIG} holds a {type(config).__name__}, not settings: copy it again")
    return config


def _check_settings(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what would make the adapter more than its A and B."""
    bias = config.get("bias", "none")
    if bias != "none":
        raise refused(folder, f"holds biases (bias={bias!r}), which cannot be served per task: train with bias='none'")
    for name in sorted(set(config) - HARMLESS):
        if config[name]:
            raise refused(
                folder,
                f"holds {name}={str(config[name])[:80]}, which cannot be served per task: train without it, or merge"
                " the adapter into a base of its own",
            )
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise refused(
            folder,
            f"starts from a base that it changed (init_lora_weights={start!r}): save it again with"
            " path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )


def _tasks(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    tasks = config.get("tasks")
    try:
        if not isinstance(tasks, list):
            raise TypeError(f"tasks must be a list of names, got {tasks!r}")
        return task_names(tasks)
    except (TypeError, ValueError) as error:
        raise refused(folder, f"{CONFIG} is not valid: {str(error)[:200]}") from None


def _number(folder: Path, name: str, value: Any, whole: bool = False) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (whole and (not isinstance(value, int) or value < 1)):
        wanted = "a whole number >= 1" if whole else "a finite number"
        raise refused(folder, f"{CONFIG} is not valid: {name} must be {wanted}, got {str(value)[:80]!r}")
    return value  # type: ignore[no-any-return]


def _pattern(folder: Path, name: str, value: Any, whole: bool = False) -> dict[str, float]:
    """A pattern's keys, which PEFT matches as regular expressions, and numbers."""
    if not isinstance(value or {}, dict):
        raise refused(folder, f"{CONFIG} is not valid: {name} must map modules to numbers, got {str(value)[:80]}")
    for key, number in (value or {}).items():
        _number(folder, f"{name}[{key[:80]!r}]", number, whole)
        repeats = len(re.findall(r"(?<!\\)[*+{]", key))
        if len(key) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)[*+{]", key):
            raise refused(folder, f"{name} has a key that may take forever to match, {key[:80]!r}: name the modules")
        try:
            re.compile(key)
        except re.error as error:
            raise refused(folder, f"{name} has a key that is no regular expression, {key[:80]!r}: {error}") from None
    return value or {}
