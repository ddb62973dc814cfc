"""`sharing`: do tasks fight more over a shared A or over a shared B? (ALoRA, Fig. 3)

In:   several tasks at once, with B shared (ALoRA), with A shared (a B per task), and HydraLoRA.
Out:  every few steps, per layer: the gradient's norm, the cosine between tasks, pairs of tasks, how many conflict;
      accuracies at the end.
Who:  `command`.

A pair conflicts in a matrix where the cosine of the two tasks' gradients, each on its own fixed rows in eval mode, is
below zero. Nothing is measured before the first step: B is zero there and A has no gradient. HydraLoRA's B are shared
too, through its router.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from alora_kernels.analysis import Conflicts, task_conflicts

from . import figures
from .claims import Claim
from .config import Config
from .encoder import SHARED_A, Study, loss_of, study
from .rows import Row, layer_of, per_seed, pick, spread

SOURCE = "ALoRA, Fig. 3"
SHARED = {"alora": "B", SHARED_A: "A", "hydralora": "A"}  # the matrix that the method's name is about
LABELS = {
    "alora": "B shared (ALoRA)",
    SHARED_A: "A shared, a B per task",
    "hydralora": "A shared, routed B (HydraLoRA)",
}


def cases(config: Config) -> list[str]:
    """A unit of work per method."""
    return list(config.methods)


def run(config: Config, seed: int, case: str) -> list[Row]:
    """One training, looked at on the way."""
    learner = study(config, case, seed)
    probes = {
        name: learner.batch({t: torch.arange(min(config.probe_size, len(task.train)))})
        for t, (name, task) in enumerate(learner.rows.items())
    }
    out: list[Row] = []

    def look(step: int) -> None:
        if step and step % config.every == 0:
            out.extend(_measured(learner, probes, step))

    learner.train(config, look)
    return out + [Row(measure="accuracy", item=name, value=v) for name, v in learner.accuracy().items()]


def _measured(learner: Study, probes: dict[str, dict[str, torch.Tensor]], step: int) -> list[Row]:
    """Rows per layer and matrix: the mean norm over its linear layers, the sums of pairs and conflicts."""
    groups: dict[tuple[int, str], list[Conflicts]] = {}
    for record in task_conflicts(learner.model, probes, loss_of):
        groups.setdefault((layer_of(record.module), record.parameter), []).append(record)
    out = []
    for (layer, part), records in groups.items():
        values = {
            "norm": sum(r.norm for r in records) / len(records),
            "conflicts": float(sum(r.conflicts for r in records)),
            "pairs": float(sum(r.pairs for r in records)),
            "cosine": float(torch.stack([_between(r) for r in records]).nanmean()),
        }
        out += [Row(layer=layer, part=part, measure=m, item=str(step), value=v) for m, v in values.items()]
    return out


def _between(record: Conflicts) -> torch.Tensor:
    """Mean cosine over the pairs of tasks; nan where none meet."""
    tasks = len(record.tasks)
    return record.cosine[tuple(torch.triu_indices(tasks, tasks, 1))].nanmean()


def _mean(rows: Sequence[Row], case: str, part: str, measure: str) -> list[float]:
    return per_seed(rows, case=case, part=part, measure=measure)


def _share(rows: Sequence[Row], case: str, part: str) -> list[float]:
    """Conflicts per pair; none where the matrix is nobody's common one."""
    both = zip(_mean(rows, case, part, "conflicts"), _mean(rows, case, part, "pairs"), strict=True)
    return [conflicts / pairs for conflicts, pairs in both if pairs]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Smaller gradients and more conflicts where A is shared."""
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


def table(rows: Sequence[Row]) -> list[str]:
    """A row per method."""
    lines = [
        "| method | gradient of A | gradient of B | cosine in A | cosine in B | conflicts in A | conflicts in B "
        "| mean accuracy % |",
        "|---|" + "---:|" * 7,
    ]
    for case in dict.fromkeys(row.case for row in rows):
        norms = [spread(_mean(rows, case, part, "norm"), ".4f") for part in "AB"]
        shares = [spread(v, ".3f") if (v := _share(rows, case, part)) else "per task" for part in "AB"]
        cosines = [spread(v, "+.3f") if (v := _mean(rows, case, part, "cosine")) else "per task" for part in "AB"]
        accuracy = [100 * v for v in per_seed(rows, case=case, measure="accuracy")]
        lines.append(f"| {LABELS[case]} | {' | '.join([*norms, *cosines, *shares])} | {spread(accuracy, '.1f')} |")
    return lines


def figure(rows: Sequence[Row], path: Path) -> None:
    """Per layer: norm of the shared matrix's gradient, and the number of conflicting pairs in a measurement."""
    mine = {LABELS[case]: pick(rows, case=case, part=part) for case, part in SHARED.items()}
    norms, conflicts = (
        {name: of(found) for name, found in mine.items() if found} for of in (_norms, _conflicts_beside_half)
    )
    panels = [
        figures.Panel("gradient norm of the shared matrix", norms),
        figures.Panel("conflicting pairs in the shared matrices of a layer", conflicts),
    ]
    figures.by_layer(panels, path, columns=2)


def _norms(rows: Sequence[Row]) -> list[Row]:
    return pick(rows, measure="norm")


def _conflicts_beside_half(rows: Sequence[Row]) -> list[Row]:
    """Conflicts with half of the pairs as their level of chance."""
    pairs = {(r.seed, r.layer, r.item): r.value or 0.0 for r in pick(rows, measure="pairs")}
    found = pick(rows, measure="conflicts")
    return [dataclasses.replace(r, chance=pairs[r.seed, r.layer, r.item] / 2) for r in found]
