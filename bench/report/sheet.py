"""A CSV file that grows row by row and reads back, for any record that is a frozen dataclass.

Its fields are the columns; `field(metadata={"column": "pass"})` names one that Python cannot. A field is a str, an int,
a float or a `float | None`, which is empty where it is None; floats keep six digits.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

from alora_kernels.text import counted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RowT = TypeVar("RowT", bound="DataclassInstance")
_CASTS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    float | None: lambda text: float(text) if text else None,
}


def columns(kind: type[RowT]) -> list[str]:
    return [field.metadata.get("column", field.name) for field in fields(kind)]


class Sheet(Generic[RowT]):
    """A CSV file of rows of one class, made where it is missing; raises as `read` if what is there is another's."""

    def __init__(self, path: Path, kind: type[RowT]) -> None:
        self.path, self.count = path, 0
        _casts(kind)  # what could not be read back is not written
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists() or path.stat().st_size == 0
        if not is_new:
            read(path, kind)
        with path.open("a", newline="") as file:  # for an old file too: what cannot be written is known before a run
            if is_new:
                csv.writer(file).writerow(columns(kind))

    def add(self, row: RowT) -> None:
        """Append a row, on disk when this returns."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([_text(getattr(row, field.name)) for field in fields(row)])
        self.count += 1

    @property
    def summary(self) -> str:
        return f"{counted(self.count, 'row')} written to {self.path}"


def read(path: Path, kind: type[RowT]) -> list[RowT]:
    """All rows of a CSV file, oldest first; a TypeError for a `kind` that is no row, a ValueError for a bad file."""
    casts = _casts(kind)
    make: Callable[..., RowT] = kind
    rows = []
    with path.open(newline="") as file:
        lines = csv.reader(file)
        if next(lines, []) != columns(kind):
            raise ValueError(f"{path} has other columns than this version writes: move it or choose another file")
        for line in lines:
            try:
                rows.append(make(**{name: casts[name](text) for name, text in zip(casts, line, strict=True)}))
            except ValueError as error:
                raise ValueError(f"{path}, line {lines.line_num}, is no row ({error}): delete it") from None
    return rows


def _casts(kind: type[RowT]) -> dict[str, Callable[[str], Any]]:
    hints = get_type_hints(kind)
    if unknown := [field.name for field in fields(kind) if hints[field.name] not in _CASTS]:
        raise TypeError(f"{kind.__name__}: {', '.join(unknown)} must be a str, an int, a float or a float | None")
    return {field.name: _CASTS[hints[field.name]] for field in fields(kind)}


def _text(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
