"""The one reader of saved adapters: a folder becomes matrices, or is refused with the reason.

The folder, ALoRA or stock LoRA, may come from anybody: nothing is unpickled or executed.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import Tensor

from ..tensor_file import DTYPES, ChangedFileError, Stamp, TensorFile
from ..text import listed
from ..tuner.config import CONFIG, PICKLE, PREFIX, WEIGHTS, unwrapped
from .config import AdapterConfig, AdapterFolderError, Kind, checked_config, not_finite, read_settings, refused

FLOATS = ("F64", "F32", "BF16", "F16")
MAX_NAME = 256  # characters of a module's name: patterns are matched against it
_KEYS = {
    "alora": re.compile(re.escape(PREFIX) + rf"(.{{1,{MAX_NAME}}})\.asymlora_(A|B)(?:\.weight)?"),
    "lora": re.compile(re.escape(PREFIX) + rf"(.{{1,{MAX_NAME}}})\.lora_(A|B)\.weight"),
}
Keys = dict[str, dict[str, str]]  # module -> "A" or "B" -> name of the tensor


class AdapterChangedError(AdapterFolderError):
    """A folder that somebody wrote into while it was read."""


class Shape(NamedTuple):
    """Output width N, rank R and input width K of one adapted module, and the experts that have matrices of their own.

    A of a task is `[*a, R, K]` and B `[*b, N, R]`: a and b are empty, or for a stacked weight whose experts do not
    share, their number.
    """

    n: int
    r: int
    k: int
    a: tuple[int, ...] = ()
    b: tuple[int, ...] = ()

    @property
    def own(self) -> tuple[int, ...]:
        """The shape of a task's A."""
        return *self.a, self.r, self.k

    @property
    def shared(self) -> tuple[int, ...]:
        """The shape of B."""
        return *self.b, self.n, self.r


class Factors(NamedTuple):
    """One module of one task, A `[R, K]`, B `[N, R]` and s: its change of the weight is s B A."""

    a: Tensor
    b: Tensor
    s: float


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A saved adapter whose contents were checked. What reads it again refuses a file that changed since."""

    folder: Path
    config: AdapterConfig
    shapes: dict[str, Shape]
    scaling: dict[str, float]  # s by module
    dtype: torch.dtype  # the widest of its tensors
    keys: Keys
    copies: dict[str, str]  # parameter of the base -> name in the file, of what PEFT copies beside an output layer
    stamp: Stamp  # which file was checked
    row: int = 0  # which task `factors` gives
    sums: int = 0  # how many of its tensors were compared with a SHA-256
    b_sums: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)  # of B by module: dtype, and SHA-256

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks; a stock LoRA is one task, called like its folder."""
        return self.config.tasks

    @property
    def base(self) -> str | None:
        """The base model's name that the folder gives; None if it gives none."""
        return self.config.base

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(shape.r for shape in self.shapes.values())

    @cached_property
    def b(self) -> dict[str, Tensor]:
        """Module -> B `[N, R]`, read when first asked for."""
        with opened(self.folder, self.stamp) as file:
            return {module: file.read(parts["B"]) for module, parts in self.keys.items()}

    def matrices(self, task: str) -> dict[str, Tensor]:
        """A of one task, module -> `[R, K]`; only these rows are read. Refuses an unknown task and a changed file."""
        if task not in self.tasks:
            listed = ", ".join(map(repr, self.tasks[:20]))
            raise refused(self.folder, f"has no task {task!r}: it has {listed}; ask for one of these")
        row = self.tasks.index(task)
        with opened(self.folder, self.stamp) as file:
            return {module: _a(file, self.config, parts["A"], row) for module, parts in self.keys.items()}

    def stacks(self) -> dict[str, Tensor]:
        """A of all tasks, module -> `[E, R, K]`. Refuses a file that changed."""
        with opened(self.folder, self.stamp) as file:
            found = {module: file.read(parts["A"]) for module, parts in self.keys.items()}
        return {module: a if self.config.kind == "alora" else a[None] for module, a in found.items()}

    def check_copies(self, base: Mapping[str, Tensor]) -> None:
        """Refuse unless the weights of the base that the file holds too are those of `base`, the parameters here."""
        with opened(self.folder, self.stamp) as file:
            for name, key in self.copies.items():
                own = base.get(name)
                if own is None or not own.is_floating_point() or own.is_meta:
                    continue
                same = file.shape(key) == own.shape and torch.equal(file.read(key).to(own.device, own.dtype), own)
                if not same:
                    raise refused(self.folder, f"was trained on another {name} than the base's, and holds it: merge the"
                                  " adapter into the base that it was trained on")  # fmt: skip

    def say_copies(self) -> None:
        """Warn of weights of the base that the file holds too, where they are left out and no base is there."""
        if self.copies:
            warnings.warn(f"{self.folder} holds {', '.join(self.copies)} of its base too, which is left out: the base"
                          " must have it unchanged", stacklevel=3)  # fmt: skip

    def refuse_experts(self, doing: str) -> None:
        """Refuse an adapter of stacked experts where that is not supported."""
        if stacks := [module for module in self.shapes if module in self.config.stacks]:
            raise refused(self.folder, f"adapts the experts of a mixture ({listed(stacks, 2)}), and {doing} takes"
                          " layers alone")  # fmt: skip

    def factors(self, module: str) -> Factors:
        """A of the task in `row`, B and s of one module; only these are read. Refuses a file that changed."""
        parts = self.keys[module]
        with opened(self.folder, self.stamp) as file:
            return Factors(_a(file, self.config, parts["A"], self.row), file.read(parts["B"]), self.scaling[module])


