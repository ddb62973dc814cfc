"""How alike two matrices A_i, A_j [R, K] (or B^T) are: as vectors, and as the subspaces their rows span.

B A = (B Q^T)(Q A) for every rotation Q of the rank, so the cosine depends on a basis that training picked by accident
(the common initialisation), while the overlap does not. Neither is small by itself: see `chance`. All of the package
measures in float64: a column of W0 moves by 1e-3 of its length, 5e-7 in 1 - cos, and float32 resolves 6e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor


class IncomparableError(ValueError):
    """Two matrices whose shapes do not allow the measurement."""


def cosine(p: Tensor, q: Tensor) -> float:
    """Cosine similarity of two matrices of one shape, read as vectors.

    Formula: `<p, q> / (||p||_F ||q||_F)`, in [-1, 1]; nan if either is all zeros (B before its first step). Raises
    IncomparableError for different shapes, TypeError or ValueError unless both are finite floating matrices.
    """
    left, right = exact("p", p), exact("q", q)
    if left.shape != right.shape:
        raise IncomparableError(f"p {list(p.shape)} and q {list(q.shape)} must have the same shape")
    return float(cosines([left, right])[0, 1])


def unit_vector(values: Tensor) -> Tensor:
    """The values over their Euclidean norm; nan for zeros. Divided by the largest first: squares must not vanish."""
    values = values / values.abs().max()
    return values / torch.linalg.vector_norm(values)


def subspace_overlap(p: Tensor, q: Tensor, *, tolerance: float | None = None) -> float:
    """Mean squared cosine of the principal angles between two row spaces.

    Formula: `||V_p V_q^T||_F^2 / min(rank p, rank q)`, the rows of V an orthonormal basis of the row space. In [0, 1]:
    0 orthogonal, 1 if one space holds the other; nan if either matrix is all zeros. See `chance`.

    Args:
        p, q: `[r1, K]` and `[r2, K]`; for B pass B^T. Raises as `cosine`, IncomparableError for different K.
        tolerance: a direction counts while its singular value exceeds this share of the Frobenius norm. Default: eps
            of the matrix's dtype. Rounding to that dtype moves no singular value by more than eps / 2 of the norm
            (Weyl), so what stays below is rounding. Give it for numbers that were coarser before, e.g. 2**-7 for
            bfloat16 weights held in float32.

    Source: Hu et al. 2022, LoRA, section 7.2, with all directions.
    """
    if exact("p", p).shape[1] != exact("q", q).shape[1]:
        raise IncomparableError(f"p {list(p.shape)} and q {list(q.shape)} must have rows of the same length")
    return float(overlaps([p, q], tolerance)[0][0, 1])


def _row_basis(matrix: Tensor, tolerance: float | None) -> Tensor:
    """Orthonormal rows `[rank, K]` that span the rows of the matrix, on the CPU."""
    _, values, basis = torch.linalg.svd(exact("matrix", matrix), full_matrices=False)
    share = torch.finfo(matrix.dtype).eps if tolerance is None else tolerance
    share = max(share, max(matrix.shape) * torch.finfo(torch.float64).eps)  # what the decomposition itself resolves
    return basis[values > share * torch.linalg.vector_norm(values)].cpu()


def chance(r1: int, r2: int, K: int) -> float:
    """The overlap that two independent random subspaces of ranks r1 and r2 have on average; ValueError below 1.

    Formula: `max(d1, d2) / K`, d = min(r, K). The projection on a random subspace has the mean `(d2 / K) I`, so `E
    ||V_p V_q^T||_F^2 = trace(P_p) d2 / K = d1 d2 / K`, which `subspace_overlap` divides by min(d1, d2).
    """
    if min(r1, r2, K) < 1:
        raise ValueError(f"r1, r2 and K must be at least 1, got {r1}, {r2}, {K}")
    return max(min(r1, K), min(r2, K)) / K


def pairwise(matrices: Sequence[Tensor] | Tensor, function: Callable[[Tensor, Tensor], float]) -> Tensor:
    """A symmetric function of every pair, such as `cosine`: `[n, n]` in float64 on the CPU, the diagonal measured too.

    `matrices` may be a stacked A `[E, R, K]` itself. nan where shapes cannot be compared; raises TypeError or
    ValueError, naming the index, unless all are finite floating matrices.
    """
    items = list(matrices)
    for i, matrix in enumerate(items):
        exact(f"matrices[{i}]", matrix)
    table = _nan(len(items))
    for i, j in combinations_with_replacement(range(len(items)), 2):
        with suppress(IncomparableError):
            table[i, j] = table[j, i] = function(items[i], items[j])
    return table


def cosines(tensors: Sequence[Tensor]) -> Tensor:
    """`cosine` of all pairs `[n, n]`; NaN where shapes differ or one is zero."""
    table = _nan(len(tensors))
    for same in _groups([tuple(t.shape) for t in tensors]):
        directions = torch.stack([unit_vector(double(tensors[i]).flatten()).cpu() for i in same])
        table[same[:, None], same] = (directions @ directions.T).clamp(-1.0, 1.0)
    return table


def overlaps(matrices: Sequence[Tensor], tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """`subspace_overlap` and `chance` of all pairs, `[n, n]` each; NaN where rows differ in length or are zeros.

    Each basis is computed once, not once per pair: of 16 tasks 16 decompositions, not 240.
    """
    bases = [_row_basis(matrix, tolerance) for matrix in matrices]
    table, level = _nan(len(bases)), _nan(len(bases))
    for same in _groups([basis.shape[1] for basis in bases]):
        owner = torch.repeat_interleave(torch.tensor([len(bases[i]) for i in same]))
        of = torch.nn.functional.one_hot(owner, len(same)).double()  # [sum of ranks, n]
        stacked = torch.cat([bases[i] for i in same])
        ranks, squares = of.sum(0), of.T @ (stacked @ stacked.T).square() @ of
        least, most = torch.minimum(ranks[:, None], ranks), torch.maximum(ranks[:, None], ranks)
        table[same[:, None], same] = (squares / least).clamp(max=1.0)  # 0 / 0 of zeros: NaN, as wanted
        level[same[:, None], same] = torch.where(least > 0, most / stacked.shape[1], torch.nan)
    return table, level


def _nan(n: int) -> Tensor:
    return torch.full((n, n), torch.nan, dtype=torch.float64)


def _groups(keys: Sequence[Any]) -> list[Tensor]:
    """The places of equal keys."""
    return [torch.tensor([i for i, other in enumerate(keys) if other == key]) for key in dict.fromkeys(keys)]


def checked(name: str, matrix: Tensor) -> Tensor:
    """The matrix without its graph. Raises TypeError if it is no floating tensor, ValueError if not 2-D, or empty."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        found = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"{name} must be a tensor of a floating dtype, got {found}")
    if matrix.dim() != 2:
        raise ValueError(f"{name} must be a matrix, got shape {list(matrix.shape)}: pass one task's slice of a stack")
    if matrix.numel() == 0:
        raise ValueError(f"{name} is empty, shape {list(matrix.shape)}")
    return matrix.detach()


def double(tensor: Tensor) -> Tensor:
    """The tensor without its graph in float64, where it is; Apple's GPUs have none, so from there on the CPU."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def exact(name: str, matrix: Tensor) -> Tensor:
    """The matrix in float64. Raises as `checked`, and ValueError for NaN or infinity."""
    values = double(checked(name, matrix))
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: the run it comes from diverged")
    return values
