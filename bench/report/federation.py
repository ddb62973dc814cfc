"""What docs/federated.md says about methods, from the JSON files of `examples/federated_sentiment.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .readme import linked, markdown

LEFT, RIGHT = ("method",), ("mean accuracy %", "worst client %", "delta-m %", "up and down")


def blocks(results: Path, page: Path) -> list[str]:
    """A block per file: the command, when and on what, a row per method, the figure."""
    found = []
    for path in sorted((results / "federated").glob("*.json"), key=lambda path: path.stem != "four"):
        told = json.loads(path.read_text())
        link = linked(path, page)
        about = f"`{told['command']}`, {told['device']}, {told['date']}, committed in {told['commit']};"
        about += f" {told['setting']}; all runs: [{path.name}]({link})."
        rows = list(map(_cells, told["rows"]))
        picture = f"![accuracy and bytes of each method]({link.removesuffix('.json')}.png)"
        table = markdown(LEFT, RIGHT, rows)
        found.append("\n".join([about, "", *table, "", picture]))
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    known = [value for value in row["delta"] if value is not None]
    delta = "0" if row["method"] == "local" else _spread(known, "+.1f") if known else ""
    worst = f"{_spread([100 * value for value in row['worst']])} ({row['worst_client']})"
    travels = row["bytes_round"]
    size = "-" if not travels else f"{travels / 1e6:.2f} MB" if travels >= 1e6 else f"{travels / 1e3:.1f} kB"
    return [f"`{row['method']}`", _spread([100 * value for value in row["mean"]]), worst, delta, size]


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    """The mean, and the standard deviation of several values."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
