"""The kernels that compute the whole layer in one launch, against plain torch and against the two launches."""

from __future__ import annotations

import importlib

import pytest
import torch
import triton.language as tl
from torch import Tensor

from alora_kernels import alora_linear
from alora_kernels import kernels as ak
from alora_kernels.kernels import sync
from alora_kernels.kernels.tiles import GROUP_M, Tile, override_tiles

from .cases import DEVICE, Case, Layer, S, assert_close, meta

# float64 is not theirs: s is a float32 number inside a launch
ONE_PASS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str, indirect=True)
EXACT = torch.float16 if DEVICE == "cuda" else torch.float32
CASES = [
    Case(m=1, k=16, n=16, r=1, e=1),
    Case(m=37, k=40, n=48, r=4, e=3),
    Case(m=64, k=64, n=64, r=16, e=1, ids="sorted"),
    Case(m=150, k=48, n=40, r=8, e=5, ids="sorted"),  # one row block over a group of eight, in the interpreter
    Case(m=300, k=16, n=32, r=16, e=2),
    Case(m=70, k=32, n=96, r=8, e=9, ids="base"),
    Case(m=70, k=32, n=96, r=8, e=4, ids="out of range"),
    Case(m=66, k=32, n=64, r=32, e=3, ids="equal"),
    Case(m=70, k=72, n=48, r=4, e=3, p=0.25),
    Case(m=70, k=32, n=48, r=16, e=2, p=0.5, fp32_adapters=True, ids="sorted"),
    Case(m=40, k=64, n=64, r=16, e=4, fp32_adapters=True),
    Case(m=0, k=16, n=16),
]


def clean() -> bool:
    """Whether every counter that kernels share is zero again."""
    return not any(block.any() for block in sync._blocks.values())


