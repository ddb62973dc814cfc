"""The custom ops: what `torch.compile`, autograd and the profiler see. Only `ops.functional` calls them.

`alora::linear` is the whole layer, or without a weight the routed half, h alone. It gives h and p only because the
backward needs them; the backward is a second op, so a compiled graph holds one opaque node a pass. Nothing of size
`[M, N]` is saved, nothing per expert of size `[M, K]`. Task ids, their order and the seed of dropout are tensors, so
new ones never recompile.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..records import acc_dtype
from . import torch_backend
from .checks import PLAIN
from .dispatch import BACKENDS
from .products import add_product_, no_autocast, product, transposed_product
from .types import SCHEMA, TENSORS, Adapter, Needs, Saved, wider

DIRECT = ("cpu", "cuda")  # devices of tensors that hold numbers, where an op's function can be called as it is
Gradients = tuple[Tensor | None, ...]
_NO_GRADIENT = (None,) * 7  # of ids, order, offsets, seed, scaling, dropout_p, backend


def backend_module(name: str) -> ModuleType:
    """The functions of a backend, "torch" or "triton"."""
    if name == "torch":
        return torch_backend
    from . import triton_backend  # needs the triton package, which only Linux has

    return triton_backend


def traced(x: Tensor) -> bool:
    """Whether somebody besides autograd must see an op's call: a tracer, a mode or a transform."""
    if type(x) not in PLAIN or x.device.type not in DIRECT or torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return bool(modes) or torch.jit.is_tracing()


def refuse_forward_mode() -> None:
    """Raise inside `torch.func.jvp` and its kind: an op of our own would drop tangents and give zeros."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise RuntimeError(
            "adapters have no forward-mode derivative: use torch.autograd.grad, or alora_kernels.reference"
        )


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd must see an op's call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_dispatch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether autograd, a tracer, a mode or a transform must see an op's call.

    Where none of them must, the plain function gives the same without the dispatcher: `bench host`.
    """
    return traced(x) or differentiated(x, *others)


def linear(
    x: Tensor, w: Tensor | None, bias: Tensor | None, b: Tensor | None, adapter: Adapter, backend: str
) -> Tensor:
    """y `[..., N]` of the whole layer, by the cheapest call that everybody who must see it sees.

    Without w, bias and b it is h of the routed half, times s.
    """
    if traced(x):
        refuse_forward_mode()
        y, _, _ = linear_op(_rows(x), w, bias, b, *adapter.flat(), backend)
    elif differentiated(x, bias, b, adapter.a, adapter.router):
        # shaped out here: what a function of autograd's gives as a view cannot be written into
        y = cast(Tensor, _LinearNow.apply(x, w, bias, b, adapter.a, adapter.router, adapter, backend))
    else:
        y, _ = _linear(_rows(x), w, bias, b, adapter, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _linear(
    x: Tensor, w: Tensor | None, bias: Tensor | None, b: Tensor | None, adapter: Adapter, backend: str
) -> tuple[Tensor, Saved]:
    name, plan = BACKENDS[backend]
    if w is None:
        saved: Saved = backend_module(name).shrink(x, adapter)
        return saved.h, saved
    return cast(tuple[Tensor, Saved], backend_module(name).linear(x, w, bias, adapter, b, plan))


def _linear_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, saved: Saved, adapter: Adapter, key: str, needs: Needs
) -> Gradients:
    """Gradients of x, bias, b, a and router; those that are not needed may be None."""
    name, plan = BACKENDS[key]
    if w is None:
        grads, db = backend_module(name).shrink_backward(dy * adapter.scaling, x, adapter, saved, needs), None
    else:
        grads, db = backend_module(name).linear_backward(dy, x, w, adapter, b, saved, needs, plan)
    return grads.dx, dy.sum(0) if needs.bias else None, db, grads.da, grads.drouter


def _or_empty(like: Tensor, grads: Gradients) -> tuple[Tensor, ...]:
    """Ops return tensors, never None: an empty one stands for a gradient that was not asked for."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


@torch.library.custom_op(
    "alora::linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? b, {SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)",
)
def linear_op(
    x: Tensor, w: Tensor | None, bias: Tensor | None, b: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h, p; without w it is h, an empty tensor, p: an op gives nothing twice."""
    y, saved = _linear(x, w, bias, b, Adapter.unflatten(*flat[:-1]), flat[-1])
    return y, y.new_empty(0) if w is None else saved.h, saved.p


