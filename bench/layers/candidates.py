"""What `bench tune` tries: tiles per kernel, and a small piece of work that shows how good a tile is.

A tile is tried by the launcher that uses it (`tiles.override_tiles`), so what is tuned is what runs. The first
candidate of a kernel is the one in use: a tile must beat it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Trial:
    """One kernel on one class of shapes: `run` launches it and returns new tensors each time.

    `formula(cast)` gives the same in plain torch, with cast applied to every input.
    """

    run: Callable[[], tuple[Tensor, ...]]
    formula: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, ...]]


def classes(kernel: str) -> list[str]:
    """The classes of shapes on which a kernel is tuned."""
    if kernel == "decode":
        return ["decode square"]
    long = [name for name in SHAPES if not name.startswith("decode")]
    return long[:1] if kernel in CLASSLESS else long


def trial(kernel: str, shapes: str, device: str) -> Trial:
    """The launches of a key of `TILES` for a key of `SHAPES`; device "cuda", or "meta" inside `kernels.recording`."""
    m, k, n = SHAPES[shapes]
    experts = m if kernel == "decode" else E

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) / (shape[-1] ** 0.5)).bfloat16()

    x, w, a, b, router = draw(m, k) * k**0.5, draw(n, k), draw(experts, R, k), draw(n, R), draw(experts, k)
    dy, h = draw(m, n) * n**0.5, draw(m, R)
    ids = torch.arange(m, device=device) * experts // m
    groups = group_rows(ids, experts) if device != "meta" else meta_groups(m, experts)
    onehot = torch.nn.functional.one_hot(ids, experts) if device != "meta" else ids

    def mixture(c: Callable[[Tensor], Tensor]) -> Tensor:
        rows = (c(x) @ c(a).flatten(0, 1).T).view(m, experts, R)
        return S * (rows * onehot.to(rows.dtype)[..., None]).sum(1)

    def soft(c: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        p = torch.cat([c(x) @ c(a).flatten(0, 1).T, c(x) @ c(router).T], 1)
        gate = p[:, -experts:].softmax(1)
        return S * (p[:, :-experts].view(m, experts, R) * gate[..., None]).sum(1), p

    def task_y(c: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        mixed = mixture(c)
        return c(x) @ c(w).T + mixed @ c(b).T, mixed

    def soft_y(c: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        mixed, p = soft(c)
        return c(x) @ c(w).T + mixed @ c(b).T, mixed, p

    trials = {
        "gemm_descriptor": Trial(lambda: (ak.plain_gemm(x, w),), lambda c: (c(x) @ c(w).T,)),
        "one_pass_task": Trial(lambda: ak.one_pass_task(x, w, None, a, b, groups.ids, scaling=S), task_y),
        "one_pass_soft": Trial(lambda: ak.one_pass_soft(x, w, None, a, b, router, scaling=S), soft_y),
        "decode": Trial(lambda: ak.decode(x, w, None, a, b, groups.ids, scaling=S), task_y),
        "shrink_task": Trial(lambda: (ak.shrink_task(x, a, groups, scaling=S),), lambda c: (mixture(c),)),
        "shrink_soft": Trial(lambda: ak.shrink_soft(x, a, router, scaling=S), soft),
        "expand_backward": Trial(
            lambda: ak.expand_backward(dy, b, h, scaling=S), lambda c: (S * (c(dy) @ c(b)), c(dy).T @ c(h))
        ),
        "da": Trial(
            lambda: (ak.da_task(h.float(), x, groups, experts, dtype=torch.bfloat16),),
            lambda c: (torch.einsum("me,mr,mk->erk", onehot.to(c(x).dtype), c(h), c(x)),),
        ),
    }
    return trials[kernel]


def meta_groups(m: int, experts: int) -> RowGroups:
    """Row groups without data."""
    ids = torch.empty(m, dtype=torch.int32, device="meta")
    return RowGroups(ids, ids, torch.empty(experts + 1, dtype=torch.int32, device="meta"))
