"""What came of a study: one `Result` per method and seed, one `Row` per method over the seeds.

In:   results.
Out:  rows: mean, worst client, delta-m against training alone, bytes.
Who:  `study` makes results and shows rows as a table; `study_plot` draws them.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..federated.log import delta_m

ALONE = "local"  # what delta-m compares with


@dataclass(frozen=True)
class Result:
    """One run, or one row of comparison that was not trained.

    Attributes:
        method: name of the method, or "majority" or "untuned".
        seed: of the run.
        accuracy: client -> accuracy on its test rows at the end.
        bytes_round: arrays up and down, per client and round, on average.
        bytes_total: arrays up and down, all clients and rounds.
        rejected: replies that the guard refused.
    """

    method: str
    seed: int
    accuracy: dict[str, float]
    bytes_round: float = 0.0
    bytes_total: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Row:
    """One method over all seeds; each list has a value per seed.

    Attributes:
        method: its name.
        mean, worst: over the clients.
        worst_client: who was worst, most often.
        delta: delta-m in percent against `local` with the same seed (below zero is better); None without such a run.
        bytes_round, bytes_total: as in `Result`, of the mean seed.
    """

    method: str
    mean: list[float]
    worst: list[float]
    worst_client: str
    delta: list[float | None]
    bytes_round: float
    bytes_total: float


def rows_of(results: Sequence[Result]) -> list[Row]:
    """One row per method, in the order of first appearance.

    Raises:
        ValueError: no results.
    """
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
