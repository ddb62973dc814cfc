"""One number of an experiment, and which numbers of a CSV count.

In:   what an experiment measured; the CSV.
Out:  `Row`s with where they come from; the rows of finished runs of one configuration.
Who:  every experiment, `docs`, `figures`.

A unit of work is a seed of a case. Its last row is `seconds`: rows without one are of a run that was interrupted and
are not read.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alora_kernels.analysis import chance, subspace_overlap
from alora_kernels.analysis.labels import places
from alora_kernels.federated.log import delta_m

from ..report.rows import origin
from .claims import NOT_RUN
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
    common = origin("cuda" if torch.cuda.is_available() else "cpu", "transformers", "peft")
    return [
        dataclasses.replace(
            row,
            experiment=config.experiment,
            config=config.hash,
            seed=seed,
            case=case,
            value=None if row.value is None or row.value != row.value else row.value,
            **common,
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


def pick(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def per_seed(rows: Iterable[Row], **wanted: object) -> list[float]:
    """For each seed the mean value of the rows whose fields have these values; seeds without one are left out."""
    found: dict[int, list[float]] = {}
    for row in pick(rows, **wanted):
        if row.value is not None:
            found.setdefault(row.seed, []).append(row.value)
    return [statistics.fmean(found[seed]) for seed in sorted(found)]


def delta_per_seed(rows: Sequence[Row], case: str, alone: str) -> list[float]:
    """For each seed delta-m of a case's accuracies against another's; seeds that lack either are left out."""
    out = []
    for seed in sorted({row.seed for row in rows}):
        own, base = (
            {r.item: r.value for r in pick(rows, case=c, seed=seed, measure="accuracy") if r.value is not None}
            for c in (case, alone)
        )
        if own and base and (value := delta_m(own, base)) is not None:
            out.append(value)
    return out


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds; with one seed, that there is none."""
    if not values:
        return NOT_RUN
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


def layer_of(module: str) -> int:
    """Number of the block that a layer belongs to, -1 where its path has none."""
    layer = places([module])[module].layer
    return -1 if layer is None else layer


def overlap_row(place: Mapping[str, Any], p: Tensor, q: Tensor) -> Row:
    """The subspace overlap of two matrices beside its level of chance: rows of A are inputs, columns of B outputs.

    Args:
        place: module, layer, part and item of the row.
        p, q: both A or both B, as the part says.
    """
    p, q = (p, q) if place["part"] == "A" else (p.T, q.T)
    level = chance(p.shape[0], q.shape[0], p.shape[1])
    return Row(**place, measure="overlap", value=subspace_overlap(p, q), chance=level)
