"""The group op as torch sees it: opcheck, compile, autocast, what is saved, double backward."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from alora_kernels.ops import group_library  # noqa: F401  registers the op
from alora_kernels.routing import group_rows
from tests.compare import skip_unless_runnable

from .groups import Group, group

BACKENDS = ["torch", "triton"]
ROUTINGS = ["task", "soft"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(backend, routing, dropout):
    skip_unless_runnable(backend, "cpu", torch.float32)
    if routing == "soft" and backend == "triton":
        pytest.skip("a soft-routed group is one alora::linear per member on triton")
    g = group((6,), 7, (5, 4), (2, 3), (3, 3), routing=routing, biases=(True,) * 3)
    groups = group_rows(g.ids, 3) if routing == "task" else (None, None, None)
    seed = torch.tensor([11]) if dropout else None
    lists = [[g.leaves[f"{key}{i}"] for i in range(2)] for key in ("bias", "a", "b")]
    routers = [g.leaves[f"router{i}"] for i in range(2)] if routing == "soft" else []
    args = (g.x, g.weights, *lists, routers, *groups, seed, [0.5, 1.0], dropout, backend)
    torch.library.opcheck(torch.ops.alora.linear_group, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_compiles_whole_and_new_ids_do_not_recompile(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float32)
    torch._dynamo.reset()
    g = group((6,), 7, (5, 4), (2, 3), (3, 3), routing=routing)
    counter = CompileCounterWithBackend("aot_eager")

    def layers(ids):
        return Group(g.x, g.weights, g.leaves, ids, g.scalings).call(backend=backend)

    compiled = torch.compile(layers, backend=counter, fullgraph=True)
    for seed in range(3):
        ids = torch.randint(-1, 3, (6,), generator=torch.Generator().manual_seed(seed)) if g.ids is not None else None
        got, want = g.step(compiled(ids)), g.step(layers(ids))
        for name, t in want.items():
            torch.testing.assert_close(got[name], t, msg=name)
    assert counter.frame_count == 1


def test_autocast_casts_the_bases():
    g = group((8,), 16, (12, 10), (4, 4), (2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = g.call()
    assert {y.dtype for y in ys} == {torch.bfloat16}
    assert {t.dtype for name, t in g.step(ys).items() if name[0] == "d"} == {torch.float32}


def test_nothing_of_output_size_is_saved():
    g = group((64,), 16, (128, 128), (4, 4), (8, 8))
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        g.call()
    assert (64, 128) not in saved
    assert (64, 16) in saved  # x, once
    assert saved.count((64, 16)) == 1


def test_double_backward_says_what_to_use():
    g = group((4,), 6, (5, 4), (2, 2), (2, 2))
    (dx,) = torch.autograd.grad(g.call()[0].square().sum(), g.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"reference\.alora_linear where second derivatives"):
        dx.sum().backward()
