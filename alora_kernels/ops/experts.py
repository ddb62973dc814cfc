"""One stacked weight of a mixture of experts: the frozen product and the expand, both grouped by expert.

`y_m = W_e x_m + bias_e + B_e h_m` for rows that are sorted by expert. h is what the ordinary shrink gives, by task, or
by task and expert as so many tasks more; that op saves x. This one saves h alone, because W is frozen, and nothing of
the size of a weight is made. Its skinny products are those of task routing with B^T in the place of A: an expand is the
gradient of a shrink, so Triton's kernels for tasks compute all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import RowGroups, group_rows
from .autograd import differentiated, linear, needs_dispatch, refuse_forward_mode, traced
from .dispatch import BACKENDS
from .functional import drawn
from .products import add_product_, without_autocast
from .types import Adapter


class SortedRows(NamedTuple):
    """Rows of tokens sorted by the expert that takes them; those that none takes come last.

    Token m of M stands in k of the S = M k rows, once for each expert that the model's router chose for it.
    """

    source: Tensor  # the place of each row in the router's `[M, k]`, `[S]`
    places: Tensor  # where each entry of the router's `[M, k]` is among the rows, `[S]`
    token: Tensor  # the token of each row, `[S]`
    ids: Tensor  # its expert, int32 `[S]`; X where none takes it
    offsets: Tensor  # where each expert's rows begin, int32 `[X + 1]`, the first of them 0

    def of_tokens(self, x: Tensor) -> Tensor:
        """Rows `[S, N]` from the tokens' `[M, N]`."""
        return cast(Tensor, _Moved.apply(x, self.token, self.places))

    def restored(self, rows: Tensor) -> Tensor:
        """Rows `[S, N]` at their places in the router's order."""
        return cast(Tensor, _Moved.apply(rows, self.places, self.source))


