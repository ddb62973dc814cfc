"""The public ops: check the arguments once, turn ids into row groups, draw the dropout seed, call the op.

`trusted_alora` is for layers that proved their own tensors when they were built: `FusedALoRALinear` and those of the
PEFT tuner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..records import Dropout
from ..routing import Routing, RowGroups
from . import autograd, checks
from .dispatch import choose
from .products import no_autocast
from .types import Adapter, wider


def autocast(x: Tensor, *frozen: Tensor | None) -> tuple[Any, ...]:
    """x and the frozen tensors in autocast's dtype, where autocast is on; adapters keep their own."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *frozen
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in (x, *frozen))


def _adapter(
    x: Tensor,
    lora_A: Tensor,
    router: Tensor | None,
    task_ids: Tensor | Routing | None,
    scaling: float,
    dropout_p: float,
    training: bool,
    split: Any = None,
) -> Adapter:
    """What varies from call to call, proven: the rows of each task, and a seed from torch's generator of x's device."""
    checks.check_routing(x, router, task_ids)
    checks.check_dropout(dropout_p)
    groups: RowGroups | None = None
    if task_ids is not None:
        routing = task_ids if isinstance(task_ids, Routing) else Routing(task_ids)
        groups = routing.groups(x.shape[:-1], lora_A.shape[0], x.device)
    return Adapter(lora_A, router, groups, scaling, drawn(dropout_p, training, x.device, split))


def drawn(dropout_p: float, training: bool, device: torch.device, split: Any = None) -> Dropout | None:
    """Dropout with a seed from torch's generator of the device; None where it is inactive."""
    if not training or dropout_p == 0.0:
        return None
    seed = torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64, device=device)
    return Dropout(dropout_p, seed if split is None else split.seed(seed))


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, adapter: Adapter, backend: str | None) -> Tensor:
    w = w.detach() if w.requires_grad else w  # a frozen parameter is known by itself: see `packed`
    return autograd.linear(x, w, bias, b, adapter, choose(x, backend))


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
    x, weight, bias = autocast(x, weight, bias)
    checks.check(x, lora_A, lora_B, weight=weight, bias=bias, router=router)
    adapter = _adapter(x, lora_A, router, task_ids, scaling, dropout_p, training)
    return _linear(x, weight, bias, lora_B, adapter, backend)


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
        x, lora_A, lora_B, router, task_ids, scaling, dropout_p, training, backend: see `alora_linear`.
        base: the base layer's output `[..., N]`, or None for the low-rank part alone. It is overwritten with
            the sum, without a second tensor of its size, unless autograd forbids it (a leaf that requires
            grad, or a view): then a new tensor is returned. Use the returned value in every case.

    Returns:
        `[..., N]`, in base's dtype (x's without a base).

    Raises:
        ValueError, TypeError, RuntimeError: as `alora_linear`; a base whose shape is not `[..., N]`.

    Source: Ban & Ji 2025, ALoRA; QLoRA-style use over a quantised base.
    """
    checks.check(x, lora_A, lora_B, router=router, base=base)
    adapter = _adapter(x, lora_A, router, task_ids, scaling, dropout_p, training)
    return _delta(x, lora_B, base, adapter, backend)


def trusted_alora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    router: Tensor | None,
    task_ids: Tensor | Routing | None,
    scaling: float,
    dropout_p: float,
    training: bool,
    split: Any = None,
) -> Tensor:
    """`alora_linear`, or without a weight `alora_delta`, of tensors that are known to fit each other.

    Only what varies from call to call is proven: x, the base's output, the ids. Without a weight they may be parts of
    what `split`, a `tuner.parallel.Split`, sums up.
    """
    if weight is not None:
        x, weight, bias = autocast(x, weight, bias)
    if not checks.suits(x, lora_A, lora_B, weight=weight, base=base):
        checks.check(x, lora_A, lora_B, weight=weight, bias=bias, router=router, base=base)
    adapter = _adapter(x, lora_A, router, task_ids, scaling, dropout_p, training, split)
    if weight is None:
        return _delta(x, lora_B, base, adapter, None, split)
    return _linear(x, weight, bias, lora_B, adapter, None)


def _delta(
    x: Tensor, b: Tensor, base: Tensor | None, adapter: Adapter, backend: str | None, split: Any = None
) -> Tensor:
    """base + h b^T, written into base where that may be."""
    rows = autocast(x)[0].reshape(-1, x.shape[-1])
    key = choose(rows, backend)
    if split is None:
        h = autograd.linear(rows, None, None, None, adapter, key)
    else:
        h = split.shrink(rows, adapter, key)
    # Triton multiplies in the dtype of the activations, torch in the wider one of both sides
    like = rows if base is None else base
    dtype = wider(like, h, b) if key == "torch" else like.dtype
    with no_autocast(x.device.type):
        h, b = h.to(dtype), b.to(dtype)
        if base is None:
            out = h @ b.t()
        elif _may_overwrite(base):
            out = autograd.add_expanded_(base, h, b)
        else:
            flat = base.reshape(-1, b.shape[0])
            out = torch.addmm(flat, h, b.t()) if base.dtype == dtype else flat + h @ b.t()
        return out.to(like.dtype).view(*x.shape[:-1], b.shape[0])


def _may_overwrite(base: Tensor) -> bool:
    """Whether autograd lets base be changed in place without a copy of its gradient."""
    if torch.compiler.is_compiling() or not base.is_contiguous():
        return False  # the compiler plans buffers itself
    return not torch.is_grad_enabled() or not (base._is_view() or (base.is_leaf and base.requires_grad))
