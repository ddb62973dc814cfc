"""Causal attention of sequences that lie side by side: rows of a packed batch, or requests of a serving step.

torch has no kernel for this on CPUs: a mask over all tokens makes each sequence meet every other one, and the backward
of its flash attention calls oneDNN five times per head and sequence, 17 us each: 16 ms of 19 for 24 rows of 48 tokens
in bfloat16. Here sequences of similar length share one batched product, and key heads are never repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .products import no_autocast

Bounds = tuple[int, int, int, int]  # first query, end of the queries, first key, end of the keys
BLOCK = 128  # queries that meet their keys at once: of a square of 1024 nearly half of the scores is never computed
CELLS = 2**17  # scores of a tile per head: some MB for all heads, so that they stay in the cache
SPARE = 4096  # scores of padding that cost less than another tile's calls
GATHER = 16  # to gather a key and its value costs about as many scores
CHANGES_SCORES = ("softcap", "position_bias", "s_aux", "output_attentions")  # what attention modules may also ask for


@dataclass(frozen=True)
class _Tile:
    """Segments, or a block of one, whose scores are one tensor; shorter ones are filled up with rows of their own."""

    q_rows: Tensor  # [S, Tq]
    k_rows: Tensor  # [S, Tk]
    hidden: Tensor | None  # [S, 1, Tq, Tk], 0 or -inf; None where each query sees all keys
    q_real: Tensor | None  # places in q_rows that fill nothing up; None where none does
    k_real: Tensor | None
    filling: Tensor | None  # [S, 1, Tq, 1], the others
    shares_keys: bool  # with other tiles, whose gradients add up
    _flat: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def take(self, name: Literal["q_rows", "k_rows"], x: Tensor) -> Tensor:
        """The tile's rows of x `[M, H, D]`, `[S, H, T, D]`; x may have its heads first in memory."""
        rows: Tensor = getattr(self, name)
        (length, heads, size), first = x.shape, _heads_first(x)
        key = name, heads, length if first else 0
        if key not in self._flat:
            each = torch.arange(heads, device=rows.device)[:, None]
            self._flat[key] = (rows[:, None] + each * length if first else rows[:, None] * heads + each).flatten()
        flat = (x.transpose(0, 1) if first else x).reshape(-1, size)
        return flat.index_select(0, self._flat[key]).view(len(rows), heads, -1, size)


class _Return:
    """Where the results of each row of `[M, H, D]` are among those of all tiles, `[S, H, T, D]` one after the other.

    Each row is in one tile, in one place.
    """

    def __init__(self, tiles: Sequence[_Tile], name: Literal["q", "k"], length: int, device: torch.device) -> None:
        self._line, self._width, self._inside = torch.empty(3, length, dtype=torch.int64, device=device)
        self._flat: dict[tuple[int, bool], Tensor] = {}
        self.slots = 0
        for tile in tiles:
            rows, real = getattr(tile, f"{name}_rows"), getattr(tile, f"{name}_real")
            places = torch.arange(rows.numel(), device=device) if real is None else real
            taken, inside = rows.flatten()[places], places % rows.shape[1]
            self._line[taken], self._inside[taken] = self.slots + places - inside, inside
            self._width[taken] = rows.shape[1]
            self.slots += rows.numel()

    def __call__(self, slots: Tensor, heads: int, heads_first: bool = False) -> Tensor:
        """The rows `[M, H, D]` from slots `[slots H, D]`, with the heads first in memory if so wished."""
        key = heads, heads_first
        if key not in self._flat:
            each = torch.arange(heads, device=slots.device)
            at = self._line[:, None] * heads + self._width[:, None] * each + self._inside[:, None]
            self._flat[key] = (at.t() if heads_first else at).flatten()
        rows = slots.index_select(0, self._flat[key])
        if heads_first:
            return rows.view(heads, -1, slots.shape[1]).transpose(0, 1)
        return rows.view(-1, heads, slots.shape[1])


