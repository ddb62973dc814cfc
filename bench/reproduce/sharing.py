"""`sharing`: do tasks fight more over a shared A or over a shared B? (ALoRA, Fig. 3)

A pair conflicts in a matrix where the cosine of the two tasks' gradients, each on its own fixed rows in eval mode, is
below zero. HydraLoRA's B are shared too, through its router. Nothing is measured before the first step: B is zero there
and A has no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from alora_kernels.analysis import Conflicts, task_conflicts

from ..report.readme import markdown
from ..report.rows import grouped
from . import figures
from .config import Config
from .encoder import SHARED_A, Study, loss_of, study
from .numbers import Claim, Number, per_seed, percents, pick, place_of, spread

SOURCE = "ALoRA, Fig. 3"
SHARED = {"alora": "B", SHARED_A: "A", "hydralora": "A"}  # the matrix that the method's name is about
LABELS = {
    "alora": "B shared (ALoRA)",
    SHARED_A: "A shared, a B per task",
    "hydralora": "A shared, routed B (HydraLoRA)",
}


def cases(config: Config) -> list[str]:
    return list(config.methods)


def run(config: Config, seed: int, case: str) -> list[Number]:
    learner = study(config, case, seed)
    probes = {
        name: learner.batch({t: torch.arange(min(config.probe_size, len(task.train)))})
        for t, (name, task) in enumerate(learner.rows.items())
    }
    out: list[Number] = []

    def look(step: int) -> None:
        if step and step % config.every == 0:
            out.extend(_measured(learner, probes, step))

    learner.train(config, look)
    return out + [Number(measure="accuracy", item=name, value=v) for name, v in learner.accuracy().items()]


def _measured(learner: Study, probes: dict[str, dict[str, torch.Tensor]], step: int) -> list[Number]:
    """Rows per layer and matrix: the mean norm over its linear layers, the sums of pairs and conflicts."""
    out = []
    conflicts = task_conflicts(learner.model, probes, loss_of)
    for records in grouped(conflicts, lambda r: (place_of(r.module, "")["layer"], r.parameter)):
        first = records[0]
        values = {
            "norm": sum(r.norm for r in records) / len(records),
            "conflicts": float(sum(r.conflicts for r in records)),
            "pairs": float(sum(r.pairs for r in records)),
            "cosine": float(torch.stack([_between(r) for r in records]).nanmean()),
        }
        place = place_of(first.module, first.parameter, str(step)) | {"module": ""}
        out += [Number(**place, measure=m, value=v) for m, v in values.items()]
    return out


def _between(record: Conflicts) -> torch.Tensor:
    """Mean cosine over the pairs of tasks; nan where none meet."""
    tasks = len(record.tasks)
    return record.cosine[tuple(torch.triu_indices(tasks, tasks, 1))].nanmean()


def _mean(rows: Sequence[Number], case: str, part: str, measure: str) -> list[float]:
    return per_seed(rows, case=case, part=part, measure=measure)


def _share(rows: Sequence[Number], case: str, part: str) -> list[float]:
    """Conflicts per pair; none where the matrix is nobody's common one."""
    both = zip(_mean(rows, case, part, "conflicts"), _mean(rows, case, part, "pairs"), strict=True)
    return [conflicts / pairs for conflicts, pairs in both if pairs]


def claims(rows: Sequence[Number]) -> list[Claim]:
    norm = {case: _mean(rows, case, part, "norm") for case, part in SHARED.items()}
    share = {case: _share(rows, case, part) for case, part in SHARED.items()}

    def beside(values: dict[str, list[float]], form: str) -> str:
        return ", ".join(f"{LABELS[case]} {spread(v, form)}" for case, v in values.items() if v)

    return [
        Claim(
            "sharing A gives smaller gradients than sharing B",
            SOURCE,
            "mean norm of the shared A below that of ALoRA's shared B",
            beside(norm, ".4f"),
            [a < b for a, b in zip(norm[SHARED_A], norm["alora"], strict=False)],
        ),
        Claim(
            "sharing A causes more conflicts than sharing B",
            SOURCE,
            "share of conflicting pairs in the shared A above that in ALoRA's shared B",
            beside(share, ".3f"),
            [a > b for a, b in zip(share[SHARED_A], share["alora"], strict=False)],
        ),
    ]


def table(rows: Sequence[Number]) -> list[str]:
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        norms = [spread(_mean(rows, case, part, "norm"), ".4f") for part in "AB"]
        cosines = [spread(v, "+.3f") if (v := _mean(rows, case, part, "cosine")) else "per task" for part in "AB"]
        shares = [spread(v, ".3f") if (v := _share(rows, case, part)) else "per task" for part in "AB"]
        lines.append([LABELS[case], *norms, *cosines, *shares, percents(rows, case=case, measure="accuracy")])
    right = [f"{what} {part}" for what in ("gradient of", "cosine in", "conflicts in") for part in "AB"]
    return markdown(["method"], [*right, "mean accuracy %"], lines)


def figure(rows: Sequence[Number], path: Path) -> None:
    """Per layer: norm of the shared matrix's gradient, and the number of conflicting pairs in a measurement."""
    mine = {LABELS[case]: pick(rows, case=case, part=part) for case, part in SHARED.items()}
    mine = {name: found for name, found in mine.items() if found}
    norms = {name: pick(found, measure="norm") for name, found in mine.items()}
    conflicts = {name: _beside_half(found) for name, found in mine.items()}
    panels = [
        figures.Panel("gradient norm of the shared matrix", norms),
        figures.Panel("conflicting pairs in the shared matrices of a layer", conflicts),
    ]
    figures.by_layer(panels, path, columns=2)


def _beside_half(rows: Sequence[Number]) -> list[Number]:
    """Conflicts with half of the pairs as their level of chance."""
    pairs = {(r.seed, r.layer, r.item): r.value or 0.0 for r in pick(rows, measure="pairs")}
    found = pick(rows, measure="conflicts")
    return [dataclasses.replace(r, chance=pairs[r.seed, r.layer, r.item] / 2) for r in found]
