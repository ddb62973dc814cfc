"""`multitask`: five ways to put several tasks into one model, on the same rows. (ALoRA, its tables)

In:   five or more tasks in every batch, each method of `baselines.methods`.
Out:  accuracy per task, on average and of the worst task; delta-m; parameters; seconds.
Who:  `command`.

delta-m is the mean relative change of accuracy against single-task training, in percent, below zero better. A LoRA per
task is single-task training: no task's gradient reaches another's A, B or head, and every task gets the same batches.
Seconds are of training on this machine, beside whatever else it did.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from alora_kernels.adapters.method import METHODS
from alora_kernels.baselines.methods import trainable_parameters

from . import figures
from .claims import Claim
from .config import Config
from .encoder import study
from .rows import Row, delta_per_seed, per_seed, pick, spread

ALONE, ALORA, HYDRA, MAJORITY = "lora-per-task", "alora", "hydralora", "majority"
SOURCE = "ALoRA, its tables"


def cases(config: Config) -> list[str]:
    """A unit of work per method."""
    return list(config.methods)


def run(config: Config, seed: int, case: str) -> list[Row]:
    """Train, judge, count."""
    learner = study(config, case, seed)
    heads = sum(p.numel() for p in learner.model.heads.parameters())
    parameters = trainable_parameters(learner.model) - heads
    start = time.perf_counter()
    learner.train(config)
    out = [Row(measure="training_seconds", value=time.perf_counter() - start)]
    accuracy = learner.accuracy()
    out += [Row(measure="accuracy", item=name, value=value) for name, value in accuracy.items()]
    out += [Row(measure=MAJORITY, item=name, value=task.majority) for name, task in learner.rows.items()]
    out += [
        Row(measure="average", value=statistics.fmean(accuracy.values())),
        Row(measure="worst", item=min(accuracy, key=lambda name: accuracy[name]), value=min(accuracy.values())),
        Row(measure="parameters", value=float(parameters)),
    ]
    return out


def _of(rows: Sequence[Row], case: str, measure: str) -> list[float]:
    return per_seed(rows, case=case, measure=measure)


def _paired(rows: Sequence[Row], measure: str) -> list[tuple[float, float]]:
    """ALoRA's and HydraLoRA's values of the seeds that both ran."""
    found = [{r.seed: r.value or 0.0 for r in pick(rows, case=case, measure=measure)} for case in (ALORA, HYDRA)]
    return [(found[0][seed], found[1][seed]) for seed in sorted(found[0].keys() & found[1].keys())]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """ALoRA against HydraLoRA: average, balance."""
    pairs = {measure: _paired(rows, measure) for measure in ("average", "worst")}

    def beside(measure: str) -> str:
        sides = [[100 * pair[i] for pair in pairs[measure]] for i in (0, 1)]
        return f"{spread(sides[0], '.1f')} % against {spread(sides[1], '.1f')} %"

    return [
        Claim(
            "ALoRA's average is comparable to or above HydraLoRA's (84.81 against 84.57, commonsense)",
            SOURCE,
            "average at most half a point below HydraLoRA's",
            beside("average"),
            [a > h - 0.005 for a, h in pairs["average"]],
        ),
        Claim(
            "ALoRA is more balanced across tasks",
            SOURCE,
            "worst task above HydraLoRA's",
            beside("worst"),
            [a > h for a, h in pairs["worst"]],
        ),
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """A row per method, a column per task."""
    tasks = list(dict.fromkeys(row.item for row in pick(rows, measure="accuracy")))
    columns = ["method", *tasks, "average", "worst", "delta-m %", "adapter parameters", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    majority = [per_seed(rows, measure=MAJORITY, item=t) for t in tasks]
    shown = [spread([100 * v for v in values], ".1f") for values in majority]
    lines.append(f"| always the most frequent | {' | '.join(shown)} | | | | | |")
    for case in [m for m in METHODS if pick(rows, case=m)]:
        scores = [[100 * (r.value or 0) for r in pick(rows, case=case, measure="accuracy", item=t)] for t in tasks]
        scores += [[100 * v for v in _of(rows, case, m)] for m in ("average", "worst")]
        delta = "0 (baseline)" if case == ALONE else spread(delta_per_seed(rows, case, ALONE), "+.1f")
        cells = [spread(s, ".1f") for s in scores] + [delta, f"{_of(rows, case, 'parameters')[0] / 1e6:.2f} M"]
        lines.append(
            f"| {METHODS[case]} | {' | '.join(cells)} | {spread(_of(rows, case, 'training_seconds'), '.0f')} |"
        )
    return lines


def figure(rows: Sequence[Row], path: Path) -> None:
    """Average and worst task of every method, a dot per seed."""
    methods = [m for m in METHODS if pick(rows, case=m)]
    panels = {
        title: {METHODS[m]: [100 * v for v in _of(rows, m, measure)] for m in methods}
        for title, measure in (("average accuracy, %", "average"), ("accuracy of the worst task, %", "worst"))
    }
    figures.dots(panels, path)
