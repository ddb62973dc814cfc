"""What each plan launches, and how fast that could be at best: a prediction, not a measurement.

The op's own code runs on meta tensors: kernels are recorded, torch's operators seen on their way to the dispatcher.
FLOPs of a kernel follow from which of the letters it is given; its bytes are its tensors, each once. Two
launches of ours that overlap ("+pdl") are predicted as one that has the products and the bytes of both. Plans with
"+overlap" are not here: a sum of times cannot tell them apart. The README's block `bench-static` and a figure say first
that nothing in them was measured; a bar there is what a plan costs over the frozen layer, in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alora_kernels import kernels
from alora_kernels.ops import triton_backend
from alora_kernels.ops.dispatch import PLANS, BackendError
from alora_kernels.ops.types import Adapter, Needs
from alora_kernels.plotting import BLUE, COLOURS, GREEN, ORANGE, figure, save, tidy
from alora_kernels.routing import RowGroups

from ..report.figures import bar, legend
from ..report.readme import markdown
from ..report.rows import grouped
from .aot import short_name

FORWARD, BACKWARD = "forward", "backward"
CHIP = "sm_90"
COLORS = {
    "one_pass": BLUE,
    "two_launch": GREEN,
    "two_launch+pdl": COLOURS[5],
    "base_first": ORANGE,
    "low_rank_first": COLOURS[4],
}
ROWS = (8192, 64)  # of a layer in the README: training, and the largest decoding batch
DECODING = 64  # rows up to which a layer counts as decoding


@dataclass(frozen=True)
class Rates:
    """What the chip is assumed to reach."""

    tflops: float = 790.0  # 10^12 FLOP/s: what large bf16 products reach on an H200, of 989 in its data sheet
    tbps: float = 4.3  # 10^12 B/s of memory, of 4.8 in the data sheet
    launch_us: float = 3.0  # from the end of one kernel to the beginning of the next
    ours: float = 1.0  # speed of our own products relative to torch's


@dataclass(frozen=True)
class Layer:
    routing: str
    m: int
    k: int
    n: int
    r: int = 16
    e: int = 8

    @property
    def shape(self) -> str:
        return f"{self.m} x {self.k} -> {self.n}"


SIZES = ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096))
DECODE = tuple((m, 4096, 4096) for m in (1, 8, 16, 64))
LAYERS = tuple(Layer(routing, *sizes) for routing in ("task", "soft") for sizes in SIZES + DECODE)


@dataclass(frozen=True)
class Step:
    """One launch, by a kernel of `ours` or by torch, whose `grid` is empty.

    `flops` of its products alone (adding partial sums counts as none); `moved`: bytes of its tensors, each once;
    `overlaps`: it runs beside the step before it.
    """

    name: str
    grid: tuple[int, ...]
    flops: int
    moved: int
    ours: bool
    overlaps: bool = False

    def microseconds(self, rates: Rates) -> float:
        """`max(flops / rate, bytes / rate) + launch`."""
        speed = rates.tflops * (rates.ours if self.ours else 1.0)
        return max(self.flops / speed, self.moved / rates.tbps) / 1e6 + rates.launch_us


@dataclass(frozen=True)
class Prediction:
    layer: Layer
    direction: str
    plan: str  # plans with the same launches share a prediction: "one_pass, two_launch"
    default: bool  # whether the op takes this plan when nobody asks for one
    steps: tuple[Step, ...]
    flops: int  # what the formula needs; less than the steps' sum where something is computed twice
    fewest: int  # bytes if each input were read once, each result (and what backward needs) written once
    microseconds: float
    frozen: float  # microseconds of the frozen layer alone: y = x w^T, or dx = dy w

    @property
    def moved(self) -> int:
        return sum(step.moved for step in self.steps)

    @property
    def ratio(self) -> float:
        return self.microseconds / self.frozen


def product_flops(layer: Layer, direction: str) -> int:
    """FLOPs that the formula needs, with C skinny columns: `2 M (N K + K C + N R)`, backward K C and N R twice."""
    m, k, n, r = layer.m, layer.k, layer.n, layer.r
    c = columns(layer)
    times = 1 if direction == FORWARD else 2
    return 2 * m * (n * k + times * (k * c + n * r))


def columns(layer: Layer) -> int:
    """Skinny products and logits of a row."""
    return layer.r if layer.routing == "task" else layer.e * (layer.r + 1)


def kernel_flops(layer: Layer, given: Iterable[str]) -> int:
    """FLOPs of a kernel given tensors of these letters, e.g. x w h b y: each pair that the formulas multiply counts."""
    m, k, n, r, c = layer.m, layer.k, layer.n, layer.r, columns(layer)
    letters = set(given)
    pairs = {
        ("x", "w"): n * k,
        ("dy", "w"): n * k,
        ("x", "a"): k * c,
        ("d", "x"): k * c,
        ("dh", "a"): k * c,
        ("dp", "a"): k * c,
        ("dy", "b"): n * r,
        ("dy", "h"): n * r,
    }
    if "dy" not in letters:  # dh and db take h and b, but do not multiply them with each other
        pairs["h", "b"] = n * r
    return 2 * m * sum(size for pair, size in pairs.items() if letters.issuperset(pair))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of what the tensors show of their storages, nothing twice."""
    shown: dict[int, int] = {}
    whole: dict[int, int] = {}
    for t in tensors:
        storage = t.untyped_storage()
        numel = math.prod(size for size, stride in zip(t.shape, t.stride()) if stride)
        shown[storage._cdata] = shown.get(storage._cdata, 0) + numel * t.element_size()
        whole[storage._cdata] = storage.nbytes()
    return sum(min(size, whole[key]) for key, size in shown.items())


