"""Rows as figures: times per case, and how far the targets are; bars with their numbers, for the other figures too.

Every case that was timed is shown, those that the fused op loses too: an alternative of comparable reach (several
adapters) that is faster is drawn in red. One LoRA and the frozen layer do less and are drawn in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alora_kernels.plotting import BLUE, DARK_GREY, GREEN, GREY, RED, figure, grid, save, tidy

from .readme import runs_of
from .rows import GRAPH, Row, grouped
from .tables import shown_ms
from .targets import FUSED, Verdict

LESS = ("frozen", "lora")  # functions of fewer adapters than the case has


def bar(
    axis: Any, y: float, value: float, thick: float, text: str, color: str, *, to: Sequence[float] = (), **look: Any
) -> None:
    """A horizontal bar of length `value` with a thin line over the range `to`, if given, and its number behind both."""
    axis.barh(y, value, thick, color=color, **look)
    axis.plot(to, [y] * len(to), color="black", linewidth=1)
    axis.annotate(text, (max(value, *to) if to else value, y), xytext=(4, -3), textcoords="offset points", fontsize=7.5)


def legend(made: Any, shown: Mapping[str, str], **options: Any) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=color, edgecolor=DARK_GREY, linewidth=0.5, label=label) for label, color in shown.items()
    ]
    made.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9, **options)


def times(rows: Sequence[Row], path: Path) -> None:
    """A panel per case and pass, a bar per provider: p50, with p20 to p80 as a line, or the peak of memory."""
    panels = grouped([row for row in rows if row.timed], lambda row: (row.case, row.direction))
    columns = min(2, len(panels))
    sizes = [len({row.provider for row in same}) + 2 for same in panels]  # 2: title and axis
    ratios = [max(sizes[i : i + columns]) for i in range(0, len(sizes), columns)]
    made = figure(7.2 * columns, 0.9 + 0.3 * sum(ratios) + 0.3 * len(ratios))
    for axis, same in zip(grid(made, len(panels), columns, gridspec_kw={"height_ratios": ratios}), panels, strict=True):
        _panel(axis, same)
    shown = {"fused": BLUE, "less than fused": RED, "more than fused": DARK_GREY}
    shown |= {"does less: no adapter or one": GREY}
    shown |= {"pale: eager; full: CUDA graph": "white"} if any(row.mode == GRAPH for row in rows) else {}
    legend(made, shown)
    _finish(made, rows, path)


def targets(verdicts: Sequence[Verdict], rows: Sequence[Row], path: Path) -> None:
    """How far each target is from what must be: beyond 1 it is met."""
    known = [v for v in reversed(verdicts) if v.measured is not None and v.target.must is not None]
    made = figure(11, 1.6 + 0.34 * len(known))
    axis: Any = made.subplots()
    for y, verdict in enumerate(known):
        t, measured = verdict.target, verdict.measured or 0.0
        must = t.must or 1.0
        margin = must / measured if t.at_most else measured / must
        color = GREEN if verdict.met else RED
        axis.plot([1, margin], [y, y], "-o", color=color, linewidth=2, markevery=[1])
        text = f"{measured:.2f} ({t.bound(must)})"
        axis.annotate(text, (max(margin, 1), y), xytext=(8, -3), textcoords="offset points", fontsize=8, color=color)
    names = [f"{v.target.case}, {v.target.direction}: {v.target.ratio_of}" for v in known]
    axis.set_yticks(range(len(known)), names, fontsize=8)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.2)  # room for the numbers
    ticks = [t for t in (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10) if low <= t <= high * 1.2]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("margin over what must be: right of 1 is met (green), left is missed (red)", fontsize=9)
    axis.set_title("targets: measured ratio of p50 (or peak memory), in brackets what it must be", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    _finish(made, rows, path)


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    """One case and pass: bars sorted by the time under a CUDA graph where there is one."""
    modes = sorted({row.mode for row in rows}, key=lambda mode: mode != GRAPH)
    fused = {row.mode: _figure(row) for row in rows if row.provider == FUSED}
    providers = [sorted(same, key=lambda row: modes.index(row.mode)) for same in grouped(rows, lambda r: r.provider)]
    providers.sort(key=lambda same: _figure(same[0]), reverse=True)
    thick, widest, timed = 0.8 / len(modes), max(map(_figure, rows)), rows[0].quantity == "p50_ms"
    for place, same in enumerate(providers):
        for row in same:
            index = modes.index(row.mode)
            y = place - thick * (index - (len(modes) - 1) / 2)
            ratio = f"  {_figure(row) / fused[row.mode]:.2f}x" if row.mode in fused else ""
            text, to = f"{_figure(row):,.0f} MB{ratio}", tuple[float, ...]()
            if timed:
                end = min(max(_figure(row), row.p80_ms or 0.0), 1.25 * widest)  # a wild p80 must not flatten all bars
                if end < (row.p80_ms or 0.0):
                    axis.plot([end], [y], ">", color="black", markersize=4)
                text, to = f"{shown_ms(row.p50_ms)} ms{ratio}", (row.p20_ms or 0.0, end)
            color = _color(row, fused.get(row.mode))
            bar(axis, y, _figure(row), thick * 0.92, text, color, to=to, alpha=1.0 if index == 0 else 0.45)
    axis.set_yticks(range(len(providers)), [f"{same[0].provider} [{same[0].computes}]" for same in providers])
    axis.set_xlim(0, widest * 1.6)
    axis.set_title(f"{rows[0].case}, {rows[0].direction}\n{rows[0].sizes}", fontsize=9)
    unit = "ms, p50 and p20 to p80" if timed else "MB, peak of the process"
    axis.set_xlabel(f"{unit}{'; x: times as much as fused' if fused else ''}", fontsize=8)
    tidy(axis)


def _color(row: Row, fused: float | None) -> str:
    if row.provider.startswith(FUSED):
        return BLUE
    if row.computes in LESS:
        return GREY
    return RED if fused is not None and _figure(row) < fused else DARK_GREY


def _figure(row: Row) -> float:
    assert row.figure is not None
    return row.figure


def _finish(made: Any, rows: Sequence[Row], path: Path) -> None:
    made.supxlabel("\n".join(runs_of(row for row in rows if row.timed)), fontsize=7, color=DARK_GREY)
    save(made, path)
