"""What is asked of a run, as data, and whether its rows show it.

A ratio is taken between rows of one run only. Where the numerator is ours, it must be small (fused / frozen); where it
is an alternative, or counts tokens per second, large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .rows import BOTH, EAGER, FORWARD, GRAPH, OK, Row

FUSED = "fused"
RECORDED = "recorded forward"  # of `bench host`: with what the backward needs


@dataclass(frozen=True)
class Side:
    """One thing measured: the rows with this provider and `group`; `name` is what reasons call it."""

    provider: str
    group: tuple[Any, ...]
    name: str


@dataclass(frozen=True)
class Target:
    """A ratio of a column (`quantity`) that must reach `must` (None: only reported), or not exceed it (`at_most`).

    Where `above` and `below` are the same, the case is a pattern such as "tasks *", and the ratio is that of the
    slowest case to the fastest.
    """

    above: Side
    below: Side
    ratio_of: str
    must: float | None
    aim: float | None = None
    at_most: bool = False
    quantity: str = "p50_ms"

    @property
    def case(self) -> str:
        """Of a layer or model: the case."""
        return str(self.above.group[0])

    @property
    def direction(self) -> str:
        """Of a layer or model: the pass."""
        return str(self.above.group[1])

    def reached(self, measured: float, wanted: float) -> bool:
        return measured <= wanted if self.at_most else measured >= wanted

    def bound(self, value: float | None) -> str:
        """`must` or `aim` with its direction."""
        return "" if value is None else f"{'≤' if self.at_most else '≥'} {value:.2f}"


@dataclass(frozen=True)
class Verdict:
    """A target, the ratio measured (None where it could not be), and why not."""

    target: Target
    measured: float | None
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether `must` is met; None where nothing is asked or nothing was measured."""
        if self.measured is None or self.target.must is None:
            return None
        return self.target.reached(self.measured, self.target.must)


def judge(target: Target, rows: Sequence[Any]) -> Verdict:
    """Look the target's rows up, the last one where there are several, and divide."""
    if target.above == target.below:
        return _spread(target, rows)
    found = []
    for side in (target.above, target.below):
        same = [row for row in rows if row.group == side.group and row.provider == side.provider]
        if not same:
            return Verdict(target, None, f"{side.name}: not run")
        if reason := _lacking(same[-1], target.quantity):
            return Verdict(target, None, f"{side.name}: {reason}")
        found.append(same[-1])
    return _divided(target, found)


def _spread(target: Target, rows: Sequence[Any]) -> Verdict:
    """Slowest to fastest case of one provider."""
    pattern, *rest = target.above.group
    found = [
        row
        for row in rows
        if fnmatchcase(row.group[0], pattern) and (*row.group[1:], row.provider) == (*rest, target.above.provider)
    ]
    if len(found) < 2:
        return Verdict(target, None, f"{len(found)} of at least 2 cases run")
    for row in found:
        if reason := _lacking(row, target.quantity):
            return Verdict(target, None, f"{row.group[0]}: {reason}")
    return _divided(target, sorted(found, key=lambda row: -getattr(row, target.quantity)))


def _lacking(row: Any, quantity: str) -> str:
    """Why a row has no such number; empty where it has one."""
    if row.status != OK:
        return str(row.status)
    return "" if getattr(row, quantity) is not None else "not known"


def _divided(target: Target, rows: Sequence[Any]) -> Verdict:
    """The first row's number over the last one's, if all are of one run."""
    if len({row.date for row in rows}) > 1:
        return Verdict(target, None, "not of one run")
    return Verdict(target, getattr(rows[0], target.quantity) / getattr(rows[-1], target.quantity))


def between(
    case: str,
    direction: str,
    numerator: str,
    denominator: str,
    must: float | None,
    aim: float | None = None,
    at_most: bool = False,
    quantity: str = "p50_ms",
    mode: str = GRAPH,
) -> Target:
    """A target between two providers of one case, pass and mode, or over the cases of one provider."""
    above, below = (Side(name, (case, direction, mode), name) for name in (numerator, denominator))
    words = f"{numerator} / {denominator}" + (", peak memory" if quantity == "peak_mb" else "")
    words = f"{numerator}: slowest / fastest" if numerator == denominator else words
    return Target(above, below, words, must, aim, at_most, quantity)


def on_row(row: Row, denominator: str, rows: Sequence[Row], targets: Sequence[Target]) -> Verdict | None:
    """The target on a row's ratio of p50 to the denominator, judged; None where nothing is asked of it."""
    for target in targets:
        mine = target.above.group == row.group and target.quantity == "p50_ms"
        if mine and (target.above.provider, target.below.provider) == (row.provider, denominator):
            return judge(target, rows)
    return None


def in_dtype(case: str, dtype: str) -> str:
    """A case's name in a dtype; float32 goes without saying."""
    return case if dtype == "float32" else f"{case}, {dtype}"


def _cpu(case: str, direction: str, numerator: str, must: float, aim: float | None = None) -> Target:
    return between(case, direction, numerator, FUSED, must, aim, mode=EAGER)


