"""Tasks come and go in saved adapters: listed, added, removed, renamed, and those of two adapters joined under one B.

The base model is not loaded, and tasks that stay keep their A to the bit. A change goes to another folder (`out`), or
into the adapter's own with `overwrite`: there a crash leaves the old files in `.before`. `tuner.tasks` does the same to
a model in memory.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import kept, written_whole
from ..modules.adapter import seeded_a, task_names
from ..settings import did_you_mean, read_mapping, write_yaml
from ..text import listed
from ..tuner.card import model_card
from ..tuner.config import CARD, PREFIX, ALoRAConfig
from ..tuner.model import OPTIMIZER
from .cards import FILE as CARDS
from .cards import TaskCard, checked_fields, read_task_cards, write_task_cards
from .config import refused
from .import_lora import ImportReport, one_adapter, over_best_b, report_of
from .method import METHODS, SETTINGS, read_method
from .reader import AdapterFile, Kind, read_adapter
from .writer import check_replaceable, write_adapter

RECIPE, LOSSES = "recipe.yaml", "losses.json"  # of `alora train`, beside the adapter
Stacks = Mapping[str, Tensor]  # module -> A of all tasks [E, R, K]


@dataclass(frozen=True)
class SavedTask:
    """One task of a saved adapter."""

    name: str
    rank: int  # the largest of its modules
    bytes: int  # of its A
    norm: float  # ||s B A||_F over all modules: how much it changes the weights
    alike: dict[str, float]  # other task -> cosine of the two changes
    card: TaskCard | None  # how it is asked, if that is known

    @property
    def nearest(self) -> str | None:
        """The other task whose change of the weights points most nearly the same way."""
        return max(self.alike, key=lambda task: self.alike[task], default=None)


def list_tasks(folder: str | Path) -> list[SavedTask]:
    """The tasks of an adapter folder in the order of their ids; an `AdapterFolderError` if it has none."""
    file = read_tasks(folder)
    products: Any = sum(changes @ changes.T for _, changes in _changes(file))
    own = sum(a.nbytes for a in file.matrices(file.tasks[0]).values())
    norms, cards = products.diagonal().sqrt(), read_task_cards(file.folder, file.tasks)
    cosines = (products / norms / norms[:, None]).nan_to_num(0.0).tolist()
    return [
        SavedTask(
            task,
            file.rank,
            own,
            float(norms[i]),
            {other: cosines[i][j] for j, other in enumerate(file.tasks) if j != i},
            cards.get(task),
        )
        for i, task in enumerate(file.tasks)
    ]


def add_task(
    folder: str | Path,
    name: str,
    *,
    like: str | None = None,
    seed: int = 0,
    card: TaskCard | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Add a task behind the others, with an A to train: `alora train --from`, or `tuner.tasks.train_only`.

    Args:
        folder: an ALoRA adapter.
        name: of the new task.
        like: copy A of this task; None draws A as a layer begins.
        seed: of that draw, for which the name counts too.
        card: how the task will be asked.
        out: another folder for the result; None changes the adapter's own.
        overwrite: replace the adapter that is there.

    Returns:
        The folder that was written.

    Raises:
        ValueError: a name that is taken, no such task, no ALoRA adapter with tasks, or a folder that holds something.

    Example:
        >>> add_task("runs/alora/adapter", "law", like="trec", out="runs/four")
    """
    file, target = _opened(folder, out, overwrite)
    if card is not None:
        checked_fields(name, card)
    tasks, a = _named(file, [*file.tasks, name], name), file.stacks()
    if like is not None:
        (row,) = _rows(file, [like])
        new = {module: stack[row] for module, stack in a.items()}
    else:
        new = {
            module: seeded_a(name, module, stack.shape[1], stack.shape[2], seed).to(stack.dtype)
            for module, stack in a.items()
        }
    cards = read_task_cards(file.folder, file.tasks) | ({name: card} if card else {})
    grown = {module: torch.cat([stack, new[module][None]]) for module, stack in a.items()}
    return _write(file, target, _config(file, tasks), _tensors(grown, file.b), cards)


