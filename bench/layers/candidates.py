"""What `bench tune` tries: tiles per kernel, and a small piece of work that shows how good a tile is.

A tile is tried by the launcher that uses it (`tiles.override_tiles`), so what is tuned is what runs. The first
candidate of a kernel is the one in use: a tile must beat it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.kernels.tiles import Tile
from alora_kernels.routing import RowGroups, group_rows

R, E, S = 16, 8, 2.0
SHAPES = {  # class of shapes -> M, K, N that stand for it
    "long square": (8192, 4096, 4096),
    "long wide": (8192, 4096, 14336),
    "long tall": (8192, 14336, 4096),
    "short square": (512, 4096, 4096),
    "decode square": (64, 4096, 4096),
}


def _tiles(*rows: tuple[int, ...]) -> tuple[Tile, ...]:
    return tuple(Tile(*row) for row in rows)  # block_m, block_n, block_k, warps, stages, parts


# fmt: off
_ONE_PASS = _tiles(
    (128, 256, 64, 8, 3, 2), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 3),
)
TILES: dict[str, tuple[Tile, ...]] = {
    "gemm_descriptor": _tiles(
        (128, 256, 64, 8, 4, 2), (128, 256, 64, 8, 3, 2), (128, 256, 64, 8, 3), (256, 128, 64, 8, 4, 2),
        (256, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 5), (128, 128, 128, 8, 3), (128, 128, 64, 4, 3),
        (64, 256, 64, 4, 4, 2), (64, 128, 64, 4, 4),
    ),
    "one_pass_task": _ONE_PASS,
    "one_pass_soft": _ONE_PASS,
    "shrink_task": _tiles(
        (64, 64, 64, 4, 4), (64, 64, 128, 4, 4), (64, 64, 128, 4, 3), (32, 64, 128, 4, 4), (16, 64, 256, 4, 3),
        (128, 64, 64, 8, 4),
    ),
    "shrink_soft": _tiles(
        (64, 128, 64, 8, 3), (64, 128, 64, 8, 4), (64, 128, 128, 8, 3), (32, 128, 64, 8, 4), (32, 128, 128, 8, 3)
    ),
    "expand_backward": _tiles(
        (64, 256, 0, 8, 3), (64, 128, 0, 4, 3), (128, 128, 0, 8, 3), (64, 128, 0, 8, 4), (32, 256, 0, 8, 3)
    ),
    "da": _tiles(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 128, 8, 3), (128, 128, 32, 4, 4), (64, 128, 64, 4, 3)
    ),
    "decode": _tiles(
        (64, 32, 128, 4, 3), (64, 16, 128, 4, 4), (64, 16, 256, 4, 3), (64, 32, 128, 4, 4), (64, 32, 64, 4, 5),
        (64, 64, 64, 4, 4), (64, 64, 128, 8, 3),
    ),
}
# fmt: on
# Launchers look these up without a class of shapes: tuned once, on the first class.
CLASSLESS = ("shrink_task", "shrink_soft", "expand_backward", "da", "decode")


Cast = Callable[[Tensor], Tensor]


class Trial(NamedTuple):
    """One kernel: `run` launches it anew; `formula(cast)` is the same in plain torch, with cast applied to inputs."""

    run: Callable[[], tuple[Tensor, ...]]
    formula: Callable[[Cast], tuple[Tensor, ...]]


def classes(kernel: str) -> list[str]:
    if kernel == "decode":
        return ["decode square"]
    long = [name for name in SHAPES if not name.startswith("decode")]
    return long[:1] if kernel in CLASSLESS else long


class _Inputs:
    """Random tensors of a key of `SHAPES` in bf16, and what each kernel makes of them in plain torch."""

    def __init__(self, m: int, k: int, n: int, experts: int, device: str) -> None:
        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, device=device) / (shape[-1] ** 0.5)).bfloat16()

        self.m, self.experts = m, experts
        self.x, self.w, self.a = draw(m, k) * k**0.5, draw(n, k), draw(experts, R, k)
        self.b, self.router = draw(n, R), draw(experts, k)
        self.dy, self.h = draw(m, n) * n**0.5, draw(m, R)
        ids = torch.arange(m, device=device) * experts // m
        if device == "meta":
            ids = ids.to(torch.int32)
            self.groups = RowGroups(ids, ids, torch.empty(experts + 1, dtype=torch.int32, device="meta"))
            return
        self.groups, self.onehot = group_rows(ids, experts), torch.nn.functional.one_hot(ids, experts)

    def task(self, c: Cast) -> Tensor:
        rows = (c(self.x) @ c(self.a).flatten(0, 1).T).view(self.m, self.experts, R)
        return S * (rows * self.onehot.to(rows.dtype)[..., None]).sum(1)

    def soft(self, c: Cast) -> tuple[Tensor, Tensor]:
        p = torch.cat([c(self.x) @ c(self.a).flatten(0, 1).T, c(self.x) @ c(self.router).T], 1)
        gate = p[:, -self.experts :].softmax(1)
        return S * (p[:, : -self.experts].view(self.m, self.experts, R) * gate[..., None]).sum(1), p

    def y(self, c: Cast, h: Tensor) -> Tensor:
        return c(self.x) @ c(self.w).T + h @ c(self.b).T

    def task_y(self, c: Cast) -> tuple[Tensor, Tensor]:
        h = self.task(c)
        return self.y(c, h), h

    def soft_y(self, c: Cast) -> tuple[Tensor, ...]:
        h, p = self.soft(c)
        return self.y(c, h), h, p

    def da(self, c: Cast) -> Tensor:
        return torch.einsum("me,mr,mk->erk", self.onehot.to(c(self.x).dtype), c(self.h), c(self.x))


def trial(kernel: str, shapes: str, device: str) -> Trial:
    """The launches of a key of `TILES` for a key of `SHAPES`; device "cuda", or "meta" inside `kernels.recording`."""
    m, k, n = SHAPES[shapes]
    t = _Inputs(m, k, n, m if kernel == "decode" else E, device)
    x, w, a, b, router, groups = t.x, t.w, t.a, t.b, t.router, t.groups
    trials = {
        "gemm_descriptor": Trial(lambda: (ak.plain_gemm(x, w),), lambda c: (c(x) @ c(w).T,)),
        "one_pass_task": Trial(lambda: ak.one_pass_task(x, w, None, a, b, groups.ids, scaling=S), t.task_y),
        "one_pass_soft": Trial(lambda: ak.one_pass_soft(x, w, None, a, b, router, scaling=S), t.soft_y),
        "decode": Trial(lambda: ak.decode(x, w, None, a, b, groups.ids, scaling=S), t.task_y),
        "shrink_task": Trial(lambda: (ak.shrink_task(x, a, groups, scaling=S),), lambda c: (t.task(c),)),
        "shrink_soft": Trial(lambda: ak.shrink_soft(x, a, router, scaling=S), t.soft),
        "expand_backward": Trial(
            lambda: ak.expand_backward(t.dy, b, t.h, scaling=S), lambda c: (S * (c(t.dy) @ c(b)), c(t.dy).T @ c(t.h))
        ),
        "da": Trial(
            lambda: (ak.da_task(t.h.float(), x, groups, t.experts, dtype=torch.bfloat16),), lambda c: (t.da(c),)
        ),
    }
    return trials[kernel]
