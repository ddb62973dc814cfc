"""Figures of an analysis: what is drawn, in which order, and as PNG on light and on dark paper.

In:   an `Analysis`.
Out:  `Picture`s: name, title, caption, text for those who cannot see it, and bytes.
Who:  `report`, which writes them as files and puts them into the page. Only here and below matplotlib is needed.

Painters (`heatmaps`, `curves`) draw on a figure that exists already, under the colours of a theme: `matplotlib`'s
global state and its windows are never touched.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .plan import Plan

if TYPE_CHECKING:
    from .result import Analysis

DPI = 150  # 10 inches: 1500 pixels, twice the width of the page
LIGHT = {"paper": "#ffffff", "ink": "#1a1d24", "soft": "#5a6270", "line": "#e3e6ec"}
DARK = {"paper": "#1b1e26", "ink": "#e8eaf0", "soft": "#a7afbe", "line": "#323744"}
REMEDY = "the figures need matplotlib: pip install matplotlib, or do without them (--no-figures, figures=False)"


@dataclass(frozen=True)
class Picture:
    """A figure that was drawn, for light and for dark surroundings; `width` in pixels of a page."""

    name: str
    title: str
    caption: str
    alt: str
    width: int
    light: bytes = field(repr=False)
    dark: bytes = field(repr=False)


def pictures(analysis: Analysis) -> Iterator[Picture]:
    """All figures that the analysis has numbers for.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    from . import curves, heatmaps

    for plan in (*heatmaps.plans(analysis), *curves.plans(analysis)):
        light, dark = (_drawn(plan, theme) for theme in (LIGHT, DARK))
        yield Picture(plan.name, plan.title, plan.caption, plan.alt, round(100 * plan.size[0]), light, dark)


def check_matplotlib() -> None:
    """Raise if there is none.

    Raises:
        ImportError: naming the remedy.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(REMEDY) from None


def _drawn(plan: Plan, theme: dict[str, str]) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, paper = theme["ink"], theme["paper"]
    settings: Any = {
        "axes.edgecolor": theme["soft"],
        "axes.facecolor": paper,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "figure.facecolor": paper,
        "font.size": 9,
        "grid.color": theme["line"],
        "legend.labelcolor": ink,
        "savefig.facecolor": paper,
        "text.color": ink,
        "text.parse_math": False,  # names come from strangers: a dollar sign is a dollar sign
        "xtick.color": theme["soft"],
        "ytick.color": theme["soft"],
    }
    out = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=plan.size, dpi=DPI, layout=plan.layout)
        plan.paint(figure, theme)
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()
