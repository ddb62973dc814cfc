"""What the kernel tests share: devices, shapes, inputs, the plain-torch answers and the error rule.

An error is judged against torch's own: a kernel may be at most twice as far from float64 as torch computing
the same formula in the same dtype, plus a tiny absolute term for results that torch happens to hit exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from alora_kernels.kernels import Dropout, dropout_mask
from alora_kernels.routing import RowGroups, group_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S = 0.3  # a scaling that is no float32 number
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One layer: sizes, how ids are laid out, dropout probability, adapters in float32, strided x."""

    m: int = 37
    k: int = 40
    n: int = 35
    r: int = 4
    e: int = 3
    ids: str = "shuffled"
    p: float = 0.0
    fp32_adapters: bool = False
    strided: bool = False

    def __str__(self) -> str:
        flags = [self.ids, f"p{self.p}", *("fp32ab",) * self.fp32_adapters, *("strided",) * self.strided]
        return f"{self.m}x{self.k}x{self.n}-r{self.r}-e{self.e}-" + "-".join(flags)


CASES = [
    Case(),
    Case(m=0),
    Case(m=1, k=1, n=1, r=1, e=1),
    Case(m=64, k=64, n=64, r=16, e=1, ids="sorted"),
    Case(m=50, k=33, n=65, r=8, e=17),
    Case(m=49, k=48, n=40, r=33, e=3, ids="sorted"),
    Case(m=35, k=70, n=48, r=40, e=17, p=0.25),
    Case(ids="equal", strided=True),
    Case(ids="base"),
    Case(ids="out of range"),
    Case(p=0.25, strided=True),
    Case(m=33, k=64, n=32, r=16, e=3, p=0.5, ids="sorted"),
    Case(p=1.0),
    Case(fp32_adapters=True, p=0.25),
    Case(m=20, k=48, r=2, e=40),
    Case(m=40, k=64, n=48, r=16, e=4, p=0.25),  # rows of p are multiples of 16 bytes: descriptors reach it
]


def make_ids(case: Case) -> Tensor:
    """Task ids in the layout the case asks for."""
    if case.ids == "equal":
        return torch.full((case.m,), case.e - 1)
    if case.ids == "base":
        return torch.full((case.m,), -1)
    low, high = (-3, case.e + 3) if case.ids == "out of range" else (-1, case.e)
    ids = torch.randint(low, high, (case.m,))
    return ids.sort().values if case.ids == "sorted" else ids


class Layer:
    """Random inputs of one case in one dtype; `double` gives the same numbers in float64."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.case, self.dtype = case, dtype
        adapter = torch.float32 if case.fp32_adapters and dtype != torch.float64 else dtype
        c = case
        self.x = self._tensor(c.k, c.m).t() if c.strided else self._tensor(c.m, c.k)
        self.w, self.bias, self.dy = self._tensor(c.n, c.k), self._tensor(c.n), self._tensor(c.m, c.n)
        self.a, self.b = self._tensor(c.e, c.r, c.k, dtype=adapter), self._tensor(c.n, c.r, dtype=adapter)
        self.router = (self._tensor(c.e, c.k) / 4).to(adapter)
        self.h = self._tensor(c.m, c.r)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.dh, self.p = self._tensor(c.m, c.r, dtype=acc), self._tensor(c.m, c.e * c.r + c.e, dtype=acc)
        self.dp = self._tensor(c.m, c.e * c.r + c.e)
        self.ids = make_ids(c).to(DEVICE)
        self.groups: RowGroups = group_rows(self.ids, c.e)
        self.drop = Dropout(c.p, torch.tensor([0x123456789ABC], device=DEVICE)) if c.p else None
        mask_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.mask = dropout_mask(c.m, c.k, self.drop, dtype=mask_dtype) if self.drop else None

    def _tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype or self.dtype).to(DEVICE)

    def onehot(self, dtype: torch.dtype) -> Tensor:
        """The gate of task routing `[M, E]`; a row of zeros for ids that name no task."""
        return (self.ids[:, None] == torch.arange(self.case.e, device=DEVICE)).to(dtype)

    def dropped(self, t: Tensor) -> Tensor:
        """t times the dropout mask, in t's dtype."""
        return t if self.mask is None else (t * self.mask).to(t.dtype)

    def task_h(self, x: Tensor, a: Tensor) -> Tensor:
        """h of task routing by the formula, as `soft_p` and `soft_h` are those of soft routing."""
        return S * torch.einsum("me,mer->mr", self.onehot(x.dtype), torch.einsum("mk,erk->mer", self.dropped(x), a))

    def soft_p(self, x: Tensor, a: Tensor, router: Tensor) -> Tensor:
        return torch.cat([self.dropped(x) @ a.flatten(0, 1).T, x @ router.T], 1)

    def soft_h(self, x: Tensor, a: Tensor, router: Tensor) -> Tensor:
        p, e, r = self.soft_p(x, a, router), self.case.e, self.case.r
        return S * torch.einsum("me,mer->mr", p[:, -e:].softmax(1), p[:, :-e].reshape(-1, e, r))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor for recordings."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def assert_close(got: Tensor, reference: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> None:
    """Error against float64 at most twice that of torch in `dtype`, plus a tiny absolute term."""
    exact, plain = reference(*(t.double() for t in tensors)), reference(*(t.to(dtype) for t in tensors))
    assert got.shape == exact.shape
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all()
    scale = max(exact.abs().max().item(), 1e-3)
    ulps = 64 if dtype == torch.float64 else 4  # in float64 the "exact" reference is itself rounded
    allowed = 2 * (plain.double() - exact).abs().max().item() + ulps * torch.finfo(dtype).eps * scale
    assert (got.double() - exact).abs().max().item() <= allowed


def skip_unmodelled(dtype: torch.dtype) -> None:
    """Skip what the interpreter cannot compute, and on a GPU what exists for the interpreter's gradient checks."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("bf16 dot: not modelled by the interpreter")
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("float64 kernels are for the interpreter's gradcheck")
