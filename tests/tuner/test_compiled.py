"""`torch.compile(fullgraph=True)` of a whole PEFT model: no break, ids are an input, new ones do not compile again."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import alora_kernels
from alora_kernels import Routing, route
from alora_kernels.tuner import set_task

from ..ops.test_autograd import has_compiler
from ..support.tiny import adapted, adapter_grads, llama, no_dropout, tokens

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler and Python's headers")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def whole(model, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def same(compiled, model, ids, **kwargs):
    torch.testing.assert_close(compiled(input_ids=ids, **kwargs).logits, model(input_ids=ids, **kwargs).logits)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ids_of_a_context(backend):
    model, ids = adapted(), tokens(3)
    compiled, counter = whole(model, backend)
    for task_ids in ([0, 1, -1], [1, 1, 1], [-1, 0, 0]):
        with route(torch.tensor(task_ids)):
            same(compiled, model, ids)
            same(compiled, model, ids)
    assert counter.frame_count == 1


def test_ids_as_an_argument():
    model, ids = adapted(), tokens(3)
    compiled, counter = whole(model)
    for task_ids in ([0, 1, -1], [1, 1, 1], [-1, 0, 0]):
        same(compiled, model, ids, adapter_names=torch.tensor(task_ids))
    assert counter.frame_count == 1
    same(compiled, model, ids, adapter_names=["math", "code", "__base__"])


@pytest.mark.parametrize(
    ("backend", "bad"),
    [("eager", 2), ("eager", -2), ("aot_eager", 2), pytest.param("inductor", 2, marks=needs_compiler)],
)
def test_an_id_of_no_task_is_refused(backend, bad):
    model, ids = adapted(), tokens(3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), route(torch.tensor([0, 1, -1])):
        compiled(input_ids=ids)
    with (
        pytest.raises(RuntimeError, match=r"valid ids are -1 \(base only\) and 0 .. 1"),
        torch.no_grad(),
        route(torch.tensor([0, 1, bad])),
    ):
        compiled(input_ids=ids)


def test_one_sort_for_all_layers():
    model, ids = adapted(), tokens(3)
    sorts = []

    def count(graph, inputs):
        sorts.append(sum("sort" in str(node.target) and "search" not in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with route([0, 1, -1]), torch.no_grad():
        same(compiled, model, ids)
    compiled(input_ids=ids, adapter_names=torch.tensor([0, 1, -1]))
    assert sorts == [1, 1]


def test_without_ids():
    """The task that `set_task` fixed, the only task, a router."""
    for options in ({}, {"tasks": ["only"]}, {"routing": "soft"}):
        model, ids = adapted(llama(layers=1), **options), tokens(2)
        if not options:
            set_task(model, "code")
        compiled, counter = whole(model)
        same(compiled, model, ids)
        assert counter.frame_count == 1


def test_gradients():
    model, ids = no_dropout(adapted()).train(), tokens(3)
    compiled, counter = whole(model, "aot_eager")

    def grads(run, task_ids):
        model.zero_grad()
        with route(task_ids):
            run(input_ids=ids, labels=ids).loss.backward()
        return {name: grad.clone() for name, grad in adapter_grads(model).items()}

    for task_ids in ([0, 1, -1], [1, 1, 0]):
        ours, wanted = grads(compiled, task_ids), grads(model, task_ids)
        assert ours.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_another_batch_size_compiles_once_more():
    model = adapted()
    compiled, counter = whole(model)
    for rows in (2, 3, 4, 5):
        with route(torch.arange(rows) % 2):
            same(compiled, model, tokens(rows))
    assert counter.frame_count <= 2


def test_each_thread_reads_its_own_ids():
    model, ids = adapted(), tokens(2)
    compiled, _ = whole(model)
    found = {}

    def run(task):
        with route([task, task]), torch.no_grad():
            found[task] = compiled(input_ids=ids).logits

    run(0)
    with route([0, 0]):
        thread = threading.Thread(target=run, args=(1,))
        thread.start()
        thread.join()
    for task in (0, 1):
        with route([task, task]):
            torch.testing.assert_close(found[task], model(input_ids=ids).logits)


def test_a_recomputed_block_reads_the_ids_of_its_forward():
    """Compiled blocks inside an activation checkpoint: the backward runs outside of `route`."""
    from torch.utils.checkpoint import checkpoint

    layer = alora_kernels.FusedALoRALinear(8, 8, 2, tasks=2)
    torch.nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x, ids = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 1, -1, 0])
    with route(ids):
        y = checkpoint(alora_kernels.keep_routing(compiled), x, use_reentrant=False)
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted)


def test_a_layer_of_its_own():
    layer = alora_kernels.FusedALoRALinear(8, 6, 2, tasks=3)
    torch.nn.init.normal_(layer.lora_B)
    compiled, counter = whole(layer, "aot_eager")
    x = torch.randn(2, 5, 8)
    for task_ids in ([0, 2], [-1, 1]):
        with route(task_ids):
            torch.testing.assert_close(compiled(x), layer(x))
        routing = Routing(torch.tensor(task_ids))
        torch.testing.assert_close(layer(x, routing), layer(x, torch.tensor(task_ids)))
    assert counter.frame_count == 1


@needs_compiler
def test_inductor_compiles_it_too():
    model, ids = adapted(llama(layers=1)), tokens(2)
    compiled = torch.compile(model, fullgraph=True)
    with route([0, 1]), torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
