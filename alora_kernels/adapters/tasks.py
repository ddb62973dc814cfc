"""Tasks come and go in saved adapters: listed, kept, dropped, renamed or added, and those of two joined under one B.

The base model is not loaded, and tasks that stay keep their A to the bit. A change goes to another folder (`out`), or
into the adapter's own with `overwrite`. `tuner.tasks` is for a model in memory.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import kept, written_whole
from ..modules.adapter import seeded_a, task_names
from ..text import did_you_mean, listed
from ..tuner.card import model_card
from ..tuner.config import CARD, PREFIX, ALoRAConfig
from ..tuner.model import OPTIMIZER
from .cards import FILE as CARDS
from .cards import TaskCard, checked_fields, described, read_task_cards, write_task_cards
from .config import refused
from .import_lora import ImportReport, one_adapter, over_best_b, report_of
from .method import METHODS, SETTINGS, read_method
from .reader import AdapterFile, Kind, read_adapter
from .writer import check_replaceable, write_adapter

#: of `alora train`; the names of tasks in a recipe decide which rows judge, so they stay as they were in training
BESIDE = ("recipe.yaml", "losses.json")


@dataclass(frozen=True)
class SavedTask:
    """One task of a saved adapter."""

    name: str
    norm: float  # ||s B A||_F over all modules, of experts that share A and B once: how much it changes the weights
    alike: dict[str, float]  # other task -> cosine of the two changes
    card: TaskCard | None  # how it is asked, if that is known


def list_tasks(folder: str | Path) -> list[SavedTask]:
    """The tasks of an adapter folder in the order of their ids; an `AdapterFolderError` if it has none."""
    file = read_tasks(folder)
    products = torch.zeros(len(file.tasks), len(file.tasks), dtype=torch.float64)
    for module, a in file.stacks().items():
        r = torch.linalg.qr(file.b[module].double()).R  # B = Q R, and Q keeps norms and angles
        a = a.unsqueeze(1) if r.dim() == 3 and a.dim() == 3 else a  # experts with a B each share A
        changes = (file.scaling[module] * r @ a.double()).flatten(1)
        products += changes @ changes.T
    norms, cards = products.diagonal().sqrt(), read_task_cards(file.folder, file.tasks)
    cosines = (products / norms / norms[:, None]).nan_to_num(0.0).tolist()
    alike = [dict(zip(file.tasks, row, strict=True)) for row in cosines]
    return [
        SavedTask(task, float(norms[i]), {o: c for o, c in alike[i].items() if o != task}, cards.get(task))
        for i, task in enumerate(file.tasks)
    ]


def arrange_tasks(
    folder: str | Path | AdapterFile,
    tasks: Mapping[str, str | None],
    *,
    seed: int = 0,
    cards: Mapping[str, TaskCard] = {},
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter with other tasks; gives the folder that was written.

    Args:
        folder: an ALoRA adapter, or what `read_tasks` read of it.
        tasks: names in the order of their ids, each with the old task whose A it has; None is an A to train, drawn as a
            layer begins. Old tasks that nobody names are dropped.
        seed: of such draws, for which the name counts too.
        cards: how new tasks will be asked; old tasks keep their cards, under a new name too.
        out: another folder; None changes the adapter's own.
        overwrite: replace the adapter that is there.

    Raises:
        ValueError: no such task, a name that cannot be a task's, no ALoRA adapter with tasks, or a folder that holds
            something.

    Example:
        >>> arrange_tasks("runs/alora/adapter", {"film": "movie", "trec": "trec", "law": None}, out="runs/three")
    """
    file, target = _opened(folder, out, overwrite)
    names = task_names(list(tasks))
    check_known(file, filter(None, tasks.values()))
    for name, card in cards.items():
        checked_fields(name, card)

    def row(module: str, stack: Tensor, name: str, source: str | None) -> Tensor:
        if source is not None:
            return stack[file.tasks.index(source)]
        return seeded_a(name, module, stack.shape[1:], seed).to(stack.dtype)

    a = {m: torch.stack([row(m, stack, *pair) for pair in tasks.items()]) for m, stack in file.stacks().items()}
    config: ALoRAConfig = ALoRAConfig.from_pretrained(str(file.folder))
    config.tasks = list(names)
    # the card of a task that is called otherwise goes with its A
    heirs = {
        old: old if tasks.get(old) == old else new for new, old in reversed(list(tasks.items())) if old is not None
    }
    known = read_task_cards(file.folder, file.tasks)
    cards = {heirs[old]: card for old, card in known.items() if old in heirs} | dict(cards)
    return _write(file, target, config, _tensors(a, file.b), cards)


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
        out, overwrite: as of `arrange_tasks`.

    Raises:
        ValueError: as `arrange_tasks`; other base models, task types or shapes, or a name that both have.
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
    for file in (first, second):
        file.refuse_experts("joining")
    one_each = {task: replace(first, row=row) for row, task in enumerate(first.tasks)}
    one_each |= {name: replace(second, row=row) for row, name in enumerate(theirs.values())}
    config, shapes = one_adapter(one_each, rank or first.rank + second.rank)
    dtype = torch.promote_types(first.dtype, second.dtype)
    if rank is None:
        tensors, config.lora_alpha = _stacked(first, second, list(shapes), dtype)
        report = report_of(one_each, shapes, tensors, target)
    else:
        tensors, report = over_best_b(one_each, shapes, target, dtype)
    config.lora_dropout = ALoRAConfig.from_pretrained(str(first.folder)).lora_dropout
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