def require(taken: bool) -> None:
    """The interpreter takes every case; a GPU takes 16 bits, and needs a copy engine above 64 rows."""
    if not taken and DEVICE == "cuda":
        pytest.skip("this GPU's one-pass kernels do not take this case: 16 bits, Hopper or later")
    assert taken


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh float tensors hold NaN, so that an entry nobody writes shows."""
    empty = torch.empty

    def nan(*shape: int, **options: object) -> Tensor:
        t = empty(*shape, **options)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", nan)


def assert_task_layer(t: Layer, y: Tensor, h: Tensor) -> None:
    """y and h of task routing by the formula; the counters are zero again."""

    def layer(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w, bias) + t.task_h(x, a) @ b.T

    assert_close(h, t.task_h, t.dtype, t.x, t.a)
    assert_close(y, layer, t.dtype, t.x, t.w, t.bias, t.a, t.b)
    assert clean()


@ONE_PASS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_task(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    t = Layer(case, dtype)
    require(ak.takes_one_pass_task(t.x, t.w, t.a, t.drop))
    poisoned(monkeypatch)
    y, h = ak.one_pass_task(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S, dropout=t.drop)
    assert_task_layer(t, y, h)


@ONE_PASS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_soft(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    t = Layer(case, dtype)
    if case.e > 8:  # more than 128 columns of p
        assert not ak.takes_one_pass_soft(t.x, t.w, t.a)
        return
    require(ak.takes_one_pass_soft(t.x, t.w, t.a))
    poisoned(monkeypatch)
    y, h, p = ak.one_pass_soft(t.x, t.w, t.bias, t.a, t.b, t.router, scaling=S, dropout=t.drop)

    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
        return x @ w.T + t.bias.to(x.dtype) + t.soft_h(x, a, router) @ b.T

    assert_close(p, t.soft_p, dtype, t.x, t.a, t.router)
    assert_close(y, layer, dtype, t.x, t.w, t.a, t.b, t.router)
    two_h, _ = ak.shrink_soft(t.x, t.a, t.router, scaling=S, dropout=t.drop)
    torch.testing.assert_close(h, two_h, rtol=1e-2, atol=1e-3)
    assert clean()


@ONE_PASS
@pytest.mark.parametrize("m", [1, 8, 32, 64])
@pytest.mark.parametrize("adapters", ["like x", "float32"])
def test_decode(m: int, adapters: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(m=m, k=300, n=50, r=12, e=m + 2, ids="out of range", fp32_adapters=adapters == "float32")
    t = Layer(case, dtype)
    poisoned(monkeypatch)
    assert ak.takes_decode(t.x, t.a)
    y, h = ak.decode(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S)
    assert_task_layer(t, y, h)


@pytest.mark.parametrize("m", [40, 100])
def test_a_task_with_nan_leaves_the_others_alone(m: int) -> None:
    t = Layer(Case(m=m, k=32, n=32, e=3, r=4), EXACT)
    require(m <= 64 or ak.takes_one_pass_task(t.x, t.w, t.a))

    def run() -> tuple[Tensor, Tensor]:
        if m <= 64:
            return ak.decode(t.x, t.w, None, t.a, t.b, t.groups.ids, scaling=S)
        return ak.one_pass_task(t.x, t.w, None, t.a, t.b, t.groups.ids, scaling=S)

    clean_y, _ = run()
    t.a[1] = torch.nan
    y, h = run()
    assert h[t.ids == 1].isnan().all() and y[t.ids == 1].isnan().all()
    assert torch.equal(y[t.ids != 1], clean_y[t.ids != 1])


def test_repeats_are_bit_identical() -> None:
    t = Layer(Case(m=70, k=48, n=64, r=8, e=3, p=0.25), EXACT)
    require(ak.takes_one_pass_task(t.x, t.w, t.a, t.drop))
    one = ak.one_pass_task(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S, dropout=t.drop)
    two = ak.one_pass_task(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S, dropout=t.drop)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_the_kernels_refuse() -> None:
    t = Layer(Case(m=70, k=32, n=32, e=2, r=4), torch.float32)
    assert not ak.takes_one_pass_task(t.x.double(), t.w.double(), t.a.double())
    assert not ak.takes_one_pass_task(t.x.t().contiguous().t(), t.w, t.a)  # columns are not contiguous
    assert not ak.takes_one_pass_task(t.x[:, 1:], t.w[:, 1:], t.a[:, :, 1:].contiguous())  # rows are not aligned
    assert not ak.takes_one_pass_task(t.x, t.w, torch.zeros(2, 65, 32))  # rank
    assert not ak.takes_one_pass_soft(t.x, t.w, torch.zeros(16, 16, 32))  # too many columns
    assert not ak.takes_decode(t.x, t.a)  # rows
    with ak.recording("sm_80"):
        assert not ak.takes_one_pass_task(t.x.to("meta"), t.w.to("meta"), t.a.to("meta"))


@pytest.mark.parametrize("chip", ["sm_90", "sm_100"])
def test_one_launch(chip: str) -> None:
    x, w, a, b = meta(8192, 4096), meta(4096, 4096), meta(8, 16, 4096), meta(4096, 16)
    ids, router = meta(8192, dtype=torch.int32), meta(8, 4096)
    with ak.recording(chip) as launches:
        ak.one_pass_task(x, w, None, a, b, ids, scaling=1.0)
        ak.one_pass_soft(x, w, None, a, b, router, scaling=1.0)
        ak.decode(x[:64], w, None, a, b, ids[:64], scaling=1.0)
    assert len(launches) == 3
    # persistent: one program per multiprocessor, two of the smaller tiles that soft routing takes on sm_100
    assert [launch.grid for launch in launches[:2]] == [(132,), (132 if chip == "sm_90" else 264,)]


def ahead_of(ticket: int, ahead: int, rest: int) -> tuple[int, int, bool]:
    """`sync.ahead_of` as plain arithmetic."""
    if ticket < ahead:
        return 0, ticket, True
    group, inside = divmod(ticket - ahead, ahead + rest)
    return (group + 1, inside, True) if inside < ahead else (group, inside - ahead, False)


@pytest.mark.parametrize(("groups", "ahead", "rest"), [(1, 2, 3), (3, 8, 8), (4, 1, 5), (2, 3, 0)])
def test_tickets_number_all_work_once_and_producers_first(groups: int, ahead: int, rest: int) -> None:
    work = [ahead_of(t, ahead, rest) for t in range(sync.tickets_of(groups, ahead, rest))]
    real = [w for w in work if w[0] < groups]
    assert len(set(real)) == len(real) == groups * (ahead + rest)
    for position, (group, _, is_ahead) in enumerate(work):
        if not is_ahead:  # everything this piece may wait for has a smaller number
            assert sum(1 for g, _, leads in work[:position] if leads and g == group) == ahead


@pytest.mark.parametrize(("ahead", "rest"), [(2, 3), (8, 8), (3, 0)])
def test_the_kernel_numbers_work_the_same_way(ahead: int, rest: int) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def number(out_ptr, AHEAD, REST):
        ticket = tl.program_id(0)
        group, index, is_ahead = sync.ahead_of(ticket, AHEAD, REST)
        tl.store(out_ptr + 3 * ticket, group)
        tl.store(out_ptr + 3 * ticket + 1, index)
        tl.store(out_ptr + 3 * ticket + 2, is_ahead.to(tl.int32))

    total = sync.tickets_of(3, ahead, rest)
    out = torch.empty(total, 3, dtype=torch.int32, device=DEVICE)
    number[(total,)](out, ahead, rest)
    assert [tuple(row) for row in out.tolist()] == [tuple(map(int, ahead_of(t, ahead, rest))) for t in range(total)]


def test_a_tile_can_be_tried() -> None:
    t = Layer(Case(m=70, k=64, n=64, r=4, e=3), EXACT)
    require(ak.takes_one_pass_task(t.x, t.w, t.a))
    usual, _ = ak.one_pass_task(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S)
    with override_tiles({"one_pass_task": Tile(64, 64, 32, 4, 1)}):
        tried, _ = ak.one_pass_task(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S)
    torch.testing.assert_close(tried, usual, rtol=1e-3, atol=1e-2)


def test_counters_grow_and_stay_zero() -> None:
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    small, large = sync.counters(device, 10), sync.counters(device, sync.LEAST + 1)
    assert (small.numel(), large.numel()) == (10, sync.LEAST + 1)
    assert not small.any() and not large.any()
    assert GROUP_M == 8  # the cases above count on it


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device of which nothing is known yet."""
    monkeypatch.setattr(sync, "_arenas", {})
    monkeypatch.setattr(sync, "_blocks", {})
    return torch.device("cpu")