class Trace(TorchDispatchMode):
    """Every launch inside the block, ours and torch's, in order."""

    def __init__(self, layer: Layer, recorded: list[kernels.Launch]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._layer, self._recorded, self._seen = layer, recorded, 0

    def collect(self) -> None:
        """Turn what kernels were recorded since the last call into steps."""
        for launch in self._recorded[self._seen :]:
            given = zip(launch.kernel.arg_names, launch.args)
            named = {name.removesuffix("_ptr"): value for name, value in given if value is not None}
            tensors = {name: getattr(value, "base", value) for name, value in named.items()}
            tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
            name = short_name(launch.kernel.__name__)
            flops, moved = kernel_flops(self._layer, tensors), size_of(tensors.values())
            moved += size_of([tensors["dx"]]) if launch.meta.get("ONTO") else 0  # read and written
            self.steps.append(Step(name, launch.grid, flops, moved, True, launch.meta.get("launch_pdl", False)))
        self._seen = len(self._recorded)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "lift")):
            self.collect()
            inputs, results = _tensors((args, kwargs)), _tensors(out)
            moved = (0 if name in ("zero_", "fill_") else size_of(inputs)) + size_of(results)
            self.steps.append(Step(f"torch.{name}", (), _torch_flops(name, inputs, results), moved, False))
        return out


