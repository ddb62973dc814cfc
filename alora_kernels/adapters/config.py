"""adapter_config.json of a folder that may come from anybody, checked by hand: s B A per task and nothing else.

Settings that are not known to leave the adapter at A and B are refused, not ignored: an adapter that was trained with
one of them and used without it answers wrongly and nobody is told.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft.utils.other import get_pattern_key

from ..modules.adapter import lora_scaling, task_names
from ..text import listed
from ..tuner.card import LOCAL
from ..tuner.config import CONFIG, unwrapped
from ..tuner.register import NAME as ALORA

Kind = Literal["alora", "lora"]
MAX_BYTES = 2**20
MAX_PATTERN, MAX_PATTERNS = 200, 4096
PATTERN = re.compile(r"\^?(?:\w|-|\\?\.(?!\*))*(?:\.\*)?(?:\w|-|\\?\.(?!\*))*\$?")
MAX_TASKS = 2**16  # that a number stands for
#: settings that say where, how or when A and B were trained; the tensors themselves decide the rest
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "routing",
    "target_modules", "task_type", "tasks", "use_rslora",
}  # fmt: skip
EXPERTS = {"experts_A", "experts_B", "target_parameters"}  # of ALoRA, whose tensors say as much
#: what the better known of the others mean
MEANING = {
    "alora_invocation_tokens": "Activated LoRA, which starts at an invocation token",
    "arrow_config": "Arrow routing",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias on B",
    "megatron_config": "Megatron's parallel layers",
    "modules_to_save": "modules trained in full",
    "target_parameters": "adapters on parameters instead of modules",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA, which rescales the base's columns",
    "use_qalora": "QA-LoRA, which pools the input",
}
#: ways to start a LoRA that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ change them
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
OTHER_KIND = {
    "alora": "is an ALoRA adapter, not a stock LoRA: `alora export` makes stock LoRAs of its tasks",
    "lora": "is a stock LoRA, not an ALoRA adapter: `alora import` makes one ALoRA of several",
}


class AdapterFolderError(ValueError):
    """An adapter that is more than s B A, is damaged or cannot be trusted; the message says why, and the remedy."""


def refused(where: Path | str, why: str) -> AdapterFolderError:
    """The error for a folder, or for what else the adapter is called; what it quotes cannot steer a terminal."""
    return AdapterFolderError(f"{where}: " + "".join(c if c.isprintable() else "?" for c in why))


def not_finite(where: Path | str, found: Sequence[str]) -> AdapterFolderError:
    """The error for modules with NaN or infinity, all of them counted and the first few named."""
    verb = "holds" if len(found) == 1 else "hold"
    return refused(where, f"{listed(found, 5)} {verb} numbers that are not finite: train it again with a lower rate")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says, once it is sure that it says no more than s B A."""

    kind: Kind
    tasks: tuple[str, ...]  # a stock LoRA is one task, called like its folder
    base: str | None
    r: int  # of modules without a pattern, as is alpha
    alpha: float
    rslora: bool
    ranks: dict[str, int]  # by pattern
    alphas: dict[str, float]
    task_type: str | None
    revision: str | None
    targets: frozenset[str] | None  # names that select its modules, if a list alone says which
    stacks: frozenset[str] = frozenset()  # stacked weights of experts among its modules

    def rank(self, module: str) -> int:
        """R of one module."""
        return self.ranks.get(get_pattern_key(list(self.ranks), module), self.r)

    def scaling(self, module: str, r: int) -> float:
        """s of one module of rank r."""
        return lora_scaling(self.alphas.get(get_pattern_key(list(self.alphas), module), self.alpha), r, self.rslora)


def json_of(path: Path, limit: int) -> Any:
    """What a JSON file of at most so many bytes holds; an OverflowError says that it is longer."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OverflowError(f"{path} is longer than {limit} bytes")
    return json.loads(data)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder as they are written; an `AdapterFolderError` if they are too large or no object."""
    try:
        settings = json_of(folder / CONFIG, MAX_BYTES)
    except OverflowError:
        raise refused(folder, f"{CONFIG} is larger than {MAX_BYTES} bytes: that is not a config") from None
    except (OSError, ValueError, RecursionError) as error:
        raise refused(folder, f"{CONFIG} does not read ({error}): copy it again") from None
    if not isinstance(settings, dict):
        raise refused(folder, f"{CONFIG} holds a {type(settings).__name__}, not settings: copy it again")
    return settings


