"""A figure before it is drawn: what it is called, what it says in words, and who paints it.

In:   made by `heatmaps` and `curves` from an `Analysis`.
Out:  `Plan`.
Who:  `figures` draws it twice, on light and on dark paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Plan:
    """A figure that can be drawn.

    Attributes:
        name: of the file, without ending.
        title, caption: for the page.
        alt: what it shows, in words with numbers.
        size: inches.
        paint: draws on the figure, with the theme's colours.
        layout: matplotlib's; None where the painter places everything.
    """

    name: str
    title: str
    caption: str
    alt: str
    size: tuple[float, float]
    paint: Callable[[Any, dict[str, str]], None] = field(repr=False)
    layout: Literal["constrained"] | None = "constrained"
