"""What was measured to be fastest, per chip and class of shapes. Written by `python -m bench tune`; do not edit.

Nothing has been measured yet: no GPU was at hand. Until then `ops.dispatch` and `kernels.tiles` follow their rules.
"""

from __future__ import annotations

from typing import Any

MEASURED: str = ""  # device, versions, commit and date of the measurement
# (chip, routing, bytes per element, class of shapes) -> (forward, dx, overlap)
PLANS: dict[tuple[str, str, int, str], tuple[str, str, bool]] = {}
# (kernel, chip, bytes per element, class of shapes) -> fields of a Tile
TILES: dict[tuple[str, str, int, str], tuple[Any, ...]] = {}
