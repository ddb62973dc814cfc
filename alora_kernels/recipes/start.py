"""`adapter:`, `train_tasks:` and `train_b:` of a recipe: training that goes on from a saved adapter.

Tasks of the data that it does not have yet are added; those that do not train keep their A to the bit. What cannot be
is refused before the base is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.method import OF_EXPERTS
from ..adapters.reader import AdapterFile
from ..adapters.tasks import read_tasks
from ..baselines.methods import load_method
from ..text import counted, did_you_mean, listed
from ..tuner import add_task, train_only
from ..tuner.config import ALoRAConfig
from .recipe import Recipe

COPIED = ("r", "lora_alpha", "lora_dropout", "use_rslora", *OF_EXPERTS)
KEPT = (*COPIED, "target_modules")  # of an adapter, whatever a recipe says
SHOWN = 8  # names of tasks in a line


@dataclass(frozen=True)
class Start:
    """What a run begins with instead of a fresh adapter."""

    file: AdapterFile
    new: tuple[str, ...]  # tasks that are added, in the order of their ids
    learn: tuple[str, ...]  # tasks that train
    b: bool  # whether B trains

    @property
    def tasks(self) -> tuple[str, ...]:
        """All names in the order of their ids."""
        return (*self.file.tasks, *self.new)

    @property
    def still(self) -> list[str]:
        """The tasks that do not train."""
        return [task for task in self.tasks if task not in self.learn]

    def model(self, base: Any, seed: int) -> Any:
        """The base with the adapter, grown by the new tasks and frozen where nothing trains."""
        model = load_method(base, self.file.folder)
        for task in self.new:
            add_task(model, task, seed=seed)
        train_only(model, self.learn if self.still or not self.b else None, b=self.b)
        return model

    def trained(self, tasks: Iterable[str]) -> list[str]:
        """The tasks of the rows from which something is learnt: with a frozen B only those that train."""
        return [task for task in tasks if self.b or task in self.learn]

    def rows(self, train: Any) -> Any:
        """These rows."""
        return train if self.b else train.filter(lambda row: row["task"] in self.learn)

    def lines(self, rows: Sequence[str], base: Any) -> list[str]:
        """What to tell before training on rows of these tasks."""
        said = [f"goes on from {self.file.folder}" + (f", new: {listed(self.new, SHOWN)}" if self.new else "")]
        still, was, now = listed(self.still, SHOWN), self.file.base, getattr(base, "name_or_path", None)
        left = len(rows) - len(self.trained(rows))
        unused = f"; {counted(left, 'training row')} of theirs not used" if left else ""
        if self.still and self.b:
            said.append(f"B trains, which changes what {still} answer too; their A stay as they are")
        elif not self.b:
            kept = f"B and {still}" if still else "B"
            said.append(f"trains {listed(self.learn, SHOWN)}; {kept} stay as they are{unused}")
        if was and now and Path(now).name != Path(was).name:
            said.append(f"the adapter was trained on {was}, and this base is {now}: only shapes are checked")
        return said


def start_of(recipe: Recipe, tasks: Sequence[str]) -> tuple[Recipe, Start | None]:
    """What a recipe begins with, None for a fresh adapter; its settings become those of the adapter.

    A ValueError for an adapter without tasks of ALoRA's, settings that contradict it, tasks that do not exist, or where
    nothing would train. `tasks` are those of the rows, in order.
    """
    if recipe.adapter is None:
        if recipe.train_tasks is not None or recipe.train_b is False:
            raise ValueError(
                "train_tasks, train_b: they leave a part of an adapter as it is, and a new one has nothing to keep: say"
                " which adapter goes on (adapter: FOLDER, --from FOLDER)"
            )
        return recipe, None
    file = read_tasks(recipe.adapter)
    if recipe.parallel == "fsdp":
        raise ValueError("adapter: a run that goes on from one is not sharded: parallel: ddp")
    known, asked = file.tasks, recipe.train_tasks
    for task in asked or ():
        if task not in tasks:
            where = "has no training rows" if task in known else f"is no task; {did_you_mean(task, [*tasks, *known])}"
            raise ValueError(f"train_tasks: {task!r} {where}")
    learn, new = tuple(asked or tasks), tuple(task for task in tasks if task not in known)
    if left := [task for task in new if task not in learn]:
        raise ValueError(
            f"train_tasks: there are rows of {listed(left, SHOWN)}, of which the adapter knows nothing: name it too, or"
            " leave its rows out"
        )
    b = (asked is None or {*known, *new} == set(learn)) if recipe.train_b is None else recipe.train_b
    if not b and not any(matrix.any() for matrix in file.b.values()):
        raise ValueError(f"train_b: B of {file.folder} is zero, so that nothing trains without it: train_b: true")
    weights = {task: weight for task, weight in recipe.weights.items() if b or task in learn or task not in known}
    return _as_the_adapter(recipe, file.folder).instead(weights=weights), Start(file, new, learn, b)


def _as_the_adapter(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with an adapter's settings; a ValueError where it asks for others."""
    config: Any = ALoRAConfig.from_pretrained(str(folder))
    if recipe.method != "alora":
        raise ValueError(f"method: {folder} is an ALoRA adapter and stays one: leave method out")
    for key in KEPT:
        given, theirs = getattr(recipe, key), getattr(config, key)
        if not _same(key, given, theirs) and given != Recipe.model_fields[key].default:
            raise ValueError(f"{key}: {given} in the recipe, but {folder} keeps its own, {theirs}: leave {key} out")
    return recipe.instead(**{key: getattr(config, key) for key in COPIED})


def _same(key: str, given: Any, theirs: Any) -> bool:
    """Whether a recipe's setting is an adapter's, whose target_parameters are full names."""
    if key != "target_parameters" or not given or not theirs:
        return bool(set(given) == theirs if isinstance(given, tuple) else given == theirs)
    if isinstance(given, str):
        return True
    met = [{end for end in given if f".{name}".endswith(f".{end}")} for name in theirs]
    return all(met) and set().union(*met) == set(given)