def _torch_flops(name: str, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> int:
    """FLOPs of mm, bmm, addmm and the like: the last matrix given is `[.., L, C]`, the result has C columns."""
    if not name.rstrip("_").endswith("mm"):
        return 0
    return 2 * results[0].numel() * [t for t in inputs if t.dim() > 1][-1].shape[-2]


def trace(layer: Layer, work: Callable[[], Any]) -> tuple[tuple[Step, ...], Any]:
    with kernels.recording(CHIP) as recorded, torch.no_grad(), Trace(layer, recorded) as seen:
        result = work()
        seen.collect()
    return tuple(seen.steps), result


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(*shape, dtype=dtype, device="meta")


class _Tensors:
    def __init__(self, layer: Layer) -> None:
        m, k, n, r, e = layer.m, layer.k, layer.n, layer.r, layer.e
        self.x, self.w, self.dy, self.b = new(m, k), new(n, k), new(m, n), new(n, r)
        groups, router = None, None
        if layer.routing == "task":
            groups = RowGroups(*(new(size, dtype=torch.int32) for size in (m, m, e + 1)))
        else:
            router = new(e, k)
        self.adapter = Adapter(new(e, r, k), router, groups, 2.0, None)
        self.saved = triton_backend.shrink(self.x, self.adapter)

    def work(self, direction: str, plan: str | None) -> Any:
        """The pass under a plan: what the op calls, and what it returns."""
        if direction == FORWARD:
            return triton_backend.linear(self.x, self.w, None, self.adapter, self.b, PLANS[plan] if plan else None)
        needs = Needs(x=True, a=True, router=self.adapter.router is not None, b=True, bias=False)
        given = (self.dy, self.x, self.w, self.adapter, self.b, self.saved, needs)
        return triton_backend.linear_backward(*given, PLANS[plan] if plan else None)

    def frozen(self, direction: str) -> Tensor:
        return F.linear(self.x, self.w) if direction == FORWARD else self.dy @ self.w

    def inputs(self, direction: str) -> list[Tensor]:
        given = [self.x, self.w, self.b, *_tensors(self.adapter)]
        return given if direction == FORWARD else [*given, self.dy, *_tensors(self.saved)]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def predict(layer: Layer, direction: str, rates: Rates) -> list[Prediction]:
    """What each plan that takes this layer is predicted to cost; plans with the same launches are one row."""
    tensors = _Tensors(layer)
    frozen = total(trace(layer, lambda: tensors.frozen(direction))[0], rates)
    usual, _ = trace(layer, lambda: tensors.work(direction, None))
    found: dict[tuple[Step, ...], list[str]] = {}
    fewest = 0
    for plan in (name for name, how in PLANS.items() if not how.overlap):
        try:
            steps, result = trace(layer, lambda plan=plan: tensors.work(direction, plan))  # type: ignore[misc]
        except BackendError:  # no kernel of this plan takes the layer
            continue
        found.setdefault(steps, []).append(plan)
        fewest = size_of([*tensors.inputs(direction), *_tensors(result)])
    needed = product_flops(layer, direction)
    predicted = []
    for steps, names in found.items():
        facts = (steps == usual, steps, needed, fewest, total(steps, rates), frozen)
        predicted.append(Prediction(layer, direction, ", ".join(names), *facts))
    return predicted


def predict_all(rates: Rates, layers: Sequence[Layer] = LAYERS) -> Iterator[Prediction]:
    """Forward and backward of every layer; up to 64 rows (decoding) forward alone."""
    for layer in layers:
        for direction in (FORWARD, BACKWARD) if layer.m > 64 else (FORWARD,):
            yield from predict(layer, direction, rates)


def total(steps: Sequence[Step], rates: Rates) -> float:
    """Of steps one after the other; those that overlap are one step, which has the products and bytes of both."""
    merged: list[Step] = []
    for step in steps:
        if step.overlaps:
            last = merged.pop()
            step = replace(step, flops=last.flops + step.flops, moved=last.moved + step.moved)
        merged.append(step)
    return sum(step.microseconds(rates) for step in merged)


def block(rows: Sequence[Prediction], rates: Rates, link: str) -> str:
    """Time over the frozen layer by plan, as Markdown; `link` is the PNG, as the README links it."""
    head = f"PREDICTED, not measured: time over the frozen layer's (R = 16, E = 8, bf16; {rates.tflops:g} TFLOP/s,"
    head += f" {rates.tbps:g} TB/s, {rates.launch_us:g} µs a launch; our products at {rates.ours:g} of cuBLAS's speed)"
    lines = []
    for same in grouped([row for row in rows if row.layer.m in ROWS], lambda row: (row.layer, row.direction)):
        ratios = {plan: f"{row.ratio:.3f}" for row in same for plan in row.plan.split(", ")}
        first = same[0]
        lines.append([first.layer.routing, first.layer.shape, first.direction, *(ratios.get(p, "") for p in COLORS)])
    table = markdown(["routing", "M x K -> N", "pass"], [f"`{plan}`" for plan in COLORS], lines)
    foot = f"Figure: [predicted]({link}); all launches: `python -m bench static --roofline-only`."
    return "\n".join([head, "", *table, "", foot])


def draw(rows: Sequence[Prediction], path: Path, rates: Rates) -> None:
    """A column per routing; a panel each for forward, backward and decoding."""
    kinds: dict[str, dict[str, list[Prediction]]] = {}
    for row in rows:
        kind = "decoding (forward)" if row.layer.m <= DECODING else row.direction
        kinds.setdefault(kind, {}).setdefault(row.layer.routing, []).append(row)
    routings = list(dict.fromkeys(row.layer.routing for row in rows))
    heights = [max(len({p.layer for p in same}) for same in panels.values()) for panels in kinds.values()]
    made = figure(6.6 * len(routings), 1.4 + 0.85 * sum(heights) + 0.5 * len(kinds))
    axes = made.subplots(len(kinds), len(routings), squeeze=False, gridspec_kw={"height_ratios": heights})
    for across, (kind, panels) in zip(axes, kinds.items(), strict=True):
        highest = max(p.ratio for same in panels.values() for p in same)
        for axis, routing in zip(across, routings, strict=True):
            _panel(axis, f"{routing} routing, {kind}", panels.get(routing, []), highest)
    title = "PREDICTED, not measured: time over the frozen layer, R = 16, E = 8, bf16"
    legend(made, COLORS, title=title, title_fontsize=12)
    assumed = f"assumed {rates.tflops:g} TFLOP/s, {rates.tbps:g} TB/s, {rates.launch_us:g} µs a launch"
    made.supxlabel(f"{assumed}; our products at {rates.ours:g} of torch's speed; `python -m bench static`", fontsize=8)
    save(made, path)


def _panel(axis: Any, title: str, rows: Sequence[Prediction], highest: float) -> None:
    """Bars per shape, one for each plan that takes it, in the order of the legend."""
    shapes, thick = grouped(rows, lambda row: row.layer), 0.8 / len(COLORS)
    for place, same in enumerate(shapes):
        plans = {plan: row for row in same for plan in row.plan.split(", ")}
        for index, (plan, color) in enumerate(COLORS.items()):
            if (row := plans.get(plan)) is not None:
                over, usual = 100 * (row.ratio - 1), " (the default)" if row.default else ""
                y = place + thick * (index - (len(COLORS) - 1) / 2)
                bar(axis, y, over, thick * 0.9, f"{over:.1f} %{usual}", color)
    axis.set_yticks(range(len(shapes)), [f"{same[0].layer.shape}\nfrozen {same[0].frozen:,.0f} µs" for same in shapes])
    axis.invert_yaxis()
    axis.set_xlim(0, 125 * (highest - 1))  # room for the numbers
    axis.set_xlabel("% over the frozen layer, predicted", fontsize=8)
    axis.set_title(title, fontsize=10)
    tidy(axis)