def _less(case: str, must: float) -> Target:
    return between(case, BOTH, FUSED, "today's build", must, at_most=True, quantity="peak_mb", mode=EAGER)


_STEPS = [in_dtype(case, dtype) for case in ("demo step", "training step") for dtype in ("float32", "bfloat16")]
CPU_TARGETS = (
    _cpu("demo step, bfloat16", BOTH, "today's build", 3.0, 4.0),  # the demo's default where the chip has bfloat16
    _cpu("demo step", BOTH, "today's build", 1.4, 1.8),
    *(_cpu(case, BOTH, "PEFT LoRA task by task", 1.4, 1.6) for case in _STEPS),
    *(_cpu(case, BOTH, "PEFT LoRA task by task, labels=", 1.4, 1.6) for case in _STEPS[:2]),
    *(_cpu(case, BOTH, "PEFT LoRA, one for all tasks", 1.05, 1.15) for case in _STEPS),
    _cpu("decode 768", FORWARD, "PEFT mixed batch", 5.0, 6.0),
    _cpu("decode 2048", FORWARD, "PEFT mixed batch", 3.0, 4.0),
    _cpu("layer soft", BOTH, "hoisted", 1.05),
    _cpu("layer soft", BOTH, "authors' loop", 2.2),
    _cpu("layer task", BOTH, "hoisted", 1.0),
    _cpu("layer task", BOTH, "authors' loop", 2.0),
    _less("memory 1 in 8 labelled", 0.4),
    _less("memory all labelled", 0.6),
)

ATTENTION = "PEFT LoRA, attention alone"
MOE_TARGETS = (
    between("experts", BOTH, FUSED, ATTENTION, 1.3, at_most=True, mode=EAGER),
    between("experts", BOTH, "PEFT LoRA task by task", FUSED, 1.8, mode=EAGER),
    between("experts", BOTH, FUSED, ATTENTION, 1.1, at_most=True, quantity="peak_mb", mode=EAGER),
    between("experts", BOTH, "PEFT LoRA, one for all tasks", ATTENTION, None, mode=EAGER),
)

HOST_TARGETS = tuple(
    between(f"host {layer}", direction, FUSED, "today's build", must, at_most=True, mode=EAGER)
    for layer in ("FusedALoRALinear", "PEFT layer")
    for direction, must in ((FORWARD, 0.6), (RECORDED, None), (BOTH, 0.5))
)


def _over_frozen(case: str, direction: str, must: float, aim: float, quantity: str = "p50_ms") -> Target:
    return between(case, direction, FUSED, "frozen", must, aim, at_most=True, quantity=quantity)


def _against(case: str, numerator: str, must: float, aim: float) -> Target:
    return between(case, BOTH, numerator, FUSED, must, aim)


SQUARE, UP, DOWN = "4096x4096", "4096->14336", "14336->4096"
GPU_TARGETS = (
    *(between(f"gemm {s}", FORWARD, "frozen", "plain Triton GEMM", None) for s in (SQUARE, UP, DOWN)),
    _over_frozen(f"task {SQUARE}", FORWARD, 1.10, 1.03),
    _over_frozen(f"task {SQUARE}", BOTH, 1.15, 1.05),
    _over_frozen(f"soft {SQUARE}", FORWARD, 1.12, 1.05),
    _over_frozen(f"soft {SQUARE}", BOTH, 1.18, 1.07),
    *(_over_frozen(f"task {s}", FORWARD, 1.10, 1.03) for s in (UP, DOWN)),
    *(_over_frozen(f"task {s}", BOTH, 1.15, 1.05) for s in (UP, DOWN)),
    *(
        _against(f"{routing} {SQUARE}", name, 1.15, 1.25)
        for name in ("hoisted", "hoisted compiled")
        for routing in ("task", "soft")
    ),
    _against(f"task {SQUARE}", "PEFT LoRA", 1.25, 1.4),
    *(_against(f"{routing} {SQUARE}", "authors' loop", 3.0, 5.0) for routing in ("task", "soft")),
    _against(f"task E=4 {SQUARE}", "LoRAFusion", 1.1, 1.3),
    *(between("tasks *", d, FUSED, FUSED, 1.1, 1.05, at_most=True) for d in (FORWARD, BOTH)),
    *(_over_frozen(f"decode {m}", FORWARD, 1.3, 1.1) for m in (1, 8, 32, 64)),
    *(_over_frozen(f"{routing} {SQUARE}", BOTH, 1.1, 1.05, "peak_mb") for routing in ("task", "soft")),
    *(
        between("model step", BOTH, above, below, None, quantity=quantity, mode=EAGER)
        for quantity in ("p50_ms", "peak_mb")
        for above, below in ((FUSED, "frozen"), ("PEFT LoRA task by task", FUSED))
    ),
    *(
        between("model decode", FORWARD, above, below, None, mode=mode)
        for mode in (EAGER, GRAPH)
        for above, below in ((FUSED, "frozen"), ("PEFT mixed batch", FUSED))
    ),
)