class Segments:
    """Which rows of q meet which rows of k and v: built once per batch, used by every layer.

    Args:
        q_bounds: where segments begin among the queries, and the end of the last, `[S + 1]`.
        k_bounds: the same of keys and values; None: as the queries. A segment's queries are the last of its keys'
            positions: all of them in training, one when a token is generated.
        k_places: where in k and v the keys lie, `[N]`, such as places in a paged cache; None: side by side.
        device: of the tensors.

    Raises:
        ValueError: bounds that do not begin at 0 or fall, a segment with more queries than keys, or keys alone.
    """

    def __init__(
        self,
        q_bounds: Sequence[int],
        k_bounds: Sequence[int] | None = None,
        *,
        k_places: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.q_bounds, self.k_bounds = list(q_bounds), list(q_bounds if k_bounds is None else k_bounds)
        self.places, self._device = k_places, torch.device(device)
        if self.q_bounds[:1] != [0] or self.k_bounds[:1] != [0] or len(self.q_bounds) != len(self.k_bounds):
            raise ValueError(
                f"bounds begin at 0 and are as many of queries as of keys, got {self.q_bounds} and {self.k_bounds}"
            )
        whole, self._tiles = [], []
        for i, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(self.q_bounds), pairwise(self.k_bounds), strict=True)):
            if not (0 < q1 - q0 <= k1 - k0 or (q0 == q1 and k0 == k1)):
                raise ValueError(
                    f"segment {i} has {q1 - q0} queries and {k1 - k0} keys: queries are the last of the keys'"
                    " positions, so there is at least one and never more than keys"
                )
            if q1 - q0 > BLOCK:
                for q in range(q0, q1, BLOCK):
                    end = min(q + BLOCK, q1)
                    self._tiles.append(self._tile([(q, end, k0, k1 - q1 + end)], shares_keys=True))
            elif q0 < q1:
                whole.append((q0, q1, k0, k1))
        self._tiles += [self._tile(group) for group in _alike(whole)]

    @cached_property
    def shares_keys(self) -> bool:
        """Whether keys meet the queries of several tiles."""
        return any(tile.shares_keys for tile in self._tiles)

    @cached_property
    def _q_return(self) -> _Return:
        return _Return(self._tiles, "q", self.q_bounds[-1], self._device)

    @cached_property
    def _k_return(self) -> _Return:
        return _Return(self._tiles, "k", self.k_bounds[-1], self._device)

    @cached_property
    def longest(self) -> int:
        """Keys of the longest segment."""
        return max((b - a for a, b in pairwise(self.k_bounds)), default=0)

    def _tile(self, group: list[Bounds], *, shares_keys: bool = False) -> _Tile:
        q0, q1, k0, k1 = torch.tensor(group).T[..., None]
        queries, keys = q1 - q0, k1 - k0
        i, j = torch.arange(int(queries.max())), torch.arange(int(keys.max()))
        unseen, q_real, k_real = j > (i + keys - queries)[..., None], i < queries, j < keys
        places = k0 + j.minimum(keys - 1)
        hidden = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None]
        k_rows = places if self.places is None else self.places.cpu()[places]
        none_fills = bool(q_real.all())
        return _Tile(
            q_rows=(q0 + i.minimum(queries - 1)).to(self._device),
            k_rows=k_rows.to(self._device),
            hidden=hidden.to(self._device) if unseen.any() else None,
            q_real=None if none_fills else q_real.flatten().nonzero().squeeze(1).to(self._device),
            k_real=None if k_real.all() else k_real.flatten().nonzero().squeeze(1).to(self._device),
            filling=None if none_fills else ~q_real[:, None, :, None].to(self._device),
            shares_keys=shares_keys or self.places is not None,
        )


def _alike(segments: list[Bounds]) -> list[list[Bounds]]:
    """Segments in groups; filling up makes none half as costly again, nor a segment costlier by another tile."""
    groups: list[list[Bounds]] = []
    real = keys = 0
    for one in sorted(segments, key=lambda s: (s[1] - s[0], s[3] - s[2]), reverse=True):
        queries, length = one[1] - one[0], one[3] - one[2]
        cost = (queries + GATHER) * length
        if groups:
            first = groups[-1][0]  # which has the most queries
            each = (first[1] - first[0] + GATHER) * max(keys, length)
            together = (len(groups[-1]) + 1) * each <= min(CELLS, max(1.5 * (real + cost), real + cost + SPARE))
            if together and each - cost <= SPARE:
                groups[-1].append(one)
                real, keys = real + cost, max(keys, length)
                continue
        groups.append([one])
        real, keys = cost, length
    return groups


