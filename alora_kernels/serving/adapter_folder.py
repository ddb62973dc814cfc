"""A folder becomes matrices, or is refused with the reason.

In:   the path of a saved adapter, ALoRA or stock LoRA, that somebody else may have written.
Out:  `AdapterFile`: its tasks, its scalings, the B's in memory and each task's A when asked for.
Who:  `TaskStore.load`, before anything that runs is touched.

Only JSON and safetensors are read, nothing is unpickled and nothing in the folder is executed. Every number is looked
at once, one task's rows of one tensor at a time, so that a folder of 1000 tasks never has to be in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..integrations.peft.files import CONFIG, PICKLE, WEIGHTS
from .adapter_config import ServedConfig, read_config, refused
from .errors import AdapterRefusedError

PREFIX = "base_model.model."
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_KEYS = {
    "alora": re.compile(re.escape(PREFIX) + r"([\w.-]+)\.asymlora_(A|B)"),
    "lora": re.compile(re.escape(PREFIX) + r"([\w.-]+)\.lora_(A|B)\.weight"),
}
Stamp = tuple[int, int, int]  # inode, bytes, time of the last change: another file under the same name differs
Keys = dict[str, dict[str, str]]  # module -> "A" or "B" -> name of the tensor


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A saved adapter whose contents were checked.

    Attributes:
        folder: where it lies.
        base: the base model's name that the folder gives; None if it gives none.
        kind: how it was saved.
        tasks: names of its tasks; a stock LoRA is one task, called like its folder.
        scaling: module -> s.
        b: module -> the shared B `[N, R]`.
        shapes: module -> (N, R, K).
        dtype: the widest of its tensors.
        keys: names of the tensors in the file.
        stamp: of the file that was checked.
    """

    folder: Path
    base: str | None
    kind: Literal["alora", "lora"]
    tasks: tuple[str, ...]
    scaling: dict[str, float]
    b: dict[str, Tensor]
    shapes: dict[str, tuple[int, int, int]]
    dtype: torch.dtype
    keys: Keys
    stamp: Stamp

    def matrices(self, task: str) -> dict[str, Tensor]:
        """A of one task: module -> `[R, K]`; only these rows are read.

        Args:
            task: one of `tasks`.

        Raises:
            AdapterRefusedError: no such task, or the file is not the one that was checked any more.
        """
        if task not in self.tasks:
            raise refused(self.folder, f"has no task {task!r}: it has {', '.join(map(repr, self.tasks[:20]))}")
        row = self.tasks.index(task)
        with _opened(self.folder) as (file, stamp):
            if stamp != self.stamp:
                raise refused(self.folder, f"{WEIGHTS} changed while it was read: load the folder again")
            return {module: _a(file, self.kind, parts["A"], row) for module, parts in self.keys.items()}


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check a saved adapter.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The adapter; module names are those of the base model.

    Raises:
        AdapterRefusedError: there is none, it is damaged, or it cannot be served per task; naming the remedy.
    """
    folder = Path(os.path.abspath(folder))
    try:
        present, is_folder = folder.exists(), folder.is_dir()
    except OSError as error:  # a name longer than the system allows, a folder that may not be looked into
        raise refused(folder, f"cannot be looked at ({error.strerror}): give another folder") from None
    if not present:
        raise refused(folder, "no such folder: give the folder that save_adapter or save_pretrained wrote")
    if not is_folder:
        raise refused(folder, "is a file: give the folder that holds it")
    config = read_config(folder)
    _check_weights(folder)
    with _opened(folder) as (file, stamp):
        keys = _keys(folder, file, config.kind)
        shapes = {module: _shape(folder, file, config, module, parts) for module, parts in keys.items()}
        scaling = {module: config.scaling(module, shapes[module][1]) for module in keys}
        dtype = _dtype(folder, file, keys)
        b = {module: file.get_tensor(parts["B"]).clone() for module, parts in keys.items()}  # not a view of the file
        for module, parts in keys.items():
            finite = bool(b[module].isfinite().all())
            for row in range(len(config.tasks)):
                finite = finite and bool(_a(file, config.kind, parts["A"], row).isfinite().all())
            if not finite:
                raise refused(folder, f"{module} holds numbers that are not finite: train it again with a lower rate")
    return AdapterFile(folder, config.base, config.kind, config.tasks, scaling, b, shapes, dtype, keys, stamp)


def _check_weights(folder: Path) -> None:
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
def _opened(folder: Path) -> Iterator[tuple[Any, Stamp]]:
    """The folder's weights and which file they are; what safetensors says of a damaged file becomes a refusal."""
    path = folder / WEIGHTS
    try:
        stat = path.stat()
        with safe_open(path, framework="pt") as file:
            yield file, (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except AdapterRefusedError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise refused(folder, f"{WEIGHTS} does not read ({error}): it is cut short or damaged; copy it again") from None


def _keys(folder: Path, file: Any, kind: str) -> Keys:
    """The tensors by module, if there is an A and a B of each and nothing else."""
    keys: Keys = {}
    for key in file.keys():  # noqa: SIM118, not a dict
        match = _KEYS[kind].fullmatch(key)
        if match is None:
            raise refused(
                folder,
                f"holds {key[:200]!r}, which cannot be served per task: only matrices A and B can; train without it",
            )
        keys.setdefault(match[1], {})[match[2]] = key
    if not keys:
        raise refused(folder, f"{WEIGHTS} holds no tensor: save the adapter again")
    for module, parts in keys.items():
        for part in "AB":
            if part not in parts:
                raise refused(folder, f"{module} has no {part}: the file is incomplete; save the adapter again")
    return keys


def _shape(folder: Path, file: Any, config: ServedConfig, module: str, parts: dict[str, str]) -> tuple[int, int, int]:
    """(N, R, K) of a module whose two tensors fit each other and the config."""
    a, b = (tuple(file.get_slice(parts[part]).get_shape()) for part in "AB")
    tasks = (len(config.tasks),) if config.kind == "alora" else ()
    if len(a) != len(tasks) + 2 or len(b) != 2 or a[: len(tasks)] != tasks or a[-2] != b[1] or 0 in (*a, *b):
        wanted = f"[{tasks[0]} tasks, R, K]" if tasks else "[R, K]"
        raise refused(folder, f"{module}: A is {list(a)} and B {list(b)}, but they must be {wanted} and [N, R]")
    if config.rank(module) != b[1]:
        raise refused(
            folder, f"{module} has rank {b[1]} but {CONFIG} says {config.rank(module)}: the scale would be wrong"
        )
    return b[0], b[1], a[-1]


def _dtype(folder: Path, file: Any, keys: Keys) -> torch.dtype:
    """The widest dtype of all tensors."""
    widest: torch.dtype | None = None
    for module, parts in keys.items():
        for key in parts.values():
            found = file.get_slice(key).get_dtype()
            if found not in DTYPES:
                raise refused(folder, f"{module} is stored as {found}: save it as one of {', '.join(DTYPES)}")
            widest = DTYPES[found] if widest is None else torch.promote_types(widest, DTYPES[found])
    assert widest is not None
    return widest


def _a(file: Any, kind: str, key: str, row: int) -> Tensor:
    """One task's A `[R, K]`, sharing no memory with the file."""
    return (file.get_slice(key)[row] if kind == "alora" else file.get_tensor(key)).clone()  # type: ignore[no-any-return]
