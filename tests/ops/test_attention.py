"""Attention of segments side by side: values and gradients in float64, errors of narrow dtypes beside torch's own."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alora_kernels.ops import attention
from alora_kernels.ops.attention import Segments, segment_attention, unsupported

TRAINING = [(n, n) for n in (5, 1, 17, 16, 5, 48, 30)]
DECODE = [(1, n) for n in (3, 1, 40, 200, 41, 7)]
MIXED = [(1, 9), (12, 12), (4, 30), (1, 300), (0, 0), (7, 8)]
LONG = [(300, 300), (20, 20), (129, 400), (128, 128)]  # in blocks
CASES = {"training": TRAINING, "decode": DECODE, "mixed": MIXED, "long": LONG, "one": [(6, 6)]}


def bounds(lengths: list[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def plan(case: list[tuple[int, int]], **options: object) -> Segments:
    return Segments(bounds([q for q, _ in case]), bounds([k for _, k in case]), **options)


def tensors(case: list[tuple[int, int]], heads: tuple[int, int] = (6, 2), dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    sizes = [
        (sum(q for q, _ in case), heads[0], 8),
        (keys := sum(k for _, k in case), heads[1], 8),
        (keys, heads[1], 4),
    ]
    q, k, v = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in sizes)
    return [t.to(dtype).requires_grad_() for t in (2 * q, k, v)]


def each(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Torch's own, one segment after another."""
    rows, groups = [q.new_empty(0, q.shape[1], v.shape[2])], q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(pairwise(segments.q_bounds), pairwise(segments.k_bounds), strict=True):
        one = [q[q0:q1], k[k0:k1].repeat_interleave(groups, 1), v[k0:k1].repeat_interleave(groups, 1)]
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - q1 + q0)
        y = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in one), attn_mask=seen)
        rows.append(y[0].transpose(0, 1))
    return torch.cat(rows)


def step(function, leaves: list[Tensor], segments: Segments) -> list[Tensor]:
    y = function(*leaves, segments)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_each_segment_alone(name: str, heads: tuple[int, int]):
    case = CASES[name]
    leaves, segments = tensors(case, heads), plan(case)
    for ours, right in zip(step(segment_attention, leaves, segments), step(each, leaves, segments), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["training", "mixed", "long"])
def test_errors_stay_within_twice_torchs_own(name: str, dtype: torch.dtype):
    case = CASES[name]
    segments, narrow = plan(case), tensors(case, dtype=dtype)
    exact = step(each, [t.detach().double().requires_grad_() for t in narrow], segments)
    for ours, own, right in zip(
        step(segment_attention, narrow, segments), step(each, narrow, segments), exact, strict=True
    ):
        assert ours.dtype == dtype
        error, allowed = ((t.double() - right).norm() for t in (ours, own))
        assert error <= 2 * allowed + 1e-7 * right.norm()


def test_what_is_not_finite_stays_in_its_segment():
    leaves, segments = tensors(TRAINING), plan(TRAINING)
    right = step(segment_attention, leaves, segments)
    for leaf, bad in zip(leaves, (torch.nan, torch.inf, torch.nan), strict=True):
        with torch.no_grad():
            leaf[6] = bad  # of the third segment, rows 6 .. 22, filled up beside one of 48
    others = torch.ones(len(leaves[0]), dtype=torch.bool)
    others[6:23] = False
    for ours, alone in zip(step(segment_attention, leaves, segments), right, strict=True):
        assert not ours[~others].isfinite().all()
        torch.testing.assert_close(ours[others], alone[others], rtol=0, atol=0)


def test_keys_may_lie_anywhere_and_be_shared():
    q, k, v = tensors(DECODE)
    cache = torch.randperm(len(k) + 30)[: len(k)]
    cache[1:3] = cache[4:6]  # two requests read a common place
    spread_k, spread_v = (torch.full((len(k) + 30, *t.shape[1:]), torch.nan).double() for t in (k, v))
    spread_k[cache], spread_v[cache] = k.detach(), v.detach()
    spread_k.requires_grad_(), spread_v.requires_grad_()
    near = step(lambda q, k, v, s: segment_attention(q, k[cache], v[cache], s), [q, spread_k, spread_v], plan(DECODE))
    far = step(segment_attention, [q, spread_k, spread_v], plan(DECODE, k_places=cache))
    for ours, right in zip(far, near, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)


