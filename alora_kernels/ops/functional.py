"""The public ops: check the arguments once, turn ids into row groups, draw the dropout seed, call the op.

In:   tensors of any leading shape, ids as a tensor or as the batch's `Routing`.
Out:  `alora_linear` gives the layer's output; `alora_delta` adds the low-rank part to a base output.
Who:  users, modules and integrations. Data goes down from here: checks, then `library`, then a backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from . import autograd, checks
from . import dispatch as backends
from .mixed import add_product_, no_autocast, product, turned_product
from .types import wider


def autocast(x: Tensor, *frozen: Tensor | None) -> tuple[Tensor | None, ...]:
    """x and the frozen tensors in autocast's dtype, where autocast is on; adapters keep their own."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *frozen)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in (x, *frozen))


Ids = tuple[Tensor | None, Tensor | None, Tensor | None]


def routing_args(x: Tensor, task_ids: Tensor | Routing | None, num_tasks: int) -> Ids:
    """(ids, order, offsets): what the ops take to route rows by task; Nones for soft routing."""
    if task_ids is None:
        return None, None, None
    routing = task_ids if isinstance(task_ids, Routing) else Routing(task_ids)
    return routing.groups(x.shape[:-1], num_tasks, x.device)


def dropout_seed(x: Tensor, dropout_p: float, training: bool) -> Tensor | None:
    """A seed from torch's generator of x's device, or None when dropout is inactive."""
    if not training or dropout_p == 0.0:
        return None
    return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64, device=x.device)


