"""One look for all figures: palette, themes, panels, PNG. matplotlib's global state and its windows are never touched.

It is imported when the first figure is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
#: Okabe and Ito's colours, which colour-blind people tell apart: blue, orange, green, red, pink, sky, ochre, black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#000000")
BLUE, ORANGE, GREEN, RED = COLOURS[:4]
DARK_GREY, GREY = "#5f5f5f", "#c4c4c4"
LIGHT = {"paper": "#ffffff", "ink": "#1a1d24", "soft": "#5a6270", "line": "#e3e6ec"}
DARK = {"paper": "#1b1e26", "ink": "#e8eaf0", "soft": "#a7afbe", "line": "#323744"}


def check_matplotlib(remedy: str = "the figures need matplotlib: pip install matplotlib") -> None:
    """Raise an ImportError with `remedy` as its text if there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(remedy) from None


def figure(width: float, height: float, *, dpi: int = DPI, layout: str | None = "constrained") -> Figure:
    """An empty figure of `width` times `height` inches."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=dpi, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(made)  # without pyplot: no display
    return made


def panels(count: int, columns: int) -> tuple[Figure, list[Any]]:
    """A figure of `count` tidy panels in rows of `columns`, each 4.2 times 2.9 inches."""
    made = figure(4.2 * columns, 2.9 * -(-count // columns))
    axes = grid(made, count, columns)
    tidy(*axes)
    return made, axes


def grid(made: Figure, count: int, columns: int, **options: Any) -> list[Any]:
    """Axes in rows of so many columns; what is left of the last row is empty."""
    axes = list(made.subplots(-(-count // columns), columns, squeeze=False, **options).flatten())
    for empty in axes[count:]:
        empty.set_axis_off()
    return axes[:count]


def tidy(*axes: Any) -> None:
    """No frame above and to the right, small tick labels."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)


@contextmanager
def themed(theme: Mapping[str, str]) -> Iterator[None]:
    """Figures made and drawn in the block have the paper and the ink of `LIGHT` or `DARK`."""
    import matplotlib

    ink, paper, soft = theme["ink"], theme["paper"], theme["soft"]
    settings: dict[Any, Any] = {
        **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color"), ink),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), soft),
        "font.size": 9,
        "grid.color": theme["line"],
        "text.parse_math": False,  # names come from strangers: a dollar sign is a dollar sign
    }
    with matplotlib.rc_context(settings):
        yield


def png(made: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    out = io.BytesIO()
    made.savefig(out, format="png", dpi=made.dpi, metadata={"Software": None})
    return out.getvalue()


def save(made: Figure, path: Path) -> Path:
    """Write the figure as PNG, whatever the suffix; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(made))
    return path
