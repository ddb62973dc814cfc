"""Steps that are captured and replayed answer as steps that are not, whatever comes, goes and is loaded meanwhile."""

from __future__ import annotations

import logging
import time
from collections import deque

import pytest
import torch

from alora_kernels import routing
from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore, batching
from alora_kernels.serving.batching import TaskBatching
from alora_kernels.serving.sampling import choose
from alora_kernels.serving.slots import Slots
from alora_kernels.tuner import ALoRALayer
from tests.support.adapters import alora_folder, tiny_base
from tests.support.cli import alora
from tests.support.fake_graphs import FakeGraphs, Graph, GraphError

TASKS = ("math", "code", "law", "news", "chat")
SIZES = {
    "max_batch": 8,
    "max_waiting": 64,
    "max_context": 128,
    "cache_tokens": 1024,
    "batch_tokens": 64,
    "page_size": 16,
}
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One adapter to begin with, and one with a task that comes later."""
    path, base = tmp_path_factory.mktemp("adapters"), tiny_base()[0]
    return alora_folder(path / "five", base, TASKS), alora_folder(path / "later", base, ["late"], seed=7, seed_b=0)


@pytest.fixture
def fakes(monkeypatch):
    return FakeGraphs().install(monkeypatch)


@pytest.fixture
def make(folders, fakes):
    """Engines that are stopped before their graphs go; three slots, so that tasks take turns in them."""
    made = []

    def build(cuda_graphs):
        base, tokenizer = tiny_base()
        store = TaskStore.open(base, [folders[0]], resident=3)
        made.append(Engine(base, tokenizer, store, EngineConfig(**SIZES, cuda_graphs=cuda_graphs)))
        return made[-1].start()

    yield build
    for engine in made:
        engine.stop()
        engine.store.close()


@pytest.fixture
def repeated(monkeypatch):
    """Why steps were repeated request by request, which hides what was wrong with them."""
    errors, real = [], TaskBatching._one_by_one
    monkeypatch.setattr(TaskBatching, "_one_by_one", lambda self, error: errors.append(error) or real(self, error))
    return errors


def a_busy_hour(engine, later):
    """Requests of tasks and of the base join and leave, some drawn with seeds, one of a task loaded meanwhile."""
    prompts = [engine.encode(f"request {i} says" + " again and again" * (i % 4)) for i in range(14)]
    long = engine.submit(prompts[0], "math", Sampling(max_tokens=50, temperature=0, ignore_eos=True))
    next(iter(long))
    taken = [long]
    for i, prompt in enumerate(prompts[1:9]):
        settings = Sampling(max_tokens=4 + 2 * i, temperature=0.9 * (i % 2), top_p=0.9, top_k=40 * (i % 3), seed=i)
        taken.append(engine.submit(prompt, (*TASKS, None)[i % 6], settings))
    next(iter(taken[4]))
    engine.store.load(later)
    for i, prompt in enumerate(prompts[9:]):
        taken.append(engine.submit(prompt, ("late", "law", None)[i % 3], Sampling(max_tokens=15, temperature=0)))
    return [generation.result(120).token_ids for generation in taken]


@pytest.fixture(scope="module")
def wanted(folders):
    """The answers of an engine as it is on a CPU."""
    base, tokenizer = tiny_base()
    with (
        TaskStore.open(base, [folders[0]], resident=3) as store,
        Engine(base, tokenizer, store, EngineConfig(**SIZES)) as engine,
    ):
        answers = a_busy_hour(engine, folders[1])
    assert len(set(answers)) == len(answers)
    return answers


def in_small_steps(monkeypatch):
    """Sizes are padded to few more than there are: many graphs, some of fewer rows than others."""
    real = batching.cache_config

    def config(sizes):
        made = real(sizes)
        made.q_padding_interval_size, made.kv_padding_interval_size = 3, 64
        return made

    monkeypatch.setattr(batching, "cache_config", config)


@pytest.mark.parametrize("steps", ["usual", "small"])
def test_every_answer_is_that_of_an_engine_without_graphs(make, fakes, repeated, folders, wanted, monkeypatch, steps):
    if steps == "small":
        in_small_steps(monkeypatch)
    found = a_busy_hour(make(cuda_graphs=True), folders[1])
    assert not fakes.faults and not repeated
    assert found == wanted
    assert fakes.replays > (30 if steps == "usual" else 20)
    assert fakes.captures == 1 if steps == "usual" else fakes.captures > 3


def replaced(kept):
    def prepare(self, *args, real=TaskBatching._prepare_batch_tensors, **kwargs):
        real(self, *args, **kwargs)
        kept.append(self._task_ids)
        self._task_ids = self._task_ids.clone()

    return TaskBatching, "_prepare_batch_tensors", prepare


def by_reference(self, scores, output_ids):
    self._scores = scores[0]


def sampled_inside(self, scores, output_ids, real=TaskBatching._sample):
    real(self, scores, output_ids)
    rows = [self._table.running[before.future.state.request_id].row for before in self._before]
    choose(scores[0, : len(rows)], rows)


def new_tensors(self, slot, matrices, real=Slots.write):
    for a in self._a.values():
        a.data = a.data.clone()
    real(self, slot, matrices)


BREAKS = {
    "ids in a new buffer": replaced(deque(maxlen=0)),
    "ids in a new buffer, the old one kept": replaced([]),
    "scores in the graph's own memory": (TaskBatching, "_sample", by_reference),
    "tokens chosen in the graph": (TaskBatching, "_sample", sampled_inside),
    "A in new tensors": (Slots, "write", new_tensors),
    "row groups made before the capture": (routing, "capturing", lambda device: False),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_test_above_sees(make, fakes, repeated, folders, wanted, monkeypatch, broken):
    monkeypatch.setattr(*BREAKS[broken])
    found = a_busy_hour(make(cuda_graphs=True), folders[1])
    assert fakes.faults or repeated or found != wanted


def test_a_task_whose_output_is_not_finite_fails_alone_and_graphs_go_on(make, fakes, caplog):
    engine = make(cuda_graphs=True)
    before = engine.generate(["one", "two"], ["math", "code"], GREEDY)
    lease = engine.store.acquire("law")
    for layer in engine.model.modules():
        if isinstance(layer, ALoRALayer):
            layer.asymlora_A["serving"].weight.data[lease.slot] = float("nan")
    engine.store.release(lease)
    done = engine.generate(["one", "bad", "two"], ["math", "law", "code"], GREEDY)
    assert [c.finish_reason for c in done] == ["length", "error", "length"] and "not finite" in done[1].error
    assert [done[0].token_ids, done[2].token_ids] == [c.token_ids for c in before]
    replays = fakes.replays
    assert [c.token_ids for c in engine.generate(["one", "two"], ["math", "code"], GREEDY)] == [
        c.token_ids for c in before
    ]
    assert fakes.replays > replays + 5 and fakes.captures == 1 and not fakes.faults and not caplog.records


def test_a_model_that_cannot_be_captured_is_served_without_and_says_so_once(make, fakes, caplog, monkeypatch):
    plain = make(cuda_graphs=False).generate(["one", "two"], ["math", None], GREEDY)
    real = type(make(cuda_graphs=False).model).forward

    def forward(self, *args, **kwargs):
        assert kwargs["input_ids"].max().item() >= 0  # what no graph can do
        return real(self, *args, **kwargs)

    engine = make(cuda_graphs=True)
    monkeypatch.setattr(type(engine.model), "forward", forward)
    with caplog.at_level(logging.WARNING, "alora_kernels"):
        done = [engine.generate(["one", "two"], ["math", None], GREEDY) for _ in range(2)]
    assert [[c.token_ids for c in answers] for answers in done] == [[c.token_ids for c in plain]] * 2
    assert fakes.captures == 1 and fakes.replays == 0 and len(fakes.faults) == 1
    (said,) = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert "_local_scalar_dense" in said


def test_a_loop_that_is_replaced_captures_its_own_steps(make, fakes, monkeypatch):
    """The cache and the buffers are new, so graphs of the old one would read what is gone."""
    engine = make(cuda_graphs=True)
    before = engine.generate(["one", "two"], ["math", None], GREEDY)
    real = TaskBatching._generation_loop_body

    def body(self, *args, **kwargs):
        monkeypatch.setattr(TaskBatching, "_generation_loop_body", real)
        raise RuntimeError("the scheduler is lost")

    monkeypatch.setattr(TaskBatching, "_generation_loop_body", body)
    while not engine.metrics.restarts._value.get():
        time.sleep(0.01)
    after = engine.generate(["one", "two"], ["math", None], GREEDY)
    assert [c.token_ids for c in after] == [c.token_ids for c in before]
    assert fakes.captures == 2 and not fakes.faults


def test_a_cpu_has_none(folders):
    with pytest.raises(
        ValueError, match=r"cuda_graphs .* replays the launches of a CUDA or ROCm GPU, and cpu has none"
    ):
        Engine(*tiny_base(), None, EngineConfig(**SIZES, cuda_graphs=True))
    serve = ("serve", "no-such-model", "--adapter", folders[0], "--port", 0, "--device", "cpu", "--cuda-graphs")
    assert "(--cuda-graphs) replays the launches" in " ".join(alora(*serve, code=2).split())  # nothing was loaded


def test_masks_and_numbers_on_the_host_are_faults(fakes):
    """What the captures above would have missed otherwise."""
    x = torch.arange(4.0)
    for bad in (
        lambda: x[x > 1], lambda: x.tolist(), lambda: bool(x[0]), lambda: x.nonzero(), lambda: torch.tensor([1]),
        lambda: x.cpu(), lambda: x.masked_select(x > 1), lambda: x.equal(x), lambda: x.repeat_interleave(x.long()),
    ):  # fmt: skip
        fakes.faults.clear()
        with pytest.raises(GraphError), fakes.capture(Graph(fakes)):
            bad()
        assert len(fakes.faults) == 1