def test_dropout_reads_the_same_keys_of_a_cache():
    q, k, v = tensors(DECODE)
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    wanted = segment_attention(q, k, v, plan(DECODE), dropout_p=0.2)
    torch.manual_seed(1)
    places = order.argsort()
    assert torch.equal(segment_attention(q, k[order], v[order], plan(DECODE, k_places=places), dropout_p=0.2), wanted)


def test_layouts_of_transformers_are_taken():
    q, k, v = (t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in tensors(TRAINING))
    assert not q.is_contiguous()
    segments = plan(TRAINING)
    for ours, right in zip(step(segment_attention, [q, k, v], segments), step(each, [q, k, v], segments), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)


def test_similar_lengths_share_a_product_and_long_ones_are_cut():
    rows = [(33 + i % 16, 33 + i % 16) for i in range(24)]
    assert len(plan(rows)._tiles) == 1
    apart = plan([(1, 2000), (1, 10), (1, 11), (1, 1990)])._tiles
    assert [t.k_rows.shape for t in apart] == [(2, 2000), (2, 11)]
    assert [t.k_rows.shape[1] for t in plan([(300, 300)])._tiles] == [128, 256, 300]
    assert all(t.q_rows.numel() * t.k_rows.shape[1] <= attention.CELLS for t in plan([(100, 100)] * 40)._tiles)


def test_no_segment_at_all_is_a_batch_of_no_rows():
    assert segment_attention(*tensors([]), plan([])).shape == (0, 6, 4)


def test_autocast_changes_nothing():
    leaves, segments = tensors(TRAINING, dtype=torch.float32), plan(TRAINING)
    right = step(segment_attention, leaves, segments)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, plain in zip(step(segment_attention, leaves, segments), right, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_dropped_weights_are_those_of_the_softmax():
    q, k, v = tensors(TRAINING, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = sum(segment_attention(q, k, v, plan(TRAINING), dropout_p=0.2) for _ in range(400)) / 400
        right = segment_attention(q, k, v, plan(TRAINING))
    assert (mean - right).norm() < 0.05 * right.norm()
    assert not torch.equal(segment_attention(q, k, v, plan(TRAINING), dropout_p=0.2), right)


@pytest.mark.parametrize(
    ("q", "k", "words"),
    [
        ([0, 4], [0, 3], "segment 0 has 4 queries and 3 keys"),
        ([0, 4, 4], [0, 4, 6], "segment 1 has 0 queries and 2 keys"),
        ([0, 4, 2], [0, 4, 8], "segment 1 has -2 queries"),
        ([1, 4], [1, 4], "begin at 0"),
        ([0, 4], [0, 2, 4], "as many of queries as of keys"),
        ([], [], "begin at 0"),
    ],
)
def test_bounds_that_fit_nothing_are_refused(q: list[int], k: list[int], words: str):
    with pytest.raises(ValueError, match=words):
        Segments(q, k)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[1:], k, v), "121 queries and 122 keys, but the segments have 122 and 122"),
        (lambda q, k, v: (q, k[1:], v[1:]), "122 queries and 121 keys"),
        (lambda q, k, v: (q[:, :3], k, v), "3 query heads cannot share 2 key heads"),
        (lambda q, k, v: (q, k, v[:, :1]), r"are not \[M,H,D\]"),
        (lambda q, k, v: (q[None], k, v), r"are not \[M,H,D\]"),
        (lambda q, k, v: (q.float(), k, v), "give one dtype"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, words: str):
    with pytest.raises(ValueError, match=words):
        segment_attention(*change(*tensors(TRAINING)), plan(TRAINING))


def test_options_that_would_be_ignored_are_named():
    assert unsupported({"sliding_window": 4096, "softcap": None, "output_attentions": False}, 300) is None
    assert unsupported({"sliding_window": 128}, 300) == "sliding_window=128"
    assert unsupported({"softcap": 30.0}, 3) == "softcap"
    assert unsupported({"position_bias": torch.ones(2, 2)}, 3) == "position_bias"
