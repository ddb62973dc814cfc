"""What adapters on the experts of known mixtures cost at best over frozen ones: a prediction, not a measurement.

The two stacked weights alone, bf16, every expert chosen by a row: router, sort, gate and the weighted sum are the same
for both. As in `roofline`, the op's own code runs on meta tensors; its frozen product is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from alora_kernels.ops import triton_backend
from alora_kernels.ops.experts import grouped, grouped_backward
from alora_kernels.ops.types import Adapter, Needs
from alora_kernels.routing import RowGroups

from ..report.readme import markdown
from .roofline import BACKWARD, FORWARD, Layer, Rates, Step, new, total, trace

RANK, TASKS = 16, 8
TOKENS = (8192, 64)  # a training batch, and decoding


@dataclass(frozen=True)
class Mixture:
    name: str
    hidden: int
    inside: int
    experts: int
    top: int

    @property
    def weights(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of the gate and up projections, stacked in one, and of the down projection."""
        return (2 * self.inside, self.hidden), (self.hidden, self.inside)


MIXTURES = (
    Mixture("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Mixture("Mixtral 8x7B", 4096, 14336, 8, 2),
    Mixture("GPT-OSS 20B", 2880, 2880, 32, 4),
)


def _groups(rows: int, tasks: int) -> RowGroups:
    return RowGroups(*(new(size, dtype=torch.int32) for size in (rows, rows, tasks + 1)))


def stacked(m: Mixture, tokens: int, n: int, k: int, *, per_token: bool) -> dict[str, tuple[list[Step], list[Step]]]:
    """Launches with adapters and without them, of the forward and of the backward of one stacked weight.

    `per_token`: A's product is that of tokens, as where x are tokens whose experts share A.
    """
    s = tokens * m.top
    x, rows, w = new(tokens if per_token else s, k), new(s, k), new(m.experts, n, k)
    h, b, dy, source = new(s, RANK), new(m.experts, n, RANK), new(s, n), new(s, dtype=torch.int64)
    adapter = Adapter(new(TASKS, RANK, k), None, _groups(len(x), TASKS), 2.0, None)
    by_expert = _groups(s, m.experts)
    ids, offsets = by_expert.ids, by_expert.offsets
    dh, saved = new(len(x), RANK), triton_backend.shrink(x, adapter)
    needs = Needs(x=True, a=True, router=False, b=True, bias=False)

    def shrunk(work: Callable[[], Any]) -> tuple[Step, ...]:
        return trace(Layer("task", len(x), k, n, RANK, TASKS), work)[0]

    def expanded(work: Callable[[], Any]) -> tuple[Step, ...]:
        return trace(Layer("task", s, n, n, RANK, m.experts), work)[0]  # B^T in the place of A: its K is N

    def to_x() -> Any:
        return new(*x.shape).add_(cast(Tensor, triton_backend.shrink_backward(dh, x, adapter, saved, needs).dx))

    forward = [*shrunk(lambda: triton_backend.shrink(x, adapter))]
    forward += shrunk(lambda: saved.h[source]) if per_token else ()
    forward += expanded(lambda: grouped(rows, w, None, h, b, ids, offsets))
    backward = [*expanded(lambda: grouped_backward(dy, w, h, b, ids, offsets, [True] * 3))]
    backward += shrunk(lambda: dh.index_add_(0, source, h)) if per_token else ()
    backward += shrunk(to_x)
    ends = offsets[1:]
    frozen = expanded(lambda: F.grouped_mm(rows, w.transpose(1, 2), offs=ends))
    return {FORWARD: (forward, [*frozen]), BACKWARD: (backward, [*expanded(lambda: F.grouped_mm(dy, w, offs=ends))])}


def predicted(m: Mixture, tokens: int, rates: Rates) -> dict[str, tuple[float, float]]:
    """Microseconds with adapters and frozen, of both stacked weights, by pass."""
    up, down = (stacked(m, tokens, n, k, per_token=i == 0) for i, (n, k) in enumerate(m.weights))
    return {
        way: (total(up[way][0] + down[way][0], rates), total(up[way][1] + down[way][1], rates))
        for way in (FORWARD, BACKWARD)
    }


def block(rates: Rates) -> str:
    """Time over that of frozen experts, as Markdown."""
    lines = []
    for m in MIXTURES:
        for tokens in TOKENS:
            times = predicted(m, tokens, rates)
            both = tuple(map(sum, zip(*times.values(), strict=True)))
            passes = {FORWARD: times[FORWARD]} | ({} if tokens == min(TOKENS) else {f"{FORWARD} and {BACKWARD}": both})
            for name, (ours, frozen) in passes.items():
                numbers = f"{frozen:,.0f}", f"{ours:,.0f}", f"{ours / frozen:.2f}"
                lines.append([f"{m.name} ({m.experts} experts, top {m.top})", f"{tokens}", name, *numbers])
    head = f"PREDICTED, not measured: the two stacked weights of a layer on an H200 (R = {RANK}, {TASKS} tasks, bf16;"
    head += f" {rates.tflops:g} TFLOP/s, {rates.tbps:g} TB/s, {rates.launch_us:g} µs a launch)"
    columns = ["mixture", "tokens", "pass"], ["frozen µs", "adapted µs", "/ frozen"]
    return "\n".join([head, "", *markdown(*columns, lines)])
