"""The best shared B of one module of several LoRAs, without forming a matrix of the base's size.

In:   A_i, B_i and s_i of each adapter.
Out:  one B, an A per adapter, the singular values, and what each adapter loses.
Who:  `import_lora`, module by module.

With D_i = s_i B_i A_i, the B of R columns that is closest to all of them in the Frobenius norm is spanned by the R
leading left singular vectors of [D_1 ... D_n], and A_i' = B^T D_i (Eckart & Young 1936). D is N x nK and never formed:
with A_i^T = Q_i R_i, the matrix of all G_i = s_i B_i R_i^T (N x sum r) has the same left singular vectors and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reader import Factors, Shape


class SharedB(NamedTuple):
    """One module of several adapters over one B.

    Attributes:
        b, a: `[N, R]` and `[E, R, K]`.
        sigma: the singular values of [D_1 ... D_E], falling.
        norms, lost: ||D_i||_F and ||D_i - B A_i||_F.
    """

    b: Tensor
    a: Tensor
    sigma: Tensor
    norms: list[float]
    lost: list[float]


def shared_b(factors: Sequence[Factors | None], shape: Shape) -> SharedB:
    """The best B of R columns for the same module of several adapters, in float64.

    Formula: U S V^T = [D_1 ... D_E], B = c U_R, A_i = U_R^T D_i / c. B A_i does not depend on c; it is chosen such that
    ||B||_F is the root mean square of the ||A_i||_F, so that training can go on with both at one scale.

    Args:
        factors: of each adapter; None where one does not have the module, which counts as D_i = 0.
        shape: N, R and K of the result. Columns beyond the sum of all ranks are zero.

    Returns:
        float64 matrices and what they lose.

    Source: Eckart & Young 1936; the asymmetry of A and B: Ban & Ji 2025, ALoRA.
    """
    parts, frames = [], []
    for found in factors:
        if found is None:
            continue
        q, r = torch.linalg.qr(found.a.double().T)  # [K, m], [m, r]
        frames.append(q)
        parts.append(found.s * found.b.double() @ r.T)  # [N, m], m = min(r, K)
    u, sigma, _ = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    kept = min(shape.r, u.shape[1])
    basis, power = u[:, :kept], float(sigma[:kept].square().sum())
    c = (power / len(factors) / kept) ** 0.25 or 1.0
    b = torch.zeros(shape.n, shape.r, dtype=torch.float64)
    a = torch.zeros(len(factors), shape.r, shape.k, dtype=torch.float64)
    b[:, :kept] = c * basis
    norms, lost = [0.0] * len(factors), [0.0] * len(factors)
    present = [i for i, found in enumerate(factors) if found is not None]
    for i, part, q in zip(present, parts, frames, strict=True):
        inside = basis.T @ part
        a[i, :kept] = inside @ q.T / c
        norms[i] = float(torch.linalg.norm(part))
        lost[i] = float(torch.linalg.norm(part - basis @ inside))
    return SharedB(b, a, sigma, norms, lost)


def rank_for(goal: float, spectra: Sequence[Tensor]) -> int:
    """The smallest R, the same in every module, whose error over everything is at most `goal`."""
    longest = max(len(sigma) for sigma in spectra)
    squares = torch.zeros(longest + 1, dtype=torch.float64)
    for sigma in spectra:
        squares[: len(sigma)] += sigma.square()
    left = squares.flip(0).cumsum(0).flip(0)  # [R]: what the values from R on amount to
    return max(1, int((left > goal**2 * left[0]).sum()))
