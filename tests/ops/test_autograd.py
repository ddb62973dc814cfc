"""The ops as torch sees them: opcheck, compile, autocast, double backward."""

from __future__ import annotations

import os
import shutil
import sysconfig

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from alora_kernels import Routing, alora_delta, alora_linear, reference
from alora_kernels.ops import autograd, torch_backend
from alora_kernels.ops.dispatch import PLANS, Plan
from alora_kernels.ops.types import Adapter
from alora_kernels.routing import group_rows
from tests.compare import problem, skip_unless_runnable

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(backend, routing, dropout):
    skip_unless_runnable(backend, "cpu", torch.float32)
    p = problem((6,), 7, 5, 2, 3, routing=routing, dtype=torch.float32)
    groups = group_rows(p.given["task_ids"], 3) if routing == "task" else (None, None, None)
    seed = torch.tensor([11]) if dropout else None
    x, a, b, bias = (p.leaves[k] for k in ("x", "a", "b", "bias"))
    rest = (a, p.leaves.get("router"), *groups, seed, 0.5, dropout, backend)
    torch.library.opcheck(torch.ops.alora.linear, (x, p.weight, bias, b, *rest))
    torch.library.opcheck(torch.ops.alora.linear, (x, None, None, None, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ["task", "soft"])
def test_compiles_whole_and_new_ids_do_not_recompile(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float32)
    torch._dynamo.reset()
    p = problem((6,), 7, 5, 2, 3, routing=routing, dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    router = p.leaves.get("router")

    def layer(x, ids):
        given = {"router": router} if router is not None else {"task_ids": ids}
        return alora_linear(x, p.weight, p.leaves["a"], p.leaves["b"], scaling=0.5, backend=backend, **given)

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for seed in range(3):
        ids = torch.randint(-1, 3, (6,), generator=torch.Generator().manual_seed(seed))
        x = p.leaves["x"]
        got, want = compiled(x, ids), layer(x, ids)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x))
    assert counter.frame_count == 1


def has_compiler() -> bool:
    headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    return headers and shutil.which(os.environ.get("CXX", "g++")) is not None


@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler and Python's headers")
def test_inductor_compiles_it_too():
    torch._dynamo.reset()
    p = problem((6,), 7, 5, 2, 3, routing="task", dtype=torch.float32)
    compiled = torch.compile(alora_linear, fullgraph=True)
    torch.testing.assert_close(
        compiled(p.leaves["x"], p.weight, p.leaves["a"], p.leaves["b"], **p.given),
        reference.alora_linear(p.leaves["x"], p.weight, p.leaves["a"], p.leaves["b"], **p.given),
    )


def test_the_dispatcher_is_skipped_only_where_nobody_looks():
    """Without gradients the op's function runs as it is; tracers, modes and transforms still see one op."""
    p = problem((6,), 7, 5, 2, 3, routing="task", dtype=torch.float32)
    routing = Routing(p.given["task_ids"])
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def layer(x):
        return alora_linear(x, p.weight, p.leaves["a"], p.leaves["b"], task_ids=routing)

    x = p.leaves["x"]
    with torch.no_grad(), Watch():
        watched = layer(x)
    assert seen.count("alora.linear.default") == 1
    with torch.no_grad():
        assert torch.equal(layer(x), watched) and torch.equal(layer(x), layer(x.detach()))
        graph = make_fx(layer)(x.detach()).graph
        assert not autograd.needs_dispatch(x, p.leaves["a"])
        assert autograd.needs_dispatch(x.to("meta"))
    assert "alora.linear.default" in {str(node.target) for node in graph.nodes}
    assert autograd.needs_dispatch(x.detach(), p.leaves["a"]) and not autograd.needs_dispatch(x.detach(), None)
    with FakeTensorMode(), torch.no_grad():
        fake = torch.empty(6, 7)
        assert autograd.needs_dispatch(fake)
    assert autograd.needs_dispatch(fake)  # outside of its mode, too


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_autograd_alone_asks_no_dispatcher(monkeypatch, routing, leading):
    """On CPUs and GPUs: same values and gradients as by the ops, bit for bit, and y can be written into."""
    assert autograd.DIRECT == ("cpu", "cuda")
    p = problem(leading, 7, 5, 2, 3, routing=routing, dtype=torch.float32)
    given = {**p.given, **({"router": p.leaves["router"]} if routing == "soft" else {})}
    x, a, b = (p.leaves[name] for name in ("x", "a", "b"))

    def run():
        y = alora_linear(x, p.weight, a, b, **given)
        h = alora_delta(x, a, b, **given)
        leaves = [leaf for name, leaf in p.leaves.items() if name != "bias"]
        return [y, h, *torch.autograd.grad(y.square().sum() + h.square().sum(), leaves)]

    with monkeypatch.context() as patch:
        patch.setattr(autograd, "traced", lambda x: True)
        wanted = run()
    for op in ("linear_op", "linear_backward_op"):
        monkeypatch.setattr(autograd, op, None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), wanted, strict=True))
    alora_linear(x, p.weight, a, b, **given).add_(1).sum().backward()


@pytest.mark.parametrize("name", ["triton", "triton:one_pass"])
def test_what_stands_behind_the_colon_goes_to_the_backend(monkeypatch, name):
    plans: list[Plan | None] = []

    class Spy:
        @staticmethod
        def linear(x, w, bias, adapter, b, plan):
            plans.append(plan)
            return torch_backend.linear(x, w, bias, adapter, b)

        @staticmethod
        def linear_backward(dy, x, w, adapter, b, saved, needs, plan):
            plans.append(plan)
            return torch_backend.linear_backward(dy, x, w, adapter, b, saved, needs)

    monkeypatch.setattr(autograd, "backend_module", lambda name: Spy if name == "triton" else None)
    p = problem((6,), 7, 5, 2, 3, routing="task", dtype=torch.float32, bias=False)
    x, a, b = (p.leaves[k] for k in ("x", "a", "b"))
    groups = group_rows(p.given["task_ids"], 3)
    y = autograd.linear(x, p.weight, None, b, Adapter(a, None, groups, 1.0, None), name)
    y.sum().backward()
    assert plans == [PLANS["one_pass"] if ":" in name else None] * 2


def test_double_backward_says_what_to_use():
    p = problem((4,), 6, 5, 2, 2, routing="task", dtype=torch.float32)
    y = alora_linear(p.leaves["x"], p.weight, p.leaves["a"], p.leaves["b"], **p.given)
    (dx,) = torch.autograd.grad(y.square().sum(), p.leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"reference\.alora_linear where second derivatives"):
        dx.sum().backward()


def test_autocast_casts_the_base_and_keeps_adapter_gradients_wide():
    p = problem((8,), 16, 12, 4, 2, routing="task", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = alora_linear(p.leaves["x"], p.weight, p.leaves["a"], p.leaves["b"], bias=p.leaves["bias"], **p.given)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in p.leaves.values())
    truth = p.to(torch.float64).step(reference.alora_linear)["y"]
    assert (y.double() - truth).abs().max() < 0.1
