"""The custom ops: what `torch.compile`, autograd and the profiler see. Only `ops.functional` calls them.

`alora::linear` and `alora::shrink` give h and p only because the backward needs them; each backward is a second op, so
a compiled graph holds one opaque node a pass. Nothing of size `[M, N]` is saved, nothing per expert of size `[M, K]`.
Task ids, their order and the seed of dropout are tensors, so new ones never recompile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from ..records import acc_dtype
from . import torch_backend
from .checks import PLAIN
from .dispatch import BACKENDS
from .products import add_product_, no_autocast, product, transposed_product
from .types import SCHEMA, TENSORS, Adapter, Needs, Saved, wider

DIRECT = ("cpu", "cuda")  # devices of tensors that hold numbers, where an op's function can be called as it is
Gradients = tuple[Tensor | None, ...]
_AND_NEEDS = f"{SCHEMA}, str backend, bool[] needs"
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


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd must see an op's call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_dispatch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether autograd, a tracer, a mode or a transform must see an op's call.

    Where none of them must, the plain function gives the same without the dispatcher: `bench host`.
    """
    return traced(x) or differentiated(x, *others)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, adapter: Adapter, backend: str) -> Tensor:
    """y `[..., N]` of the whole layer, by the cheapest call that everybody who must see it sees."""
    if traced(x):
        y, _, _ = linear_op(_rows(x), w, bias, b, *adapter.flat(), backend)
    elif differentiated(x, bias, b, adapter.a, adapter.router):
        # shaped out here: what a function of autograd's gives as a view cannot be written into
        y = cast(Tensor, _LinearNow.apply(x, w, bias, b, adapter.a, adapter.router, adapter, backend))
    else:
        y, _ = _linear(_rows(x), w, bias, b, adapter, backend)
    return _laid_as(x, y)


def shrink(x: Tensor, adapter: Adapter, backend: str) -> Tensor:
    """h of the routed half, times s; x is `[M, K]`."""
    if traced(x):
        return cast(Tensor, shrink_op(x, *adapter.flat(), backend)[0])
    if differentiated(x, adapter.a, adapter.router):
        return cast(Tensor, _ShrinkNow.apply(x, adapter.a, adapter.router, adapter, backend))
    return _shrink(x, adapter, backend).h


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _laid_as(x: Tensor, rows: Tensor) -> Tensor:
    """rows `[M, N]` in the leading shape of x."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[1])


def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, adapter: Adapter, backend: str
) -> tuple[Tensor, Saved]:
    name, plan = BACKENDS[backend]
    return cast(tuple[Tensor, Saved], backend_module(name).linear(x, w, bias, adapter, b, plan))


def _shrink(x: Tensor, adapter: Adapter, backend: str) -> Saved:
    return cast(Saved, backend_module(BACKENDS[backend].name).shrink(x, adapter))


def _linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, b: Tensor, saved: Saved, adapter: Adapter, backend: str, needs: Needs
) -> Gradients:
    """Gradients of x, bias, b, a and router; those that are not needed may be None."""
    name, plan = BACKENDS[backend]
    grads, db = backend_module(name).linear_backward(dy, x, w, adapter, b, saved, needs, plan)
    return grads.dx, dy.sum(0) if needs.bias else None, db, grads.da, grads.drouter


def _shrink_backward(dh: Tensor, x: Tensor, saved: Saved, adapter: Adapter, backend: str, needs: Needs) -> Gradients:
    module = backend_module(BACKENDS[backend].name)
    grads: Gradients = module.shrink_backward(dh * adapter.scaling, x, adapter, saved, needs)
    return grads


def _or_empty(like: Tensor, grads: Gradients) -> tuple[Tensor, ...]:
    """Ops return tensors, never None: an empty one stands for a gradient that was not asked for."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _op(name: str, inputs: str, outputs: int) -> Callable[..., Any]:
    """A custom op that mutates nothing and returns so many tensors; `SCHEMA` and the backend's key end its inputs."""
    returns = ", ".join(["Tensor"] * outputs)
    return torch.library.custom_op(f"alora::{name}", mutates_args=(), schema=f"({inputs}) -> ({returns})")


