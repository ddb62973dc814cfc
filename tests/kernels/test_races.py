"""A GPU run that races cannot hide from: the one-pass kernels, thousands of times, on inputs that change.

The interpreter runs one program after another and can only check values. Here programs really wait for each other: each
repetition draws new inputs, the output is poisoned with NaN first, and y, h and p are compared with the two launches.
Every tile and every h is one sum in a fixed order, so also two runs on the same inputs must agree bit for bit.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.kernels import sync
from alora_kernels.routing import group_rows

pytestmark = pytest.mark.gpu
REPEATS = 2000
S = 0.5

Outputs = tuple[Tensor, ...]


class Layer:
    """Inputs that change in place, so that a captured graph sees them too."""

    def __init__(self, m: int, k: int, n: int, r: int, e: int) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device="cuda", dtype=torch.bfloat16)

        self.x, self.w, self.a, self.b, self.router = empty(m, k), empty(n, k), empty(e, r, k), empty(n, r), empty(e, k)
        self.ids = torch.empty(m, dtype=torch.int32, device="cuda")
        self.e = e
        self.renew()

    def renew(self) -> None:
        for t in (self.x, self.w, self.a, self.b, self.router):
            t.normal_(std=t.shape[-1] ** -0.25)
        self.ids.copy_(torch.randint(-1, self.e, self.ids.shape, device="cuda").sort().values)

    def one_task(self) -> Outputs:
        return ak.one_pass_task(self.x, self.w, None, self.a, self.b, self.ids, scaling=S)

    def one_soft(self) -> Outputs:
        return ak.one_pass_soft(self.x, self.w, None, self.a, self.b, self.router, scaling=S)

    def decode(self) -> Outputs:
        return ak.decode(self.x, self.w, None, self.a, self.b, self.ids, scaling=S)

    def two_task(self) -> Outputs:
        h = ak.shrink_task(self.x, self.a, group_rows(self.ids, self.e), scaling=S)
        return ak.expand(self.x, self.w, None, h, self.b), h

    def two_soft(self) -> Outputs:
        h, p = ak.shrink_soft(self.x, self.a, self.router, scaling=S)
        return ak.expand(self.x, self.w, None, h, self.b), h, p


def poison(*shapes: torch.Size) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    for t in [torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16) for shape in shapes]:
        del t


def agree(one: Outputs, two: Outputs) -> None:
    """Equal but for the order of sums: a lost or stale h is off by far more."""
    for got, expected in zip(one, two, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


CASES: dict[str, tuple[tuple[int, int, int, int, int], Callable[[Layer], Outputs], Callable[[Layer], Outputs]]] = {
    "task": ((2048 + 37, 512, 1024, 16, 8), Layer.one_task, Layer.two_task),
    "task, short K": ((4096, 64, 2048, 16, 3), Layer.one_task, Layer.two_task),  # tiles that wait for their leaders
    "soft": ((2048 + 37, 512, 1024, 16, 8), Layer.one_soft, Layer.two_soft),
    "soft, long K, few tiles": ((128, 4096, 256, 16, 8), Layer.one_soft, Layer.two_soft),  # all wait for one producer
    "decode": ((64, 2048, 2048, 16, 64), Layer.decode, Layer.two_task),
    "decode, one row": ((1, 4096, 256, 16, 4), Layer.decode, Layer.two_task),
}


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
    assert not any(block.any() for block in sync._blocks.values())


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


SMALL = """
import torch
from tests.kernels.test_races import Layer
layer = Layer(300, 128, 256, 16, 3)
layer.one_task(), layer.one_soft(), layer.two_task(), layer.two_soft(), Layer(8, 256, 128, 16, 4).decode()
torch.cuda.synchronize()
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "7", sys.executable, "-c", SMALL]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if "not supported" in done.stdout + done.stderr:
        pytest.skip(f"compute-sanitizer cannot watch this machine: {(done.stdout + done.stderr)[-300:]}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
