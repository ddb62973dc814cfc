"""The layer in Triton launches: two forward, four or five backward.

In:   two-dimensional activations, the adapter, and rows grouped by task (or a router).
Out:  the same four results as `torch_backend`: `linear`, `shrink` and their backwards.
Who:  `ops.library` calls these functions through its custom ops, on CUDA and ROCm devices and in the
      interpreter. What each launch reads and writes is derived in `kernels/README.md`.
"""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from .types import Adapter, Grads, Needs, Saved, acc_dtype


def shrink(x: Tensor, adapter: Adapter) -> Saved:
    """h = s sum_e gate_e A_e dropout(x), and p for soft routing; see `types.Saved`."""
    dropout = None if adapter.dropout is None else kernels.Dropout(*adapter.dropout)
    if adapter.router is None:
        h = kernels.task_shrink(x, adapter.a, adapter.task_groups, scaling=adapter.scaling, dropout=dropout)
        return Saved(h, x.new_empty(0, dtype=acc_dtype(x)))
    return Saved(*kernels.soft_shrink(x, adapter.a, adapter.router, scaling=adapter.scaling, dropout=dropout))


def linear(x: Tensor, w: Tensor, bias: Tensor | None, adapter: Adapter, b: Tensor) -> tuple[Tensor, Saved]:
    """y = x w^T + bias + h b^T in one product whose last step is the expand."""
    saved = shrink(x, adapter)
    return kernels.linear_expand(x, w, bias, saved.h, b), saved


def _routed_backward(
    dh: Tensor, x: Tensor, adapter: Adapter, saved: Saved, needs: Needs, dy: Tensor | None, w: Tensor | None
) -> Grads:
    """dx = dy w + dp [a; router] in one launch (no base product without dy), and the adapter's gradients."""
    dropout = None if adapter.dropout is None else kernels.Dropout(*adapter.dropout)
    dx = da = drouter = None
    if adapter.router is None:
        groups = adapter.task_groups
        if needs.x:
            dx = kernels.linear_dx_task(dy, w, dh, adapter.a, groups, dtype=x.dtype, dropout=dropout)
        if needs.a:
            da = kernels.task_da(dh, x, groups, adapter.a.shape[0], dtype=adapter.a.dtype, dropout=dropout)
        return Grads(dx, da, None)
    dp = kernels.gate_backward(dh, saved.p, adapter.a.shape[0], dtype=x.dtype)
    if needs.x:
        dx = kernels.linear_dx_soft(dy, w, dp, adapter.a, adapter.router, dtype=x.dtype, dropout=dropout)
    if needs.a or needs.router:
        da, drouter = kernels.soft_da(dp, x, adapter.a.shape[0], dtype=adapter.a.dtype, dropout=dropout)
    return Grads(dx, da, drouter).cast_adapter(adapter)


def shrink_backward(dh: Tensor, x: Tensor, adapter: Adapter, saved: Saved, needs: Needs) -> Grads:
    """Gradients of `shrink` from the gradient of the UNSCALED h."""
    return _routed_backward(dh, x, adapter, saved, needs, None, None)


def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, adapter: Adapter, b: Tensor, saved: Saved, needs: Needs
) -> tuple[Grads, Tensor | None]:
    """Gradients of `linear` for x, a, router and b; one pass over dy gives dh and db."""
    dh, db = kernels.expand_backward(dy, b, saved.h, scaling=adapter.scaling)
    return _routed_backward(dh, x, adapter, saved, needs, dy, w), db if needs.b else None
