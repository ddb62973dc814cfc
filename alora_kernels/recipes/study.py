"""Several federated methods on the same clients and seeds, side by side: runs, a table, a JSON file, a picture.

In:   one `FedConfig` per method and seed.
Out:  a `Result` each; mean, worst client, delta-m against training alone, and bytes, over the seeds.
Who:  `examples/federated_sentiment.py`.

A finished run stays in its folder and is read back instead of repeated, so an interrupted study goes on where it was; a
folder that holds a run of another configuration is refused. The order of methods differs from task to task and seed to
seed: the table shows the spread, and no test asserts an order.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ..federated import FedConfig, Outcome, checkpoint, run
from ..federated.log import read
from ..federated.server import FINAL, LEDGER, Template
from . import display
from .display import quiet
from .federated import base_fingerprint, majority, participant, template
from .study_results import ALONE, Result, rows_of

CONFIG = "config.yaml"


def study(configs: Sequence[FedConfig]) -> list[Result]:
    """Every run, with a progress bar, after what needs no training: one pair of baselines per seed.

    Args:
        configs: one per method and seed, each with an output folder of its own.

    Raises:
        ValueError, RuntimeError: as `result`.
    """
    quiet()
    one_per_seed = {config.seed: config for config in reversed(configs)}
    results = [row for seed in dict.fromkeys(c.seed for c in configs) for row in baselines(one_per_seed[seed])]
    with display.progress("messages") as bar:
        for config in configs:
            total = 2 * len(config.clients) * (config.rounds + 1)  # there and back, and once more to judge the end
            task = bar.add_task(f"{config.method}, seed {config.seed}", total=total, note="")
            results.append(result(config, lambda _, task=task: bar.advance(task)))  # type: ignore[misc]
            bar.update(task, completed=total)  # a run that was read back sent nothing
            accuracy = statistics.fmean(results[-1].accuracy.values())
            bar.console.print(f"{config.method}, seed {config.seed}: {display.percent(accuracy)} on average")
    return results


def baselines(config: FedConfig) -> list[Result]:
    """What no training gives: always the most frequent answer, and the model before its first step."""
    untuned = {}
    for client in config.clients:
        fresh = participant(config, client.name)
        untuned[client.name] = float(fresh.evaluate(fresh.model)["accuracy"])
    return [Result("majority", config.seed, majority(config)), Result("untuned", config.seed, untuned)]


def result(config: FedConfig, on_message: Callable[[Any], None] = lambda message: None) -> Result:
    """Run a configuration in this process, or read the run that its folder holds.

    Args:
        config: the run; `output` is a folder of its own.
        on_message: sees every message of a run, for a progress bar.

    Raises:
        ValueError: the folder holds a run of another configuration.
        RuntimeError: the run stopped early, and why.
    """
    folder, text = config.output, config.to_yaml()
    kept = folder / CONFIG
    if kept.exists() and kept.read_text() != text:
        raise ValueError(f"{folder} holds a run with other settings: choose another output, or delete it")
    if (folder / FINAL).exists():
        outcome = Outcome("finished", None, config.rounds, {}, read(folder / LEDGER))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)
        resume = (folder / checkpoint.FILE).exists()
        known = Template(template(config), base_fingerprint(config))
        outcome = run(config, partial(participant, config), template=known, resume=resume, on_message=on_message)
    if outcome.status != "finished":
        raise RuntimeError(f"{config.method}, seed {config.seed}, stopped: {outcome.reason}")
    total = outcome.bytes_up + outcome.bytes_down
    return Result(
        method=config.method,
        seed=config.seed,
        accuracy={name: metrics["accuracy"] for name, metrics in outcome.final.items()},
        bytes_round=total / (len(config.clients) * config.rounds),
        bytes_total=total,
        rejected=len(outcome.rejections),
    )


def table(results: Sequence[Result], title: str) -> Table:
    """The study as a table: averages over seeds, with the range where there are several."""
    cells = []
    for row in rows_of(results):
        worst = f"{_spread([100 * v for v in row.worst])} ({row.worst_client})"
        known = [value for value in row.delta if value is not None]
        delta = "0.0" if row.method == ALONE else _spread(known, "+.1f") if known else "-"
        mean = _spread([100 * v for v in row.mean])
        cells.append([row.method, mean, worst, delta, _size(row.bytes_round), _size(row.bytes_total)])
    columns = ("method", "mean %", "worst % (client)", "delta-m %", "bytes a round", "bytes in all")
    note = (
        f"delta-m: mean relative change of accuracy against {ALONE}, below zero is better; ± is the standard deviation "
        "over seeds; bytes are arrays up and down, a round's for one client"
    )
    shown = display.table(title, columns, cells, caption=note)
    shown.columns[0].no_wrap = True  # other columns may wrap, names may not
    return shown


def save(results: Sequence[Result], configs: Sequence[FedConfig], folder: Path) -> tuple[Path, Path]:
    """`results.json` (configurations, every run, the rows) and `results.png` in the folder."""
    from .study_plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "configs": [config.model_dump(mode="json", exclude_defaults=True, exclude={"output"}) for config in configs],
        "results": [asdict(r) for r in results],
        "rows": [asdict(row) for row in rows_of(results)],
    }
    path = folder / "results.json"
    path.write_text(json.dumps(values, indent=1, allow_nan=False))
    return path, plot(results, folder / "results.png")


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    """The mean, and the standard deviation of several values."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ±{statistics.stdev(values):.1f}"


def _size(count: float) -> str:
    """A number of bytes; 0 as a dash."""
    if not count:
        return "-"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
