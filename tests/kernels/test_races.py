"""A GPU run that races cannot hide from: the one-pass kernels, thousands of times, on inputs that change.

The interpreter runs one program after another and can only check values. Here programs really wait for each other: each
repetition draws new inputs, the output is poisoned with NaN first, and y, h and p are compared with the two launches.
Every tile and every h is one sum in a fixed order, so also two runs on the same inputs must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.kernels import sync
from alora_kernels.routing import group_rows

from .cases import DEVICE

REPEATS = 2000
S = 0.5
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no dot of bfloat16

Outputs = tuple[Tensor, ...]


class Layer:
    """Inputs that change in place, so that a captured graph sees them too."""

    def __init__(self, m: int, k: int, n: int, r: int, e: int, p: float = 0.0) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device=DEVICE, dtype=DTYPE)

        self.x, self.w, self.a, self.b, self.router = empty(m, k), empty(n, k), empty(e, r, k), empty(n, r), empty(e, k)
        self.ids = torch.empty(m, dtype=torch.int32, device=DEVICE)
        self.seed = torch.empty(1, dtype=torch.int64, device=DEVICE)
        self.drop = ak.Dropout(p, self.seed) if p else None
        self.e = e
        sync.prepare(self.x.device)  # launches of a stream share counters, as those of a model do
        self.renew()

    def renew(self) -> None:
        for t in (self.x, self.w, self.a, self.b, self.router):
            t.normal_(std=t.shape[-1] ** -0.25)
        self.ids.copy_(torch.randint(-1, self.e, self.ids.shape, device=DEVICE).sort().values)
        self.seed.random_()

    def one_task(self) -> Outputs:
        return ak.one_pass_task(self.x, self.w, None, self.a, self.b, self.ids, scaling=S, dropout=self.drop)

    def one_soft(self) -> Outputs:
        return ak.one_pass_soft(self.x, self.w, None, self.a, self.b, self.router, scaling=S, dropout=self.drop)

    def decode(self) -> Outputs:
        return ak.decode(self.x, self.w, None, self.a, self.b, self.ids, scaling=S)

    def pair(self, two_launch: Callable[[Layer], Outputs]) -> Outputs:
        if not ak.overlaps_launches(self.x.device):
            pytest.skip("launches overlap on Hopper and later")
        with ak.overlapping():
            return two_launch(self)

    def pair_task(self) -> Outputs:
        return self.pair(Layer.two_task)

    def pair_soft(self) -> Outputs:
        return self.pair(Layer.two_soft)

    def two_task(self) -> Outputs:
        h = ak.shrink_task(self.x, self.a, group_rows(self.ids, self.e), scaling=S, dropout=self.drop)
        return ak.expand(self.x, self.w, None, h, self.b), h

    def two_soft(self) -> Outputs:
        h, p = ak.shrink_soft(self.x, self.a, self.router, scaling=S, dropout=self.drop)
        return ak.expand(self.x, self.w, None, h, self.b), h, p


def poison(*shapes: torch.Size) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    for t in [torch.full(shape, torch.nan, device=DEVICE, dtype=DTYPE) for shape in shapes]:
        del t


def agree(one: Outputs, two: Outputs) -> None:
    """Equal but for the order of sums: a lost or stale h is off by far more."""
    for got, expected in zip(one, two, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2, check_dtype=False)


CASES: dict[str, tuple[tuple[float, ...], Callable[[Layer], Outputs], Callable[[Layer], Outputs]]] = {
    "task": ((2048 + 37, 512, 1024, 16, 8), Layer.one_task, Layer.two_task),
    "task, short K": ((4096, 64, 2048, 16, 3), Layer.one_task, Layer.two_task),  # tiles that wait for their leaders
    "soft": ((2048 + 37, 512, 1024, 16, 8), Layer.one_soft, Layer.two_soft),
    "soft, long K, few tiles": ((128, 4096, 256, 16, 8), Layer.one_soft, Layer.two_soft),  # all wait for one producer
    "decode": ((64, 2048, 2048, 16, 64), Layer.decode, Layer.two_task),
    "decode, one row": ((1, 4096, 256, 16, 4), Layer.decode, Layer.two_task),
    "task, beside its shrink": ((2048 + 37, 512, 1024, 16, 8), Layer.pair_task, Layer.two_task),
    "task, one row beside its shrink": ((1, 4096, 256, 16, 4), Layer.pair_task, Layer.two_task),
    "soft, beside its shrink": ((128, 4096, 256, 16, 8), Layer.pair_soft, Layer.two_soft),
    "task, dropout": ((1024 + 37, 4096, 512, 16, 8, 0.25), Layer.one_task, Layer.two_task),
    "soft, dropout": ((1024 + 37, 4096, 512, 16, 8, 0.25), Layer.one_soft, Layer.two_soft),
}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_one_pass_repeats(name: str) -> None:
    shape, one_pass, two_launch = CASES[name]
    layer = Layer(*shape)
    for turn in range(REPEATS):
        layer.renew()
        expected = two_launch(layer)
        poison(*(t.shape for t in expected))
        got = one_pass(layer)
        agree(got, expected)
        if turn % 20 == 0:
            assert all(torch.equal(a, b) for a, b in zip(got, one_pass(layer), strict=True)), turn


@pytest.mark.parametrize("routing", ["task", "soft"])
def test_dropout_over_many_steps(routing: str) -> None:
    """Against plain torch and the mask: a masked x waits in registers that the next step must not overwrite."""
    m, k, r, e = (1024 + 37, 4096, 16, 8) if DEVICE == "cuda" else (37, 64, 4, 2)
    layer = Layer(m, k, 64, r, e, 0.25)
    for _ in range(100 if DEVICE == "cuda" else 1):
        layer.renew()
        x = layer.x.double() * ak.dropout_mask(m, k, layer.drop, dtype=torch.float32)
        p = torch.einsum("mk,erk->mer", x, layer.a.double())
        if routing == "task":
            gate = (layer.ids[:, None] == torch.arange(e, device=DEVICE)).double()
            groups, dh = group_rows(layer.ids, e), torch.randn(m, r, device=DEVICE)
            da = ak.da_task(dh, layer.x, groups, e, dropout=layer.drop, dtype=torch.float32)
            agree((da,), (torch.einsum("me,mr,mk->erk", gate, dh.double(), x),))
            h = ak.shrink_task(layer.x, layer.a, groups, scaling=S, dropout=layer.drop)
        else:
            gate = (layer.x.double() @ layer.router.double().T).softmax(1)
            h, _ = ak.shrink_soft(layer.x, layer.a, layer.router, scaling=S, dropout=layer.drop)
        agree((h,), (S * torch.einsum("me,mer->mr", gate, p),))


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_one_pass_in_a_replayed_graph(name: str) -> None:
    shape, one_pass, two_launch = CASES[name]
    layer = Layer(*shape)
    one_pass(layer)  # compiled, and the arena of counters exists
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = one_pass(layer)
    for _ in range(REPEATS):
        layer.renew()
        for t in outputs:
            t.fill_(torch.nan)
        graph.replay()
        agree(outputs, two_launch(layer))


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    layers, streams = [Layer(1024, 1024, 1024, 16, 4) for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    expected = [layer.two_task() for layer in layers]
    torch.cuda.synchronize()
    for _ in range(200):
        got: list[Outputs] = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(layer.one_task())
        torch.cuda.synchronize()
        for one, two in zip(got, expected, strict=True):
            agree(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2048, 4096])
def test_masked_products_of_many_steps(k: int) -> None:
    """Masked operands wait in registers: one that is overwritten while a product reads it is wrong in every plan."""
    layer = Layer(1024, k, 256, 16, 8, 0.25)
    for _ in range(REPEATS // 20):
        layer.renew()
        assert layer.drop is not None
        masked = layer.x.float() * ak.dropout_mask(*layer.x.shape, layer.drop, dtype=torch.float32)
        onehot = (layer.ids[:, None] == torch.arange(layer.e, device=DEVICE)).float()
        agree(layer.two_task()[1:], (S * torch.einsum("me,mk,erk->mr", onehot, masked, layer.a.float()),))
        pieces = masked @ layer.a.flatten(0, 1).float().T
        agree((layer.two_soft()[2][:, : pieces.shape[1]],), (pieces,))
        dh = torch.randn(1024, 16, device=DEVICE).to(DTYPE)
        da = ak.da_task(dh, layer.x, group_rows(layer.ids, layer.e), layer.e, dropout=layer.drop, dtype=torch.float32)
        expected = torch.einsum("me,mr,mk->erk", onehot, dh.float(), masked)
        agree((da / expected.std(),), (expected / expected.std(),))


@pytest.mark.skipif(DEVICE == "cuda", reason="the tests above run there")
@pytest.mark.parametrize("name", CASES)
def test_cases_agree_in_the_interpreter(name: str) -> None:
    """Whatever turns red on a GPU is no fault of a case."""
    shape, one_pass, two_launch = CASES[name]
    layer = Layer(24, 32, 32, *shape[3:])
    expected = two_launch(layer)
    poison(*(t.shape for t in expected))
    agree(one_pass(layer), expected)