class _Moved(torch.autograd.Function):
    """`x[index]` for an index that takes each row k times, with `inverse` in which those k are side by side.

    The gradient of plain indexing adds row by row, in one thread of a CPU: a fifth of a step over frozen experts.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, _, inverse = inputs
        ctx.save_for_backward(inverse)
        ctx.rows = x.shape[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        dx = dy.index_select(0, inverse)
        return dx if len(dx) == ctx.rows else dx.view(ctx.rows, -1, dx.shape[1]).sum(1), None, None


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> SortedRows:
    """Rows by expert, from the router's choice `[M, k]`; ids below 0 or from X on mean no expert. One stable sort."""
    flat = expert_ids.reshape(-1)
    none = (flat < 0) | (flat >= num_experts)
    groups = group_rows(torch.where(none, num_experts, flat), num_experts)
    source = groups.order.long()
    places = torch.empty_like(source)
    places[source] = torch.arange(source.numel(), device=source.device)
    return SortedRows(source, places, source // expert_ids.shape[-1], groups.ids[source], groups.offsets)


def experts_linear(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    lora_B: Tensor,
    rows: SortedRows,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
    backend: str,
) -> Tensor:
    """y `[S, N]` of rows sorted by expert, with h `[S, R]` that holds s already.

    Formula: `y_m = W_e x_m + bias_e + B_e h_m`; zero where no expert takes the row.

    Args:
        x: `[S, K]`, in the order of `rows`.
        weight: frozen `[X, N, K]`, or with `transposed` `[X, K, N]`; it receives no gradient.
        h: the shrink's result `[S, R]`, zero in rows of no task.
        lora_B: `[X, N, R]`, or `[N, R]` shared by the experts.
        rows: of `sort_by_expert`.
        bias: frozen `[X, N]`, or None.
        backend: a key of `dispatch.BACKENDS`; plans are for plain layers.
    """
    b = lora_B if lora_B.dim() == 3 else lora_B.expand(weight.shape[0], -1, -1)  # autograd sums its gradient
    if transposed:
        weight = weight.transpose(1, 2)
    name = BACKENDS[backend].name
    flat = x, weight.detach(), bias, h, b, rows.ids, rows.offsets, name
    if traced(x):
        refuse_forward_mode()
        return cast(Tensor, experts_linear_op(*flat))
    return cast(Tensor, _ExpertsNow.apply(*flat)) if differentiated(x, h, b) else _experts_linear(*flat)


@torch.library.custom_op(
    "alora::experts_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor b, Tensor ids, Tensor offsets, str backend)"
    " -> Tensor",
)
def experts_linear_op(x: Tensor, *others: Any) -> Tensor:
    """See `experts_linear`; b is `[X, N, R]`."""
    return _experts_linear(x, *others)


def _experts_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, ids: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    if backend == "torch":
        return _each_expert(x, weight, bias, h, b, offsets)
    return grouped(x, weight, bias, h, b, ids, offsets)


@torch.library.custom_op(
    "alora::experts_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor weight, Tensor h, Tensor b, Tensor ids, Tensor offsets, str backend, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
)
def experts_linear_backward_op(dy: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy W_e, dh = dy B_e, dB_e = dy_e^T h_e; empty where not needed."""
    return _experts_linear_backward(dy, *others)


def _experts_linear_backward(
    dy: Tensor, weight: Tensor, h: Tensor, b: Tensor, ids: Tensor, offsets: Tensor, backend: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        return _each_expert_backward(dy, weight, h, b, offsets, needs)
    return grouped_backward(dy, weight, h, b, ids, offsets, needs)


@experts_linear_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@experts_linear_backward_op.register_fake
def _(dy: Tensor, weight: Tensor, h: Tensor, b: Tensor, ids: Any, offsets: Any, backend: Any, needs: Any) -> Any:
    like = dy.new_empty(dy.shape[0], weight.shape[2]), torch.empty_like(h), b.new_empty(b.shape)
    return tuple(t if need else dy.new_empty(0) for t, need in zip(like, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, h, b, ids, offsets, ctx.backend = inputs
    ctx.save_for_backward(weight, h, b, ids, offsets)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs, saved = [ctx.needs_input_grad[i] for i in (0, 3, 4)], ctx.saved_tensors
    # create_graph=True asks for a second derivative, which the op refuses with a reason
    run: Any = experts_linear_backward_op if needs_dispatch(dy, *saved[:3]) else _experts_linear_backward
    grads = run(dy.contiguous(), *saved, ctx.backend, needs)
    dx, dh, db = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, None, None, dh, db, None, None, None


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the backward of adapted experts cannot be differentiated again (create_graph=True): use"
        " alora_kernels.reference.alora_experts where second derivatives are needed"
    )


class _ExpertsNow(torch.autograd.Function):
    """The op for autograd alone, without the dispatcher; see `autograd.needs_dispatch`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _experts_linear(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy)


experts_linear_op.register_autograd(_backward, setup_context=_save)
experts_linear_backward_op.register_autograd(_no_double_backward)


def _spans(offsets: Tensor) -> list[tuple[int, slice]]:
    """The rows of each expert that has any."""
    bounds = offsets.tolist()
    return [(e, slice(*bounds[e : e + 2])) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


@without_autocast
def _each_expert(x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Two products for each expert, the second into the result of the first."""
    y, spans = x.new_empty(x.shape[0], w.shape[1]), _spans(offsets)
    y[spans[-1][1].stop if spans else 0 :] = 0  # what no expert takes
    for expert, rows in spans:
        if bias is None:
            torch.mm(x[rows], w[expert].t(), out=y[rows])
        else:
            torch.addmm(bias[expert], x[rows], w[expert].t(), out=y[rows])
        add_product_(y[rows], h[rows], b[expert].t())
    return y


@without_autocast
def _each_expert_backward(
    dy: Tensor, w: Tensor, h: Tensor, b: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of each expert's rows, while they are in the cache."""
    spans = _spans(offsets)
    end = spans[-1][1].stop if spans else 0
    dx = dy.new_empty(dy.shape[0], w.shape[2]) if needs[0] else dy.new_empty(0)
    dh = torch.empty_like(h) if needs[1] else dy.new_empty(0)
    across = b.transpose(1, 2).contiguous() if needs[1] else b  # [X, R, N], as products want it
    db = b.new_zeros(b.shape[0], b.shape[2], b.shape[1]) if needs[2] else dy.new_empty(0)  # likewise
    for gradient, need in ((dx, needs[0]), (dh, needs[1])):
        if need:
            gradient[end:] = 0
    for expert, rows in spans:
        part = dy[rows]
        if needs[0]:
            torch.mm(part, w[expert], out=dx[rows])
        if needs[1]:
            _multiply(part, across[expert].t(), dh[rows])
        if needs[2]:
            _multiply(h[rows].t(), part, db[expert])
    return dx, dh, db.transpose(1, 2).contiguous() if needs[2] else db


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left right, in the dtype of out, the wider one of x and the adapter."""
    torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def grouped(x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The forward in Triton's kernels for tasks, over torch's grouped product."""
    from .. import kernels  # needs the triton package, which only Linux has

    y = _grouped_product(x, w.transpose(1, 2), offsets, whole=False)
    if bias is not None:
        y += F.pad(bias, (0, 0, 0, 1))[ids]
    return kernels.dx_task(None, None, h, _as_a(b), _groups(ids, offsets), dtype=y.dtype, onto=y)


def grouped_backward(
    dy: Tensor, w: Tensor, h: Tensor, b: Tensor, ids: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in Triton's kernels for tasks."""
    from .. import kernels

    dx, dh, db = (dy.new_empty(0) for _ in needs)
    groups = _groups(ids, offsets)
    if needs[0]:
        dx = _grouped_product(dy, w, offsets)
    if needs[1]:
        dh = kernels.shrink_task(dy, _as_a(b), groups, scaling=1.0, dropout=None).to(h.dtype)
    if needs[2]:
        db = kernels.da_task(h, dy, groups, b.shape[0], dtype=b.dtype).transpose(1, 2).contiguous()
    return dx, dh, db


def _as_a(b: Tensor) -> Tensor:
    """B^T `[X, R, N]`: a copy where rows of R numbers are not aligned, or each number would be a load of its own."""
    transposed = b.transpose(1, 2)
    return transposed.contiguous() if b.shape[2] % 16 else transposed


def _grouped_product(x: Tensor, w: Tensor, offsets: Tensor, whole: bool = True) -> Tensor:
    """x_e w_e `[S, N]` for w `[X, K, N]`; rows of no expert are zero, or unless `whole` they may hold anything."""
    aligned = x.numel() > 0 and x.shape[1] % 8 == w.shape[2] % 8 == 0  # grouped_mm takes rows of whole 16 bytes
    if hasattr(F, "grouped_mm") and x.dtype == w.dtype == torch.bfloat16 and aligned:
        y = F.grouped_mm(x.contiguous(), w, offs=offsets[1:])
        if not whole:
            return cast(Tensor, y)
        beyond = torch.arange(x.shape[0], device=x.device) >= offsets[-1]  # which it leaves as they are
        return cast(Tensor, y.masked_fill_(beyond.unsqueeze(1), 0))
    y = x.new_zeros(x.shape[0], w.shape[2])
    for expert, rows in _spans(offsets):
        torch.mm(x[rows], w[expert], out=y[rows])
    return y


def _groups(ids: Tensor, offsets: Tensor) -> RowGroups:
    """The experts as tasks, of rows in their order."""
    return RowGroups(ids, torch.arange(ids.numel(), dtype=torch.int32, device=ids.device), offsets)


def experts_shrink(
    x: Tensor,
    lora_A: Tensor,
    rows: SortedRows,
    tasks: RowGroups,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
    per_token: bool = False,
    backend: str,
) -> Tensor:
    """h `[S, R]` of rows sorted by expert: the ordinary shrink, by task or by task and expert.

    Formula: `h_m = s A_{t(,e)} dropout(x_m)`; zero in rows of no task.

    Args:
        x: rows `[S, K]` in the order of `rows`, or with `per_token` the tokens `[M, K]`.
        lora_A: `[T, R, K]`, or `[T, X, R, K]` with an A for each expert.
        rows: of `sort_by_expert`.
        tasks: the tokens by task.
        scaling, dropout_p, training: as in `alora_linear`; `per_token` draws one mask for all experts of a token.
        per_token: with one A per task: shrink each token once, k times less work than its rows.
        backend: a key of `dispatch.BACKENDS`.
    """
    if lora_A.dim() == 3 and per_token:
        return rows.of_tokens(_shrink(x, lora_A, tasks, scaling, dropout_p, training, backend))
    x = rows.of_tokens(x) if per_token else x
    ids = tasks.ids[rows.token]
    if lora_A.dim() == 4:
        num_experts = lora_A.shape[1]
        ids = torch.where((ids >= 0) & (rows.ids < num_experts), ids * num_experts + rows.ids, -1)
        lora_A = lora_A.flatten(0, 1)
    return _shrink(x, lora_A, group_rows(ids, lora_A.shape[0]), scaling, dropout_p, training, backend)


def _shrink(
    x: Tensor, a: Tensor, groups: RowGroups, scaling: float, dropout_p: float, training: bool, backend: str
) -> Tensor:
    adapter = Adapter(a, None, groups, scaling, drawn(dropout_p, training, x.device))
    return linear(x, None, None, None, adapter, backend)


class _Recomputed(torch.autograd.Function):
    """What stands between the two products of an expert, worked out again in the backward pass: it keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return torch.autograd.grad(y, x, dy)[0], None


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which autograd keeps x alone; a compiler decides for itself what it keeps."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    return cast(Tensor, _Recomputed.apply(x, function))
