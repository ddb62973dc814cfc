"""The generation loop alone, with CUDA graphs and without: real ones on a GPU, where no other package is needed."""

from __future__ import annotations

import random
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from peft import inject_adapter_in_model

from alora_kernels.serving.batching import EngineConfig, TaskBatching
from alora_kernels.serving.request import Sampling
from alora_kernels.serving.sampling import Row
from alora_kernels.tuner import ALoRAConfig, ALoRALayer
from tests.support.fake_graphs import FakeGraphs
from tests.support.tiny import VOCAB, llama

TASKS = 3
SIZES = {"max_batch": 6, "max_context": 96, "cache_tokens": 768, "batch_tokens": 64, "page_size": 16}


class Table:
    """What a loop needs of a table of requests."""

    def __init__(self):
        self.running, self.eos, self.tokens, self.errors = {}, [], {}, []
        self.changed = threading.Condition()

    def output(self, id, generated, finished, error):
        with self.changed:
            self.errors += [error] if error else []
            if finished or error:
                self.tokens[id] = list(generated)
            self.changed.notify_all()

    def stepped(self, inside, tokens, requests):
        return []

    def wait(self, ids):
        with self.changed:
            assert self.changed.wait_for(lambda: self.tokens.keys() >= set(ids), 120)
        return [self.tokens[id] for id in ids]


def adapted(device):
    model = inject_adapter_in_model(
        ALoRAConfig(r=4, tasks=TASKS, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]), llama()
    )
    generator = torch.Generator().manual_seed(3)
    for layer in layers(model):
        for part in (layer.asymlora_A["default"], layer.asymlora_B["default"]):
            part.weight.data = 0.3 * torch.randn(part.weight.shape, generator=generator)
    return model.to(device).eval().requires_grad_(False)


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, ALoRALayer)]


def submitted(loop, table, first, count):
    """Requests of all tasks and of the base; every other one is sampled."""
    ids = []
    for i in range(first, first + count):
        slot = i % (TASKS + 1) - 1
        sampling = Sampling(max_tokens=6 + 5 * (i % 4), temperature=0.8 * (i % 2), top_k=20, ignore_eos=True)
        run = SimpleNamespace(
            generation=SimpleNamespace(id=f"request {i}"),
            prompt=[(7 * i + 3 * j) % VOCAB for j in range(2 + 5 * (i % 5))],
            row=Row(sampling, random.Random(i).random),
            lease=None if slot < 0 else SimpleNamespace(slot=slot),
        )
        table.running[run.generation.id] = run
        ids.append(run.generation.id)
        assert loop.add(run)
    return ids


def answers(device, cuda_graphs):
    """Of a first wave, and of a second, for which a task was given other numbers while the loop runs."""
    model, table = adapted(device), Table()
    config = EngineConfig(**SIZES, cuda_graphs=cuda_graphs).resolved(model)
    loop = TaskBatching(model, config, table, SimpleNamespace(step=nullcontext, stop=lambda: None))
    try:
        early = table.wait(submitted(loop, table, 0, 12))
        with torch.no_grad():
            for layer in layers(model):
                layer.asymlora_A["default"].weight[1].mul_(-2)
        if device == "cuda":
            torch.cuda.synchronize()
        late = table.wait(submitted(loop, table, 12, 12))
    finally:
        loop.stop(block=True, hard_stop=True)
    assert not table.errors
    return early + late


def test_replayed_steps_give_the_tokens_of_others(device, monkeypatch, caplog):
    replays = []
    if device == "cpu":
        fakes = FakeGraphs().install(monkeypatch)
    else:
        real = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or real(graph))
    wanted = answers(device, cuda_graphs=False)
    assert not replays
    found = answers(device, cuda_graphs=True)
    if device == "cpu":
        assert not fakes.faults
        replays = [None] * fakes.replays
    assert found == wanted and len(replays) > 20
    assert not [record for record in caplog.records if "CUDA graphs" in record.message]
    assert len({tuple(tokens) for tokens in found}) > 12
