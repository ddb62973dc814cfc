"""`fedsa`: are A more alike across clients than B, and less so where their data differ? (FedSA-LoRA, Fig. 2 to 5)

One task split over clients label by label with Dirichlet(alpha), no communication; all begin from the same adapter and
head, as in the paper. Of VeRA the trained vectors take the places of the matrices: d scales the frozen A's rows, b the
frozen B's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from alora_kernels.analysis import cosine

from ..report.readme import markdown
from . import figures
from .config import Config
from .encoder import RSLORA, VERA, Study, factors, study
from .numbers import NOT_RUN, Claim, Number, per_seed, percents, pick, place_of, spread

SOURCE = {"lora": "FedSA-LoRA, Fig. 2 to 4", RSLORA: "FedSA-LoRA, Fig. 5", VERA: "FedSA-LoRA, its VeRA figure"}
BETWEEN, OWN = "cosine between clients", "cosine to its start"
VECTOR = {"d": "A", "b": "B"}


def cases(config: Config) -> list[str]:
    return [f"{variant}, alpha {alpha:g}" for variant in config.variants for alpha in config.alphas]


def split(targets: torch.Tensor, clients: int, alpha: float, least: int, seed: int) -> list[torch.Tensor]:
    """Row numbers of each client: every label's rows are shared out by a draw of Dirichlet(alpha); small differ most.

    Draws that give a client fewer than `least` rows are repeated, up to a thousand times.
    """
    generator = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in targets.unique().tolist():
            rows = generator.permutation(np.flatnonzero(targets.numpy() == label))
            ends = np.cumsum(generator.dirichlet([alpha] * clients))[:-1] * len(rows)
            for part, share in zip(parts, np.split(rows, ends.astype(int)), strict=True):
                part += share.tolist()
        if min(map(len, parts)) >= least:
            return [torch.tensor(sorted(part)) for part in parts]
    raise ValueError(f"alphas: Dirichlet({alpha:g}) gives some of {clients} clients fewer than {least} rows each time")


def _of_client(learner: Study, numbers: torch.Tensor) -> Study:
    ((name, rows),) = learner.rows.items()
    train = [rows.train[i] for i in numbers.tolist()]
    own = dataclasses.replace(rows, train=train, train_target=rows.train_target[numbers])
    return dataclasses.replace(learner, rows={name: own})


def run(config: Config, seed: int, case: str) -> list[Number]:
    variant, alpha = case.split(", alpha ")
    task, rate = config.tasks[:1], config.vera_learning_rate if variant == VERA else config.number("learning_rate")
    learners = [study(config, variant, seed, tasks=task) for _ in range(config.clients)]  # equal, each trains its own
    start = factors(learners[0].model)
    targets = next(iter(learners[0].rows.values())).train_target
    parts = split(targets, config.clients, float(alpha), config.number("batch_size"), seed)
    ends, out = [], []
    for client, learner in enumerate(learners):
        own = _of_client(learner, parts[client])
        torch.manual_seed(1000 * (seed + 1) + client)  # the order of rows and dropout; the adapter is drawn already
        own.train(config, rate=rate)
        ends.append(factors(own.model))
        out.append(Number(measure="rows", item=str(client), value=float(len(parts[client]))))
        out += [Number(measure="accuracy", item=str(client), value=v) for v in own.accuracy().values()]
    for module, first in start.items():
        for name, before in first.items():
            place = place_of(module, VECTOR.get(name, name))
            after = [torch.atleast_2d(end[module][name]) for end in ends]
            pairs = fmean(cosine(p, q) for p, q in combinations(after, 2))
            out.append(Number(**place, measure=BETWEEN, value=pairs))
            if place["part"] == "A":
                own_start = fmean(cosine(torch.atleast_2d(before), q) for q in after)
                out.append(Number(**place, measure=OWN, value=own_start))
    return out


def _of(rows: Sequence[Number], case: str, part: str, measure: str = BETWEEN) -> list[float]:
    return per_seed(rows, case=case, part=part, measure=measure)


def _cases_of(rows: Sequence[Number], variant: str) -> list[str]:
    """The cases of a variant, smallest alpha (most different clients) first."""
    mine = {row.case for row in rows if row.case.split(", ")[0] == variant}
    return sorted(mine, key=lambda case: float(case.split("alpha ")[1]))


def _known(rows: Sequence[Number]) -> list[str]:
    return [case for variant in SOURCE for case in _cases_of(rows, variant)]


def claims(rows: Sequence[Number]) -> list[Claim]:
    """For each variant: A above B at every alpha; B falls as clients differ; A moves at all."""
    out = []
    for variant, source in SOURCE.items():
        known = _cases_of(rows, variant)
        a, b = ([_of(rows, case, part) for case in known] for part in "AB")
        seeds = range(min(map(len, a + b), default=0))
        shown = [f"{c.split(', ')[1]}: {spread(p)} against {spread(q)}" for c, p, q in zip(known, a, b, strict=True)]
        out += [
            Claim(
                f"{variant}: A are more alike across clients than B",
                source,
                "mean cosine of A above that of B at every alpha",
                "; ".join(shown),
                [all(p[i] > q[i] for p, q in zip(a, b, strict=True)) for i in seeds],
            ),
            Claim(
                f"{variant}: B are less alike the more the clients' data differ",
                source,
                "mean cosine of B at the smallest alpha below that at the largest",
                f"{spread(b[0])} against {spread(b[-1])}" if b else NOT_RUN,
                [b[0][i] < b[-1][i] for i in seeds],
            ),
        ]
    own = [_of(rows, case, "A", OWN) for case in _cases_of(rows, "lora")]
    moved = [max(values) for values in zip(*own, strict=True)]
    out.append(
        Claim(
            "A are updated: they differ from their start",
            "FedSA-LoRA, Fig. 4",
            "mean cosine to the start below 0.999 at every alpha",
            spread(moved),
            [value < 0.999 for value in moved],
        )
    )
    return out


def table(rows: Sequence[Number]) -> list[str]:
    lines = []
    for case in _known(rows):
        cells = [spread(_of(rows, case, p, m)) for p, m in (("A", BETWEEN), ("B", BETWEEN), ("A", OWN))]
        lines.append([case, *cells, percents(rows, case=case, part="", measure="accuracy")])
    right = ["A between clients", "B between clients", "A to its start", "mean accuracy %"]
    return markdown(["adapter, Dirichlet alpha"], right, lines)


def figure(rows: Sequence[Number], path: Path) -> None:
    panels = []
    for case in _known(rows):
        found = pick(rows, case=case)
        series = {f"{part}, between clients": pick(found, part=part, measure=BETWEEN) for part in "AB"}
        panels.append(figures.Panel(case, {**series, "A, to its start": pick(found, part="A", measure=OWN)}, 1.05))
    figures.by_layer(panels, path, columns=3)
