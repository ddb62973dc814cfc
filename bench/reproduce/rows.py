"""One number of an experiment, and which numbers of a CSV count.

In:   what an experiment measured; the CSV.
Out:  `Row`s with where they come from; the rows of finished runs of one configuration.
Who:  every experiment, `docs`, `figures`.

A unit of work is a seed of a case. Its last row is `seconds`: rows without one are of a run that was interrupted and
are not read.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from ..machine import this_run
from .config import Config

DONE = "seconds"


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        experiment, config: its name, and the hash of its settings.
        seed, case: which unit of work.
        module, layer: path of the adapted layer and number of its block; empty and -1 for numbers of the whole model.
        part: "A", "B", "W".
        measure: what the number is.
        item: of what: a pair, a task, a client, a step.
        value: the number; empty where it is not defined.
        chance: what `value` would be for random directions.
        date, commit, device, torch, transformers, peft: where it comes from.
    """

    experiment: str = ""
    config: str = ""
    seed: int = 0
    case: str = ""
    module: str = ""
    layer: int = -1
    part: str = ""
    measure: str = ""
    item: str = ""
    value: float | None = None
    chance: float | None = None
    date: str = ""
    commit: str = ""
    device: str = ""
    torch: str = ""
    transformers: str = ""
    peft: str = ""


def stamped(rows: Iterable[Row], config: Config, seed: int, case: str) -> list[Row]:
    """The rows with their unit of work and their origin; a NaN becomes empty."""
    here = this_run("reproduce", "cuda" if torch.cuda.is_available() else "cpu")
    versions: dict[str, Any] = {name: metadata.version(name) for name in ("transformers", "peft")}
    common: dict[str, Any] = {"date": here.date, "commit": here.commit, "device": here.device, "torch": here.torch}
    return [
        dataclasses.replace(
            row,
            experiment=config.experiment,
            config=config.hash,
            seed=seed,
            case=case,
            value=None if row.value is None or row.value != row.value else row.value,
            **common,
            **versions,
        )
        for row in rows
    ]


def finished(rows: Sequence[Row], config: Config) -> list[Row]:
    """Rows of this configuration, of units that were finished; the newest run where a unit was run twice."""
    mine = [row for row in rows if row.config == config.hash]
    newest = {(row.seed, row.case): row.date for row in mine if row.measure == DONE}
    return [row for row in mine if newest.get((row.seed, row.case)) == row.date]


def done(rows: Sequence[Row], config: Config) -> set[tuple[int, str]]:
    """The units, (seed, case), that are finished."""
    return {(row.seed, row.case) for row in finished(rows, config)}


def per_seed(rows: Iterable[Row], keep: Callable[[Row], bool]) -> list[float]:
    """For each seed the mean value of the rows to keep; seeds without one are left out."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.value is not None and keep(row):
            found.setdefault(row.seed, []).append(row.value)
    return [statistics.fmean(found[seed]) for seed in sorted(found)]


def pick(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds; with one seed, that there is none."""
    if not values:
        return "not run yet"
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


def layer_of(module: str) -> int:
    """Number of the block that a layer belongs to, -1 where its path has none."""
    match = re.search(r"(?:layer|layers|h|blocks)\.(\d+)\.", module)
    return int(match[1]) if match else -1
