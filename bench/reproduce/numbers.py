"""One number of an experiment, which numbers of a CSV count, and what a paper says beside them.

A unit of work is a seed of a case. Its last row is `seconds`: rows without one are of a run that was interrupted and
are not read. A verdict is about this setting (a small encoder, a few hundred steps), never about the paper's.
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
from alora_kernels.analysis.table import places
from alora_kernels.federated.log import delta_m

from ..report.readme import line
from ..report.rows import newest, origin
from .config import Config

DONE, NOT_RUN = "seconds", "not run yet"


@dataclass(frozen=True)
class Number:
    """One number: `measure` of `item` (a pair, a task, a client, a step), for a seed of a case.

    `config` is the hash of the settings. `module` and `layer`, the number of its block, are empty and -1 for numbers of
    the whole model; `part` is "A", "B" or "W". `chance` is what `value` would be for random directions.
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


def place_of(module: str, part: str, item: str = "") -> dict[str, Any]:
    """Columns of an adapted layer's matrix; the block is -1 where the path has none."""
    layer = places([module])[module].layer
    return {"module": module, "layer": -1 if layer is None else layer, "part": part, "item": item}


def overlap(place: Mapping[str, Any], p: Tensor, q: Tensor) -> Number:
    """The subspace overlap of two matrices beside its level of chance: rows of A are inputs, columns of B outputs."""
    p, q = (p, q) if place["part"] == "A" else (p.T, q.T)
    level = chance(p.shape[0], q.shape[0], p.shape[1])
    return Number(**place, measure="overlap", value=subspace_overlap(p, q), chance=level)


def stamped(rows: Iterable[Number], config: Config, seed: int, case: str) -> list[Number]:
    """The rows with their unit of work and their origin; a NaN becomes empty."""
    common = origin("cuda" if torch.cuda.is_available() else "cpu", "transformers", "peft")
    common |= {"experiment": config.experiment, "config": config.hash, "seed": seed, "case": case}
    return [dataclasses.replace(row, value=None if row.value != row.value else row.value, **common) for row in rows]


def finished(rows: Sequence[Number], config: Config) -> list[Number]:
    """Rows of this configuration, of units that were finished; the newest run where a unit was run twice."""
    mine = [row for row in rows if row.config == config.hash]
    return newest(mine, lambda row: (row.seed, row.case), lambda row: row.measure == DONE)


def pick(rows: Iterable[Number], **wanted: object) -> list[Number]:
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def by_seed(rows: Iterable[Number], **wanted: object) -> dict[int, float]:
    """For each seed, in order, the mean of the rows whose fields have these values; seeds without one are left out."""
    found: dict[int, list[float]] = {}
    for row in pick(rows, **wanted):
        if row.value is not None:
            found.setdefault(row.seed, []).append(row.value)
    return {seed: statistics.fmean(found[seed]) for seed in sorted(found)}


def per_seed(rows: Iterable[Number], **wanted: object) -> list[float]:
    return list(by_seed(rows, **wanted).values())


def percents(rows: Iterable[Number], **wanted: object) -> str:
    """The spread of `per_seed`, of shares."""
    return spread([100 * value for value in per_seed(rows, **wanted)], ".1f")


def paired(rows: Sequence[Number], measure: str, *cases: str) -> list[tuple[float, ...]]:
    """The values of several cases, of the seeds that all of them ran."""
    found = [by_seed(rows, case=case, measure=measure) for case in cases]
    return [tuple(f[seed] for f in found) for seed in sorted(set.intersection(*(set(f) for f in found)))]


def against(pairs: Sequence[tuple[float, ...]]) -> str:
    """The spreads of two sides of `paired`, of shares."""
    mine, theirs = (spread([100 * pair[i] for pair in pairs], ".1f") for i in (0, 1))
    return f"{mine} % against {theirs} %"


def delta(rows: Sequence[Number], case: str, alone: str) -> str:
    """The spread of delta-m of a case's accuracies against another's; seeds that lack either are left out."""
    if case == alone:
        return "0 (baseline)"
    out = []
    for seed in sorted({row.seed for row in rows}):
        own, base = (
            {r.item: r.value for r in pick(rows, case=c, seed=seed, measure="accuracy") if r.value is not None}
            for c in (case, alone)
        )
        if own and base and (value := delta_m(own, base)) is not None:
            out.append(value)
    return spread(out, "+.1f")


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds; with one seed, that there is none."""
    if not values:
        return NOT_RUN
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


@dataclass(frozen=True)
class Claim:
    """One statement (`text`) of a paper's figure or table, our numbers beside it, and for each seed whether it agrees.

    `rule` says what we count as agreement.
    """

    text: str
    source: str
    rule: str
    ours: str
    agrees: Sequence[bool]

    @property
    def verdict(self) -> str:
        """In words, with the number of seeds where it says something."""
        met, seeds = sum(self.agrees), len(self.agrees)
        if not seeds:
            return NOT_RUN
        few = "; 1 seed, too few for a spread" if seeds == 1 else ""
        if met == seeds:
            return f"holds ({met} of {seeds} seeds{few})"
        if met == 0:
            return f"does not hold at this size ({met} of {seeds} seeds{few})"
        return f"undecided at this size ({met} of {seeds} seeds)"


def claim_table(claims: Sequence[Claim]) -> list[str]:
    lines = ["| claim | from | counted as agreement | ours | verdict |", "|---|---|---|---|---|"]
    return lines + [line(c.text, c.source, c.rule, c.ours if c.agrees else NOT_RUN, c.verdict) for c in claims]
