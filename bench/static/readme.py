"""The README's block of predictions, between its `bench-static` markers.

In:   predictions of `bench.static.roofline`.
Out:  a table, time over the frozen layer by plan, that says in its first line that nothing in it was measured.
Who:  `bench.report.plot`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .roofline import Prediction, Rates

COLUMNS = ("one_pass", "two_launch", "base_first", "low_rank_first")
ROWS = (8192, 64)  # of a layer: training, and the largest decoding batch


def block(rows: Sequence[Prediction], rates: Rates, figure: str) -> str:
    """The block's text.

    Args:
        rows: as `predict_all` gave them.
        rates: what was assumed.
        figure: the PNG, as the README links it.
    """
    cells: dict[tuple[str, str, str], dict[str, Prediction]] = {}
    for row in rows:
        if row.layer.m in ROWS:
            line = cells.setdefault((row.layer.routing, row.layer.shape, row.direction), {})
            line |= dict.fromkeys(row.plan.split(", "), row)
    head = f"PREDICTED, not measured: time over the frozen layer's (R = 16, E = 8, bf16; {rates.tflops:g} TFLOP/s,"
    head += f" {rates.tbps:g} TB/s, {rates.launch_us:g} µs a launch; our products at {rates.ours:g} of cuBLAS's speed)"
    lines = [head, "", f"| routing | M x K -> N | pass | {' | '.join(f'`{plan}`' for plan in COLUMNS)} |"]
    lines.append("|---|---|---|" + "---:|" * len(COLUMNS))
    for (routing, shape, direction), line in cells.items():
        shown = [f"{line[plan].ratio:.3f}" if plan in line else "" for plan in COLUMNS]
        lines.append(f"| {routing} | {shape} | {direction} | {' | '.join(shown)} |")
    return "\n".join(
        [*lines, "", f"Figure: [predicted]({figure}); all launches: `python -m bench static --roofline-only`."]
    )