def read_adapter(
    folder: str | Path, only: Kind | None = None, *, fits: Callable[[AdapterFile], object] = lambda file: None
) -> AdapterFile:
    """Read and check a saved adapter; its module names are those of the base model. `only` refuses the other kind.

    `fits` is asked once modules and shapes are known and before any number is read, which may take long: it refuses
    what does not belong to a base. Every number is looked at, and compared with its SHA-256 where the file has them.

    An `AdapterFolderError` if there is none, it is damaged, or more than s B A per task; of one that somebody writes
    into, an `AdapterChangedError` at the second try.
    """
    try:
        return _read(folder, only, fits)
    except AdapterChangedError:
        return _read(folder, only, fits)


def _read(folder: str | Path, only: Kind | None, fits: Callable[[AdapterFile], object]) -> AdapterFile:
    folder = Path(os.path.abspath(folder))
    try:
        _look(folder)
    except OSError as error:  # a path longer than the system allows, a folder that may not be looked into
        raise refused(folder, f"cannot be looked at ({error.strerror}): give another folder") from None
    config = checked_config(folder, read_settings(folder), only)
    with opened(folder) as file:
        keys, copies = _keys(folder, file, config)
        shapes = {module: _shape(folder, file, config, module, parts) for module, parts in keys.items()}
        scaling = {module: config.scaling(module, shape.r) for module, shape in shapes.items()}
        dtypes = [_dtype(folder, file, module, key) for module, parts in keys.items() for key in parts.values()]
        widest = reduce(torch.promote_types, dtypes)
        b_sums = {module: (file.dtype(parts["B"]), file.sums.get(parts["B"])) for module, parts in keys.items()}
        stamp, sums = file.stamp, len(file.sums)
        found = AdapterFile(folder, config, shapes, scaling, widest, keys, copies, stamp, sums=sums, b_sums=b_sums)
        fits(found)
        if bad := [name for name, parts in keys.items() if not all(map(file.finite, parts.values()))]:
            raise not_finite(folder, bad)
    return found


def _look(folder: Path) -> None:
    """Refuse a folder without the two files."""
    if not folder.exists():
        raise refused(folder, "no such folder: give the folder that save_adapter or save_pretrained wrote")
    if not folder.is_dir():
        raise refused(folder, "is a file: give the folder that holds it")
    if not (folder / CONFIG).is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))[:5]
        hint = f"give one of its subfolders: {', '.join(inside)}" if inside else "is it an adapter's folder?"
        raise refused(folder, f"has no {CONFIG}: {hint}")
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLE).exists():
        raise refused(
            folder,
            f"holds {PICKLE}, a pickle, which could run code and is never read: save the adapter again with a"
            f" current PEFT, which writes {WEIGHTS}",
        )
    raise refused(folder, f"has no {WEIGHTS} beside its {CONFIG}: save the adapter again, or copy the missing file")


@contextmanager
def opened(folder: Path, checked: Stamp | None = None, name: str = WEIGHTS) -> Iterator[TensorFile]:
    """The folder's weights; a refusal if they are damaged, or another file than the one that was checked."""
    try:
        with TensorFile(folder / name) as file:
            if checked not in (None, file.stamp):
                raise ChangedFileError("it is another file")
            yield file
    except ChangedFileError:
        why = f"{name} changed while it was read: load the folder again"
        raise AdapterChangedError(str(refused(folder, why))) from None
    except AdapterFolderError:
        raise
    except (OSError, ValueError) as error:
        raise refused(folder, f"{name} does not read ({error}): it is cut short or damaged; copy it again") from None