def unsupported(options: Mapping[str, Any], longest: int) -> str | None:
    """The first of an attention module's options that `segment_attention` would have to ignore.

    `options` are what transformers hands to an attention function by name. A sliding window hides nothing from segments
    of at most its length, `longest`.
    """
    window = options.get("sliding_window")
    if window is not None and window < longest:
        return f"sliding_window={window}"
    return next((name for name in CHANGES_SCORES if options.get(name) is not None and options[name] is not False), None)


def mask_function(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> Tensor | None:
    """What transformers calls for masks: None for a causal one; any other is for layers to be refused.

    Some models tell a window to its mask alone, and make masks that none of their layers is given.
    """
    return torch.empty(0) if local_size or use_vmap else None


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scaling: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Causal attention within each segment, with grouped key heads; differentiable.

    Formula:
        y_i = sum_j softmax_j(scaling q_i k_j) v_j over the keys j of i's segment up to i's own position. Query head h
        reads key head h // (H / G). The softmax is float32; sliding windows, soft caps and biases of the scores are not
        known here, see `unsupported`.

    Args:
        q: queries `[M, H, D]`.
        k: keys `[N, G, D]`, H a multiple of G; without gradients k and v may have a dtype of their own, such as bf16.
        v: values `[N, G, V]`.
        segments: which rows belong together; on the same device.
        scaling: of the scores; None: D ** -0.5.
        dropout_p: probability that a weight of the softmax is dropped; segments are then computed one by one.

    Returns:
        y `[M, H, V]`, contiguous. Values that are not finite reach only rows of their own segment.

    Raises:
        ValueError: shapes that fit neither each other nor the segments.

    Source: grouped queries, Ainslie et al. 2023; recomputing the scores in the backward, Dao et al. 2022.
    """
    _check(q, k, v, segments)
    scaling = q.shape[2] ** -0.5 if scaling is None else scaling
    if dropout_p > 0.0:
        return _one_by_one(q, k, v, segments, scaling, dropout_p)
    with no_autocast(q.device.type):
        return _SegmentAttention.apply(q, k, v, segments, scaling)  # type: ignore[no-any-return, no-untyped-call]


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not [M,H,D], [N,G,D], [N,G,V]"
        )
    same = q.dtype == k.dtype == v.dtype
    if not same and (k.dtype != v.dtype or any(t.requires_grad for t in (q, k, v))):
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: give one dtype, or without gradients two")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: give a multiple")
    queries, keys = segments.q_bounds[-1], segments.k_bounds[-1]
    if len(q) != queries or (segments.places is None and len(k) != keys):
        raise ValueError(f"{len(q)} queries and {len(k)} keys, but the segments have {queries} and {keys}")


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, dropout_p: float) -> Tensor:
    if segments.places is not None:
        k, v = (t.index_select(0, segments.places.to(t.device)) for t in (k, v))
    lengths = [[b - a for a, b in pairwise(bounds)] for bounds in (segments.q_bounds, segments.k_bounds)]
    parts = []
    for one_q, one_k, one_v in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True):
        seen = torch.ones(len(one_q), len(one_k), dtype=torch.bool, device=q.device)
        parts.append(
            F.scaled_dot_product_attention(
                one_q.transpose(0, 1)[None],
                one_k.transpose(0, 1)[None],
                one_v.transpose(0, 1)[None],
                attn_mask=seen.tril(len(one_k) - len(one_q)),
                dropout_p=dropout_p,
                scale=scaling,
                enable_gqa=True,
            )[0].transpose(0, 1)
        )
    return torch.cat(parts)


class _SegmentAttention(torch.autograd.Function):
    """Tile by tile. Scores and their gradients are float32 (or float64); what they multiply next is as q is.

    Kept for the backward are the rows of tiles instead of q, k and v, and weights no larger than queries; of blocks
    that share keys nothing is, which would be kept for each of them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float) -> Tensor:  # type: ignore[override]
        heads, narrow, back, keeps = q.shape[1], _narrow(q), segments._q_return, any(ctx.needs_input_grad)
        slots, kept = _Slots(back.slots * heads, v.shape[2], narrow, q.device), []
        for tile in segments._tiles:
            rows = _taken(q, k, v, tile)
            p = _weights(*rows[:2], tile, scaling)
            torch.bmm(p.to(narrow), rows[2].to(narrow), out=slots.next(p.shape[:2]))
            if keeps and not tile.shares_keys:
                kept += [*rows, p if p.nbytes <= rows[0].nbytes else None]
        ctx.save_for_backward(*((q, k, v) if segments.shares_keys else (None, None, None)), *kept)
        ctx.segments, ctx.scaling = segments, scaling
        ctx.like = [(t.shape, _heads_first(t)) for t in (q, k, v)]
        return back(slots.all, heads).to(q.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        segments: Segments = ctx.segments
        wide, narrow = _wide(dy), _narrow(dy)
        returns = [segments._q_return] + [None if segments.shares_keys else segments._k_return] * 2
        grads = [
            _Slots(back.slots * shape[1], shape[2], narrow, dy.device) if back else dy.new_zeros(shape)
            for back, (shape, _) in zip(returns, ctx.like, strict=True)
        ]
        with no_autocast(dy.device.type):
            for tile in segments._tiles:
                if tile.shares_keys:
                    (queries, keys, values), p = _taken(q, k, v, tile), None
                else:
                    (queries, keys, values, p), kept = kept[:4], kept[4:]
                p = _weights(queries, keys, tile, ctx.scaling) if p is None else p
                dout = tile.take("q_rows", dy)
                if tile.filling is not None:  # it asked for nothing
                    dout.masked_fill_(tile.filling, 0)
                dout = dout.view(*queries.shape[:2], -1)
                dp = torch.bmm(dout.to(wide), values.to(wide).mT)
                ds = torch._softmax_backward_data(dp, p, -1, wide).mul_(ctx.scaling).to(narrow)
                factors = (ds, keys), (ds.mT, queries), (p.to(narrow).mT, dout)
                for grad, (left, right) in zip(grads, factors, strict=True):
                    if isinstance(grad, _Slots):
                        torch.bmm(left, right.to(narrow), out=grad.next(left.shape[:2]))
                    else:
                        _add_keys(grad, tile, torch.bmm(left, right.to(narrow)))
        found = [
            back(grad.all, shape[1], first).to(dy.dtype) if back and isinstance(grad, _Slots) else grad
            for back, grad, (shape, first) in zip(returns, grads, ctx.like, strict=True)
        ]
        return *found, None, None


class _Slots:
    """Room for the results of all tiles, `[slots H, D]`, handed out tile by tile."""

    def __init__(self, slots: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.all, self._used = torch.empty(slots, size, dtype=dtype, device=device), 0

    def next(self, shape: torch.Size) -> Tensor:
        """The room of the next tile, `[*shape, D]`."""
        start, self._used = self._used, self._used + shape.numel()
        return self.all[start : self._used].view(*shape, -1)


def _heads_first(x: Tensor) -> bool:
    """Whether `[M, H, D]` lies in memory as `[H, M, D]`: as models turn queries and keys by their positions."""
    return not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _narrow(x: Tensor) -> torch.dtype:
    """What weights are multiplied in: as flash attention does in bfloat16; CPUs are slow in float16."""
    return x.dtype if x.dtype == torch.bfloat16 else _wide(x)


def _weights(queries: Tensor, keys: Tensor, tile: _Tile, scaling: float) -> Tensor:
    """Softmax of the tile's scores, `[S G, (H / G) Tq, Tk]`."""
    wide = _wide(queries)
    scores = torch.bmm(queries.to(wide), keys.to(wide).mT).mul_(scaling)
    if tile.hidden is not None:
        scores.view(len(tile.q_rows), -1, *tile.hidden.shape[2:]).add_(tile.hidden)
    return scores.softmax(-1)


def _taken(q: Tensor, k: Tensor, v: Tensor, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's queries `[S G, (H / G) Tq, D]`, keys `[S G, Tk, D]` and values."""
    keys, values = (tile.take("k_rows", t).flatten(0, 1) for t in (k, v))
    return tile.take("q_rows", q).view(len(keys), -1, q.shape[2]), keys, values


def _add_keys(into: Tensor, tile: _Tile, given: Tensor) -> None:
    """Add what keys are given, `[S G, Tk, D]`, to their rows of `[N, G, D]`, without those that filled up."""
    heads, size = into.shape[1:]
    given = given.view(len(tile.k_rows), heads, -1, size).transpose(1, 2).reshape(-1, heads, size).to(into.dtype)
    rows = tile.k_rows.flatten()
    if tile.k_real is not None:
        given, rows = given.index_select(0, tile.k_real), rows.index_select(0, tile.k_real)
    into.index_add_(0, rows, given)
