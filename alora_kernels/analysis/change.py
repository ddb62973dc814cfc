"""What training did to a weight: how far its columns moved (`Change`), which singular values s B A has (`Spectrum`).

Columns run along dim 0, as in the paper: column c of W [N, K] is what input c does to all outputs. Work goes through
the matrix in blocks of columns, so neither a float64 copy nor the merged weight of a large layer is ever whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .similarity import checked, exact

BLOCK = 2**20  # numbers per block: 8 MB in float64, a handful of which are alive at a time


@dataclass(frozen=True)
class Change:
    """What happened to the columns of a matrix."""

    magnitude: float  # mean over all columns of `| ||w'_c|| - ||w_c|| |`
    relative_magnitude: float  # the same over the mean `||w_c||`; nan if all columns were zero, as B is at its start
    direction: float  # mean of `1 - cos(w'_c, w_c)`, in [0, 2], over the columns that have one; nan if none has
    columns: int  # K
    without_direction: int  # zero before or after, and so left out of `direction`


def column_change(before: Tensor, after: Tensor) -> Change:
    """The change from one matrix to another.

    Formula: `dM = mean_c | ||w'_c|| - ||w_c|| |`, `dD = mean_c (1 - cos(w'_c, w_c))`; before and after are `[N, K]`,
    pass the transpose to measure rows. Raises TypeError or ValueError unless both are finite floating matrices of one
    shape.

    Source: Liu et al. 2024, DoRA, weight decomposition analysis.
    """
    before, after = checked("before", before), checked("after", after)
    if before.shape != after.shape:
        raise ValueError(f"before {list(before.shape)} and after {list(after.shape)} must have the same shape")
    return _measured((exact("before", old), exact("after", new)) for old, new in _blocks(before, after))


def merged_change(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Change:
    """The change from W0 `[N, K]` to W0 + s B A, without building either product or sum whole.

    a `[R, K]` is one task's, b is `[N, R]`. Raises as `column_change`, and ValueError for shapes that do not fit.
    """
    w = checked("w", w)
    right, left = _factors(a, b)
    s = _finite(scaling)
    if w.shape != (left.shape[0], right.shape[1]):
        raise ValueError(f"w {list(w.shape)} must be [N, K] = {[left.shape[0], right.shape[1]]} of b and a")
    pairs = ((exact("w", old), inputs) for old, inputs in _blocks(w, right))
    return _measured(
        (old, torch.addmm(old, left.to(old.device), inputs.to(old.device), alpha=s)) for old, inputs in pairs
    )


def _blocks(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same columns of both, block by block."""
    width = max(1, BLOCK // one.shape[0])
    return zip(one.split(width, 1), other.split(width, 1), strict=True)


def _measured(blocks: Iterator[tuple[Tensor, Tensor]]) -> Change:
    """Sums over blocks of (before, after)."""
    columns = directed = 0
    moved = length = turned = 0.0
    for old, new in blocks:
        new = new.to(old.device)
        lengths, new_lengths = torch.linalg.vector_norm(old, dim=0), torch.linalg.vector_norm(new, dim=0)
        columns += old.shape[1]
        length += float(lengths.sum())
        moved += float((new_lengths - lengths).abs().sum())
        known = (lengths > 0) & (new_lengths > 0)
        directed += int(known.sum())
        # |u - v|^2 / 2 is 1 - cos for unit vectors, and keeps its digits where 1 - cos loses them: a turn by 1e-6 is
        # 5e-13, of which the difference of 1 and a cosine would have three digits left
        gap = old[:, known] / lengths[known] - new[:, known] / new_lengths[known]
        turned += float(gap.square().sum()) / 2
    return Change(
        magnitude=moved / columns,
        relative_magnitude=moved / length if length else math.nan,
        direction=turned / directed if directed else math.nan,
        columns=columns,
        without_direction=columns - directed,
    )


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of a matrix say. Source: effective rank, Roy & Vetterli 2007."""

    singular_values: tuple[float, ...]  # largest first; of an update min(N, R, K) of them, the others being zero
    effective_rank: float  # `exp(-sum p log p)`, p = sigma / sum sigma: 1 for one direction, R for R equal ones
    stable_rank: float  # `||.||_F^2 / sigma_1^2`; nan for a matrix of zeros
    frobenius: float  # `||.||_F`


def matrix_spectrum(matrix: Tensor) -> Spectrum:
    """The spectrum of a matrix `[N, K]`; TypeError or ValueError unless it is finite and floating."""
    return _spectrum(torch.linalg.svdvals(exact("matrix", matrix)))


def update_spectrum(a: Tensor, b: Tensor, scaling: float = 1.0) -> Spectrum:
    """The spectrum of s B A; arguments and errors as for `merged_change`."""
    right, left = _factors(a, b)
    # with B = Q_b T_b and A^T = Q_a T_a it is Q_b (s T_b T_a^T) Q_a^T, and the Q do not change singular values: what is
    # decomposed is [R, R] (SmolLM2's 1536 x 576 at r = 8: 64 numbers instead of 884,736)
    small = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return _spectrum(torch.linalg.svdvals(_finite(scaling) * small))


def _spectrum(values: Tensor) -> Spectrum:
    norm = float(torch.linalg.vector_norm(values))
    shares = values / values.sum()  # zeros: 0 / 0 is the nan that is wanted
    effective = float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
    stable = float((values / values[0]).square().sum())
    return Spectrum(tuple(values.tolist()), effective, stable, norm)


def _factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One task's A `[R, K]` and B `[N, R]` in float64 on one device."""
    left, right = exact("b", b), exact("a", a)
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"a {list(a.shape)} and b {list(b.shape)} have different ranks: a is [R, K] and b is [N, R], as stored"
        )
    return right, left.to(right.device)


def _finite(scaling: float) -> float:
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number, got {float(scaling)}")
    return float(scaling)
