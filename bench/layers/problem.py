"""One layer problem: random tensors, the truth in float64, and how far off a provider may be.

In:   a `Case`: the routing, the letters, dtypes, the batch's layout, the device.
Out:  tensors by name, what is right to the last digit, and the verdict on what a provider gave.
Who:  `bench.layer` verifies every provider with it before anything is timed; `bench.layers.providers` read its tensors.

The rule is that of `tests/compare.py`: err <= 2 x the error of the plain formula in the same dtype + tiny, for the
output and every gradient that is asked for, errors relative to the tensor's largest entry.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from alora_kernels.routing import Routing

from .functions import FUNCTIONS, Given

SCALING = 2.0
CHUNK_BYTES = 2**30  # the truth of a large case is taken in pieces of about this much


@dataclass(frozen=True)
class Case:
    """What one layer is asked to do; letters as everywhere in the package.

    Attributes:
        name: how tables and targets call it.
        routing: "task" or "soft".
        layout: "runs": sequences sorted by task, as training batches can be; "rows": one task per row in any
            order, as in decoding.
        adapter: dtype of a, b and router; None is like `dtype`.
    """

    name: str
    routing: str
    m: int
    k: int
    n: int
    r: int = 16
    e: int = 8
    dtype: torch.dtype = torch.float32
    layout: str = "runs"
    adapter: torch.dtype | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for letter in "mknre":
            if getattr(self, letter) < 1:
                raise ValueError(f"{letter} must be at least 1, got {getattr(self, letter)}")
        if self.m % self.batch:
            raise ValueError(
                f"m must be a multiple of {self.batch} (that many sequences of equal length), got {self.m}"
            )

    @property
    def batch(self) -> int:
        """Rows of the batch: sequences, at least one per task; single tokens in the layout "rows"."""
        return self.m if self.layout == "rows" else min(self.m, max(16, self.e))


@dataclass(frozen=True)
class Check:
    """The worst tensor: its error, what is allowed for it, and its name."""

    worst: float
    allowed: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether the result is right; an error that is not a number is not."""
        return self.worst <= self.allowed


class Expected(NamedTuple):
    """A tensor's truth in float64, the dtype it must come in, and the error allowed."""

    truth: Tensor
    dtype: torch.dtype
    allowed: float


class Problem:
    """The tensors of a case, drawn once from a fixed seed, and the truth about them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.scaling = SCALING
        self._tensors: dict[str, Tensor] = {}
        self._truths: dict[tuple[str, bool], dict[str, Expected]] = {}
        self.ids = self._draw_ids()
        self.routing = Routing(self.ids)
        self.given = Given(self.tensor("w").detach(), self.ids, SCALING)

    def tensor(self, name: str) -> Tensor:
        """A leaf by name, e.g. "x" `[batch, M/batch, K]`, "bs" `[E, N, R]`, "a1" `[R, K]`; see `FUNCTIONS`."""
        if name not in self._tensors:
            c = self.case
            shapes = {
                "x": (c.batch, c.m // c.batch, c.k),
                "dy": (c.batch, c.m // c.batch, c.n),
                "w": (c.n, c.k),
                "a": (c.e, c.r, c.k),
                "a1": (c.r, c.k),
                "b": (c.n, c.r),
                "bs": (c.e, c.n, c.r),
                "router": (c.e, c.k),
                "logits": (c.e, c.e),
            }
            shape = shapes[name]
            wide = name in ("x", "dy", "logits")  # weights are scaled so that every product is of size one
            dtype = c.dtype if name in ("x", "dy", "w") else c.adapter or c.dtype
            generator = torch.Generator(c.device).manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(shape, generator=generator, device=c.device) / (1.0 if wide else math.sqrt(shape[-1]))
            self._tensors[name] = drawn.to(dtype).requires_grad_(name not in ("w", "dy"))
        return self._tensors[name]

    def leaves(self, function: str) -> dict[str, Tensor]:
        """What a function trains, by name; x first."""
        return {name: self.tensor(name) for name in FUNCTIONS[function].leaves}

    def check(self, function: str, got: Mapping[str, Tensor], *, gradients: bool) -> Check:
        """Judge a provider's output, "y", and its gradients, "dx", "da" and so on.

        Args:
            function: a key of `FUNCTIONS`.
            got: tensors by name.
            gradients: whether every gradient must be there and right.
        """
        expected = self._expected(function, gradients)
        if missing := expected.keys() - got.keys():
            return Check(math.inf, 1.0, f"no {', '.join(sorted(missing))}")
        found = [
            Check(_error(got[name], truth, dtype), allowed, name) for name, (truth, dtype, allowed) in expected.items()
        ]
        return max(found, key=lambda c: math.inf if math.isnan(c.worst) else c.worst / c.allowed)

    def _expected(self, function: str, gradients: bool) -> dict[str, Expected]:
        """What is right, by tensor name; worked out once."""
        key = (function, gradients)
        if key not in self._truths:
            truth = self._formula(function, gradients, torch.float64)
            own = self._formula(function, gradients, None)
            # in 16 bits one rounding of the largest entry, because torch's own error is sometimes zero by luck
            tiny = max(1e-6, torch.finfo(self.case.dtype).eps if self.case.dtype.itemsize == 2 else 0.0)
            self._truths[key] = {
                name: Expected(t, own[name].dtype, 2 * _error(own[name], t, own[name].dtype) + tiny)
                for name, t in truth.items()
            }
        return self._truths[key]

    def _formula(self, function: str, gradients: bool, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Output and gradients of the plain formula; float64 is computed in chunks of batch rows."""
        c, f = self.case, FUNCTIONS[function]
        leaves = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in self.leaves(function).items()}
        given = replace(self.given, weight=self.given.weight.to(dtype or c.dtype))
        per_row = c.m // c.batch * max(c.n, c.k, c.e * c.r) * 8
        size = max(1, CHUNK_BYTES // per_row) if dtype is torch.float64 else c.batch
        x, dy = leaves.pop("x"), self.tensor("dy").to(dtype or c.dtype)
        ys, dxs, sums = [], [], {name: torch.zeros_like(t) for name, t in leaves.items()}
        for start in range(0, c.batch, size):
            rows = slice(start, start + size)
            part = x[rows].detach().requires_grad_()
            y = f.formula(replace(given, ids=given.ids[rows]), part, **leaves)
            ys.append(y.detach())
            if gradients:
                dx, *grads = torch.autograd.grad(y, [part, *leaves.values()], dy[rows])
                dxs.append(dx)
                for total, grad in zip(sums.values(), grads):
                    total += grad
        named = {"y": torch.cat(ys)}
        return named | ({"dx": torch.cat(dxs)} | {f"d{k}": t for k, t in sums.items()} if gradients else {})

    def _draw_ids(self) -> Tensor:
        c = self.case
        if c.layout == "runs":
            return torch.arange(c.batch, device=c.device) * c.e // c.batch
        generator = torch.Generator().manual_seed(1)
        return (torch.randperm(max(c.e, c.batch), generator=generator)[: c.batch] % c.e).to(c.device)


def _error(got: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Largest difference, relative to the truth's largest entry where that exceeds one."""
    if got.shape != truth.shape or got.dtype != dtype:
        return math.inf
    if truth.numel() == 0:
        return 0.0
    return float((got.detach().double() - truth).abs().max() / truth.abs().max().clamp_min(1.0))
