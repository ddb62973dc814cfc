"""Rows as Markdown tables between the markers of a page.

A block depends on the rows and the names of the figures alone, so that `--check` can compare it.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .rows import Row, grouped
from .tables import fastest_first, shown_ms
from .targets import FUSED, Target, Verdict, judge, on_row


def replace_block(text: str, name: str, content: str) -> str:
    """The text with what is between `<!-- name:begin -->` and `<!-- name:end -->` replaced; ValueError without them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the README needs the line {begin} and below it {end}, each once")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n{content.strip()}\n{end}", text, flags=re.DOTALL)


def markdown(left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table of columns with text and columns with numbers; short rows end in empty cells."""
    lines = [line(*left, *right), "|" + "---|" * len(left) + "---:|" * len(right)]
    return lines + [line(*cells) + " |" * (len(left) + len(right) - len(cells)) for cells in rows]


def linked(path: Path, folder: Path) -> str:
    """The path as a page in `folder` links it."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def block(
    rows: Sequence[Row], targets: Sequence[Target], source: str, figures: Mapping[str, str], *, cases: bool
) -> str:
    """What the README says about one CSV; `source` and `figures` (name -> PNG) as the README links them.

    `cases`: every case gets a table; a GPU has too many, its figures show them, and only whole models do.
    """
    parts = [_about(rows, source)]
    shown = [same for same in grouped(rows, lambda row: row.group) if cases or same[0].whole_model]
    parts += [_case_table(same, rows, targets) for same in shown]
    parts.append(_target_table([judge(target, rows) for target in targets]))
    parts.append("Figures: " + ", ".join(f"[{name}]({link})" for name, link in figures.items()) + ".")
    return "\n\n".join(parts)


def runs_of(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Device, versions, commit and date of each run -> its cases."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row.device}, torch {row.torch}, triton {row.triton}, commit {row.commit}, {row.date}"
        runs.setdefault(where, []).append(row.case)
    return runs


def _about(rows: Sequence[Row], source: str) -> str:
    """Where, when and how the numbers were taken; a run each where they are of several."""
    timed = [row for row in rows if row.timed]
    runs = runs_of(timed)
    proof = "every result verified against float64 before it is timed"
    if timed[0].command == "host":
        proof = "kernels are replaced by nothing, so there is no result"
    lines = [
        f"`python -m bench {timed[0].command}`, {proof}; all rows: [{source}]({source}).",
        "",
    ]
    for run, names in runs.items():
        lines.append(f"- {run}" + ("" if len(runs) == 1 else f" ({', '.join(dict.fromkeys(names))})"))
    return "\n".join(lines)


def _case_table(same: Sequence[Row], rows: Sequence[Row], targets: Sequence[Target]) -> str:
    first = same[0]
    notes = "".join(f"; {note}" for note in dict.fromkeys(row.note for row in same if row.timed and row.note))
    more = ("tokens/s | peak MB | ", "---:|---:|") if first.whole_model else ("", "")
    number = "peak MB" if first.quantity == "peak_mb" else "p50 ms (p20 to p80)"
    lines = [
        f"**{first.case}**: {first.direction}, {first.mode}, {first.sizes}{notes}",
        "",
        f"| provider | computes | {number} | / fused | {more[0]}target |",
        f"|---|---|---:|---:|{more[1]}---|",
    ]
    fused = next((row.figure for row in same if row.provider == FUSED and row.timed), None)
    for row in fastest_first(same):
        if not row.timed:
            lines.append(f"| {row.provider} | {row.computes} | {row.status} | | |{' | |' * first.whole_model}")
            continue
        if row.quantity == "peak_mb":
            shown = "" if row.peak_mb is None else f"{row.peak_mb:,.0f}"
        else:
            shown = f"{shown_ms(row.p50_ms)} ({shown_ms(row.p20_ms)} to {shown_ms(row.p80_ms)})"
        cells = [row.provider, row.computes, shown, f"{row.figure / fused:.2f}" if fused and row.figure else ""]
        if row.tokens_per_second is not None:
            cells += [f"{row.tokens_per_second:,.0f}", "" if row.peak_mb is None else f"{row.peak_mb:,.0f}"]
        asked = on_row(row, FUSED, rows, targets)
        lines.append(line(*cells, "" if asked is None else f"{asked.target.bound(asked.target.must)}: {met(asked)}"))
    return "\n".join(lines)


def compiled(path: Path, source: str) -> str:
    """A line per chip of what `bench static --csv` found: the worst of its kernels."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    chips: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        chips.setdefault(row["chip"], []).append(row)
    cells = []
    for chip, same in chips.items():
        bad = [row["kernel"] for row in same if int(row["failed"]) or int(row["spilled"]) or int(row["hazards"])]
        full = max(same, key=lambda row: int(row["shared"]) / int(row["shared_limit"]))
        most = [max(int(row[name]) for row in same) for name in ("registers", "spilled")]
        shared = f"{int(full['shared']):,} of {int(full['shared_limit']):,}"
        counts = [sum(int(row[name]) for row in same) for name in ("variants", "failed", "hazards")]
        cells.append([chip, ", ".join(bad) or "none", *map(str, (len(same), *counts, *most)), shared])
    run = f"triton {rows[0]['triton']}, commit {rows[0]['commit']}, {rows[0]['date']}"
    about = f"`python -m bench static --csv`, {run}; a line per kernel: [{Path(source).name}]({source})."
    about += " Order: rules of `bench/static/ptx.py` that the PTX breaks."
    columns = ["kernels", "variants", "do not compile", "order", "registers", "spilled B", "shared B"]
    return "\n\n".join([about, "\n".join(markdown(["chip", "with a fault"], columns, cells))])


def _target_table(verdicts: Sequence[Verdict]) -> str:
    lines = ["| case | pass | ratio | must | aim | measured | met |", "|---|---|---|---:|---:|---:|---|"]
    for v in verdicts:
        t = v.target
        found = ("not measured", v.reason) if v.measured is None else (f"{v.measured:.2f}", met(v))
        lines.append(line(t.case, t.direction, t.ratio_of, t.bound(t.must), t.bound(t.aim), *found))
    return "\n".join(lines)


def met(verdict: Verdict) -> str:
    return {None: "", True: "met", False: "**missed**"}[verdict.met]