def remove_tasks(
    folder: str | Path, names: Sequence[str], *, out: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Take tasks out; those that stay keep their order. Arguments and errors as `add_task`; one task has to stay."""
    file, target = _opened(folder, out, overwrite)
    gone = set(_rows(file, [names] if isinstance(names, str) else names))
    stay = [row for row in range(len(file.tasks)) if row not in gone]
    if not stay:
        raise refused(file.folder, "would have no task left: delete the folder if that is meant")
    a = {module: stack[stay] for module, stack in file.stacks().items()}
    tasks = [file.tasks[row] for row in stay]
    cards = {task: card for task, card in read_task_cards(file.folder, file.tasks).items() if task in tasks}
    without = {file.tasks[row]: None for row in gone}
    return _write(file, target, _config(file, tasks), _tensors(a, file.b), cards, without)


def rename_task(
    folder: str | Path, old: str, new: str, *, out: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Call a task otherwise; its id, its A and how it is asked stay. Arguments and errors as `add_task`."""
    file, target = _opened(folder, out, overwrite)
    (row,) = _rows(file, [old])
    tasks = _named(file, [*file.tasks[:row], new, *file.tasks[row + 1 :]], new)
    cards = {new if task == old else task: card for task, card in read_task_cards(file.folder, file.tasks).items()}
    return _write(file, target, _config(file, tasks), _tensors(file.stacks(), file.b), cards, {old: new})


def join_adapters(
    folder: str | Path,
    other: str | Path,
    *,
    rank: int | None = None,
    prefix: str = "",
    out: str | Path | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Put the tasks of another adapter behind those of the first, under one B; gives what that loses of each task.

    Formula: B = [B_1 B_2]; A is [A_t; 0] of a task of the first adapter and [0; A_t] of the second, so that s B A stays
    what it was. Scalings that differ go into B, in float32 or wider. With `rank` it is the best B of so many columns
    instead, see `shared_b`.

    Args:
        folder: an ALoRA adapter.
        other: another one on the same base, or a stock LoRA, which is one task called as its folder.
        rank: R of the result; None adds the ranks of both, which loses nothing.
        prefix: put before the names of the second adapter's tasks.
        out, overwrite: as `add_task`.

    Raises:
        ValueError: as `add_task`; other base models, task types or shapes, or a name that both have.

    Source: Eckart & Young 1936 for `rank`.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    (first, target), second = _opened(folder, out, overwrite), read_tasks(other, only=None)
    theirs = {task: prefix + task for task in second.tasks}
    if twice := [name for name in theirs.values() if name in first.tasks]:
        raise ValueError(
            f"both adapters have a task {listed(map(repr, twice), 3)}: put something before the second's names"
            " (prefix, --prefix), or rename one first (alora tasks DIR rename OLD NEW)"
        )
    task_names([*first.tasks, *theirs.values()])
    one_each = {task: replace(first, row=row) for row, task in enumerate(first.tasks)}
    one_each |= {name: replace(second, row=row) for row, name in enumerate(theirs.values())}
    config, shapes = one_adapter(one_each, rank or first.rank + second.rank)
    dtype = torch.promote_types(first.dtype, second.dtype)
    if rank is None:
        tensors, alpha = _stacked(first, second, list(shapes), dtype)
        config.r, config.lora_alpha = next(iter(shapes.values())).r, alpha
        norms = _norms([first, second], list(shapes))
        report = report_of(one_each, tensors, target, norms, {m: [0.0] * len(row) for m, row in norms.items()}, {})
    else:
        tensors, report = over_best_b(one_each, shapes, target, dtype)
    config.lora_dropout = _config(first, first.tasks).lora_dropout
    cards = read_task_cards(first.folder, first.tasks)
    cards |= {theirs[task]: card for task, card in read_task_cards(second.folder, second.tasks).items()}
    _write(first, target, config, tensors, cards)
    return report


def read_tasks(folder: str | Path, only: Kind | None = "alora") -> AdapterFile:
    """As `read_adapter`, after the folders of other methods, which are no PEFT adapters, were refused by their name."""
    folder = Path(folder)
    method = read_method(folder) if (folder / SETTINGS).is_file() else None
    if method is not None and method.name not in ("alora", "lora"):
        raise refused(
            folder, f"is of the method {METHODS[method.name]}: tasks come and go under ALoRA's shared B alone"
        )
    file = read_adapter(folder, only)
    file.say_copies()
    return file


def _opened(folder: str | Path, out: str | Path | None, overwrite: bool) -> tuple[AdapterFile, Path]:
    """The adapter and the folder for what is made of it."""
    file = read_tasks(folder)
    target = file.folder if out is None else Path(out).resolve()
    check_replaceable(target, overwrite)
    if any((place / name).exists() for place in (target, target.parent) for name in OPTIMIZER):
        raise refused(target, "is a checkpoint, whose optimizer goes by the rows of A: give another folder (--out)")
    return file, target


def _rows(file: AdapterFile, names: Sequence[str]) -> list[int]:
    """The ids of tasks; a refusal if there is no such task."""
    for name in names:
        if name not in file.tasks:
            raise refused(file.folder, f"has no task {name[:80]!r}: {did_you_mean(name, file.tasks)}")
    return [file.tasks.index(name) for name in names]


def _named(file: AdapterFile, tasks: Sequence[str], new: str) -> tuple[str, ...]:
    """The names of tasks, one of them new; a ValueError for one that is taken or cannot be a task's."""
    if new in file.tasks:
        raise refused(file.folder, f"has a task {new!r} already: choose another name")
    return task_names(tasks)


def _config(file: AdapterFile, tasks: Sequence[str]) -> ALoRAConfig:
    """The adapter's own, for other tasks."""
    config: ALoRAConfig = ALoRAConfig.from_pretrained(str(file.folder))
    config.tasks = list(tasks)
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set would be written in no fixed order
    return config


def _tensors(a: Stacks, b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names in the file."""
    named = {f"{PREFIX}{module}.asymlora_A.weight": stack for module, stack in a.items()}
    return named | {f"{PREFIX}{module}.asymlora_B.weight": b[module] for module in a}


def _stacked(
    first: AdapterFile, second: AdapterFile, modules: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """The tensors of two adapters under [B_1 B_2], zeros where one has no such module or less rank, and lora_alpha."""
    (s, *others), r = {*first.scaling.values(), *second.scaling.values()}, first.rank + second.rank
    if others or not s:
        s, dtype = 1.0, torch.promote_types(dtype, torch.float32)  # so that B is rounded no more than it was
    places = ((first, first.stacks(), 0, 0), (second, second.stacks(), len(first.tasks), first.rank))
    a, b, tasks = {}, {}, len(first.tasks) + len(second.tasks)
    for module in modules:
        n, _, k = first.shapes.get(module) or second.shapes[module]
        a[module], b[module] = torch.zeros(tasks, r, k, dtype=dtype), torch.zeros(n, r, dtype=dtype)
        for file, stacks, row, column in places:
            if module in file.shapes:
                columns = slice(column, column + file.shapes[module].r)
                a[module][row : row + len(file.tasks), columns] = stacks[module]
                b[module][:, columns] = file.b[module].double() * (file.scaling[module] / s)
    return _tensors(a, b), s * r


def _changes(file: AdapterFile) -> Iterator[tuple[str, Tensor]]:
    """Module and, for each task, numbers with the norms and angles of its s B A: s R A, where B = Q R."""
    for module, a in file.stacks().items():
        r = torch.linalg.qr(file.b[module].double()).R
        yield module, (file.scaling[module] * r @ a.double()).flatten(1)


def _norms(files: Sequence[AdapterFile], modules: Sequence[str]) -> dict[str, list[float]]:
    """Module -> ||s B A||_F of all tasks of all files; zeros where an adapter does not have it."""
    found = [{module: changes.norm(dim=1).tolist() for module, changes in _changes(file)} for file in files]
    return {
        module: [
            norm for file, own in zip(files, found, strict=True) for norm in own.get(module, [0.0] * len(file.tasks))
        ]
        for module in modules
    }


def _write(
    file: AdapterFile,
    target: Path,
    config: ALoRAConfig,
    tensors: Mapping[str, Tensor],
    cards: Mapping[str, TaskCard],
    renamed: Mapping[str, str | None] = {},
) -> Path:
    """Write what was made of an adapter: weights and config, how tasks are asked, and what says how they were trained.

    `renamed` is what happened to tasks of the recipe, by which `alora eval` judges; None: gone.
    """
    text = (file.folder / CARD).read_text(encoding="utf-8") if (file.folder / CARD).is_file() else ""
    packaged = re.search(r'load_model\("([^"]+)"\)', text)
    asked = {task: card.template for task, card in cards.items() if card.template}
    with kept(target), written_whole(target) as folder:
        draft = Path(folder)
        write_adapter(draft, tensors, config, model_card(config, text, named=packaged and packaged[1], asked=asked))
        write_task_cards(draft, cards)
        if (file.folder / RECIPE).is_file():
            recipe = read_mapping(file.folder / RECIPE, "tasks: [trec, spam]")
            (draft / RECIPE).write_text(write_yaml(_judged(recipe, renamed)), encoding="utf-8")
        if (file.folder / SETTINGS).is_file():
            method = json.loads((file.folder / SETTINGS).read_text(encoding="utf-8"))
            method["settings"] |= {key: getattr(config, key) for key in ("tasks", "r", "lora_alpha", "use_rslora")}
            (draft / SETTINGS).write_text(json.dumps(method, indent=1), encoding="utf-8")
        if target != file.folder and (file.folder / LOSSES).is_file():
            shutil.copy(file.folder / LOSSES, draft)
        if not (draft / CARDS).exists():
            (target / CARDS).unlink(missing_ok=True)
    return target


def _judged(recipe: dict[str, Any], renamed: Mapping[str, str | None]) -> dict[str, Any]:
    """A recipe whose tasks have their new names; without those that are gone, or have no settings to name them in."""
    stay: list[Any] = []
    for entry in recipe.get("tasks") or ():
        old = str(entry.get("name")) if isinstance(entry, dict) else Path(str(entry)).stem
        new = renamed.get(old, old)
        if new == old:
            stay.append(entry)
        elif new is not None and isinstance(entry, dict):
            stay.append(entry | {"name": new})
    return recipe | ({"tasks": stay} if stay else {})