def alora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    router: Tensor | None = None,
    task_ids: Tensor | Routing | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer plus several low-rank A under one shared B, fused.

    Formula: `y = x W0^T + bias + s (sum_e g_e(x) A_e dropout(x)) B^T`, g the softmax of `x router^T` or the
    one-hot of the task id.

    Args:
        x: activations `[..., K]`, float16, bfloat16, float32 or float64, any strides.
        weight: frozen base weight `[N, K]`; it never receives a gradient.
        lora_A: `[E, R, K]`, in x's dtype or float32; its gradient is zero for tasks without rows.
        lora_B: the shared B, `[N, R]`, in x's dtype or float32.
        bias: base bias `[N]`; receives a gradient when it requires one.
        router: router weight `[E, K]` (soft routing); it sees x before dropout.
        task_ids: integer ids `[batch]` or `x.shape[:-1]` (task routing), or the batch's `Routing`; -1 means
            the base alone. A raw CUDA tensor is read back once per call to check its range; a `Routing`
            is checked once per batch.
        scaling: s, `lora_alpha / r` (rsLoRA: `lora_alpha / sqrt(r)`).
        dropout_p: probability that an entry of x is dropped from the low-rank path; one mask for all experts.
        training: dropout is active only when True. Its seed comes from torch's generator of x's device, so a
            recomputation under activation checkpointing draws the same mask.
        backend: "triton", "torch", or None: the environment's `ALORA_BACKEND`, else Triton on CUDA and ROCm
            and torch elsewhere.

    Returns:
        y `[..., N]` in x's dtype. The same inputs give bit-identical outputs and gradients.

    Raises:
        ValueError: shapes that do not fit, an id out of range, both or neither of router and task_ids,
            tensors on different devices.
        TypeError: integer or 8-bit x, non-integer ids, weight of another dtype than x.
        RuntimeError: the backend cannot run there; second derivatives are asked for.

    Source: Ban & Ji 2025, ALoRA; `alora_kernels.reference.alora_linear` is the specification.
    """
    x_cast, w, bias = autocast(x, weight, bias)
    assert x_cast is not None and w is not None
    checks.check_tensors(x_cast, weight=w, lora_A=lora_A, lora_B=lora_B, bias=bias, router=router)
    checks.check_adapter(x, lora_A, lora_B, router)
    checks.check_base(x_cast, w, lora_B, bias)
    checks.check_routing(x, router, task_ids)
    checks.check_dropout(dropout_p)
    rows = x_cast.reshape(-1, x.shape[-1])
    y, _, _ = autograd.linear_for(rows, bias, lora_A, lora_B, router)(
        rows,
        w.detach(),
        bias,
        lora_A,
        lora_B,
        router,
        *routing_args(x, task_ids, lora_A.shape[0]),
        dropout_seed(x, dropout_p, training),
        scaling,
        dropout_p,
        backends.choose(rows, backend),
    )
    return y.view(*x.shape[:-1], w.shape[0])


def alora_delta(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    base: Tensor | None = None,
    router: Tensor | None = None,
    task_ids: Tensor | Routing | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The low-rank part alone, added to the output of a base whose weight is not a plain matrix.

    Formula: `base + s (sum_e g_e(x) A_e dropout(x)) B^T`.

    Args:
        x: activations `[..., K]`.
        lora_A: `[E, R, K]`.
        lora_B: the shared B, `[N, R]`.
        base: the base layer's output `[..., N]`, or None for the low-rank part alone. It is overwritten with
            the sum, without a second tensor of its size, unless autograd forbids it (a leaf that requires
            grad, or a view): then a new tensor is returned. Use the returned value in every case.
        router: see `alora_linear`.
        task_ids: see `alora_linear`.
        scaling: s.
        dropout_p: see `alora_linear`.
        training: see `alora_linear`.
        backend: see `alora_linear`.

    Returns:
        `[..., N]`, in base's dtype (x's without a base).

    Raises:
        ValueError, TypeError, RuntimeError: as `alora_linear`; a base whose shape is not `[..., N]`.

    Source: Ban & Ji 2025, ALoRA; QLoRA-style use over a quantised base.
    """
    out_shape = (*x.shape[:-1], lora_B.shape[0])
    checks.check_tensors(x, lora_A=lora_A, lora_B=lora_B, router=router, base=base)
    checks.check_adapter(x, lora_A, lora_B, router)
    checks.check_routing(x, router, task_ids)
    checks.check_dropout(dropout_p)
    if base is not None and base.shape != out_shape:
        raise ValueError(f"base must be {out_shape} (x's leading shape and lora_B's rows), got {tuple(base.shape)}")
    (x_cast,) = autocast(x)
    assert x_cast is not None
    rows = x_cast.reshape(-1, x.shape[-1])
    backend = backends.choose(rows, backend)
    shrink = autograd.shrink if autograd.needs_dispatch(rows, lora_A, router) else autograd.shrink_now
    h, _ = shrink(
        rows,
        lora_A,
        router,
        *routing_args(x, task_ids, lora_A.shape[0]),
        dropout_seed(x, dropout_p, training),
        scaling,
        dropout_p,
        backend,
    )
    # Triton multiplies in the dtype of the activations, torch in the wider one of both sides
    like = rows if base is None else base
    dtype = wider(like, h, lora_B) if backend == "torch" else like.dtype
    with no_autocast(x.device.type):
        return _expanded(base, h.to(dtype), lora_B.to(dtype)).to(like.dtype).view(out_shape)


def _expanded(base: Tensor | None, h: Tensor, b: Tensor) -> Tensor:
    """base + h b^T, written into base where that may be."""
    if base is None:
        return h @ b.t()
    if _may_overwrite(base):
        return _AddExpanded.apply(base, h, b)  # type: ignore[no-any-return]
    rows = base.reshape(-1, b.shape[0])
    return torch.addmm(rows, h, b.t()) if base.dtype == h.dtype else rows + h @ b.t()


def _may_overwrite(base: Tensor) -> bool:
    """Whether autograd lets base be changed in place without a copy of its gradient."""
    if torch.compiler.is_compiling() or not base.is_contiguous():
        return False  # the compiler plans buffers itself
    return not torch.is_grad_enabled() or not (base._is_view() or (base.is_leaf and base.requires_grad))


class _AddExpanded(torch.autograd.Function):
    """base += h b^T in place; the gradient of base passes through uncopied."""

    @staticmethod
    def forward(ctx, base: Tensor, h: Tensor, b: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(h, b)
        ctx.mark_dirty(base)
        add_product_(base.view(-1, b.shape[0]), h, b.t())
        return base

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        h, b = ctx.saved_tensors
        rows = dy.reshape(-1, b.shape[0])
        with no_autocast(dy.device.type):
            dh = product(rows, b, 1.0) if ctx.needs_input_grad[1] else None
            db = turned_product(rows, h) if ctx.needs_input_grad[2] else None
        return dy, dh, db