def check_known(file: AdapterFile, names: Iterable[str]) -> None:
    """Raise an `AdapterFolderError` unless the adapter has these tasks."""
    for name in names:
        if name not in file.tasks:
            raise refused(file.folder, f"has no task {name[:80]!r}: {did_you_mean(name, file.tasks)}")


def _opened(folder: str | Path | AdapterFile, out: str | Path | None, overwrite: bool) -> tuple[AdapterFile, Path]:
    """The adapter and the folder for what is made of it."""
    file = folder if isinstance(folder, AdapterFile) else read_tasks(folder)
    target = file.folder if out is None else Path(out).resolve()
    check_replaceable(target, overwrite)
    if any((place / name).exists() for place in (target, target.parent) for name in OPTIMIZER):
        raise refused(target, "is a checkpoint, whose optimizer goes by the rows of A: give another folder (--out)")
    return file, target


def _tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names in the file."""
    parts = {"A": a, "B": b}
    return {f"{PREFIX}{m}.asymlora_{part}.weight": parts[part][m] for part in parts for m in a}


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
        n, _, k, *_ = first.shapes.get(module) or second.shapes[module]
        a[module], b[module] = torch.zeros(tasks, r, k, dtype=dtype), torch.zeros(n, r, dtype=dtype)
        for file, stacks, row, column in places:
            if module in file.shapes:
                columns = slice(column, column + file.shapes[module].r)
                a[module][row : row + len(file.tasks), columns] = stacks[module]
                b[module][:, columns] = file.b[module].double() * (file.scaling[module] / s)
    return _tensors(a, b), s * r


def _write(
    file: AdapterFile,
    target: Path,
    config: ALoRAConfig,
    tensors: Mapping[str, Tensor],
    cards: Mapping[str, TaskCard],
) -> Path:
    """Write what was made of an adapter, and beside it how it was trained."""
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set would be written in no fixed order
    text = (file.folder / CARD).read_text(encoding="utf-8") if (file.folder / CARD).is_file() else ""
    packaged = re.search(r'load_model\("([^"]+)"\)', text)
    asked = {task: said for task, card in cards.items() if (said := described(card))}
    with kept(target), written_whole(target) as folder:
        draft = Path(folder)
        write_adapter(draft, tensors, config, model_card(config, text, named=packaged and packaged[1], asked=asked))
        write_task_cards(draft, cards)
        if (file.folder / SETTINGS).is_file():
            method = json.loads((file.folder / SETTINGS).read_text(encoding="utf-8"))
            method["settings"] |= {key: getattr(config, key) for key in ("tasks", "r", "lora_alpha", "use_rslora")}
            (draft / SETTINGS).write_text(json.dumps(method, indent=1), encoding="utf-8")
        for name in BESIDE if target != file.folder else ():
            if (file.folder / name).is_file():
                shutil.copy(file.folder / name, draft)
        if not cards:
            (target / CARDS).unlink(missing_ok=True)
    return target
