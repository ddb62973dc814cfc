"""What docs/cpu.md says about servers, from the CSV files of `bench serving --peer`; its own file, for `bench plot`."""

from __future__ import annotations

import os
from pathlib import Path

from ..report.readme import markdown, met
from ..report.rows import newest
from ..report.sheet import read
from ..report.targets import Verdict, judge
from .command import SERVER_COLUMNS, server_cells
from .rows import Repeat, medians, peer_goals


def blocks(folder: Path, page: Path) -> list[str]:
    """A block per CSV, its newest run: where it was taken, medians, and every goal, those that were missed too."""
    found = []
    for path in sorted(folder.glob("peer-*.csv")):
        rows = medians(newest(read(path, Repeat), lambda row: ""))
        if not rows:
            continue
        first, link = rows[0], Path(os.path.relpath(path.resolve(), page)).as_posix()
        about = (
            f"`python -m bench {first.command}`, {first.device}, torch {first.torch}, commit {first.commit},"
            f" {first.date}; {first.model}, {first.requests} requests of {first.new_tokens} tokens over {first.tasks}"
            f" tasks, {first.concurrency} in flight; {first.note}; medians; all rows: [{path.name}]({link})."
        )
        table = markdown(SERVER_COLUMNS[:3], SERVER_COLUMNS[3:], map(server_cells, rows))
        judged = [judge(goal, rows) for goal in peer_goals(first.tasks, max(row.busy for row in rows))]
        goals = markdown(("ratio",), ("must", "aim", "measured", "met"), map(_goal, judged))
        found.append("\n".join([about, "", *table, "", *goals]))
    return found


def _goal(verdict: Verdict) -> list[str]:
    t, number = verdict.target, verdict.measured
    found = ["not measured", verdict.reason] if number is None else [f"{number:.2f}", met(verdict)]
    return [t.ratio_of, t.bound(t.must), t.bound(t.aim), *found]
