"""Causal attention of sequences that lie side by side: rows of a packed batch, or requests of a serving step.

torch has no kernel for this on CPUs: a mask over all tokens makes each sequence meet every other one, and the backward
of its flash attention calls oneDNN five times per head and sequence, 17 us each: 16 ms of 19 for 24 rows of 48 tokens
in bfloat16. Here sequences of similar length share one batched product, and key heads are never repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    _flat: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def flat(self, name: Literal["q_rows", "k_rows"], heads: int) -> Tensor:
        """Rows of a tensor `[M heads, D]`, those of a head beneath each other: `[S heads T]`."""
        if (name, heads) not in self._flat:
            rows: Tensor = getattr(self, name)
            each = torch.arange(heads, device=rows.device)[:, None]
            self._flat[name, heads] = (rows[:, None] * heads + each).flatten()
        return self._flat[name, heads]


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

    @property
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
        k: keys `[N, G, D]`, H a multiple of G.
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
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: give one dtype")
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
    """Tile by tile. Scores and their gradients are float32 (or float64); what they multiply next is as q is."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.scaling = segments, scaling
        y, narrow = q.new_empty(*q.shape[:2], v.shape[2]), _narrow(q)
        for tile in segments._tiles:
            queries, keys, values = _taken(q, k, v, tile)
            p = _weights(queries, keys, tile, scaling)
            _put(y, tile.q_rows, tile.q_real, torch.bmm(p.to(narrow), values.to(narrow)))
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        wide, narrow = _wide(q), _narrow(q)
        with no_autocast(q.device.type):
            for tile in ctx.segments._tiles:
                queries, keys, values = _taken(q, k, v, tile)
                dout = _take(dy, tile.flat("q_rows", dy.shape[1]), queries.shape[1])
                if tile.filling is not None:  # it asked for nothing
                    dout.view(len(tile.q_rows), -1, tile.q_rows.shape[1], dy.shape[2]).masked_fill_(tile.filling, 0)
                p = _weights(queries, keys, tile, ctx.scaling)
                dp = torch.bmm(dout.to(wide), values.to(wide).mT)
                ds = torch._softmax_backward_data(dp, p, -1, wide).mul_(ctx.scaling).to(narrow)
                _put(dq, tile.q_rows, tile.q_real, torch.bmm(ds, keys.to(narrow)))
                of_keys = tile.k_rows, tile.k_real
                _put(dk, *of_keys, torch.bmm(ds.mT, queries.to(narrow)), add=tile.shares_keys)
                _put(dv, *of_keys, torch.bmm(p.to(narrow).mT, dout.to(narrow)), add=tile.shares_keys)
        return dq, dk, dv, None, None


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
    groups, (rows, keys) = k.shape[1], (tile.q_rows.shape[1], tile.k_rows.shape[1])
    places = tile.flat("k_rows", groups)
    queries = _take(q, tile.flat("q_rows", q.shape[1]), q.shape[1] // groups * rows)
    return queries, _take(k, places, keys), _take(v, places, keys)


def _take(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """Places of x `[M H, D]` as `[-1, rows, D]`."""
    return x.reshape(-1, x.shape[2]).index_select(0, places).view(-1, rows, x.shape[2])


def _put(into: Tensor, rows: Tensor, real: Tensor | None, taken: Tensor, *, add: bool = False) -> None:
    """The way back of `_take` to rows of `[M, H, D]`, without those that filled up."""
    heads, size = into.shape[1:]
    given = taken.view(len(rows), heads, rows.shape[1], size).transpose(1, 2).reshape(-1, heads, size).to(into.dtype)
    rows = rows.flatten()
    if real is not None:
        given, rows = given.index_select(0, real), rows.index_select(0, real)
    into.index_add_(0, rows, given) if add else into.index_copy_(0, rows, given)
