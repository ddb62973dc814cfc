"""What to train, on what, and how: the YAML file of `alora train`, as frozen data.

In:   a YAML mapping.
Out:  a `Recipe`; unknown keys and wrong values are refused with the valid ones.
Who:  `alora train`, `alora eval` (which reads the copy saved beside the adapter) and the demo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..data import TASKS, TaskSpec
from ..integrations.budget import METHODS
from ..integrations.methods import Method

FILE = "recipe.yaml"
BUDGETS = ("rank", "parameters")
ROUTING_OF = {"alora": "task", "alora-soft": "soft"}


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says which key and what it may be."""


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        tasks: names of built-in tasks, or mappings with the fields of `alora_kernels.data.TaskSpec`
            (`name`, `source`: a hub id or a .jsonl file, `prompt`, `answer`, ...).
        model: "smollm2-135m", "tiny-random", a folder, or a hub id.
        output: folder for checkpoints and the adapter.
        method: "alora" (one A per task, one B), "alora-soft" (`num_experts` A under a learned router, one B), "lora"
            (one for all tasks), "lora-per-task" (A and B of each task's own) or "hydralora" (one A, `num_experts` B
            under a learned router).
        budget: "rank" (r as given) or "parameters" (the rank with which the method trains about as many parameters as
            "alora" with r; the scaling s stays that of r and lora_alpha).
        routing: of ALoRA by its older name: "task" is the method "alora", "soft" is "alora-soft".
        num_experts: E of "alora-soft" and "hydralora".
        r, lora_alpha, lora_dropout, use_rslora, target_modules: the adapter.
        steps, batch_size, learning_rate, warmup_steps, weight_decay: the optimiser (AdamW, linear decay).
        temperature: task balance, see `TaskBalancedSampler`.
        train_size, test_size: rows per task; None takes all for training.
        max_length: tokens per row.
        save_steps: a checkpoint every so many steps; 0 saves only the final adapter.
        conflict_steps: every so many steps, gradient conflicts between tasks on held-out rows go to conflicts.csv in
            the output folder, where `alora analyze` finds them; 0 measures none.
        seed: of data order, adapter and dropout.
    """

    tasks: tuple[str | TaskSpec, ...]
    model: str = "smollm2-135m"
    output: str = "runs/alora"
    method: str = "alora"
    budget: str = "rank"
    routing: str | None = None
    num_experts: int = 4
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    steps: int = 40
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 4
    weight_decay: float = 0.0
    temperature: float = 1e6
    train_size: int | None = 2000
    test_size: int = 100
    max_length: int = 96
    save_steps: int = 0
    conflict_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise RecipeError(f"tasks: give at least one, for example {', '.join(TASKS)}")
        self._settle_method()
        if self.budget not in BUDGETS:
            raise RecipeError(f"budget: must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        for name in ("r", "steps", "batch_size", "max_length", "num_experts", "test_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RecipeError(f"{name}: must be a whole number >= 1, got {value!r}")
        if not isinstance(self.conflict_steps, int) or self.conflict_steps < 0:
            raise RecipeError(f"conflict_steps: must be a whole number >= 0, got {self.conflict_steps!r}")

    def _settle_method(self) -> None:
        """Make `method` and its older spelling `routing` say the same."""
        if self.method not in list(METHODS):  # a list: YAML may give what has no hash
            raise RecipeError(f"method: must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.routing not in (None, "task", "soft"):
            raise RecipeError(f"routing: must be 'task' or 'soft', got {self.routing!r}")
        if self.method == "alora" and self.routing == "soft":
            object.__setattr__(self, "method", "alora-soft")  # frozen for everybody else
        routing = ROUTING_OF.get(self.method)
        if self.routing not in (None, routing):
            raise RecipeError(f"routing: {self.routing} is not how {self.method} works: leave routing out")
        object.__setattr__(self, "routing", routing)

    @property
    def targets(self) -> str | list[str]:
        """`target_modules` as PEFT takes them."""
        return self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)

    def instead(self, method: str | None = None, output: Path | None = None) -> Recipe:
        """The same run by another method or into another folder; None keeps the recipe's."""
        changed = self if method is None else dataclasses.replace(self, method=method, routing=None)
        return changed if output is None else dataclasses.replace(changed, output=str(output))

    def adapters(self, tasks: tuple[str, ...]) -> Method:
        """The method of this recipe for tasks with these names in the order of their ids, at the recipe's rank."""
        return Method(
            self.method,
            tasks=tasks,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            num_experts=self.num_experts,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )

    def within_budget(self, method: Method, shapes: Sequence[tuple[int, int]]) -> Method:
        """The same method with the rank that the budget gives it.

        Args:
            method: at the recipe's rank.
            shapes: (in_features, out_features) of the adapted layers.

        Raises:
            ValueError: the method at rank 1 is above the budget.
        """
        return method if self.budget == "rank" else method.as_large_as_alora(shapes)

    def save(self, folder: Path) -> None:
        """Write the recipe beside the adapter."""
        values = dataclasses.asdict(self)
        values["tasks"] = [t if isinstance(t, str) else dict(t) for t in values["tasks"]]
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.target_modules)
        (folder / FILE).write_text(yaml.safe_dump(values, sort_keys=False))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: no such file, not a YAML mapping, an unknown key (the valid ones are listed), a bad value.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"no such file: {path}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, for example `tasks: [trec, spam]`")
    known = [f.name for f in dataclasses.fields(Recipe)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise RecipeError(f"{path}: unknown setting {', '.join(map(str, unknown))}; known are {', '.join(known)}")
    tasks = values.get("tasks") or ()
    if not isinstance(tasks, list | tuple):
        raise RecipeError(f"tasks: must be a list, got {tasks!r}")
    values["tasks"] = tuple(_task(task) for task in tasks)
    if isinstance(values.get("target_modules"), list):
        values["target_modules"] = tuple(values["target_modules"])
    for name in ("learning_rate", "weight_decay", "lora_alpha", "lora_dropout", "temperature"):
        if name in values:
            values[name] = _number(name, values[name])
    return Recipe(**values)


def _task(task: Any) -> str | TaskSpec:
    if isinstance(task, str):
        return task
    if not isinstance(task, dict):
        raise RecipeError(f"tasks: each is a name or a mapping with name and source, got {task!r}")
    known = [f.name for f in dataclasses.fields(TaskSpec)]
    unknown = [key for key in task if key not in known]
    if unknown or not {"name", "source"} <= set(task):
        raise RecipeError(f"tasks: a mapping needs name and source and may have {', '.join(known)}; got {task!r}")
    return TaskSpec(**task)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-3 as a string
    except (TypeError, ValueError):
        raise RecipeError(f"{name}: must be a number, got {value!r}") from None
