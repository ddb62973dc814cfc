"""The singular values of an update, and how many of its directions it really uses.

In:   one task's A [R, K] and B [N, R] with the scaling; or any matrix.
Out:  a `Spectrum`: singular values, effective and stable rank, Frobenius norm.
Who:  reports and figures.

s B A = Q_b (s T_b T_a^T) Q_a^T with B = Q_b T_b and A^T = Q_a T_a, and the Q do not change singular values: what is
decomposed is [R, R], and [N, K] is never built (SmolLM2's 1536 x 576 at r = 8: 64 numbers instead of 884,736).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .float64 import exact, factors, scale


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of a matrix say.

    Attributes:
        singular_values: largest first; of an update min(N, R, K) of them, the others being zero.
        effective_rank: `exp(-sum_i p_i log p_i)`, `p_i = sigma_i / sum sigma`: 1 for one direction, R for R equal
            ones. nan for a matrix of zeros.
        stable_rank: `||.||_F^2 / sigma_1^2`; nan for a matrix of zeros.
        frobenius: `||.||_F`.

    Source: effective rank, Roy & Vetterli 2007.
    """

    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    frobenius: float


def matrix_spectrum(matrix: Tensor) -> Spectrum:
    """The spectrum of a matrix `[N, K]`.

    Raises:
        TypeError, ValueError: not a finite floating matrix.
    """
    return _of(torch.linalg.svdvals(exact("matrix", matrix)))


def update_spectrum(a: Tensor, b: Tensor, scaling: float = 1.0) -> Spectrum:
    """The spectrum of s B A.

    Args:
        a: `[R, K]`, one task's.
        b: `[N, R]`.
        scaling: s.

    Raises:
        TypeError, ValueError: not finite floating matrices, or of different ranks.
    """
    right, left = factors(a, b)
    small = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return _of(torch.linalg.svdvals(scale(scaling) * small))


def _of(values: Tensor) -> Spectrum:
    norm = float(torch.linalg.vector_norm(values))
    shares = values / values.sum()  # zeros: 0 / 0 is the nan that is wanted
    effective = float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
    stable = float((values / values[0]).square().sum())
    return Spectrum(tuple(values.tolist()), effective, stable, norm)