def _keys(folder: Path, file: TensorFile, config: AdapterConfig) -> tuple[Keys, dict[str, str]]:
    """The tensors by module, if there is an A and a B of each, and copies from the base; nothing else."""
    keys: Keys = {}
    others: dict[str, str] = {}
    for key in file.keys():  # noqa: SIM118, not a dict
        name = unwrapped(key)
        match = _KEYS[config.kind].fullmatch(name) if key.isprintable() else None
        if match is None:
            others[name.removeprefix(PREFIX)] = key
        elif keys.setdefault(match[1], {}).setdefault(match[2], key) != key:
            raise refused(folder, f"holds {match[2]} of {match[1]} twice: save the adapter again")
    if not keys:
        raise refused(folder, f"{WEIGHTS} holds no tensor: save the adapter again")
    if missing := config.stacks - keys.keys():
        raise refused(folder, f"target_parameters names {listed(sorted(missing), 2)}, of which {WEIGHTS} holds no A and"
                      " B: give full names, or save the adapter again")  # fmt: skip
    for module, parts in keys.items():
        for part in "AB":
            if part not in parts:
                raise refused(folder, f"{module} has no {part}: the file is incomplete; save the adapter again")
    for name, key in others.items():
        if key.isprintable() and _is_copy(name, keys, others):
            continue
        remedy = "nothing else can be used; train without it"
        if name.endswith(".weight") and name.split(".")[-2] in EMBEDDING_LAYER_NAMES:
            remedy = (
                "if the base has it unchanged, save the adapter again with save_pretrained(folder,"
                " save_embedding_layers=False); otherwise save a base of its own"
            )
        raise refused(folder, f"holds {key[:200]!r}, no A or B of a linear layer: {remedy}")
    return dict(sorted(keys.items())), {name.replace(".base_layer.", "."): key for name, key in others.items()}


def _is_copy(name: str, keys: Keys, others: Mapping[str, str]) -> bool:
    """Whether PEFT copied a tensor from the frozen base, beside an adapter on the output layer; not so a bias alone."""
    module, _, parameter = name.rpartition(".base_layer.")
    output = module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES and module in keys
    return output and parameter in ("weight", "bias") and f"{module}.base_layer.weight" in others


def _shape(folder: Path, file: TensorFile, config: AdapterConfig, module: str, parts: dict[str, str]) -> Shape:
    """That of a module whose two tensors fit each other and the config."""
    a, b = (file.shape(parts[part]) for part in "AB")
    tasks = (len(config.tasks),) if config.kind == "alora" else ()
    own_a, own_b = a[len(tasks) : -2], b[:-2]
    known = {(), *((own_a, own_b) if module in config.stacks else ())}
    fits = {own_a, own_b} <= known and max(len(own_a), len(own_b)) < 2 and (not own_a or own_b in ((), own_a))
    if not fits or min(len(a) - len(tasks), len(b)) < 2 or a[: len(tasks)] != tasks or a[-2] != b[-1] or 0 in (*a, *b):
        wanted = f"[{tasks[0]} tasks, R, K]" if tasks else "[R, K]"
        raise refused(folder, f"{module}: A is {list(a)} and B {list(b)}, but they must be {wanted} and [N, R]: save"
                      " the adapter again, without convolutions")  # fmt: skip
    if config.rank(module) != b[-1]:
        raise refused(folder, f"{module} has rank {b[-1]} but {CONFIG} says {config.rank(module)}: the two files do not"
                      " belong together; save the adapter again")  # fmt: skip
    return Shape(b[-2], b[-1], a[-1], tuple(own_a), tuple(own_b))


def _dtype(folder: Path, file: TensorFile, module: str, key: str) -> torch.dtype:
    found = file.dtype(key)
    if found not in FLOATS:
        raise refused(folder, f"{module} is stored as {found}: save it as one of {', '.join(FLOATS)}")
    return DTYPES[found]


def _a(file: TensorFile, config: AdapterConfig, key: str, row: int) -> Tensor:
    """One task's A `[R, K]`."""
    return file.read(key, row if config.kind == "alora" else None)