@torch.library.custom_op(
    "alora::linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor? weight, Tensor? b, Tensor h, Tensor p, {SCHEMA}, str backend, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_backward_op(
    dy: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, h: Tensor, p: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """dx, dbias, db, da, drouter; empty where not needed."""
    *flat, backend, needs = rest
    adapter = Adapter.unflatten(*flat)
    return _or_empty(dy, _linear_backward(dy, x, w, b, Saved(h, p), adapter, backend, Needs(*needs)))


@linear_op.register_fake
def _(x: Tensor, w: Tensor | None, bias: Any, b: Any, a: Tensor, router: Tensor | None, *rest: Any) -> Any:
    experts, rank, _ = a.shape
    h_dtype = wider(x, a, router) if rest[-1] == "torch" else x.dtype  # see `types.Saved`
    h = x.new_empty(x.shape[0], rank, dtype=h_dtype)
    p_shape = (0,) if router is None else (x.shape[0], experts * rank + experts)
    p = x.new_empty(p_shape, dtype=acc_dtype(x.dtype))
    return (h, h.new_empty(0), p) if w is None else (x.new_empty(x.shape[0], w.shape[0]), h, p)


@linear_backward_op.register_fake
def _(dy: Tensor, x: Tensor, w: Any, b: Any, h: Any, p: Any, a: Tensor, router: Any, *rest: Any) -> Any:
    like = x, dy.new_empty(dy.shape[1]), b, a, router
    wanted = zip(like, rest[-1], strict=True)
    return _or_empty(dy, tuple(t.new_empty(t.shape) if t is not None and need else None for t, need in wanted))


def _save(ctx: Any, own: tuple[Tensor | None, ...], flat: Sequence[Any], saved: Sequence[Tensor]) -> None:
    """Keep for the backward: x, w and b, h and p, the flat arguments of the adapter, the backend's key."""
    ctx.set_materialize_grads(False)
    ctx.numbers = flat[TENSORS:]
    ctx.save_for_backward(*own, *saved, *flat[:TENSORS])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, _, b, *flat = inputs
    y, h, p = output
    _save(ctx, (x, w, b), flat, (y if w is None else h, p))


def _linear_grads(ctx: Any, dy: Tensor | None, *_: Any) -> Gradients:
    if dy is None:
        return (None,) * 6 + _NO_GRADIENT
    x, w, b, h, p, *tensors = ctx.saved_tensors
    x = _rows(x)
    *numbers, backend = ctx.numbers
    x_, _, *others = ctx.needs_input_grad[:6]
    needs = Needs(x_, *others)
    # create_graph=True asks for a second derivative, which the op refuses with a reason
    if needs_dispatch(dy, x, b, *tensors[:2]):
        grads = linear_backward_op(dy, x, w, b, h, p, *tensors, *numbers, backend, list(needs))
    else:
        grads = _linear_backward(dy, x, w, b, Saved(h, p), Adapter.unflatten(*tensors, *numbers), backend, needs)
    dx, *rest = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, None, *rest, *_NO_GRADIENT


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "ALoRA's fused backward cannot be differentiated again (create_graph=True): "
        "use alora_kernels.reference.alora_linear where second derivatives are needed"
    )


linear_op.register_autograd(_linear_grads, setup_context=_save_linear)
linear_backward_op.register_autograd(_no_double_backward)


class _LinearNow(torch.autograd.Function):
    """The layer for autograd alone: y `[M, N]` of x `[..., K]`.

    Without `setup_context`: for that `apply` asks Python's `inspect` for a signature at every call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:  # type: ignore[override]
        w, bias, b, _, _, adapter, backend = inputs
        y, saved = _linear(_rows(x), w, bias, b, adapter, backend)
        _save(ctx, (x, w, b), (*adapter.flat(), backend), saved)
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:  # type: ignore[override]
        if dy is None:
            return (None,) * 8
        dx, *others = _linear_grads(ctx, dy)[:6]
        return None if dx is None else dx.view(ctx.shape), *others, None, None


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
    def backward(ctx, dy: Tensor) -> Gradients:  # type: ignore[no-untyped-def, override]
        h, b = ctx.saved_tensors
        rows = dy.reshape(-1, b.shape[0])
        with no_autocast(dy.device.type):
            dh = product(rows, b, 1.0) if ctx.needs_input_grad[1] else None
            db = transposed_product(rows, h) if ctx.needs_input_grad[2] else None
        return dy, dh, db


add_expanded_ = _AddExpanded.apply
