"""Qualify plans, then time plans and tiles: one idea after the other, the table on disk after each.

A plan is qualified for a routing when its values and gradients are right against float64 and, repeated on changing
inputs, its forward is never off. Only such plans are timed. Tiles are tried round the one in use;
where one wins, the plans it takes part in are timed once more.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.tiles import Tile, has_tile, override_tiles, shape_class, tile_for
from ..kernels.tuned import OK, Table
from ..ops.dispatch import PLANS, BackendError, Plan
from .gpu import Gpu, Run
from .layer import Layer

GAIN = 1.01  # how much faster a challenger must be: below that it is noise
JUDGED = 549  # rows on which a tile is judged in float64
RULE = "base_first"  # the plan that must be beaten
UNTAKEN = "no kernel for it on this chip"
PATIENCE = 300.0  # seconds for one judgement: its kernels compile in a tenth of that
ROUTINGS = ("task", "soft")


class Shape(NamedTuple):
    """A layer to be timed, and the name its plan is kept under: a class of shapes, or rows and exact sizes."""

    name: str
    m: int
    k: int
    n: int

    @property
    def group(self) -> str:
        """Its class of shapes."""
        return shape_class(self.m, self.k, self.n)


ROWS = {"long": 8192, "short": 512, "decode": 64}
STANDARD = (
    Shape("long square", 8192, 4096, 4096),
    Shape("long wide", 8192, 4096, 14336),
    Shape("long tall", 8192, 14336, 4096),
    Shape("short square", 512, 4096, 4096),
    Shape("decode square", 64, 4096, 4096),
)


def shapes_of(layers: Iterable[tuple[int, int]]) -> list[Shape]:
    """The layers `(K, N)` of a model as they are in training, short prompts and decoding; large ones first."""
    by_size = sorted(set(layers), key=math.prod, reverse=True)
    return [Shape(f"{amount} {k}x{n}", m, k, n) for amount, m in ROWS.items() for k, n in by_size]


def _checks() -> Iterator[tuple[Any, ...]]:
    """Arguments of `Layer` after the routing: random sizes; each variant of rank and dropout is compiled anew."""
    drawn = random.Random(0)
    for variant in ((16, 0.0, False), (8, 0.1, True)):
        for few, many in ((1, 64), (65, 500), (501, 3000)):
            sizes = drawn.randint(few, many), 16 * drawn.randint(4, 128), 16 * drawn.randint(4, 128)
            yield *sizes, drawn.randint(2, 9), *variant
        yield drawn.randint(65, 500), 1001, 335, 3, *variant


CHECKS = tuple(_checks())
RACES: Mapping[str, Sequence[tuple[Any, ...]]] = {
    "task": (
        (2085, 512, 1024),
        (4096, 64, 2048, 3),  # tiles that wait for their leaders
        (600, 2048, 512, 4, 16, 0.1),
        (64, 2048, 2048, 64),
        (1, 4096, 256, 4),
    ),
    "soft": ((2085, 512, 1024), (128, 4096, 256), (600, 2048, 512, 4, 16, 0.1)),
}
RACING = ("one_pass", "two_launch+pdl")  # plans whose programs read what runs beside them stores
WAITING = ("one_pass_task", "one_pass_soft", "decode")  # kernels whose programs wait for each other
CLASSLESS = ("shrink_task", "shrink_soft", "expand_backward", "da", "decode")  # whose tile is one for all shapes
KERNELS = ("gemm_descriptor", "gemm", "one_pass_task", "one_pass_soft", *CLASSLESS)


def neighbours(tile: Tile, kernel: str, room: int) -> list[Tile]:
    """The tile in use and what is a step away from it, operands within `room` bytes of shared memory in 16 bits."""
    m, n, k, warps, stages, parts = astuple(tile)
    steps = [
        (m, n, k, warps, stages + 1, parts), (m, n, k, warps, stages - 1, parts), (m, n, k, 12 - warps, stages, parts),
        (m, n, 2 * k, warps, max(2, stages // 2), parts), (m, n, k // 2, warps, stages + 1, parts),
        (m, n // 2, k, warps, stages + 1, parts), (m, 2 * n, k, warps, stages - 1, parts),
        (m // 2, n, k, warps, stages, parts), (m // 2, 2 * n, k, warps, stages, parts),
        (2 * m, n // 2, k, warps, stages, parts), (m, n, k, warps, stages, 3 - parts),
    ]  # fmt: skip

    def fits(t: Tile) -> bool:
        sides = 16 <= t.block_m <= 256 and 16 <= t.block_n <= 256 and (k == 0 or 16 <= t.block_k <= 256)
        shared = 2 * (t.block_m + t.block_n) * t.block_k * t.num_stages
        stores = t.parts == 1 or kernel.startswith(("gemm_descriptor", "one_pass"))
        return sides and stores and t.num_stages > 0 and t.num_warps in (4, 8) and shared <= room

    others = [Tile(*step) for step in steps]
    if kernel == "decode":  # takes as many rows as there are
        others = [t for t in others if t.block_m == m]
    return list(dict.fromkeys([tile, *filter(fits, others)]))


def pick(times: Mapping[Any, float], current: Any) -> Any:
    """The fastest, but what is in use unless that is beaten by more than noise; None of nothing."""
    best = min(times, key=lambda name: times[name], default=None)
    return current if current in times and times[current] <= GAIN * times[best] else best


def pick_plan(forward: Mapping[str, float], both: Mapping[str, float]) -> Plan | None:
    """The plan of the fastest parts, from seconds by plan: whose forward and whose dx, of those with one overlap."""
    backward = {name: both[name] - forward[name] for name in both if name in forward}
    pairs = {
        (one, other): forward[one] + backward[other]
        for one in forward
        for other in backward
        if PLANS[one].overlap == PLANS[other].overlap
    }
    best = pick(pairs or {(name, name): taken for name, taken in forward.items()}, (RULE, RULE))
    return best and PLANS[best[0]]._replace(dx=PLANS[best[1]].dx)


class DeviceLostError(RuntimeError):
    """The device answers no more in this process; the message names what ran."""


@dataclass
class Tuner:
    """One run over a table, which may hold what an earlier one found."""

    table: Table
    shapes: Sequence[Shape]
    device: Gpu
    tasks: int = 8
    rank: int = 16
    repeats: int = 2000
    deadline: float = math.inf  # by the device's clock
    tell: Callable[[str, int], None] = lambda idea, left: None
    skipped: dict[str, str] = field(default_factory=dict)

    def run(self) -> int:
        """Work off what is open; how much of it the deadline left. An OSError where the table cannot be written."""
        if self.table.trying:
            self.table.verdicts[self.table.trying] = "the run that tried it did not come back"
        self._save()
        while ideas := self._open():
            if self.device.now() >= self.deadline:
                return len(ideas)
            name, work = next(iter(ideas.items()))
            self.tell(name, len(ideas))
            try:
                work()
            except torch.OutOfMemoryError:
                self.skipped[name] = "out of memory"
            except (DeviceLostError, OSError):
                raise
            except Exception as error:
                self.skipped[name] = self._failed(name, error)
            finally:
                self._save()
            self.device.release()
        return 0

    def _save(self) -> None:
        self.table.trying = ""
        self.table.save()

    def _open(self) -> dict[str, Callable[[], None]]:
        """Ideas by name, in order: plans to qualify, plans to time, tiles, plans whose tiles have changed."""
        size, table = self.device.dtype.itemsize, self.table
        verdicts = {f"{routing}/{plan}": (routing, plan) for routing in ROUTINGS for plan in PLANS}
        plans = {f"{routing}/{size}/{shape.name}": (routing, shape) for shape in self.shapes for routing in ROUTINGS}
        ideas: dict[str, Callable[[], None]] = {
            name: partial(self._qualify, name, *what) for name, what in verdicts.items() if name not in table.verdicts
        }
        stale = [name for name in plans if table.plans.get(name, {}).get("stale")]
        new = [name for name in plans if table.plans.get(name, {}).get("layer") != [self.tasks, self.rank]]
        ideas |= {name: partial(self._plan, name, *plans[name]) for name in new}
        tiles = {key: (kernel, shape) for key, kernel, shape in self._tiles() if key not in table.tiles}
        ideas |= {key: partial(self._tile, key, *what) for key, what in tiles.items()}
        ideas |= {name: partial(self._plan, name, *plans[name]) for name in stale}
        left_out = {*self.skipped, *(name for name, said in table.verdicts.items() if said != OK)}
        return {name: work for name, work in ideas.items() if name not in left_out}

    def _tiles(self) -> Iterator[tuple[str, str, Shape]]:
        """Kernels that have tiles on this chip, each with the classes of shapes that have tiles of their own."""
        place, dtype = self.device.place, self.device.dtype
        for kernel in KERNELS:
            if not has_tile(kernel, place, dtype) or (kernel == "gemm" and has_tile("gemm_descriptor", place, dtype)):
                continue
            groups: dict[str, Shape] = {}
            for shape in self.shapes:
                if shape.group.startswith("decode") == (kernel == "decode"):
                    groups.setdefault("" if kernel in CLASSLESS else shape.group, shape)
            yield from ((f"{kernel}/{dtype.itemsize}/{group}", kernel, shape) for group, shape in groups.items())

    def _layer(self, routing: str, m: int, k: int, n: int, *others: Any) -> Layer:
        return Layer(routing, m, k, n, *others, dtype=self.device.dtype, device=self.device.place)

    def _qualify(self, name: str, routing: str, plan: str) -> None:
        repeats, said = self.repeats if plan in RACING else max(1, self.repeats // 10), UNTAKEN
        for layer, judge in [(args, "wrong") for args in CHECKS] + [(args, "raced") for args in RACES[routing]]:

            def work(layer: tuple[Any, ...] = layer, judge: str = judge) -> str:
                made = self._layer(routing, *layer)
                return made.wrong(plan) if judge == "wrong" else made.raced(plan, repeats)

            try:
                said = self._verdict(name, work)
            except BackendError:  # nothing takes this layer
                continue
            if said != OK:
                break
        self.table.verdicts[name] = said

    def _verdict(self, name: str, work: Callable[[], str]) -> str:
        """What `work` finds wrong, or OK; on disk is, meanwhile, what a run that hangs would be blamed on."""
        self.table.trying = name
        self.table.save()
        watch = threading.Timer(PATIENCE, self.device.hung, (name,))
        watch.daemon = True
        watch.start()
        try:
            return work() or OK
        except (torch.OutOfMemoryError, BackendError):
            raise
        except Exception as error:
            return self._failed(name, error)
        finally:
            watch.cancel()

    def _failed(self, name: str, error: Exception) -> str:
        """An error in a line; a DeviceLostError, its culprit on record, where the device answers no more."""
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        try:
            self.device.alive()
        except Exception:
            self.table.verdicts[name] = said
            raise DeviceLostError(f"{name}: {said}") from error
        return said

    def _plan(self, name: str, routing: str, shape: Shape) -> None:
        """Time all that is qualified, and keep the plan of the fastest parts."""
        layer = self._layer(routing, *shape[1:], self.tasks, self.rank)
        right = [plan for plan in PLANS if self.table.verdicts.get(f"{routing}/{plan}") == OK]
        decoding = shape.group.startswith("decode")
        forward = self._time(routing, {plan: partial(layer.infer, plan) for plan in right})
        both = {} if decoding else self._time(routing, {plan: partial(layer.train, plan) for plan in forward})
        best = pick_plan(forward, both)
        self.table.plans[name] = {
            "plan": best and list(best),
            "layer": [self.tasks, self.rank],
            "ms": {plan: round(1e3 * taken, 4) for plan, taken in forward.items()},
        }

    def _time(self, routing: str, steps: Mapping[str, Callable[[], Sequence[Tensor]]]) -> Mapping[str, float]:
        runs = {}
        for plan, step in steps.items():
            try:
                runs[plan] = self.device.ready(step)
            except torch.OutOfMemoryError:
                raise
            except BackendError:
                continue
            except Exception as error:  # a graph that cannot be captured
                self._failed(f"{routing}/{plan}", error)
        return self.device.seconds(runs) if runs else {}

    def _tile(self, key: str, kernel: str, shape: Shape) -> None:
        """Time the tiles round the one in use that are right, and keep the fastest."""
        routing, plan = "soft" if "soft" in kernel else "task", "one_pass" if kernel in WAITING else "two_launch"
        sizes = shape.k, shape.n, self.tasks, self.rank
        judge, layer = (self._layer(routing, m, *sizes) for m in (min(shape.m, JUDGED), shape.m))
        used, launch = tile_for(kernel, layer.x.device, layer.x.dtype, shape.group), layer.launcher(kernel)

        def under(tile: Tile, work: Callable[[], Any]) -> Any:
            with override_tiles({kernel: tile}):
                return work()

        runs: dict[Tile, Run] = {}
        for tile in neighbours(used, kernel, self.device.room):
            name = f"tile {kernel} {astuple(tile)}"
            known = self.table.verdicts.get(name, OK) == OK
            with suppress(BackendError):  # nothing takes this layer
                if known and self._verdict(name, partial(under, tile, partial(judge.wrong, plan))) == OK:
                    runs[tile] = partial(under, tile, launch)
        times = dict(self.device.seconds(runs)) if runs else {}
        while (best := pick(times, used)) not in (None, used) and kernel in WAITING:
            name = f"tile {kernel} {astuple(best)}"
            said = self._verdict(name, partial(under, best, partial(judge.raced, plan, self.repeats)))
            if said == OK:
                break
            self.table.verdicts[name] = said
            del times[best]
        self.table.tiles[key] = None if best is None else list(astuple(best))
        touched = {each.name for each in self.shapes if kernel in CLASSLESS or each.group == shape.group}
        for name, entry in self.table.plans.items() if best not in (None, used) else ():
            if name.rpartition("/")[2] in touched:
                entry["stale"] = True
