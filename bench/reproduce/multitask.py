"""`multitask`: five ways to put several tasks into one model, on the same rows. (ALoRA, its tables)

delta-m is the mean relative change of accuracy against single-task training, in percent, below zero better. A LoRA per
task is single-task training: no task's gradient reaches another's A, B or head, and every task gets the same batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from alora_kernels.adapters.method import METHODS
from alora_kernels.baselines.methods import trainable_parameters

from ..report.readme import markdown
from . import figures
from .config import Config
from .encoder import study
from .numbers import Claim, Number, against, delta, paired, per_seed, percents, pick, spread

ALONE, ALORA, HYDRA, MAJORITY = "lora-per-task", "alora", "hydralora", "majority"
SOURCE = "ALoRA, its tables"


def cases(config: Config) -> list[str]:
    return list(config.methods)


def run(config: Config, seed: int, case: str) -> list[Number]:
    learner = study(config, case, seed)
    heads = sum(p.numel() for p in learner.model.heads.parameters())
    parameters = trainable_parameters(learner.model) - heads
    start = time.perf_counter()
    learner.train(config)
    out = [Number(measure="training_seconds", value=time.perf_counter() - start)]
    accuracy = learner.accuracy()
    out += [Number(measure="accuracy", item=name, value=value) for name, value in accuracy.items()]
    out += [Number(measure=MAJORITY, item=name, value=task.majority) for name, task in learner.rows.items()]
    return [
        *out,
        Number(measure="average", value=statistics.fmean(accuracy.values())),
        Number(measure="worst", item=min(accuracy, key=lambda name: accuracy[name]), value=min(accuracy.values())),
        Number(measure="parameters", value=float(parameters)),
    ]


def claims(rows: Sequence[Number]) -> list[Claim]:
    pairs = {measure: paired(rows, measure, ALORA, HYDRA) for measure in ("average", "worst")}
    return [
        Claim(
            "ALoRA's average is comparable to or above HydraLoRA's (84.81 against 84.57, commonsense)",
            SOURCE,
            "average at most half a point below HydraLoRA's",
            against(pairs["average"]),
            [a > h - 0.005 for a, h in pairs["average"]],
        ),
        Claim(
            "ALoRA is more balanced across tasks",
            SOURCE,
            "worst task above HydraLoRA's",
            against(pairs["worst"]),
            [a > h for a, h in pairs["worst"]],
        ),
    ]


def table(rows: Sequence[Number]) -> list[str]:
    tasks = list(dict.fromkeys(row.item for row in pick(rows, measure="accuracy")))
    lines = [["always the most frequent", *(percents(rows, measure=MAJORITY, item=t) for t in tasks)]]
    for case in [m for m in METHODS if pick(rows, case=m)]:
        scores = [percents(rows, case=case, measure="accuracy", item=t) for t in tasks]
        scores += [percents(rows, case=case, measure=m) for m in ("average", "worst")]
        size = f"{per_seed(rows, case=case, measure='parameters')[0] / 1e6:.2f} M"
        seconds = spread(per_seed(rows, case=case, measure="training_seconds"), ".0f")
        lines.append([METHODS[case], *scores, delta(rows, case, ALONE), size, seconds])
    return markdown(["method"], [*tasks, "average", "worst", "delta-m %", "adapter parameters", "seconds"], lines)


def figure(rows: Sequence[Number], path: Path) -> None:
    figures.accuracies(rows, path, {m: METHODS[m] for m in METHODS if pick(rows, case=m)}, "task")
