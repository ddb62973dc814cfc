"""One layer problem: a function as a plain formula, random tensors, the truth in float64, and how far off one may be.

Alternatives to ALoRA compute other functions (one LoRA, one B per task, a mixture of B), so a time is only comparable
together with the name of its function. The rule of errors is that of `tests/compare.py`.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alora_kernels import reference
from alora_kernels.routing import Routing

from ..run import Check

SCALING = 2.0
CHUNK_BYTES = 2**30  # the truth of a large case is taken in pieces of about this much


@dataclass(frozen=True)
class Given:
    """What is fixed: the frozen weight `[N, K]`, one id per batch row, and s."""

    weight: Tensor
    ids: Tensor
    scaling: float


def _frozen(given: Given, x: Tensor) -> Tensor:
    return F.linear(x, given.weight)


def _lora(given: Given, x: Tensor, a1: Tensor, b: Tensor) -> Tensor:
    """y = x w^T + s x a1^T b^T: one adapter for all rows."""
    low = F.linear(F.linear(x, a1.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, given.weight) + given.scaling * low


def _task(given: Given, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return reference.alora_linear(x, given.weight, a, b, task_ids=given.ids, scaling=given.scaling)


def _soft(given: Given, x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
    return reference.alora_linear(x, given.weight, a, b, router=router, scaling=given.scaling)


def _multi(given: Given, x: Tensor, a: Tensor, bs: Tensor) -> Tensor:
    """y = x w^T + s x a_t^T b_t^T: every task has its own B, as in ordinary multi-LoRA."""
    g = reference.gate(x, a.shape[0], None, given.ids)
    p = torch.einsum("...k,erk->...er", x, a.to(x.dtype))
    low = torch.einsum("...er,enr->...n", g.unsqueeze(-1) * p, bs.to(x.dtype))
    return F.linear(x, given.weight) + given.scaling * low


def _hydra(given: Given, x: Tensor, a1: Tensor, bs: Tensor, router: Tensor) -> Tensor:
    """y = x w^T + s sum_e g_e(x) b_e a1 x (HydraLoRA: one A, several B)."""
    g = reference.gate(x, bs.shape[0], router, None)
    h = F.linear(x, a1.to(x.dtype))
    y = F.linear(x, given.weight)
    for e, b in enumerate(bs):
        y = y + given.scaling * g[..., e, None] * F.linear(h, b.to(x.dtype))
    return y


def _poly(given: Given, x: Tensor, a: Tensor, bs: Tensor, logits: Tensor) -> Tensor:
    """y = x w^T + x A_t^T B_t^T / R with A_t, B_t the task's own mixture of all skills (Polytropon)."""
    g = torch.sigmoid(logits[given.ids])
    g = g / g.sum(-1, keepdim=True)
    mixed_a = torch.einsum("be,erk->brk", g, a).to(x.dtype)
    mixed_b = torch.einsum("be,enr->bnr", g, bs).to(x.dtype)
    return F.linear(x, given.weight) + x @ mixed_a.mT @ mixed_b.mT / a.shape[1]


#: a layer as a formula, by the name that a row's column `computes` holds; its arguments are the tensors it trains
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "frozen": _frozen,
    "lora": _lora,
    "task": _task,
    "soft": _soft,
    "multi": _multi,
    "hydra": _hydra,
    "poly": _poly,
}


@dataclass(frozen=True)
class Case:
    """What one layer is asked to do; letters as everywhere in the package; `adapter` None is like `dtype`.

    layout "runs": sequences sorted by task, as training batches can be; "rows": one task per row in any order, as in
    decoding.
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
        _, *names = inspect.signature(FUNCTIONS[function]).parameters
        return {name: self.tensor(name) for name in names}

    def check(self, function: str, got: Mapping[str, Tensor], *, gradients: bool) -> Check:
        """Judge a provider's output, "y", and with `gradients` all of "dx", "da" and so on."""
        expected = self._expected(function, gradients)
        if missing := expected.keys() - got.keys():
            return Check(math.inf, 1.0, f"no {', '.join(sorted(missing))}")
        found = [
            Check(_error(got[name], truth, dtype), allowed, name) for name, (truth, dtype, allowed) in expected.items()
        ]
        return max(found, key=lambda c: math.inf if math.isnan(c.worst) else c.worst / c.allowed)

    def _expected(self, function: str, gradients: bool) -> dict[str, Expected]:
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
        c = self.case
        leaves = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in self.leaves(function).items()}
        given = replace(self.given, weight=self.given.weight.to(dtype or c.dtype))
        per_row = c.m // c.batch * max(c.n, c.k, c.e * c.r) * 8
        size = max(1, CHUNK_BYTES // per_row) if dtype is torch.float64 else c.batch
        x, dy = leaves.pop("x"), self.tensor("dy").to(dtype or c.dtype)
        ys, dxs, sums = [], [], {name: torch.zeros_like(t) for name, t in leaves.items()}
        for start in range(0, c.batch, size):
            rows = slice(start, start + size)
            part = x[rows].detach().requires_grad_()
            y = FUNCTIONS[function](replace(given, ids=given.ids[rows]), part, **leaves)
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
