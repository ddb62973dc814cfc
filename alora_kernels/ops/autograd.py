"""The torch.library custom ops: what `torch.compile`, autograd and the profiler see.

In:   flat arguments, tensors and numbers; x is `[M, K]`.
Out:  `alora::linear -> (y, h, p)` and `alora::shrink -> (h, p)`; h and p are outputs only because the
      backward needs them. Each has its backward as a second op, so a compiled graph holds one opaque node
      a pass.
Who:  `ops.functional`; nobody else calls these.

Nothing of size `[M, N]` is saved, nothing per expert of size `[M, K]`. Task ids, their order and the seed of
dropout are tensors, so new ids or a new seed never recompile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..routing import RowGroups
from .torch import layer as torch_layer
from .types import Adapter, Dropout, Needs, Saved, acc_dtype, wider

PLAIN = (Tensor, torch.nn.Parameter)


def backend_module(backend: str) -> ModuleType:
    """The backend of a name such as "torch", "triton" or "triton:plan"."""
    if backend == "torch":
        return torch_layer
    from .triton import layer as triton_layer  # needs the triton package, which only Linux has

    return triton_layer


def _plan(backend: str) -> dict[str, str]:
    """How the backend is to do it, as a keyword: what stands behind the colon of its name."""
    plan = backend.partition(":")[2]
    return {"plan": plan} if plan else {}


def traced(x: Tensor) -> bool:
    """Whether somebody besides autograd must see an op's call: a tracer, a mode, a transform, or a GPU's dispatcher."""
    if type(x) not in PLAIN or x.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return bool(modes) or torch.jit.is_tracing()


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd must see an op's call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_dispatch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether autograd, a tracer, a mode or a transform must see an op's call.

    Where none of them must, `linear_now` and `shrink_now` give the same without the dispatcher's 13 us, a quarter of
    what a small layer takes.
    """
    return traced(x) or differentiated(x, *others)


