"""Rows as the README's tables, between its markers.

In:   the newest rows of the CSV files, the README's text.
Out:  the README's text with the blocks `bench-cpu` and `bench-gpu` written anew; everything else stays.
Who:  `bench.report.plot`.

A block depends on the rows and the names of the figures alone, so that `--check` can compare it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .rows import Row, grouped
from .tables import shown_ms, wanted
from .targets import FUSED, Target, Verdict, judge


def replace_block(text: str, name: str, content: str) -> str:
    """The text with what is between `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the README needs the line {begin} and below it {end}, each once")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n{content.strip()}\n{end}", text, flags=re.DOTALL)


def block(
    rows: Sequence[Row], targets: Sequence[Target], source: str, figures: Mapping[str, str], *, cases: bool
) -> str:
    """What the README says about one CSV.

    Args:
        rows: the newest rows.
        targets: what is asked for.
        source: the CSV, as the README links it.
        figures: name -> PNG file, likewise.
        cases: whether every case gets a table; a GPU has too many, its figures show them, and only whole models do.
    """
    parts = [_about(rows, source)]
    shown = [same for same in grouped(rows).values() if cases or same[0].whole_model]
    parts += [_case_table(same, rows, targets) for same in shown]
    verdicts = [judge(target, rows) for target in targets]
    parts.append(_target_table(verdicts))
    parts.append("Figures: " + ", ".join(f"[{name}]({link})" for name, link in figures.items()) + ".")
    return "\n\n".join(parts)


def _about(rows: Sequence[Row], source: str) -> str:
    """Where, when and how the numbers were taken; a run each where they are of several."""
    timed = [row for row in rows if row.timed]
    command = timed[0].command
    runs: dict[tuple[str, ...], list[str]] = {}
    for row in timed:
        key: tuple[str, ...] = (
            row.device,
            f"torch {row.torch}",
            f"triton {row.triton}",
            f"commit {row.commit}",
            row.date,
        )
        runs.setdefault(key, []).append(row.case)
    lines = [
        f"`python -m bench {command}`, every result verified against float64 before it is timed; all rows: [{source}]"
        f"({source}).",
        "",
    ]
    for key, names in runs.items():
        which = "" if len(runs) == 1 else f" ({', '.join(dict.fromkeys(names))})"
        lines.append(f"- {', '.join(key)}{which}")
    return "\n".join(lines)


def _case_table(same: Sequence[Row], rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """One case: times, the ratio to the fused op, and what was asked of it."""
    first = same[0]
    sizes = " ".join(f"{letter.upper()}={getattr(first, letter)}" for letter in "mknre")
    notes = "".join(f"; {note}" for note in dict.fromkeys(row.note for row in same if row.timed and row.note))
    more = ("tokens/s | peak MB | ", "---:|---:|") if first.whole_model else ("", "")
    lines = [
        f"**{first.case}**: {first.direction}, {first.mode}, {sizes} {first.dtype}{notes}",
        "",
        f"| provider | computes | p50 ms (p20 to p80) | / fused | {more[0]}target |",
        f"|---|---|---:|---:|{more[1]}---|",
    ]
    fused = next((row.p50_ms for row in same if row.provider == FUSED and row.timed), None)
    for row in sorted(same, key=lambda row: row.p50_ms if row.timed and row.p50_ms else float("inf")):
        if row.timed:
            time = f"{shown_ms(row.p50_ms)} ({shown_ms(row.p20_ms)} to {shown_ms(row.p80_ms)})"
            ratio = f"{row.p50_ms / fused:.2f}" if fused and row.p50_ms else ""
            cells = [row.provider, row.computes, time, ratio]
            if row.tokens_per_second is not None:
                cells += [f"{row.tokens_per_second:,.0f}", "" if row.peak_mb is None else f"{row.peak_mb:,.0f}"]
            lines.append(f"| {' | '.join([*cells, _asked(row, rows, targets)])} |")
        else:
            lines.append(f"| {row.provider} | {row.computes} | {row.status} | | |{' | |' * first.whole_model}")
    return "\n".join(lines)


def _asked(row: Row, rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """The target on a row's ratio to the fused op, if there is one."""
    for target in targets:
        mine = (target.case, target.direction, target.mode) == row.group and target.quantity == "p50_ms"
        if mine and (target.numerator, target.denominator) == (row.provider, FUSED):
            return f"{wanted(target, target.must)}: {_met(judge(target, rows))}"
    return ""


def _target_table(verdicts: Sequence[Verdict]) -> str:
    lines = ["| case | pass | ratio | must | aim | measured | met |", "|---|---|---|---:|---:|---:|---|"]
    for v in verdicts:
        t = v.target
        measured = "not measured" if v.measured is None else f"{v.measured:.2f}"
        met = v.reason if v.measured is None else _met(v)
        cells = (t.case, t.direction, t.ratio_of, wanted(t, t.must), wanted(t, t.aim), measured, met)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _met(verdict: Verdict) -> str:
    return {None: "", True: "met", False: "**missed**"}[verdict.met]
