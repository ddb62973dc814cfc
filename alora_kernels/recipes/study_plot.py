"""The picture of a study: accuracy of each client under each method, beside the bytes it takes.

In:   results of `study`.
Out:  a PNG.
Who:  `study.save`.

Left, a line per method: a dot per client (mean over seeds), a bar at the mean over clients with the range over seeds.
Right, bytes per client and round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .study_results import Result, rows_of

#: Okabe and Ito's colours, which colour-blind people tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#000000")
MARKERS = "osD^vP*X"


def plot(results: Sequence[Result], path: Path) -> Path:
    """Draw the results.

    Args:
        results: of every method and seed.
        path: of the PNG.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'alora-kernels[federated]'") from error
    rows = rows_of(results)
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(rows)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1.3))
    _clients(left, results, [row.method for row in rows])
    for y, row in enumerate(rows):
        mean = 100 * sum(row.mean) / len(row.mean)
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
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _clients(axes: Any, results: Sequence[Result], methods: Sequence[str]) -> None:
    """A dot per client and method, a little apart so that equal values stay visible."""
    clients = list(dict.fromkeys(name for r in results for name in r.accuracy))
    for i, client in enumerate(clients):
        apart = (i - (len(clients) - 1) / 2) * 0.5 / max(len(clients), 4)
        points = []
        for y, method in enumerate(methods):
            values = [r.accuracy[client] for r in results if r.method == method and client in r.accuracy]
            if values:
                points.append((100 * sum(values) / len(values), y + apart))
        xs, ys = zip(*points, strict=True)
        style = {"color": COLOURS[i % 8], "marker": MARKERS[i // 8 % 8 if len(clients) > 8 else i % 8]}
        axes.plot(xs, ys, ls="", ms=5, label=client, zorder=2, **style)
