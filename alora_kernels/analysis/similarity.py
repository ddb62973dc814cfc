"""How alike two matrices A_i, A_j [R, K] (or B^T) are: as vectors, and as the subspaces their rows span; in float64.

The two answer different questions. B A = (B Q^T)(Q A) for every rotation Q of the rank, so the cosine depends on a
basis that training picked by accident (the common initialisation), while the overlap does not. Neither is small by
itself: r random directions of K overlap by r / K, so a number means something beside `chance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .float64 import checked, exact


class IncomparableError(ValueError):
    """Two matrices whose shapes do not allow the measurement."""


def cosine(p: Tensor, q: Tensor) -> float:
    """Cosine similarity of two matrices read as vectors.

    Formula: `<p, q> / (||p||_F ||q||_F)`.

    Args:
        p, q: of the same shape.

    Returns:
        In [-1, 1]; nan if either is all zeros (B before its first step).

    Raises:
        IncomparableError: different shapes.
        TypeError, ValueError: not finite floating matrices.
    """
    left, right = exact("p", p), exact("q", q)
    if left.shape != right.shape:
        raise IncomparableError(f"p {list(p.shape)} and q {list(q.shape)} must have the same shape")
    u, v = unit_vector(left), unit_vector(right.to(left.device))
    return float((u * v).sum().clamp(-1.0, 1.0))


def unit_vector(values: Tensor) -> Tensor:
    """The values over their Euclidean norm; nan for zeros. Divided by the largest first: squares must not vanish."""
    values = values / values.abs().max()
    return values / torch.linalg.vector_norm(values)


def subspace_overlap(p: Tensor, q: Tensor, *, tolerance: float | None = None) -> float:
    """Mean squared cosine of the principal angles between two row spaces.

    Formula: `||V_p V_q^T||_F^2 / min(rank p, rank q)`, the rows of V an orthonormal basis of the row space.

    Args:
        p: `[r1, K]`; for B pass B^T.
        q: `[r2, K]`.
        tolerance: a direction counts while its singular value exceeds this share of the Frobenius norm. Default: eps
            of the matrix's dtype. Rounding to that dtype moves no singular value by more than eps / 2 of the norm
            (Weyl), so what stays below is rounding. Give it for numbers that were coarser before, e.g. 2**-7 for
            bfloat16 weights held in float32.

    Returns:
        In [0, 1]: 0 orthogonal, 1 if one space holds the other; nan if either matrix is all zeros. See `chance`.

    Raises:
        IncomparableError: different K.
        TypeError, ValueError: not finite floating matrices.

    Source: Hu et al. 2022, LoRA, section 7.2, with all directions.
    """
    if checked("p", p).shape[1] != checked("q", q).shape[1]:
        raise IncomparableError(f"p {list(p.shape)} and q {list(q.shape)} must have rows of the same length")
    v, u = row_basis("p", p, tolerance), row_basis("q", q, tolerance)
    directions = min(len(v), len(u))
    if directions == 0:
        return float("nan")
    return min(float((v @ u.to(v.device).T).square().sum() / directions), 1.0)


def row_basis(name: str, matrix: Tensor, tolerance: float | None) -> Tensor:
    """Orthonormal rows `[rank, K]` that span the rows of the matrix."""
    _, values, basis = torch.linalg.svd(exact(name, matrix), full_matrices=False)
    share = torch.finfo(matrix.dtype).eps if tolerance is None else tolerance
    share = max(share, max(matrix.shape) * torch.finfo(torch.float64).eps)  # what the decomposition itself resolves
    return basis[values > share * torch.linalg.vector_norm(values)]


def chance(r1: int, r2: int, K: int) -> float:
    """The overlap that two independent random subspaces have on average.

    Formula: `max(d1, d2) / K`, d = min(r, K). The projection on a random subspace has the mean `(d2 / K) I`, so
    `E ||V_p V_q^T||_F^2 = trace(P_p) d2 / K = d1 d2 / K`, which `subspace_overlap` divides by min(d1, d2).

    Args:
        r1, r2: their ranks.
        K: length of the rows.

    Raises:
        ValueError: any below 1.
    """
    if min(r1, r2, K) < 1:
        raise ValueError(f"r1, r2 and K must be at least 1, got {r1}, {r2}, {K}")
    return max(min(r1, K), min(r2, K)) / K


def pairwise(matrices: Sequence[Tensor] | Tensor, function: Callable[[Tensor, Tensor], float]) -> Tensor:
    """A symmetric function of every pair.

    Args:
        matrices: n of them, e.g. a stacked A `[E, R, K]` itself.
        function: `cosine`, `subspace_overlap`, or another that is symmetric.

    Returns:
        `[n, n]` in float64 on the CPU, the diagonal measured too; nan where the shapes cannot be compared.

    Raises:
        TypeError, ValueError: not finite floating matrices; the index is named.
    """
    items = list(matrices)
    for i, matrix in enumerate(items):
        exact(f"matrices[{i}]", matrix)
    table = torch.full((len(items), len(items)), float("nan"), dtype=torch.float64)
    for i, p in enumerate(items):
        for j in range(i, len(items)):
            try:
                table[i, j] = table[j, i] = function(p, items[j])
            except IncomparableError:
                continue
    return table
