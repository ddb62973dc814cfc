"""`federated`: what to share between clients, method by method. (Fed-ALoRA and FedSA-LoRA, their tables)

In:   the clients of `examples/federated_sentiment.py`, every method, several seeds.
Out:  accuracy per client, on average and of the worst client; delta-m against training alone; bytes.
Who:  `command`; the runs are the example's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from types import ModuleType

from ..report.rows import ROOT
from . import figures
from .claims import Claim
from .config import Config, ConfigError
from .rows import Row, delta_per_seed, per_seed, pick, spread

ALONE = "local"
RUNS = Path("runs/reproduce-federated")
ROWS = ("majority", "untuned")


@lru_cache(maxsize=1)
def _example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("federated_sentiment", ROOT / "examples" / "federated_sentiment.py")
    if spec is None or spec.loader is None:
        raise ConfigError("examples/federated_sentiment.py is missing: run in a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(config: Config) -> list[str]:
    """A unit of work per method."""
    return list(config.methods)


def run(config: Config, seed: int, case: str) -> list[Row]:
    """One method with one seed, and what needs no training."""
    domains = {_example().FOUR: "four", _example().EIGHT: "eight"}.get(config.names)
    if domains is None:
        raise ConfigError(f"tasks: must be {', '.join(_example().FOUR)} or the eight of the example")
    results = _example().main(
        domains=domains,
        methods=[case],
        seeds=[seed],
        model=config.model,
        output=str(RUNS / config.hash),
        rounds=config.number("rounds"),
        local_steps=config.number("local_steps"),
        batch_size=config.number("batch_size"),
        train_size=config.train_size,
        test_size=config.test_size,
        max_length=config.max_length,
    )
    out = []
    for result in results:
        kind = result.method if result.method in ROWS else "accuracy"
        out += [Row(measure=kind, item=client, value=value) for client, value in result.accuracy.items()]
        if kind == "accuracy":
            out.append(Row(measure="average", value=fmean(result.accuracy.values())))
            out.append(Row(measure="worst", value=min(result.accuracy.values())))
            out.append(Row(measure="bytes", value=float(result.bytes_total)))
    return out


def _of(rows: Sequence[Row], case: str, measure: str) -> dict[int, float]:
    return {r.seed: r.value for r in pick(rows, case=case, measure=measure) if r.value is not None}


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Fed-ALoRA against FedIT and FedSA-LoRA."""
    out = []
    for other, text in (("fedit", "all of LoRA (FedIT)"), ("fedsa-lora", "A alone (FedSA-LoRA)")):
        mine, theirs = _of(rows, "fed-alora", "average"), _of(rows, other, "average")
        seeds = sorted(mine.keys() & theirs.keys())
        shown = [spread([100 * found[s] for s in seeds], ".1f") for found in (mine, theirs)]
        out.append(
            Claim(
                f"sharing B alone is comparable to or better than sharing {text}",
                "Fed-ALoRA, homogeneous table",
                "average at most half a point below",
                f"{shown[0]} % against {shown[1]} %",
                [mine[s] > theirs[s] - 0.005 for s in seeds],
            )
        )
    return out


def table(rows: Sequence[Row]) -> list[str]:
    """A row per method."""
    lines = ["| method | average % | worst client % | delta-m % | MB in all |", "|---|---:|---:|---:|---:|"]
    for name in ROWS:
        values = per_seed(rows, measure=name)
        lines.append(f"| {name} | {spread([100 * v for v in values], '.1f')} | | | |")
    for case in dict.fromkeys(row.case for row in rows):
        average, worst = ([100 * v for v in _of(rows, case, m).values()] for m in ("average", "worst"))
        delta = "0 (baseline)" if case == ALONE else spread(delta_per_seed(rows, case, ALONE), "+.1f")
        size = fmean(_of(rows, case, "bytes").values()) / 1e6
        lines.append(f"| {case} | {spread(average, '.1f')} | {spread(worst, '.1f')} | {delta} | {size:.2f} |")
    return lines


def figure(rows: Sequence[Row], path: Path) -> None:
    """Average and worst client of every method, a dot per seed."""
    cases_ = list(dict.fromkeys(row.case for row in rows))
    panels = {
        title: {case: [100 * v for v in _of(rows, case, measure).values()] for case in cases_}
        for title, measure in (("average accuracy, %", "average"), ("accuracy of the worst client, %", "worst"))
    }
    figures.dots(panels, path)
