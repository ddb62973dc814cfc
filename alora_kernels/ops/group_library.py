"""The custom op of a group of layers that read the same x, and its backward.

In:   x `[M, K]`, lists with one tensor per member, flat routing arguments.
Out:  `alora::linear_group -> [y_1, .., y_n, h, p]`; h and p are outputs only because the backward needs them.
Who:  `ops.group`; nobody else calls these.

An empty list of biases or routers means none. As in `ops.library`, ids and the seed are tensors, so new ones never
recompile, and nothing of size `[M, N]` is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_group
from .autograd import adapter_of, differentiated, h_dtype, needs_dispatch, no_double_backward, or_empty, traced
from .types import Member, Needs, Saved, acc_dtype


def _module(backend: str) -> ModuleType:
    if backend == "torch":
        return torch_group
    from . import triton_group  # needs the triton package, which only Linux has

    return triton_group


def _members(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    routers: Sequence[Tensor],
    routing: tuple[Tensor | None, Tensor | None, Tensor | None],
    seed: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
) -> list[Member]:
    return [
        Member(
            weights[i],
            biases[i] if biases else None,
            adapter_of(a[i], routers[i] if routers else None, *routing, seed, scalings[i], dropout_p),
            b[i],
        )
        for i in range(len(weights))
    ]


def linear_group_now(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    routers: Sequence[Tensor],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    backend: str,
) -> list[Tensor]:
    """The members' y, then h and p of all of them."""
    members = _members(weights, biases, a, b, routers, (ids, order, offsets), seed, scalings, dropout_p)
    ys, saved = _module(backend).linear_group(x, members)
    return [*ys, saved.h, saved.p]


linear_group = torch.library.custom_op("alora::linear_group", linear_group_now, mutates_args=())