def checked_config(where: Path | str, settings: Mapping[str, Any], only: Kind | None = None) -> AdapterConfig:
    """Check settings as PEFT writes them; an `AdapterFolderError` if they are not valid or more than s B A per task.

    `where` is what errors call the adapter; the last part of a folder's path names the task of a stock LoRA. `only`
    refuses the other kind.
    """
    found = settings.get("peft_type")
    if found not in (ALORA, "LORA"):
        raise refused(
            where, f"is a {repr(found)[:80]} adapter: only {ALORA} (ALoRA) and LORA are A and B; train one of these"
        )
    kind: Kind = "alora" if found == ALORA else "lora"
    if only not in (None, kind):
        raise refused(where, OTHER_KIND[kind])
    _check_settings(where, settings, kind)
    base, revision, rslora = (settings.get(n) for n in ("base_model_name_or_path", "revision", "use_rslora"))
    if not isinstance(rslora or False, bool):
        raise refused(where, f"{CONFIG} is not valid: use_rslora must be true or false, got {str(rslora)[:80]!r}")
    r = _number(where, "r", settings.get("r", 8), whole=True)  # 8: what PEFT takes where nothing is said
    alpha = settings.get("lora_alpha", None if kind == "alora" else 8)
    ranks = _pattern(where, "rank_pattern", settings.get("rank_pattern"), whole=True)
    task_type, targets = settings.get("task_type"), settings.get("target_modules")
    narrowed = settings.get("exclude_modules") or settings.get("layers_to_transform") is not None
    by_name = bool(targets) and isinstance(targets, list | set) and all(isinstance(name, str) for name in targets)
    return AdapterConfig(
        kind=kind,
        tasks=_tasks(where, settings) if kind == "alora" else (Path(where).name,),
        base=base if isinstance(base, str) and base and not base.startswith(LOCAL) else None,
        r=r,
        alpha=2 * r if alpha is None and kind == "alora" else _number(where, "lora_alpha", alpha),
        rslora=bool(rslora),
        ranks=ranks,
        alphas=_pattern(where, "alpha_pattern", settings.get("alpha_pattern")),
        task_type=task_type if isinstance(task_type, str) else None,
        revision=revision if isinstance(revision, str) else None,
        targets=frozenset(map(unwrapped, targets or ())) if by_name and not narrowed else None,
        stacks=_stacks(where, settings.get("target_parameters")) if kind == "alora" else frozenset(),
    )


def _check_settings(where: Path | str, settings: Mapping[str, Any], kind: Kind) -> None:
    """Refuse what would make the adapter more than its A and B."""
    routing = settings.get("routing", "task") if kind == "alora" else "task"
    if routing == "soft":
        raise refused(
            where,
            "weighs its experts for each token anew: it has no tasks to choose from and no fixed LoRA equals it; run it"
            " with generate",
        )
    if routing != "task":
        raise refused(where, f"{CONFIG} is not valid: routing must be task or soft, got {str(routing)[:80]!r}")
    bias = settings.get("bias", "none")
    if bias != "none":
        raise refused(where, f"holds biases (bias={str(bias)[:80]!r}), which are no A or B: train with bias='none'")
    for name in sorted(set(settings) - HARMLESS - (EXPERTS if kind == "alora" else set())):
        if settings[name]:
            meaning = f" ({MEANING[name]})" if name in MEANING else ""
            raise refused(
                where,
                f"holds {name[:80]}={str(settings[name])[:80]}{meaning}, which is more than A and B: train without it,"
                " or merge the adapter into a base of its own",
            )
    start = settings.get("init_lora_weights", True)
    if start not in STARTS:
        raise refused(
            where,
            f"starts from a base that it changed (init_lora_weights={str(start)[:80]!r}): save it again with"
            " path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )


def _stacks(where: Path | str, names: Any) -> frozenset[str]:
    """The stacked weights of experts, by full names as ALoRA saves them."""
    if not isinstance(names or [], list) or not all(isinstance(name, str) for name in names or ()):
        raise refused(where, f"{CONFIG} is not valid: target_parameters must be a list, got {str(names)[:80]!r}")
    return frozenset(map(unwrapped, names or ()))


def _tasks(where: Path | str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    tasks: Any = settings.get("tasks")
    count = isinstance(tasks, int) and not isinstance(tasks, bool) and tasks <= MAX_TASKS
    try:
        if not count and not isinstance(tasks, list):
            raise TypeError(f"tasks must be a list of names, or at most {MAX_TASKS}, got {tasks!r}")
        return task_names(tasks)
    except (TypeError, ValueError) as error:
        raise refused(where, f"{CONFIG} is not valid: {str(error)[:200]}") from None


def _number(where: Path | str, name: str, value: Any, whole: bool = False) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not number or (whole and (not isinstance(value, int) or value < 1)):
        wanted = "a whole number >= 1" if whole else "a finite number"
        raise refused(where, f"{CONFIG} is not valid: {name} must be {wanted}, got {repr(value)[:80]}")
    return value


def _pattern(where: Path | str, name: str, value: Any, whole: bool = False) -> dict[str, Any]:
    """A pattern's keys, which PEFT matches as regular expressions: of these only what is soon matched is taken."""
    if not isinstance(value or {}, dict):
        raise refused(where, f"{CONFIG} is not valid: {name} must map modules to numbers, got {str(value)[:80]}")
    for key, number in (value or {}).items():
        _number(where, f"{name}[{key[:80]!r}]", number, whole)
        if len(key) > MAX_PATTERN or not PATTERN.fullmatch(key):
            raise refused(where, f"{name} has a key that may take long to match, {key[:80]!r}: name the modules, with"
                          " dots, ^, $ and one .* at most")  # fmt: skip
    if len(value or {}) > MAX_PATTERNS:
        raise refused(where, f"{name} has {len(value)} keys, more than {MAX_PATTERNS}: give one rank to most modules")
    return value or {}