def _linear_flat(x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, h, p of the whole layer."""
    y, saved = _linear(x, w, bias, b, Adapter.unflatten(*flat[:-1]), flat[-1])
    return y, saved.h, saved.p


linear_op = _op("linear", f"Tensor x, Tensor weight, Tensor? bias, Tensor b, {SCHEMA}, str backend", 3)(_linear_flat)


@_op("shrink", f"Tensor x, {SCHEMA}, str backend", 2)
def shrink_op(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """h, p of the routed half."""
    saved = _shrink(x, Adapter.unflatten(*flat[:-1]), flat[-1])
    return saved.h, saved.p


@_op("linear_backward", f"Tensor dy, Tensor x, Tensor weight, Tensor b, Tensor h, Tensor p, {_AND_NEEDS}", 5)
def linear_backward_op(
    dy: Tensor, x: Tensor, w: Tensor, b: Tensor, h: Tensor, p: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """dx, dbias, db, da, drouter; empty where not needed."""
    *flat, backend, needs = rest
    adapter = Adapter.unflatten(*flat)
    return _or_empty(dy, _linear_backward(dy, x, w, b, Saved(h, p), adapter, backend, Needs(*needs)))


@_op("shrink_backward", f"Tensor dh, Tensor x, Tensor h, Tensor p, {_AND_NEEDS}", 3)
def shrink_backward_op(dh: Tensor, x: Tensor, h: Tensor, p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """dx, da, drouter from the gradient of the scaled h; empty where not needed."""
    *flat, backend, needs = rest
    return _or_empty(dh, _shrink_backward(dh, x, Saved(h, p), Adapter.unflatten(*flat), backend, Needs(*needs)))


def _fake_saved(x: Tensor, a: Tensor, router: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    experts, rank, _ = a.shape
    h_dtype = wider(x, a, router) if backend == "torch" else x.dtype  # see `types.Saved`
    p_shape = (0,) if router is None else (x.shape[0], experts * rank + experts)
    return x.new_empty(x.shape[0], rank, dtype=h_dtype), x.new_empty(p_shape, dtype=acc_dtype(x.dtype))


@linear_op.register_fake
def _(x: Tensor, w: Tensor, bias: Any, b: Any, a: Tensor, router: Tensor | None, *rest: Any) -> Any:
    return x.new_empty(x.shape[0], w.shape[0]), *_fake_saved(x, a, router, rest[-1])


@shrink_op.register_fake
def _(x: Tensor, a: Tensor, router: Tensor | None, *rest: Any) -> Any:
    return _fake_saved(x, a, router, rest[-1])


def _fake_grads(dy: Tensor, *wanted: tuple[Tensor | None, bool]) -> tuple[Tensor, ...]:
    return _or_empty(dy, tuple(t.new_empty(t.shape) if t is not None and need else None for t, need in wanted))


@linear_backward_op.register_fake
def _(dy: Tensor, x: Tensor, w: Tensor, b: Tensor, h: Any, p: Any, a: Tensor, router: Any, *rest: Any) -> Any:
    needs = Needs(*rest[-1])
    wanted = (x, needs.x), (dy.new_empty(dy.shape[1]), needs.bias), (b, needs.b), (a, needs.a), (router, needs.router)
    return _fake_grads(dy, *wanted)


@shrink_backward_op.register_fake
def _(dh: Tensor, x: Tensor, h: Any, p: Any, a: Tensor, router: Tensor | None, *rest: Any) -> Any:
    needs = Needs(*rest[-1])
    return _fake_grads(dh, (x, needs.x), (a, needs.a), (router, needs.router))


def _save(ctx: Any, own: tuple[Tensor, ...], flat: Sequence[Any], saved: tuple[Tensor, ...]) -> None:
    """Keep for the backward: the op's own tensors, h and p, the flat arguments of the adapter, the backend's key."""
    ctx.set_materialize_grads(False)
    ctx.numbers = flat[TENSORS:]
    ctx.save_for_backward(*own, *saved, *flat[:TENSORS])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, _, b, *flat = inputs
    _save(ctx, (x, w, b), flat, output[1:])


def _save_shrink(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs[:1], inputs[1:], output)


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


def _shrink_grads(ctx: Any, dh: Tensor | None, *_: Any) -> Gradients:
    if dh is None:
        return (None,) * 3 + _NO_GRADIENT
    x_, a, router = ctx.needs_input_grad[:3]
    needs = Needs(x_, bias=False, b=False, a=a, router=router)
    x, h, p, *tensors = ctx.saved_tensors
    *numbers, backend = ctx.numbers
    grads: Gradients
    if needs_dispatch(dh, x, *tensors[:2]):
        grads = shrink_backward_op(dh, x, h, p, *tensors, *numbers, backend, list(needs))
    else:
        grads = _shrink_backward(dh, x, Saved(h, p), Adapter.unflatten(*tensors, *numbers), backend, needs)
    return *(g if need else None for g, need in zip(grads, (x_, a, router), strict=True)), *_NO_GRADIENT


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "ALoRA's fused backward cannot be differentiated again (create_graph=True): "
        "use alora_kernels.reference.alora_linear where second derivatives are needed"
    )


linear_op.register_autograd(_linear_grads, setup_context=_save_linear)
shrink_op.register_autograd(_shrink_grads, setup_context=_save_shrink)
linear_backward_op.register_autograd(_no_double_backward)
shrink_backward_op.register_autograd(_no_double_backward)


class _LinearNow(torch.autograd.Function):
    """The layer for autograd alone: y `[M, N]` of x `[..., K]`.

    Without `setup_context`: for that `apply` asks Python's `inspect` for a signature at every call.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        b: Tensor,
        a: Tensor,
        router: Tensor | None,
        adapter: Adapter,
        backend: str,
    ) -> Tensor:
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


class _ShrinkNow(torch.autograd.Function):
    """The routed half for autograd alone."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, a: Tensor, router: Tensor | None, adapter: Adapter, backend: str
    ) -> Tensor:
        saved = _shrink(x, adapter, backend)
        _save(ctx, (x,), (*adapter.flat(), backend), saved)
        return saved.h

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None) -> Gradients:  # type: ignore[override]
        return *_shrink_grads(ctx, dh)[:3], None, None


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
