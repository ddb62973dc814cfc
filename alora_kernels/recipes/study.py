"""Several federated methods on the same clients and seeds, side by side: runs, a table, a JSON file, a picture.

A finished run stays in its folder and is read back instead of repeated, so an interrupted study goes on where it was; a
folder that holds a run of another configuration is refused. The order of methods differs from task to task and seed to
seed: the table shows the spread, and no test asserts an order.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import plotting
from ..federated import FedConfig, Outcome, run
from ..federated.log import LEDGER, delta_m, read
from ..federated.state import CHECKPOINT, FINAL
from ..text import install, percent
from . import display
from .federated import majority, participant, template

CONFIG = "config.yaml"
ALONE = "local"  # what delta-m compares with
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Result:
    """One run, or one row of comparison that was not trained."""

    method: str  # or "majority" or "untuned"
    seed: int
    accuracy: dict[str, float]  # client -> accuracy on its test rows at the end
    bytes_round: float = 0.0  # arrays up and down, per client and round, on average
    bytes_total: int = 0  # of all clients and rounds
    rejected: int = 0  # replies that the guard refused


@dataclass(frozen=True)
class Row:
    """One method over all seeds; each list has a value per seed."""

    method: str
    mean: list[float]  # over the clients, as is `worst`
    worst: list[float]
    worst_client: str  # who was worst, most often
    delta: list[float | None]  # delta-m in percent against `local` with the same seed; None without such a run
    bytes_round: float  # as in `Result`, of the mean seed
    bytes_total: float


def study(configs: Sequence[FedConfig]) -> list[Result]:
    """Every run, with a progress bar, after what needs no training: one pair of baselines per seed.

    There is a configuration per method and seed, each with an output folder of its own. Raises as `result`.
    """
    display.quiet()
    one_per_seed: dict[int, FedConfig] = {}
    for config in configs:
        one_per_seed.setdefault(config.seed, config)
    results = [row for config in one_per_seed.values() for row in baselines(config)]
    with display.progress("messages") as bar:
        for config in configs:
            total = 2 * len(config.clients) * (config.rounds + 1)  # there and back, and once more to judge the end
            task = bar.add_task(f"{config.method}, seed {config.seed}", total=total, note="")
            results.append(result(config, lambda _, task=task: bar.advance(task)))  # type: ignore[misc]
            bar.update(task, completed=total)  # a run that was read back sent nothing
            accuracy = statistics.fmean(results[-1].accuracy.values())
            bar.console.print(f"{config.method}, seed {config.seed}: {percent(accuracy)} on average")
    return results


def baselines(config: FedConfig) -> list[Result]:
    """What no training gives: always the most frequent answer, and the model before its first step."""
    untuned = {}
    for client in config.clients:
        fresh = participant(config, client.name)
        untuned[client.name] = float(fresh.evaluate(fresh.model)["accuracy"])
    return [Result("majority", config.seed, majority(config)), Result("untuned", config.seed, untuned)]


def result(config: FedConfig, on_message: Callable[[Any], None] = lambda message: None) -> Result:
    """Run a configuration in this process, or read the run that its folder holds; `on_message` sees every message.

    A ValueError if the folder holds a run of another configuration, a RuntimeError if the run stopped early.
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
        resume = (folder / CHECKPOINT).exists()
        how: dict[str, Any] = {"template": template(config), "resume": resume, "on_message": on_message}
        outcome = run(config, partial(participant, config), **how)
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


def rows_of(results: Sequence[Result]) -> list[Row]:
    """One row per method, in the order of first appearance."""
    if not results:
        raise ValueError("results is empty: run at least one method")
    alone = {r.seed: r.accuracy for r in results if r.method == ALONE}
    rows = []
    for method in dict.fromkeys(r.method for r in results):
        own = [r for r in results if r.method == method]
        worst = [min(r.accuracy, key=r.accuracy.__getitem__) for r in own]
        rows.append(
            Row(
                method=method,
                mean=[statistics.fmean(r.accuracy.values()) for r in own],
                worst=[r.accuracy[name] for r, name in zip(own, worst, strict=True)],
                worst_client=Counter(worst).most_common(1)[0][0],
                delta=[delta_m(r.accuracy, alone[r.seed]) if r.seed in alone else None for r in own],
                bytes_round=statistics.fmean(r.bytes_round for r in own),
                bytes_total=statistics.fmean(r.bytes_total for r in own),
            )
        )
    return rows


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


def plot(results: Sequence[Result], path: Path) -> Path:
    """The picture of the results, as PNG; returns its path.

    Left, a line per method: a dot per client (mean over seeds), a bar at the mean over clients with the range over
    seeds. Right, bytes per client and round.
    """
    plotting.check_matplotlib(f"the picture needs matplotlib: {install('federated')}")
    rows = rows_of(results)
    figure = plotting.figure(9, 1.6 + 0.42 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1.3))
    _clients(left, results, [row.method for row in rows])
    for y, row in enumerate(rows):
        mean = 100 * statistics.fmean(row.mean)
        left.plot([100 * min(row.mean), 100 * max(row.mean)], [y, y], color="black", lw=4, alpha=0.35, zorder=1)
        label = "mean over clients, range over seeds" if y == 0 else None
        left.plot([mean, mean], [y - 0.32, y + 0.32], color="black", lw=2, zorder=1, label=label)
        right.barh(y, row.bytes_round / 1e3, color="#999999", height=0.55)
        note = f" {row.bytes_round / 1e3:.0f}" if row.bytes_round else " 0"
        right.text(row.bytes_round / 1e3, y, note, va="center", fontsize=8)
    left.set_yticks(range(len(rows)), [row.method for row in rows])
    left.invert_yaxis()
    left.set_xlabel("accuracy on each client's own test rows, %")
    left.grid(axis="x", alpha=0.3)
    right.set_xlabel("kB up and down\nper client and round")
    right.margins(x=0.25)
    right.set_xlim(left=0)
    plotting.tidy(left, right)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return plotting.save(figure, path)


def _clients(axes: Any, results: Sequence[Result], methods: Sequence[str]) -> None:
    """A dot per client and method, a little apart so that equal values stay visible."""
    clients = list(dict.fromkeys(name for r in results for name in r.accuracy))
    for i, client in enumerate(clients):
        apart = (i - (len(clients) - 1) / 2) * 0.5 / max(len(clients), 4)
        points = [
            (100 * statistics.fmean(values), y + apart)
            for y, method in enumerate(methods)
            if (values := [r.accuracy[client] for r in results if r.method == method and client in r.accuracy])
        ]
        style = {"color": plotting.COLOURS[i % 8], "marker": MARKERS[i // 8 % 8 if len(clients) > 8 else i % 8]}
        axes.plot(*zip(*points, strict=True), ls="", ms=5, label=client, zorder=2, **style)