def capture(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Pretend to capture a graph on a stream of its own; the list grows with what is allocated there as zeros."""
    zeros, made = torch.zeros, list[object]()
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: made.append(shape) or zeros(*shape, **options))
    monkeypatch.setattr(sync, "_stream", lambda device: 7)
    monkeypatch.setattr(sync, "capturing", lambda device: True)
    return made


def test_a_graph_never_owns_counters(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while it warms up, on its own stream and in its private memory, nor when it is captured there."""
    sync.prepare(cpu)
    arena = sync._arenas[cpu]
    made = capture(monkeypatch)
    monkeypatch.setattr(sync, "capturing", lambda device: False)
    warm, again = sync.counters(cpu, 100), sync.counters(cpu, 50)
    monkeypatch.setattr(sync, "capturing", lambda device: True)
    own = [sync.counters(cpu, 101), sync.counters(cpu, 101)]
    assert made == [] and warm.data_ptr() == again.data_ptr()
    starts = [(t.data_ptr() - arena.data_ptr()) // 4 for t in (warm, *own)]
    assert starts == [0, sync.LEAST, sync.LEAST + 104]
    assert all(t.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr() for t in (warm, *own))


def test_counters_without_an_arena_are_not_kept(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    sync._arenas[cpu] = torch.zeros(8, dtype=torch.int32)
    for _ in range(2):
        assert not sync.counters(cpu, 9).any()
    assert sync._blocks == {}
    made = capture(monkeypatch)
    assert sync.counters(cpu, 9).numel() == 9 and len(made) == 1
    monkeypatch.setattr(sync, "_arenas", {})
    sync.prepare(cpu)  # not now: it would lie in the graph's memory
    assert sync._arenas == {}


@pytest.mark.skipif(DEVICE == "cuda", reason="the capture is a pretended one")
@pytest.mark.parametrize("m", [40, 70], ids=["decode", "one_pass"])
def test_a_captured_layer_allocates_no_counters(m: int, cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    t = Layer(Case(m=m, k=32, n=32, e=2, r=4), EXACT)
    sync.prepare(cpu)
    made = capture(monkeypatch)
    y = alora_linear(t.x, t.w, t.a, t.b, task_ids=t.ids, scaling=S, backend="triton:one_pass")
    assert made == [] and not sync._blocks
    torch.testing.assert_close(y, t.x @ t.w.T + t.task_h(t.x, t.a) @ t.b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_counters_of_captured_launches_are_their_own() -> None:
    device = torch.device("cuda", 0)
    sync.prepare(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one, two = sync.counters(device, 16), sync.counters(device, 16)
    assert len({one.data_ptr(), two.data_ptr(), sync.counters(device, 16).data_ptr()}) == 3


@pytest.mark.skipif(DEVICE == "cuda", reason="a compiled kernel cannot lose its flag")
def test_a_lost_flag_ends_in_a_test_build_and_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sync.TURNS == 0  # builds for users wait
    monkeypatch.setattr(sync, "TURNS", tl.constexpr(5))
    monkeypatch.setattr(importlib.import_module("alora_kernels.kernels.decode"), "publish", lambda *_: None)
    t = Layer(Case(m=8, k=32, n=48, r=16, e=3), torch.float32)
    ak.decode(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S)
    assert not clean()
    for block in sync._blocks.values():
        assert block[sync.DONE.value] >= sync.GAVE_UP.value
        block.zero_()
