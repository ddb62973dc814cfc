"""What is asked of the fused op, as data, and whether the rows of a run show it.

In:   rows.
Out:  for each target the ratio that was measured, and whether it met what must be and what is aimed at.
Who:  `bench.cpu`, `bench.gpu` and `bench.report.plot`.

A ratio is taken between rows of one run only. Where the numerator is the fused op, it must be small (fused / frozen);
where it is an alternative, large (alternative / fused).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..layers.layer import BOTH, FORWARD
from .rows import EAGER, GRAPH, Row

FUSED = "fused"


@dataclass(frozen=True)
class Target:
    """One ratio that is asked for.

    Attributes:
        case: the case, or a pattern such as "tasks *" where `numerator` and `denominator` are the same provider: then
            the ratio is that of its slowest case to its fastest.
        direction: the pass.
        numerator, denominator: providers.
        must: what must be reached; None for a ratio that is only reported.
        aim: what is hoped for.
        at_most: the ratio must not exceed `must`; else it must not fall below.
        quantity: the column, "p50_ms" or "peak_mb".
        mode: "eager" or "cuda graph".
    """

    case: str
    direction: str
    numerator: str
    denominator: str
    must: float | None
    aim: float | None = None
    at_most: bool = False
    quantity: str = "p50_ms"
    mode: str = GRAPH

    @property
    def ratio_of(self) -> str:
        """What is divided by what, in words."""
        if self.numerator == self.denominator:
            return f"{self.numerator}: slowest / fastest"
        return f"{self.numerator} / {self.denominator}" + (", peak memory" if self.quantity == "peak_mb" else "")

    def reached(self, measured: float, wanted: float) -> bool:
        """Whether a ratio is on the right side."""
        return measured <= wanted if self.at_most else measured >= wanted


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


def judge(target: Target, rows: Sequence[Row]) -> Verdict:
    """Look the target's rows up and divide."""
    if target.numerator == target.denominator:
        return _spread(target, rows)
    values = []
    for provider in (target.numerator, target.denominator):
        found = [row for row in rows if row.group == (target.case, target.direction, target.mode)]
        found = [row for row in found if row.provider == provider]
        if not found:
            return Verdict(target, None, f"{provider}: not run")
        value = getattr(found[-1], target.quantity)
        if not found[-1].timed or value is None:
            return Verdict(target, None, f"{provider}: {found[-1].status if not found[-1].timed else 'not known'}")
        values.append((found[-1].date, value))
    (date, above), (other, below) = values
    return Verdict(target, above / below) if date == other else Verdict(target, None, "not of one run")


def _spread(target: Target, rows: Sequence[Row]) -> Verdict:
    """Slowest to fastest case of one provider."""
    found = [
        row
        for row in rows
        if fnmatchcase(row.case, target.case)
        and (row.direction, row.mode, row.provider) == (target.direction, target.mode, target.numerator)
    ]
    if len(found) < 2:
        return Verdict(target, None, f"{len(found)} of at least 2 cases run")
    for row in found:
        if not row.timed:
            return Verdict(target, None, f"{row.case}: {row.status}")
    if len({row.date for row in found}) > 1:
        return Verdict(target, None, "not of one run")
    values = [getattr(row, target.quantity) for row in found]
    return Verdict(target, max(values) / min(values))


def _cpu(case: str, direction: str, numerator: str, must: float) -> Target:
    return Target(case, direction, numerator, FUSED, must, mode=EAGER)


CPU_TARGETS = (
    *(_cpu(f"layer {routing}", BOTH, "hoisted", 1.0) for routing in ("soft", "task")),
    *(_cpu(f"layer {routing}", BOTH, "authors' loop", 2.0) for routing in ("soft", "task")),
    _cpu("decode 768", FORWARD, "PEFT mixed batch", 4.0),
    _cpu("decode 2048", FORWARD, "PEFT mixed batch", 2.0),
    _cpu("training step", BOTH, "PEFT LoRA task by task", 1.2),
)


def _over_frozen(case: str, direction: str, must: float, aim: float, quantity: str = "p50_ms") -> Target:
    return Target(case, direction, FUSED, "frozen", must, aim, at_most=True, quantity=quantity)


def _against(case: str, numerator: str, must: float, aim: float) -> Target:
    return Target(case, BOTH, numerator, FUSED, must, aim)


SQUARE, UP, DOWN = "4096x4096", "4096->14336", "14336->4096"
GPU_TARGETS = (
    *(Target(f"gemm {s}", FORWARD, "frozen", "plain Triton GEMM", None) for s in (SQUARE, UP, DOWN)),
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
    *(Target("tasks *", d, FUSED, FUSED, 1.1, 1.05, at_most=True) for d in (FORWARD, BOTH)),
    *(_over_frozen(f"decode {m}", FORWARD, 1.3, 1.1) for m in (1, 8, 32, 64)),
    *(_over_frozen(f"{routing} {SQUARE}", BOTH, 1.1, 1.05, "peak_mb") for routing in ("task", "soft")),
    *(
        Target("model step", BOTH, above, below, None, quantity=quantity, mode=EAGER)
        for quantity in ("p50_ms", "peak_mb")
        for above, below in ((FUSED, "frozen"), ("PEFT LoRA task by task", FUSED))
    ),
    *(
        Target("model decode", FORWARD, above, below, None, mode=mode)
        for mode in (EAGER, GRAPH)
        for above, below in ((FUSED, "frozen"), ("PEFT mixed batch", FUSED))
    ),
)
