"""The public op for layers that read the same x: q, k and v, or gate and up.

In:   x once, and a sequence with one entry per member for everything else.
Out:  the members' outputs, as if `alora_linear` had been called for each.
Who:  users and modules with fused projections. Checks here, then `group_library`, then a backend.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..routing import Routing
from . import autograd, checks, group_library
from . import dispatch as backends
from .functional import autocast, dropout_seed, routing_args


def alora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] | None = None,
    routers: Sequence[Tensor] | None = None,
    task_ids: Tensor | Routing | None = None,
    scalings: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Several frozen linear layers with ALoRA adapters on the same x, fused.

    The skinny products of all members are one pass over x, and the gradient of x is accumulated in one tensor.

    Formula: `y_i = x W_i^T + bias_i + s_i (sum_e g_ie(x) A_ie dropout(x)) B_i^T`, g_i the softmax of `x router_i^T` or
    the one-hot of the task id.

    Args:
        x: activations `[..., K]`.
        weights: frozen base weights, `[N_i, K]` each; they never receive gradients.
        lora_As: `[E, R_i, K]` each. Task routing: the same E for all members; soft routing: any E_i.
        lora_Bs: the members' B, `[N_i, R_i]` each.
        biases: base biases `[N_i]` or None each, or None for no biases.
        routers: router weights `[E_i, K]` each (soft routing), or None.
        task_ids: ids as in `alora_linear` (task routing), or None.
        scalings: s for all members, or one per member.
        dropout_p: probability that an entry of x is dropped from the low-rank paths; ONE mask for all members, where
            separate calls draw one each.
        training: dropout is active only when True.
        backend: see `alora_linear`. On "triton" a soft-routed group is one op per member.

    Returns:
        y_1, y_2, ..: `[..., N_i]` each, in x's dtype. The same inputs give bit-identical outputs and gradients; they
        equal those of separate calls up to rounding.

    Raises:
        ValueError, TypeError, RuntimeError: as `alora_linear`, with the member's number; sequences of different
            lengths, an empty group, task-routed members with different E.

    Source: Ban & Ji 2025, ALoRA.
    """
    n = len(weights)
    all_biases = [None] * n if biases is None else list(biases)
    all_scalings = [float(scalings)] * n if isinstance(scalings, int | float) else [float(s) for s in scalings]
    _check_lengths(n, lora_As=lora_As, lora_Bs=lora_Bs, biases=all_biases, routers=routers, scalings=all_scalings)
    x_cast, *frozen = autocast(x, *weights, *all_biases)
    assert x_cast is not None
    ws = [w.detach() for w in frozen[:n] if w is not None]
    for i in range(n):
        router = None if routers is None else routers[i]
        _check_member(i, x, x_cast, ws[i], frozen[n + i], lora_As[i], lora_Bs[i], router)
    _check_routing(x, routers, task_ids, lora_As)
    checks.check_dropout(dropout_p)
    rows = x_cast.reshape(-1, x.shape[-1])
    tensors = (rows, ws, _all_or_none(frozen[n:], ws), list(lora_As), list(lora_Bs), list(routers or ()))
    routing = (*routing_args(x, task_ids, lora_As[0].shape[0]), dropout_seed(x, dropout_p, training))
    ys = _outputs(tensors, routing, all_scalings, dropout_p, backends.choose(rows, backend))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


Tensors = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
Routed = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _outputs(
    tensors: Tensors, routing: Routed, scalings: list[float], dropout_p: float, backend: str
) -> Sequence[Tensor]:
    """The members' y by one op, or by one per member where the backend has none for the group."""
    x, weights, biases, a, b, routers = tensors
    if routers and backend != "torch":
        y = []
        for i, s in enumerate(scalings):
            bias = biases[i] if biases else None
            linear = autograd.linear_for(x, bias, a[i], b[i], routers[i])
            y.append(linear(x, weights[i], bias, a[i], b[i], routers[i], *routing, s, dropout_p, backend)[0])
        return y
    group = group_library.linear_group_for(x, *biases, *a, *b, *routers)
    return group(*tensors, *routing, scalings, dropout_p, backend)[: len(weights)]


def _all_or_none(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    """A bias for every member, zeros where only some have one; an empty list where none has."""
    if all(bias is None for bias in biases):
        return []
    return [w.new_zeros(w.shape[0]) if bias is None else bias for bias, w in zip(biases, weights, strict=True)]


def _check_lengths(n: int, **given: Sequence[object] | None) -> None:
    """Raise unless every sequence has one entry per weight."""
    if n == 0:
        raise ValueError("weights is empty: a group needs at least one member")
    for name, values in given.items():
        if values is not None and len(values) != n:
            raise ValueError(f"{name} must have one entry per weight, {n}, got {len(values)}")


def _check_member(
    i: int,
    x: Tensor,
    x_cast: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor | None,
) -> None:
    """The checks of `alora_linear`, whose errors then name the member."""
    try:
        checks.check_tensors(x_cast, weight=w, lora_A=a, lora_B=b, bias=bias, router=router)
        checks.check_adapter(x, a, b, router)
        checks.check_base(x_cast, w, b, bias)
    except (ValueError, TypeError) as error:
        raise type(error)(f"member {i} of the group: {error}") from None


def _check_routing(
    x: Tensor, routers: Sequence[Tensor] | None, task_ids: Tensor | Routing | None, lora_As: Sequence[Tensor]
) -> None:
    """Raise unless the group routes in one way, and all members know the same tasks."""
    checks.check_routing(x, None if routers is None else routers[0], task_ids)
    tasks = sorted({a.shape[0] for a in lora_As})
    if task_ids is not None and len(tasks) > 1:
        raise ValueError(
            f"the lora_As of a task-routed group need the same number of tasks, got {tasks}: call alora_linear for"
            " each layer"
        )