def linear_group_backward_now(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    routers: Sequence[Tensor],
    h: Tensor,
    p: Tensor,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """dx, then da, db, drouter and dbias of each member; empty where not needed."""
    members = _members(weights, (), a, b, routers, (ids, order, offsets), seed, scalings, dropout_p)
    asked = _per_member(needs)
    dx, grads, dbs = _module(backend).linear_group_backward(dys, x, members, Saved(h, p), asked)
    found = [dx]
    for dy, grad, db, need in zip(dys, grads, dbs, asked, strict=True):
        # one member's need computes the gradients of all: what was not asked for is dropped here
        da = grad.da if need.a else None
        drouter = grad.drouter if need.router else None
        found += [da, db, drouter, dy.sum(0) if need.bias else None]
    return [or_empty(g, x) for g in found]


linear_group_backward = torch.library.custom_op(
    "alora::linear_group_backward", linear_group_backward_now, mutates_args=()
)


def _per_member(needs: Sequence[bool]) -> list[Needs]:
    """From x's need followed by four per member (a, b, router, bias)."""
    fours = zip(*(needs[1 + i :: 4] for i in range(4)), strict=True)
    return [Needs(x=needs[0], a=a, router=router, b=b, bias=bias) for a, b, router, bias in fours]


@linear_group.register_fake
def _(x: Tensor, weights: Any, biases: Any, a: Any, b: Any, routers: Any, *rest: Any) -> list[Tensor]:
    rows = x.shape[0]
    columns = sum(t.shape[0] * (t.shape[1] + 1) for t in a)
    ys = [x.new_empty(rows, w.shape[0]) for w in weights]
    h = x.new_empty(rows, sum(t.shape[1] for t in b), dtype=h_dtype(rest[-1], x, *a, *routers))
    return [*ys, h, x.new_empty((rows, columns) if routers else (0,), dtype=acc_dtype(x))]


@linear_group_backward.register_fake
def _(dys: Any, x: Tensor, weights: Any, a: Any, b: Any, routers: Any, *rest: Any) -> list[Tensor]:
    asked = _per_member(rest[-1])
    shapes: list[tuple[Tensor | None, bool]] = [(x, asked[0].x)]
    for i, need in enumerate(asked):
        router = routers[i] if routers else None
        shapes += [(a[i], need.a), (b[i], need.b), (router, need.router), (dys[i][:1].sum(0), need.bias)]
    return [or_empty(t.new_empty(t.shape) if need and t is not None else None, x) for t, need in shapes]


ARGS = (
    *("x", "weights", "biases", "a", "b", "routers", "ids", "order", "offsets", "seed"),
    *("scalings", "dropout_p", "backend"),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    args = dict(zip(ARGS, inputs, strict=True))
    ctx.numbers = {key: args[key] for key in ("scalings", "dropout_p", "backend")}
    ctx.members, ctx.soft, ctx.biased = len(args["weights"]), bool(args["routers"]), bool(args["biases"])
    lists = [t for key in ("weights", "a", "b", "routers") for t in args[key]]
    ctx.save_for_backward(*(args[key] for key in ("x", "ids", "order", "offsets", "seed")), *output[-2:], *lists)


def _asked(ctx: Any, needs: Sequence[Any]) -> list[bool]:
    """x's need, then four per member: a, b, router, bias."""
    need, none = dict(zip(ARGS, needs, strict=True)), [False] * ctx.members
    lists = need["a"], need["b"], need["routers"] if ctx.soft else none, need["biases"] if ctx.biased else none
    fours = zip(*lists, strict=True)
    return [bool(need["x"]), *(bool(flag) for four in fours for flag in four)]


def _grads(ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[Any]) -> tuple[Any, ...]:
    """Gradients of the op's arguments, in lists where these are lists, as `needs` is."""
    x, ids, order, offsets, seed, h, p, *lists = ctx.saved_tensors
    n = ctx.members
    weights, a, b, routers = lists[:n], lists[n : 2 * n], lists[2 * n : 3 * n], lists[3 * n :]
    # a member whose output nobody used has a gradient of zero
    dys = [x.new_zeros(x.shape[0], w.shape[0]) if dy is None else dy for dy, w in zip(grads[:n], weights, strict=True)]
    asked = _asked(ctx, needs)
    # create_graph=True asks for a second derivative, which the op refuses with a reason
    dispatch = needs_dispatch(dys[0], *dys[1:], x, *a, *b, *routers)
    backward = linear_group_backward if dispatch else linear_group_backward_now
    found = backward(dys, x, weights, a, b, routers, h, p, ids, order, offsets, seed, **ctx.numbers, needs=asked)
    given = [g if need else None for g, need in zip(found, asked, strict=True)]
    da, db, drouters, dbiases = (given[1 + i :: 4] for i in range(4))
    lists_of_grads = ([None] * n, dbiases if ctx.biased else [], da, db, drouters if ctx.soft else [])
    return (given[0], *lists_of_grads, None, None, None, None, None, None, None)


def _op_grads(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return _grads(ctx, grads, ctx.needs_input_grad)


linear_group.register_autograd(_op_grads, setup_context=_save)
linear_group_backward.register_autograd(no_double_backward)


def _nested(lengths: Sequence[int], flat: Sequence[Any]) -> list[Any]:
    """The op's arguments in the order of `ARGS`, from the same with the five lists' entries one after the other."""
    nested, at = [flat[0]], 1
    for length in lengths:
        nested.append(list(flat[at : at + length]))
        at += length
    return [*nested, *flat[at:]]


class _GroupNow(torch.autograd.Function):
    """The op for autograd alone, see `library.linear_for`. Autograd finds no tensors in lists, so they come flat."""

    @staticmethod
    def forward(lengths: Sequence[int], *flat: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(linear_group_now(*_nested(lengths, flat)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.lengths, *flat = inputs
        _save(ctx, tuple(_nested(ctx.lengths, flat)), list(output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found = _grads(ctx, grads, _nested(ctx.lengths, ctx.needs_input_grad[1:]))
        return (None, *(g for part in found for g in (part if isinstance(part, list) else [part])))


def _group_now(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lists, numbers = rest[:5], rest[5:]
    flat = [t for tensors in lists for t in tensors]
    return _GroupNow.apply([len(tensors) for tensors in lists], x, *flat, *numbers)  # type: ignore[no-any-return]


def linear_group_for(x: Tensor, *others: Tensor) -> Callable[..., Sequence[Tensor]]:
    """The cheapest way to call `linear_group` that everybody who must see the call sees; see `library.linear_for`."""
    if traced(x):
        return linear_group
    return _group_now if differentiated(x, *others) else linear_group_now
