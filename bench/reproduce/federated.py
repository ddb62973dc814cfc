"""`federated`: what to share between clients, method by method. (Fed-ALoRA and FedSA-LoRA, their tables)

Accuracy per client, on average and of the worst client; delta-m against training alone; bytes. Learning rate and ranks
are those of `examples/federated_sentiment.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..report.readme import markdown
from . import figures
from .config import Config
from .numbers import Claim, Number, against, delta, paired, per_seed, percents

ALONE = "local"
RUNS = Path("runs/reproduce-federated")
ROWS = ("majority", "untuned")
LEARNING_RATE = 2e-3
OWN: dict[str, Any] = {"fedsa-vera": {"rank": 256}}  # VeRA trains two vectors per layer: more entries
RANKS = (16, 8, 8, 4)  # of the clients, in turn, where a method lets them differ
SIZES = ("rounds", "local_steps", "batch_size", "train_size", "test_size", "max_length")


def cases(config: Config) -> list[str]:
    return list(config.methods)


def run(config: Config, seed: int, case: str) -> list[Number]:
    from alora_kernels.federated import METHODS, FedConfig
    from alora_kernels.recipes.study import study

    ranks = [{"rank": r} for r in RANKS] if METHODS[case].adapter == "het" else [{}]
    clients = [{"name": name, "task": name, **ranks[i % len(ranks)]} for i, name in enumerate(config.names)]
    sizes = {name: config.number(name) if name in SIZES[:3] else getattr(config, name) for name in SIZES}
    values: dict[str, Any] = {"learning_rate": LEARNING_RATE} | OWN.get(case, {}) | sizes
    values |= {"method": case, "clients": clients, "model": config.model, "seed": seed}
    out = []
    for result in study([FedConfig(**values, output=RUNS / config.hash / case / f"seed-{seed}")]):
        kind = result.method if result.method in ROWS else "accuracy"
        out += [Number(measure=kind, item=client, value=value) for client, value in result.accuracy.items()]
        if kind == "accuracy":
            out.append(Number(measure="average", value=fmean(result.accuracy.values())))
            out.append(Number(measure="worst", value=min(result.accuracy.values())))
            out.append(Number(measure="bytes", value=float(result.bytes_total)))
    return out


def claims(rows: Sequence[Number]) -> list[Claim]:
    out = []
    for other, text in (("fedit", "all of LoRA (FedIT)"), ("fedsa-lora", "A alone (FedSA-LoRA)")):
        pairs = paired(rows, "average", "fed-alora", other)
        out.append(
            Claim(
                f"sharing B alone is comparable to or better than sharing {text}",
                "Fed-ALoRA, homogeneous table",
                "average at most half a point below",
                against(pairs),
                [mine > theirs - 0.005 for mine, theirs in pairs],
            )
        )
    return out


def table(rows: Sequence[Number]) -> list[str]:
    lines = [[name, percents(rows, measure=name)] for name in ROWS]
    for case in dict.fromkeys(row.case for row in rows):
        average, worst = (percents(rows, case=case, measure=m) for m in ("average", "worst"))
        size = fmean(per_seed(rows, case=case, measure="bytes")) / 1e6
        lines.append([case, average, worst, delta(rows, case, ALONE), f"{size:.2f}"])
    return markdown(["method"], ["average %", "worst client %", "delta-m %", "MB in all"], lines)


def figure(rows: Sequence[Number], path: Path) -> None:
    figures.accuracies(rows, path, {case: case for case in dict.fromkeys(row.case for row in rows)}, "client")
