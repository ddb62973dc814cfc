"""What each plan launches, and how fast that could be at best: a prediction, not a measurement.

The op's own code runs on meta tensors: kernels are recorded, torch's operators seen on their way to the dispatcher.
FLOPs of a kernel follow from which of the letters it is given; its bytes are its tensors, each once. Plans with
"+overlap" are not here: a sum of times cannot tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from alora_kernels.routing import RowGroups

from .aot import short_name

FORWARD, BACKWARD = "forward", "backward"


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

    `flops` of its products alone (adding partial sums counts as none); `moved`: bytes of its tensors, each once.
    """

    name: str
    grid: tuple[int, ...]
    flops: int
    moved: int
    ours: bool

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
            self.steps.append(Step(name, launch.grid, flops, moved, True))
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
    """FLOPs of mm, bmm, addmm and the like: the last input is `[.., L, C]`, the result has C columns."""
    return 2 * results[0].numel() * inputs[-1].shape[-2] if name.rstrip("_").endswith("mm") else 0


def trace(layer: Layer, work: Callable[[], Any], chip: str) -> tuple[tuple[Step, ...], Any]:
    with kernels.recording(chip) as recorded, torch.no_grad(), Trace(layer, recorded) as seen:
        result = work()
        seen.collect()
    return tuple(seen.steps), result


class _Tensors:
    def __init__(self, layer: Layer) -> None:
        m, k, n, r, e = layer.m, layer.k, layer.n, layer.r, layer.e
        self.x, self.w, self.dy, self.b = self._new(m, k), self._new(n, k), self._new(m, n), self._new(n, r)
        groups, router = None, None
        if layer.routing == "task":
            groups = RowGroups(*(self._new(size, dtype=torch.int32) for size in (m, m, e + 1)))
        else:
            router = self._new(e, k)
        self.adapter = Adapter(self._new(e, r, k), router, groups, 2.0, None)
        self.saved = triton_backend.shrink(self.x, self.adapter)

    @staticmethod
    def _new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

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


def predict(layer: Layer, direction: str, rates: Rates, chip: str = "sm_90") -> list[Prediction]:
    """What each plan that takes this layer is predicted to cost; plans with the same launches are one row."""
    tensors = _Tensors(layer)
    frozen = _total(trace(layer, lambda: tensors.frozen(direction), chip)[0], rates)
    usual, _ = trace(layer, lambda: tensors.work(direction, None), chip)
    found: dict[tuple[Step, ...], list[str]] = {}
    fewest = 0
    for plan in (name for name, how in PLANS.items() if not how.overlap):
        try:
            steps, result = trace(layer, lambda plan=plan: tensors.work(direction, plan), chip)  # type: ignore[misc]
        except BackendError:  # no kernel of this plan takes the layer
            continue
        found.setdefault(steps, []).append(plan)
        fewest = size_of([*tensors.inputs(direction), *_tensors(result)])
    needed = product_flops(layer, direction)
    predicted = []
    for steps, names in found.items():
        facts = (steps == usual, steps, needed, fewest, _total(steps, rates), frozen)
        predicted.append(Prediction(layer, direction, ", ".join(names), *facts))
    return predicted


def predict_all(rates: Rates, layers: Sequence[Layer] = LAYERS) -> Iterator[Prediction]:
    """Forward and backward of every layer; up to 64 rows (decoding) forward alone."""
    for layer in layers:
        for direction in (FORWARD, BACKWARD) if layer.m > 64 else (FORWARD,):
            yield from predict(layer, direction, rates)


def _total(steps: Sequence[Step], rates: Rates) -> float:
    return sum(step.microseconds(rates) for step in steps)
