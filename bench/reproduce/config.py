"""What an experiment is run with: `configs/NAME.yaml`, or another path, as frozen data.

The hash covers what the file sets differently from the defaults, so a row in a CSV says which settings it belongs to
and a new field leaves old rows valid. A new default for an old field would not: add a field instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alora_kernels.data import TaskSpec

CONFIGS = Path(__file__).parent / "configs"
BUDGETS = ("rank", "parameters")


class ConfigError(ValueError):
    """Settings that cannot be run; the message names the key."""


@dataclass(frozen=True)
class Config:
    """The settings of one experiment; None is a value that the file leaves out."""

    experiment: str  # key of `command.EXPERIMENTS`
    model: str  # "minilm", "tiny-random-encoder", a folder or a hub id of an encoder
    tasks: tuple[str | TaskSpec, ...]  # built-in tasks, `.jsonl` files, hub ids, or fields of `data.TaskSpec`
    seeds: tuple[int, ...] = (0, 1, 2)  # of everything that is drawn: rows, adapters, heads, order of batches
    methods: tuple[str, ...] = ()
    r: int | None = None
    lora_alpha: float | None = None  # defaults to 2 r
    num_experts: int = 4
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ()  # as PEFT has it; defaults to all linear layers
    budget: str = "rank"  # or "parameters": ranks that train about as many as ALoRA of rank r, s unchanged
    steps: int | None = None
    batch_size: int | None = None  # rows of each task in a step
    learning_rate: float | None = None  # AdamW's, constant
    train_size: int | None = 2000  # rows per task
    test_size: int = 200
    max_length: int = 64  # tokens per row
    every: int = 10  # steps between two measurements of gradients
    probe_size: int = 32  # rows per task in these measurements
    early: float = 0.1  # share of the steps after which the "early" state is taken
    clients: int = 3
    alphas: tuple[float, ...] = ()  # of the Dirichlet distribution that splits the labels over clients
    variants: tuple[str, ...] = ("lora",)  # adapters that clients train: "lora", "rslora", "vera"
    vera_r: int = 256
    vera_learning_rate: float = 2e-2  # VeRA's own, whose vectors need larger steps
    rounds: int | None = None  # of federated training
    local_steps: int | None = None

    @property
    def hash(self) -> str:
        """Eight digits for all settings but the seeds and what is left at its default."""
        fields = [f for f in dataclasses.fields(self) if f.name != "seeds"]
        values = {f.name: _plain(value) for f in fields if (value := getattr(self, f.name)) != f.default}
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task if isinstance(task, str) else task.name for task in self.tasks)

    def number(self, key: str) -> Any:
        """The value of a key that this experiment cannot do without; ConfigError if the file leaves it out."""
        value = getattr(self, key)
        if value is None:
            raise ConfigError(f"{key}: {self.experiment} needs it, and the file leaves it out (not published): set it")
        return value

    def quick(self) -> Config:
        """The same in seconds: one seed, few steps, few rows. Tries the machinery; its numbers mean nothing."""
        few: dict[str, Any] = {n: 2 for n in ("steps", "rounds", "local_steps") if getattr(self, n) is not None}
        rows: dict[str, Any] = {"batch_size": 2, "train_size": 24, "test_size": 8, "probe_size": 4}
        return dataclasses.replace(self, seeds=self.seeds[:1], every=1, vera_r=8, **rows, **few)


def _plain(value: Any) -> Any:
    """A task's specification as a dict, wherever it stands."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def load(name: str | Path) -> Config:
    path = Path(name) if Path(name).suffix == ".yaml" else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no experiment {str(name)!r}: choose from {', '.join(available())}, or give a .yaml file")
    values = yaml.safe_load(path.read_text())
    fields = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(values, dict) or (unknown := sorted(values.keys() - fields)):
        raise ConfigError(f"{path}: unknown keys {unknown if isinstance(values, dict) else values!r}; known: {fields}")
    missing = [key for key in ("experiment", "model", "tasks") if key not in values]
    if missing:
        raise ConfigError(f"{path}: {', '.join(missing)} must be given")
    if values.get("budget", BUDGETS[0]) not in BUDGETS:
        raise ConfigError(f"{path}: budget must be one of {', '.join(BUDGETS)}, got {values['budget']!r}")
    for key in ("tasks", "seeds", "methods", "alphas", "variants", "target_modules"):
        if key in values and not isinstance(values[key], list):
            raise ConfigError(f"{path}: {key} must be a list, got {values[key]!r}")
        if key in values:
            values[key] = tuple(TaskSpec(**v) if isinstance(v, dict) else v for v in values[key])
    return Config(**values)


def available() -> list[str]:
    """Names of the configurations that ship, those of the papers' size as paths below `configs/`."""
    return sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
