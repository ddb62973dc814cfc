"""What was measured to be fastest: on the user's own chip by `alora tune`, and what the package ships.

The user's table is one JSON file per kind of chip in the cache folder. It counts only under the driver and the versions
it was measured with. A process reads it once, when its first layer runs; `alora tune` alone writes it, whole or not at
all, so the ranks of a job may read it at any time. Where neither table knows, `ops.dispatch` and `kernels.tiles` follow
their rules.
"""

from __future__ import annotations

import json
import logging
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from alora_kernels.files import cache_dir, replacing
from alora_kernels.version import __version__

logger = logging.getLogger(__name__)

MEASURED: str = ""  # what the package ships: device, versions, commit and date of the measurement
# (chip, routing, bytes per element, class of shapes) -> (forward, dx, overlap)
PLANS: dict[tuple[str, str, int, str], tuple[str, str, bool]] = {}
# (kernel, chip, bytes per element, class of shapes) -> fields of a Tile
TILES: dict[tuple[str, str, int, str], tuple[Any, ...]] = {}

OK = "ok"
DRIVERS = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")
NEVER = "this user never tuned it"


@dataclass
class Table:
    """What `alora tune` found on one chip; a name of shapes is a class, "long tall", or exact, "long 4096x1024"."""

    key: dict[str, str]  # see `identity`
    date: str = ""
    verdicts: dict[str, str] = field(default_factory=dict)  # "task/one_pass", "tile ..." -> OK, or why never
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)  # "task/2/long square" -> the fields of `Planned`
    tiles: dict[str, list[int] | None] = field(default_factory=dict)  # "da/2/" -> fields of a Tile; None: the rule's
    trying: str = ""  # what ran when the file was written: a run that never came back names its culprit

    def plan(self, routing: str, itemsize: int, shapes: str, k: int, n: int) -> list[Any] | None:
        """The fields of the plan for a layer `[K] -> [N]`: measured on just this layer, else on its class of shapes."""
        for name in (f"{shapes.partition(' ')[0]} {k}x{n}", shapes):
            if found := self.plans.get(f"{routing}/{itemsize}/{name}", {}).get("plan"):
                return found
        return None

    def save(self) -> Path:
        """Write the whole table, so that a reader sees the old one or the new one; an OSError where that fails."""
        path, self.date = path_of(self.key), time.strftime("%Y-%m-%d %H:%M")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        find.cache_clear()
        return path


class Found(NamedTuple):
    """The table that counts on a device, and what is to be said of it; None where there is none."""

    table: Table | None
    why: str


def identity(device: torch.device) -> dict[str, str] | None:
    """What a measurement depends on: the chip, its driver and the versions; None for what compiles no kernels."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return None
    driver = str(torch.version.hip or torch.version.cuda)
    with suppress(OSError):
        driver = next((Path(name).read_text().strip() for name in DRIVERS if Path(name).exists()), driver)
    versions = {"torch": str(torch.__version__), "triton": triton.__version__, "alora-kernels": __version__}
    return {"chip": torch.cuda.get_device_properties(device).name, "driver": driver, **versions}


def path_of(key: dict[str, str]) -> Path:
    """The file of a kind of chip; an OSError where the user has no folder for it."""
    try:
        return cache_dir() / f"tuned-{re.sub('[^a-z0-9]+', '-', key['chip'].lower())}.json"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None


@cache
def find(device: torch.device) -> Found:
    """The user's table for a device; where none counts, one line of the log says so."""
    key = identity(device)
    if key is None:
        return Found(None, "no kernels are compiled there")
    found = read(key)
    if found.table is None:
        level = logging.INFO if found.why == NEVER else logging.WARNING
        logger.log(level, "%s is not qualified for one-pass kernels: %s. Run `alora tune`", key["chip"], found.why)
    return found


def read(key: dict[str, str]) -> Found:
    """The table of a chip under these versions."""
    try:
        table = Table(**json.loads(path_of(key).read_text(encoding="utf-8")))
        if changed := [f"{name} {table.key[name]}" for name in key if table.key[name] != key[name]]:
            return Found(None, f"its table is of {', '.join(changed)} and does not count")
        words = [*table.verdicts.values()]
        words += [word for entry in table.plans.values() if entry["plan"] for word in entry["plan"][:2]]
        tiles = [tile for tile in table.tiles.values() if tile is not None]
        numbers = [number for tile in tiles for number in (*tile, len(tile) == 6 or None)]
        if not all(isinstance(word, str) for word in words) or not all(isinstance(number, int) for number in numbers):
            raise ValueError("not written by `alora tune`")
    except FileNotFoundError:
        return Found(None, NEVER)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Found(None, f"its table {path_of(key)} does not read ({type(error).__name__})")
    return Found(table, f"tuned {table.date}")
