"""A layer of random numbers on which plans are judged: against float64, and against two launches, again and again.

Takes sizes, gives the reason why a plan is wrong there, or none. `tuning.run` asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels as ak
from .. import reference
from ..ops.autograd import linear_backward_op, linear_op
from ..ops.types import Adapter, Needs
from ..records import Dropout, acc_dtype
from ..routing import group_rows
from .gpu import NEAR

S = 0.5
LOOK = 50  # repetitions between two looks at what was found, which wait for the device
NAMES = ("y", "dx", "db", "da", "drouter")
RACED = ("left entries unwritten", "was wrong", "differed from one run to the next")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates in the block is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Layer:
    """Numbers of one layer; letters as everywhere. With `mixed` there is a bias, and adapters are float32."""

    def __init__(
        self, routing: str, m: int, k: int, n: int, e: int = 8, r: int = 16, dropout: float = 0.0, mixed: bool = False,
        *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cuda",
    ) -> None:  # fmt: skip
        def draw(*shape: int, dtype: torch.dtype = dtype, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, device=device)).to(dtype)

        self.words = f"{m}x{k}x{n}, {e} tasks of rank {r}" + f", dropout {dropout}" * (dropout > 0) + ", mixed" * mixed
        wide = torch.float32 if mixed else dtype
        self.x, self.dy, self.w, self.bias = draw(m, k), draw(m, n), draw(n, k, std=k**-0.5), draw(n) if mixed else None
        router = draw(e, k, dtype=wide, std=k**-0.5) if routing == "soft" else None
        drop = Dropout(dropout, torch.tensor([17], device=device)) if dropout else None
        self.adapter = Adapter(draw(e, r, k, dtype=wide, std=k**-0.5), router, None, S, drop)
        self.b = draw(n, r, dtype=wide, std=r**-0.5)
        self._route()

    def _route(self) -> None:
        if self.adapter.router is None:  # most rows of a task stand together, as those of a sequence do
            (m, _), e = self.x.shape, self.adapter.a.shape[0]
            ids = torch.randint(-1, e, (m,), device=self.x.device)
            ids = torch.cat([ids[: m - m // 8].sort().values, ids[m - m // 8 :]])
            self.adapter = self.adapter._replace(groups=group_rows(ids, e))

    def renew(self) -> None:
        """Other numbers and ids in the same layer."""
        for t in (self.adapter.a, self.adapter.router, self.b):
            if t is not None:
                t.normal_(std=t.shape[-1] ** -0.5)
        self.x.normal_()
        self._route()

    def infer(self, plan: str) -> list[Tensor]:
        """y, h and p of a forward."""
        return list(linear_op(self.x, self.w, self.bias, self.b, *self.adapter.flat(), f"triton:{plan}"))

    def train(self, plan: str) -> list[Tensor]:
        """y and the gradients in the order of `NAMES`, in this thread: tiles that override are seen."""
        y, *saved = self.infer(plan)
        needs = Needs(x=True, bias=False, b=True, a=True, router=self.adapter.router is not None)
        flat = *self.adapter.flat(), f"triton:{plan}", list(needs)
        dx, _, db, da, drouter = linear_backward_op(self.dy, self.x, self.w, self.b, *saved, *flat)
        return [y, dx, db, da, *([drouter] if needs.router else [])]

    def formula(self, dtype: torch.dtype, gradients: bool = True) -> list[Tensor]:
        """The same by the formula in plain torch, all numbers in one dtype; or y alone."""
        x, b, a, *router = (
            t.detach().to(dtype).requires_grad_()
            for t in (self.x, self.b, self.adapter.a, self.adapter.router)
            if t is not None
        )
        (m, k), e, drop, groups = x.shape, a.shape[0], self.adapter.dropout, self.adapter.groups
        kept = x if drop is None else x * ak.dropout_mask(m, k, drop, dtype=torch.float32).to(dtype)
        gate = reference.gate(x, e, router[0] if router else None, groups and groups.ids)
        h = torch.einsum("me,mer->mr", gate, (kept @ a.flatten(0, 1).t()).view(m, e, -1))
        y = F.linear(x, self.w.to(dtype), None if self.bias is None else self.bias.to(dtype)) + S * F.linear(h, b)
        leaves = [x, b, a, *router]
        return [y.detach(), *(torch.autograd.grad(y, leaves, self.dy.to(dtype)) if gradients else ())]

    @cached_property
    def truth(self) -> list[tuple[Tensor, float]]:
        """Each tensor in float64, and the error allowed: twice that of torch in x's dtype, and some roundings."""
        exact, own = self.formula(torch.float64), self.formula(self.x.dtype)
        tiny = 4 * torch.finfo(self.x.dtype).eps
        return [(t, 2 * _error(o, t) + tiny) for t, o in zip(exact, own, strict=True)]

    def wrong(self, plan: str) -> str:
        """What is wrong with a plan's values or gradients here, if anything; a BackendError where it takes no part."""
        with poisoned():
            got, again = self.train(plan), self.train(plan)
        for name, mine, twice, (truth, allowed) in zip(NAMES, got, again, self.truth):
            if not (error := _error(mine, truth)) <= allowed:  # so NaN is wrong too
                return f"{name} is off by {error:.1e} of its largest entry, allowed {allowed:.1e} ({self.words})"
            if not torch.equal(mine, twice):
                return f"{name} {RACED[2]} ({self.words})"
        return ""

    def raced(self, plan: str, repeats: int) -> str:
        """What is wrong in that many forwards on changing inputs, if anything.

        The judge is `two_launch`, and under dropout, whose faults all plans could share, y of the formula.
        """
        bad = torch.zeros(len(RACED), dtype=torch.bool, device=self.x.device)
        for turn in range(1, repeats + 1):
            self.renew()
            shared = self.adapter.dropout is not None
            expected = self.formula(torch.float32, gradients=False) if shared else self.infer("two_launch")
            with poisoned():
                got, again = self.infer(plan), self.infer(plan)
            for mine, twice, other in zip(got, again, expected):
                near = (mine - other).abs() <= NEAR * (1 + other.abs())
                bad |= torch.stack([mine.isnan().any(), ~near.all(), (mine != twice).any()])
            if turn % LOOK == 0 or turn == repeats:
                for found, what in zip(bad.tolist(), RACED, strict=True):
                    if found:
                        return f"{what} within {turn} runs ({self.words})"
        return ""

    def launcher(self, kernel: str) -> Callable[[], object]:
        """One launch of a kernel on these numbers, by the name of its tiles."""
        x, w, a, b, router, dtype = self.x, self.w, self.adapter.a, self.b, self.adapter.router, self.x.dtype
        if router is not None:
            if kernel == "one_pass_soft":
                return lambda: ak.one_pass_soft(x, w, None, a, b, router, scaling=S)
            return lambda: ak.shrink_soft(x, a, router, scaling=S)
        groups, h = self.adapter.task_groups, self.infer("two_launch")[1]
        dh = h.to(acc_dtype(dtype))
        launchers: dict[str, Callable[[], object]] = {
            "one_pass_task": lambda: ak.one_pass_task(x, w, None, a, b, groups.ids, scaling=S),
            "decode": lambda: ak.decode(x, w, None, a, b, groups.ids, scaling=S),
            "shrink_task": lambda: ak.shrink_task(x, a, groups, scaling=S),
            "expand_backward": lambda: ak.expand_backward(self.dy, b, h, scaling=S),
            "da": lambda: ak.da_task(dh, x, groups, a.shape[0], dtype=dtype),
        }
        return launchers.get(kernel, lambda: ak.plain_gemm(x, w))


def _error(got: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((got.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