def adapter_of(
    a: Tensor,
    router: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Adapter:
    groups = None
    if ids is not None and order is not None and offsets is not None:
        groups = RowGroups(ids, order, offsets)
    return Adapter(a, router, groups, scaling, None if seed is None else Dropout(dropout_p, seed))


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """Ops return tensors, never None: an empty one stands for a gradient that was not asked for."""
    return like.new_empty(0) if t is None else t


def linear_now(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h, p of the whole layer."""
    adapter = adapter_of(a, router, ids, order, offsets, seed, scaling, dropout_p)
    y, saved = backend_module(backend).linear(x, weight, bias, adapter, b, **_plan(backend))
    return y, saved.h, saved.p


linear = torch.library.custom_op("alora::linear", linear_now, mutates_args=())


def shrink_now(
    x: Tensor,
    a: Tensor,
    router: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """h, p of the routed half."""
    saved = backend_module(backend).shrink(x, adapter_of(a, router, ids, order, offsets, seed, scaling, dropout_p))
    return saved.h, saved.p


shrink = torch.library.custom_op("alora::shrink", shrink_now, mutates_args=())


def linear_backward_now(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    router: Tensor | None,
    h: Tensor,
    p: Tensor,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, da, db, drouter, dbias; empty where not needed."""
    adapter = adapter_of(a, router, ids, order, offsets, seed, scaling, dropout_p)
    asked = Needs(*needs)
    grads, db = backend_module(backend).linear_backward(dy, x, weight, adapter, b, Saved(h, p), asked, **_plan(backend))
    dbias = dy.sum(0) if asked.bias else None
    return tuple(or_empty(g, dy) for g in (grads.dx, grads.da, db, grads.drouter, dbias))  # type: ignore[return-value]


linear_backward = torch.library.custom_op("alora::linear_backward", linear_backward_now, mutates_args=())


@torch.library.custom_op("alora::shrink_backward", mutates_args=())
def shrink_backward(
    dh: Tensor,
    x: Tensor,
    a: Tensor,
    router: Tensor | None,
    h: Tensor,
    p: Tensor,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, da, drouter from the gradient of the scaled h; empty where not needed."""
    adapter = adapter_of(a, router, ids, order, offsets, seed, scaling, dropout_p)
    grads = backend_module(backend).shrink_backward(dh * scaling, x, adapter, Saved(h, p), Needs(*needs))
    return tuple(or_empty(g, dh) for g in (grads.dx, grads.da, grads.drouter))  # type: ignore[return-value]


def h_dtype(backend: str, x: Tensor, *adapter: Tensor | None) -> torch.dtype:
    """The dtype of the h that a backend saves; see `types.Saved`."""
    return wider(x, *adapter) if backend == "torch" else x.dtype


def _fake_saved(x: Tensor, a: Tensor, router: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    experts, rank, _ = a.shape
    p_shape = (0,) if router is None else (x.shape[0], experts * rank + experts)
    h = x.new_empty(x.shape[0], rank, dtype=h_dtype(backend, x, a, router))
    return h, x.new_empty(p_shape, dtype=acc_dtype(x))


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, router: Tensor | None, *rest: Any) -> Any:
    return (x.new_empty(x.shape[0], weight.shape[0]), *_fake_saved(x, a, router, rest[-1]))


@shrink.register_fake
def _(x: Tensor, a: Tensor, router: Tensor | None, *rest: Any) -> Any:
    return _fake_saved(x, a, router, rest[-1])


def _fake_grads(like: Tensor, shapes: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if need and t is not None else like.new_empty(0)
        for t, need in zip(shapes, needs, strict=True)
    )


@linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, router: Tensor | None, *rest: Any) -> Any:
    asked = Needs(*rest[-1])
    dx, da, db, drouter = _fake_grads(dy, (x, a, b, router), (asked.x, asked.a, asked.b, asked.router))
    return dx, da, db, drouter, dy.new_empty(dy.shape[1] if asked.bias else 0)


@shrink_backward.register_fake
def _(dh: Tensor, x: Tensor, a: Tensor, router: Tensor | None, *rest: Any) -> Any:
    asked = Needs(*rest[-1])
    return _fake_grads(dh, (x, a, router), (asked.x, asked.a, asked.router))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], names: tuple[str, ...]) -> None:
    """Keep tensors for the backward by name; h and p are the op's last two outputs."""
    ctx.set_materialize_grads(False)
    args = dict(zip(names, inputs, strict=True))
    ctx.numbers = {key: args.pop(key) for key in ("scaling", "dropout_p", "backend")}
    args.pop("bias", None)
    ctx.save_for_backward(*args.values(), *output[-2:])


LINEAR_ARGS = (
    *("x", "weight", "bias", "a", "b", "router", "ids", "order", "offsets", "seed"),
    *("scaling", "dropout_p", "backend"),
)
SHRINK_ARGS = tuple(name for name in LINEAR_ARGS if name not in ("weight", "bias", "b"))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output, LINEAR_ARGS)


def _save_shrink(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output, SHRINK_ARGS)


def _asked(ctx: Any, names: tuple[str, ...]) -> Needs:
    need = dict(zip(names, ctx.needs_input_grad, strict=True))
    return Needs(*(bool(need.get(key, False)) for key in ("x", "a", "router", "b", "bias")))


def _linear_grads(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(LINEAR_ARGS)
    x, weight, a, b, router, ids, order, offsets, seed, h, p = ctx.saved_tensors
    asked = _asked(ctx, LINEAR_ARGS)
    # create_graph=True asks for a second derivative, which the op refuses with a reason
    backward = linear_backward if needs_dispatch(dy, x, a, b, router) else linear_backward_now
    grads = backward(dy, x, weight, a, b, router, h, p, ids, order, offsets, seed, **ctx.numbers, needs=list(asked))
    found = dict(zip(("x", "a", "b", "router", "bias"), grads, strict=True))
    return tuple(found[name] if getattr(asked, name, False) else None for name in LINEAR_ARGS)


def _shrink_grads(ctx: Any, dh: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dh is None:
        return (None,) * len(SHRINK_ARGS)
    x, a, router, ids, order, offsets, seed, h, p = ctx.saved_tensors
    asked = _asked(ctx, SHRINK_ARGS)
    grads = shrink_backward(dh, x, a, router, h, p, ids, order, offsets, seed, **ctx.numbers, needs=list(asked))
    found = dict(zip(("x", "a", "router"), grads, strict=True))
    return tuple(found[name] if getattr(asked, name, False) else None for name in SHRINK_ARGS)


def no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "ALoRA's fused backward cannot be differentiated again (create_graph=True): "
        "use alora_kernels.reference.alora_linear where second derivatives are needed"
    )


linear.register_autograd(_linear_grads, setup_context=_save_linear)
shrink.register_autograd(_shrink_grads, setup_context=_save_shrink)
linear_backward.register_autograd(no_double_backward)
shrink_backward.register_autograd(no_double_backward)


class _LinearNow(torch.autograd.Function):
    """The op `linear` for autograd alone: on a CPU the dispatcher takes 280 us of a small layer's 600."""

    forward = staticmethod(linear_now)  # type: ignore[assignment]
    setup_context = staticmethod(_save_linear)
    backward = staticmethod(_linear_grads)  # type: ignore[assignment]


def linear_for(x: Tensor, *others: Tensor | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The cheapest way to call `linear` that everybody who must see the call sees.

    Args:
        x: the op's x.
        others: the tensors that may require a gradient.
    """
    if traced(x):
        return linear
    return _LinearNow.apply if differentiated(x, *others) else linear_now  # type: ignore[return-value]
