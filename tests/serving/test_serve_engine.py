"""The engine against the truth: every request of a mixed batch answers as its task merged into the base would alone."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time
import weakref

import pytest
import torch
from peft import PeftModel
from tokenizerkinds import added
from truth import alone, merged_models

from alora_kernels import set_task
from alora_kernels.adapters.asking import Prompt
from alora_kernels.adapters.cards import FILE, TaskCard, write_task_cards
from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore
from alora_kernels.serving.batching import TaskBatching
from alora_kernels.serving.request import (
    NotServingError,
    QueueFullError,
    RequestError,
    TaskReplacedError,
    UnknownTaskError,
)
from alora_kernels.tuner import ALoRALayer
from tests.support.adapters import alora_folder, tiny_base

TASKS = ("math", "code", "law", "news", "chat")
GREEDY = Sampling(max_tokens=12, temperature=0)
SMALL = EngineConfig(max_batch=8, max_waiting=64, max_context=128, cache_tokens=1024, batch_tokens=64, page_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return alora_folder(tmp_path_factory.mktemp("adapter") / "five", tiny_base()[0], TASKS)


@pytest.fixture(scope="module")
def merged(folder):
    return merged_models(folder, TASKS)


@pytest.fixture
def make(folder):
    """Engines that are stopped at the end of the test."""
    made = []

    def build(config=SMALL, **store):
        base, tokenizer = tiny_base()
        engine = Engine(base, tokenizer, TaskStore.open(base, [folder], **({"resident": 8} | store)), config)
        made.append(engine)
        return engine.start()

    yield build
    for engine in made:
        engine.stop()
        engine.store.close()


def prompts(engine, n):
    return [engine.encode(f"request number {i} says" + " again and again" * (i % 5)) for i in range(n)]


@pytest.mark.parametrize("resident", [8, 2], ids=["all tasks resident", "two slots for five tasks"])
@pytest.mark.parametrize("cache", [1024, 160], ids=["roomy cache", "cache for three requests"])
def test_a_mixed_batch_equals_each_request_alone_with_its_task_merged(make, merged, resident, cache):
    engine = make(
        EngineConfig(max_batch=8, max_context=128, cache_tokens=cache, batch_tokens=64, page_size=16), resident=resident
    )
    ids = prompts(engine, 36)
    tasks = [(*TASKS, None)[i % 6] for i in range(36)]
    done = engine.generate(ids, tasks, GREEDY)
    assert [c.token_ids for c in done] == [alone(merged[task], p) for p, task in zip(ids, tasks)]
    assert all(c.task == task and c.finish_reason in ("length", "stop") for c, task in zip(done, tasks))


def test_the_same_prompt_for_every_task_shares_no_cache(make, merged):
    """transformers finds equal prefixes by tokens: with block sharing a task would read another's keys and values."""
    engine = make()
    prompt = engine.encode("the very same prompt for everyone, long enough to fill blocks " * 3)
    for _ in range(2):  # the second time everything would be in the cache
        done = engine.generate([prompt] * 6, [*TASKS, None], GREEDY)
        assert [c.token_ids for c in done] == [alone(merged[task], prompt) for task in (*TASKS, None)]
    answers = {alone(merged[task], prompt) for task in (*TASKS, None)}
    assert len(answers) > 3  # the tasks do differ


def test_block_sharing_would_be_wrong(make, merged, monkeypatch):
    """The test above can fail: with sharing on, some answers are those of another task."""
    from alora_kernels.serving import batching as module

    made = module.cache_config

    def sharing(*sizes):
        config = made(*sizes)
        config.allow_block_sharing = True
        return config

    monkeypatch.setattr(module, "cache_config", sharing)
    engine = make()
    prompt = engine.encode("the very same prompt for everyone, long enough to fill blocks " * 3)
    wrong = 0
    for task in (*TASKS, None):
        wrong += engine.generate([prompt], task, GREEDY)[0].token_ids != alone(merged[task], prompt)
    assert wrong


def test_pieces_add_up_and_end_once(make):
    engine = make()
    generation = engine.submit("tell me", "math", Sampling(max_tokens=9, temperature=0))
    pieces = list(generation)
    completion = generation.result(1)
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [piece.finish_reason for piece in pieces].count(None) == len(pieces) - 1
    assert pieces[-1].tokens == completion.completion_tokens == 9 and pieces[-1].finish_reason == "length"
    assert list(generation) == pieces  # a second reader gets all of it
    assert completion.first_token is not None and completion.queued <= completion.first_token <= completion.seconds


def test_prompts_that_end_inside_a_character_are_not_repeated(make):
    """Every cut of a text with emoji, several tasks at once: pieces, text and what the tokens truly add are one."""
    engine = make()
    ids = engine.encode("Weather: sunny ☀ 🌍🎉 and 日本語 today")
    cuts = [ids[:n] for n in range(1, len(ids))]
    running = [engine.submit(prompt, TASKS[n % 5], GREEDY) for n, prompt in enumerate(cuts)]
    for prompt, generation in zip(cuts, running, strict=True):
        pieces, completion = list(generation), generation.result(1)
        assert "".join(piece.text for piece in pieces) == completion.text
        assert completion.text == added(engine.tokenizer, prompt, list(completion.token_ids))
    assert any(engine.tokenizer.decode(prompt).endswith("\ufffd") for prompt in cuts)


def test_sampling_is_repeatable_with_a_seed_whatever_runs_beside_it(make):
    engine = make()
    wanted = Sampling(max_tokens=15, temperature=0.8, top_p=0.9, seed=11)
    first = engine.generate(["once upon"], "law", wanted)[0]
    noise = [engine.submit(f"noise {i}", TASKS[i % 5], Sampling(max_tokens=30, seed=i)) for i in range(6)]
    again = engine.generate(["once upon"], "law", wanted)[0]
    other = engine.generate(["once upon"], "law", Sampling(max_tokens=15, temperature=0.8, top_p=0.9, seed=12))[0]
    assert first.token_ids == again.token_ids != other.token_ids
    assert all(g.result(20).completion_tokens for g in noise)


def test_stop_text_ends_the_request_and_frees_its_place(make):
    engine = make()
    free = engine.generate(["tell me more"], "code", Sampling(max_tokens=40, temperature=0))[0]
    stop = free.text[5:9]
    done = engine.generate(["tell me more"], "code", Sampling(max_tokens=40, temperature=0, stop=(stop,)))[0]
    assert done.finish_reason == "stop" and done.text == free.text[: free.text.index(stop)]
    assert done.completion_tokens < free.completion_tokens
    assert engine.drain(5) and engine.stats().running == 0


def test_end_of_text_token_stops_unless_ignored(make, merged):
    engine = make()
    prompt = engine.encode("tell me")
    tokens = alone(merged["math"], prompt)
    engine.stop()
    base, tokenizer = tiny_base()
    base.generation_config.eos_token_id = [tokens[3]]
    store = TaskStore.open(base, [engine.store.tasks()[0].folder], resident=8)
    with Engine(base, tokenizer, store, SMALL) as other:
        first = tokens.index(tokens[3])
        done = other.generate([prompt], "math", GREEDY)[0]
        assert done.token_ids == tokens[: first + 1] and done.finish_reason == "stop"
        forced = other.generate([prompt], "math", Sampling(max_tokens=12, temperature=0, ignore_eos=True))[0]
        assert forced.token_ids == tokens and forced.finish_reason == "length"


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


def in_use(engine):
    return sum(task.in_use for task in engine.store.tasks())


def test_log_probabilities_are_the_models_own_and_the_end_of_text_is_left_out(make, merged):
    """Beside float64, for requests that ask for none, for their own tokens alone, and for the likeliest."""
    engine, wanted = make(), [None, 0, 5, 20]
    ids = prompts(engine, 4)
    taken = [
        engine.submit(p, task, Sampling(max_tokens=9, temperature=0.7 * (n == 20), seed=n, logprobs=n, ignore_eos=True))
        for p, task, n in zip(ids, ("math", None, "code", "math"), wanted)
    ]
    pieces = [[*one] for one in taken]
    for prompt, generation, count, streamed in zip(ids, taken, wanted, pieces):
        done = generation.result()
        assert done.logprobs == sum((piece.logprobs for piece in streamed), ())
        if count is None:
            assert done.logprobs == ()
            continue
        whole = torch.tensor([[*prompt, *done.token_ids]])
        with torch.no_grad():
            logits = merged[done.task](whole).logits[0, len(prompt) - 1 : -1].double()
        truth, decode = logits.log_softmax(-1), engine.tokenizer.decode
        for token, one, row in zip(done.token_ids, done.logprobs, truth, strict=True):
            best = row.topk(count)
            torch.testing.assert_close(one.value, row[token].item(), rtol=0, atol=1e-4)
            torch.testing.assert_close(torch.tensor([t.value for t in one.top]), best.values.float(), rtol=0, atol=1e-4)
            assert [t.text for t in one.top] == [decode([id]) for id in best.indices.tolist()]
        assert [one.text for one in done.logprobs] == [decode([token]) for token in done.token_ids]
        lengths = [len(one.text) for one in done.logprobs]
        assert [one.offset for one in done.logprobs] == [sum(lengths[:i]) for i in range(len(lengths))]


def test_a_repeated_step_tells_log_probabilities_once(make, monkeypatch):
    """As the end of text ends the answer, and is no token of its text."""
    engine = make()
    real, failed = TaskBatching._tell_scores, []

    def once(self, runs, tokens):
        real(self, runs, tokens)
        if not failed:
            failed.append(1)
            raise RuntimeError("after it has been told")

    monkeypatch.setattr(TaskBatching, "_tell_scores", once)
    prompt = engine.encode("tell me")
    plain = engine.submit(prompt, "math", Sampling(max_tokens=6, temperature=0, logprobs=1)).result()
    assert (
        failed
        and len(plain.logprobs) == len(plain.token_ids)
        and all(x.value == x.top[0].value for x in plain.logprobs)
    )
    engine._table.eos.append(plain.token_ids[-1])
    ended = engine.submit(prompt, "math", Sampling(max_tokens=99, temperature=0, logprobs=1)).result()
    known = plain.token_ids.index(plain.token_ids[-1])
    assert ended.finish_reason == "stop" and ended.logprobs == plain.logprobs[:known]


def test_a_prompt_is_never_asked_of_a_version_with_another_template(make, folder):
    engine = make()
    write_task_cards(folder, {"math": TaskCard("Sum: {text}\nResult:", ("one",))})
    try:
        engine.store.load(folder, name="math", task="math", replace=True)
        prompt = engine.prompt("1 + 1", "math")
        engine.store.load(folder, name="math", task="math", replace=True)  # other numbers perhaps, the same words
        assert engine.submit(prompt, "math", Sampling(max_tokens=1)).result().error is None
        write_task_cards(folder, {"math": TaskCard("Add: {text}\nSum:", ("one",))})
        engine.store.load(folder, name="math", task="math", replace=True)
        with pytest.raises(TaskReplacedError, match="'math' was replaced while its prompt was made: ask again"):
            engine.submit(prompt, "math")
    finally:
        (folder / FILE).unlink()


def test_a_task_is_asked_as_in_training_and_its_answer_has_no_space_before_it(make, folder, monkeypatch):
    write_task_cards(folder, {"math": TaskCard("Sum: {text}\nResult:", ("one",))})
    try:
        engine = make()
    finally:
        (folder / FILE).unlink()
    prompt = engine.prompt("1 + 1", "math")
    assert prompt == Prompt("Sum: 1 + 1\nResult:", spaced=True) and engine.encode(prompt) == engine.encode(prompt.text)
    taken: list = []
    with monkeypatch.context() as patch:
        patch.setattr(engine._table, "enqueue", taken.append)
        engine.submit(prompt, "math")
        engine.submit(prompt.text, "math")
    ids = engine.tokenizer(" one").input_ids
    assert [run.text.feed(ids) + run.text.finish() for run in taken] == ["one", " one"]
    assert engine.prompt("hi").text.endswith("<|im_start|>assistant\n") and not engine.prompt("hi", "code").spaced
    with pytest.raises(UnknownTaskError, match="known are math"):
        engine.prompt("hi", "nothing")
    with pytest.raises(RequestError, match="single prompts"):
        engine.prompt([{"role": "system", "content": "x"}], "math")


def test_an_answer_ends_where_the_chat_template_of_its_task_ends_a_turn(make, folder):
    template = "{% for m in messages %}{{ m.content }}~END~\n{% endfor %}"
    write_task_cards(folder, {"math": TaskCard(chat=True, chat_template=template), "code": TaskCard(chat=True)})
    try:
        engine = make()
    finally:
        (folder / FILE).unlink()
    prompt = engine.encode("tell me")
    whole = {task: engine.submit(prompt, task, GREEDY).result().token_ids for task in ("math", "code")}
    for task, ended in (("math", True), ("code", False)):
        last = whole[task][-1]
        engine._special = {"~END~": last}
        done = engine.submit(prompt, task, GREEDY).result()
        assert done.finish_reason == ("stop" if ended else "length")
        assert done.token_ids == (whole[task][: whole[task].index(last) + 1] if ended else whole[task])


def test_cancelling_running_and_waiting_requests_frees_everything(make):
    engine = make(EngineConfig(max_batch=2, max_waiting=8, max_context=128, cache_tokens=512, page_size=16))
    long = Sampling(max_tokens=120, temperature=0)
    running = [engine.submit("go on", "math", long) for _ in range(2)]
    waiting = [engine.submit("go on", "code", long) for _ in range(3)]
    next(iter(running[0]))
    for generation in [*running, *waiting]:
        generation.cancel()
        generation.cancel()
    assert {g.result(60).finish_reason for g in [*running, *waiting]} == {"cancelled"}
    wait_until(lambda: in_use(engine) == 0)
    assert engine.generate(["and now"], "law", GREEDY)[0].completion_tokens == 12
    assert engine.stats().waiting == 0


def test_cancelling_at_random_moments_loses_nothing(make, merged):
    engine = make()
    ids = prompts(engine, 30)
    taken = [engine.submit(p, TASKS[i % 5], GREEDY) for i, p in enumerate(ids)]
    for i, generation in enumerate(taken):
        if i % 3 == 0:
            time.sleep(0.002)
            generation.cancel()
    for i, generation in enumerate(taken):
        done = generation.result(20)
        if done.finish_reason != "cancelled":
            assert done.token_ids == alone(merged[TASKS[i % 5]], ids[i])
        else:
            assert i % 3 == 0
    wait_until(lambda: in_use(engine) == 0 and engine.stats().cache_used == 0)


def test_a_full_queue_refuses_and_says_when_to_come_back(make):
    engine = make(EngineConfig(max_batch=1, max_waiting=2, max_context=128, cache_tokens=128, page_size=16))
    long = Sampling(max_tokens=100, temperature=0)
    first = engine.submit("go on", "math", long)
    next(iter(first))
    others = [engine.submit("go on", "math", long) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
        engine.submit("go on", "math", long)
    assert caught.value.retry_after >= 1
    assert b'alora_requests_refused_total{reason="QueueFull"} 1.0' in engine.metrics.text()
    assert [g.result(30).finish_reason for g in (first, *others)] == ["length"] * 3


def test_what_cannot_be_served_is_named(make):
    engine = make()
    with pytest.raises(UnknownTaskError, match="'maths': known are math, code, law, news, chat"):
        engine.submit("x", "maths")
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.submit([], "math")
    with pytest.raises(RequestError, match="the prompt has 128 tokens and prompt and answer together may have 128"):
        engine.submit([5] * 128, "math")
    for wrong in (-1, 49152, True, "a"):
        with pytest.raises(RequestError, match="is not in the vocabulary"):
            engine.submit([3, wrong], "math")
    done = engine.generate([[5] * 120], "math", Sampling(max_tokens=50, temperature=0))[0]
    assert done.completion_tokens == 8 and done.finish_reason == "length"  # cut to the context
    with pytest.raises(ValueError, match="2 prompts need as many tasks"):
        engine.generate(["a", "b"], ["math"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_batch": 0}, "max_batch must be >= 1"),
        ({"page_size": 2}, "page_size must be >= 4"),
        ({"max_context": 10**6}, "the model reads at most"),
        ({"max_context": 100, "cache_tokens": 50}, "cache_tokens is 50, less than one request"),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Engine(*tiny_base(), None, EngineConfig(**sizes))


def test_a_task_that_is_replaced_or_unloaded_answers_to_the_end_as_it_began(make, merged, tmp_path):
    base, _ = tiny_base()
    engine = make()
    newer = alora_folder(tmp_path / "newer", base, ["math"], seed=7, seed_b=0)
    renewed = merged_models(newer, ["math"])["math"]
    prompt = engine.encode("a long answer please")
    long = Sampling(max_tokens=90, temperature=0)
    old = engine.submit(prompt, "math", long)
    next(iter(old))
    engine.store.load(newer, replace=True)
    new = engine.submit(prompt, "math", long)
    gone = engine.submit(prompt, "code", long)
    next(iter(gone))
    engine.store.unload("code")
    with pytest.raises(UnknownTaskError):
        engine.submit(prompt, "code")
    assert old.result(30).token_ids == alone(merged["math"], prompt, 90)
    assert new.result(30).token_ids == alone(renewed, prompt, 90) != old.result().token_ids
    assert gone.result(30).token_ids == alone(merged["code"], prompt, 90)


def test_tasks_change_all_the_time_and_every_answer_belongs_to_one_version(make, merged, tmp_path):
    base, _ = tiny_base()
    engine = make(resident=3)
    newer = alora_folder(tmp_path / "newer", base, ["math", "law"], seed=7, seed_b=0)
    renewed = merged_models(newer, ["math", "law"])
    old_folder, stop = engine.store.tasks()[0].folder, threading.Event()

    def churn():
        for turn in range(10**6):
            if stop.is_set():
                return
            engine.store.load(newer if turn % 2 else old_folder, name="math", replace=True)
            engine.store.load(newer if turn % 3 else old_folder, name="law", replace=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        prompt = engine.encode("whose words are these")
        tasks = [("math", "law", "code", None)[i % 4] for i in range(60)]
        done = engine.generate([prompt] * 60, tasks, GREEDY)
    finally:
        stop.set()
        thread.join()
    for task, completion in zip(tasks, done):
        possible = {alone(merged[task], prompt)} | ({alone(renewed[task], prompt)} if task in renewed else set())
        assert completion.token_ids in possible


def test_asyncio_readers_share_one_thread(make, merged):
    engine = make()
    ids = prompts(engine, 12)

    async def read(prompt, task):
        text = ""
        generation = engine.submit(prompt, task, GREEDY)
        async for piece in generation:
            text += piece.text
        assert text == (await generation.wait()).text
        return generation.result(0).token_ids

    async def all_of_them():
        before = threading.active_count()
        results = await asyncio.gather(*(read(p, TASKS[i % 5]) for i, p in enumerate(ids)))
        assert threading.active_count() == before
        return results

    assert asyncio.run(all_of_them()) == [alone(merged[TASKS[i % 5]], p) for i, p in enumerate(ids)]


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("steps", ["prompt", "answer"])
def test_a_request_that_breaks_its_batch_fails_alone(make, merged, monkeypatch, steps):
    engine = make()
    ids, poison = prompts(engine, 9), 49000
    real = type(engine.model).forward
    seen = []

    def forward(self, *args, **kwargs):
        tokens = kwargs["input_ids"]
        seen.append(tokens.shape[1])
        if (tokens == poison).any() or (steps == "answer" and len(seen) > 4 and tokens.shape[1] == 1):
            raise Boom("this batch cannot be computed")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(engine.model), "forward", forward)
    if steps == "prompt":
        taken = [engine.submit(p, TASKS[i % 5], GREEDY) for i, p in enumerate(ids)]
        bad = engine.submit([5, poison, 5], "math", GREEDY)
        assert "cannot be computed" in bad.result(20).error and bad.result().finish_reason == "error"
        assert [g.result(20).token_ids for g in taken] == [alone(merged[TASKS[i % 5]], p) for i, p in enumerate(ids)]
    else:  # a request alone in its batch fails; the loop goes on
        assert engine.submit(ids[0], "math", GREEDY).result(20).finish_reason == "error"
        monkeypatch.setattr(type(engine.model), "forward", real)
        assert engine.generate([ids[0]], "math", GREEDY)[0].token_ids == alone(merged["math"], ids[0])
    assert engine.state == "ready" and engine.metrics.restarts._value.get() == 0
    wait_until(lambda: in_use(engine) == 0)


def test_a_task_whose_output_is_not_finite_fails_alone(make, merged):
    engine = make()
    ids = prompts(engine, 6)
    lease = engine.store.acquire("law")
    for layer in engine.model.modules():
        if isinstance(layer, ALoRALayer):
            for stacked in layer.asymlora_A.values():
                stacked.weight.data[lease.slot] = float("nan")
    engine.store.release(lease)
    done = engine.generate(ids, [*TASKS, None], GREEDY)
    assert [c.finish_reason for c in done] == ["length", "length", "error", "length", "length", "length"]
    assert "not finite" in done[2].error
    for i, task in enumerate((*TASKS, None)):
        if task != "law":
            assert done[i].token_ids == alone(merged[task], ids[i])


def test_a_loop_that_dies_is_replaced_and_only_its_requests_fail(make, monkeypatch):
    engine = make()
    real, broken = TaskBatching._generation_loop_body, threading.Event()

    def body(self, *args, **kwargs):
        if broken.is_set():
            broken.clear()
            raise Boom("the scheduler is lost")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TaskBatching, "_generation_loop_body", body)
    victim = engine.submit("go on", "math", Sampling(max_tokens=120, temperature=0))
    next(iter(victim))
    broken.set()
    assert "the scheduler is lost" in victim.result(60).error
    assert engine.generate(["again"], "math", GREEDY)[0].completion_tokens == 12
    assert engine.metrics.restarts._value.get() == 1 and engine.state == "ready"
    wait_until(lambda: in_use(engine) == 0)


def test_an_engine_whose_loop_always_dies_says_so_and_stops_trying(make, monkeypatch):
    def body(self, *args, **kwargs):
        raise Boom("never works")

    monkeypatch.setattr(TaskBatching, "_generation_loop_body", body)
    engine = make()
    wait_until(lambda: engine.state == "failed")
    with pytest.raises(NotServingError, match="failed"):
        engine.submit("x")


def test_drain_finishes_what_runs_and_refuses_the_rest(make):
    engine = make()
    taken = [engine.submit("go on", TASKS[i % 5], Sampling(max_tokens=40, temperature=0)) for i in range(12)]
    engine.close()
    with pytest.raises(NotServingError, match="draining"):
        engine.submit("too late")
    assert engine.drain(30)
    assert [g.result(0).finish_reason for g in taken] == ["length"] * 12


def test_stop_ends_everything_at_once_and_twice_is_harmless(make):
    engine = make()
    taken = [engine.submit("go on", "math", Sampling(max_tokens=110, temperature=0)) for _ in range(20)]
    engine.stop()
    engine.stop()
    assert all(g.result(1).finish_reason in ("cancelled", "length") for g in taken)
    assert any("stopped" in (g.result().error or "") for g in taken)
    assert in_use(engine) == 0
    with pytest.raises(NotServingError, match="make a new one"):
        engine.start()


def test_an_engine_that_nobody_holds_ends_its_threads(folder):
    base, tokenizer = tiny_base()
    engine = Engine(base, tokenizer, None, SMALL).start()
    threads = {t for t in threading.enumerate() if t.name.startswith("alora-")}
    assert len(threads) >= 2
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    wait_until(lambda: not any(t.is_alive() for t in threads))


def test_numbers_of_a_running_engine(make):
    engine = make()
    assert engine.stats().state == "ready" and engine.stats().tasks_known == 5
    engine.generate(["one", "two"], ["math", None], GREEDY)
    running = engine.submit("go on", "math", Sampling(max_tokens=110, temperature=0))
    next(iter(running))
    now = engine.stats()
    assert now.running == 1 and now.batch_requests == 1 and now.requests_finished == 2 and 0 < now.cache_used < 1
    assert now.tokens_per_second > 0 and now.uptime > 0
    running.cancel()
    text = engine.metrics.text().decode()
    assert 'alora_requests_total{finish_reason="length",task="math"} 1.0' in text
    assert 'alora_generated_tokens_total{task="(base)"} 12.0' in text
    assert "alora_bytes_per_task" in text and "alora_time_to_first_token_seconds_bucket" in text


def test_the_head_can_be_adapted_too(tmp_path):
    base, tokenizer = tiny_base()
    if base.config.tie_word_embeddings:
        base.config.tie_word_embeddings = False
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    folder = alora_folder(tmp_path / "head", base, ["one", "two"], target_modules=["q_proj", "lm_head"])
    ids = tokenizer("what is the word")["input_ids"]
    models = merged_models(folder, ["one", "two"], base)
    wanted = [alone(models[task], ids) for task in ("one", "two")]
    with Engine(base, tokenizer, TaskStore.open(base, [folder], resident=4), SMALL) as engine:
        done = engine.generate([ids, ids], ["one", "two"], GREEDY)
    assert [c.token_ids for c in done] == wanted


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word:UserWarning")
def test_an_adapter_on_the_output_layer_which_sees_fewer_rows_than_the_model_has_tokens(tmp_path):
    tasks_known = TASKS[:3]
    first = alora_folder(tmp_path / "first", tiny_base()[0], tasks_known, target_modules=["q_proj", "lm_head"])
    model = PeftModel.from_pretrained(tiny_base()[0], first)
    model.save_pretrained(tmp_path / "stock")  # with lm_head's own weight beside its adapter
    base, tokenizer = tiny_base()
    assert base.config.tie_word_embeddings  # the adapter is for the output only
    engine = Engine(base, tokenizer, TaskStore.open(base, [tmp_path / "stock"], resident=4), SMALL).start()
    try:
        ids = prompts(engine, 12)
        tasks = [(*tasks_known, None)[i % 4] for i in range(12)]
        done = engine.generate(ids, tasks, GREEDY)
    finally:
        engine.stop()
        engine.store.close()
    wanted = []
    for prompt, task in zip(ids, tasks, strict=True):  # unmerged: a merge would change the input embeddings too
        set_task(model, task or "__base__")
        wanted.append(alone(model, prompt))
    assert [c.token_ids for c in done] == wanted
    set_task(model, "__base__")
    assert sum(alone(model, prompt) != answer for prompt, answer in zip(ids, wanted, strict=True)) > 3  # the control


def test_what_waits_is_answered_by_the_version_it_was_submitted_with(make, merged, tmp_path):
    """Unloaded, replaced, or both: with one slot for all of them, and the old ones moved to the disk meanwhile."""
    engine = make(EngineConfig(max_batch=1, max_context=128, page_size=16), resident=1, host=0, spill=tmp_path / "disk")
    newer = alora_folder(tmp_path / "newer", tiny_base()[0], ["math"], seed=7, seed_b=0)
    prompt = engine.encode("who answers this")
    running = engine.submit(prompt, "law", Sampling(max_tokens=60, temperature=0))
    next(iter(running))
    old = [engine.submit(prompt, task, GREEDY) for task in ("math", "code", "math", "news")]
    engine.store.load(newer, replace=True)
    new = engine.submit(prompt, "math", GREEDY)
    cancelled = engine.submit(prompt, "math", GREEDY)
    for task in ("math", "code", "law"):
        engine.store.unload(task)
        with pytest.raises(UnknownTaskError):
            engine.submit(prompt, task)
    cancelled.cancel()
    assert [one.result(60).token_ids for one in old] == [
        alone(merged[task], prompt) for task in ("math", "code", "math", "news")
    ]
    renewed = alone(merged_models(newer, ["math"])["math"], prompt)
    assert new.result(60).token_ids == renewed != alone(merged["math"], prompt)
    assert running.result(60).token_ids == alone(merged["law"], prompt, 60)
    wait_until(lambda: not engine.store._leases)
    assert engine.store.names() == ["news", "chat"] and len(list((tmp_path / "disk").rglob("*.safetensors"))) <= 2


def test_rows_that_are_not_brought_into_the_model_fail_one_request(make, merged, monkeypatch):
    engine = make()
    with monkeypatch.context() as broken:
        broken.setattr(engine.store._placement, "bring", lambda record: 1 / 0)
        failed = engine.submit("one", "math", GREEDY).result(60)
    assert failed.finish_reason == "error" and "not brought into the model: division by zero" in failed.error
    prompt = engine.encode("another")
    assert engine.submit(prompt, "math", GREEDY).result(60).token_ids == alone(merged["math"], prompt)
    wait_until(lambda: not engine.store._leases)


def numbers(text):
    """The lines of a scrape, by what stands before their value."""
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_requests_add_up_at_any_scrape(make):
    """Taken are those that ended, run or wait, whatever is cancelled, refused and unloaded at that moment."""
    engine, stop, scrapes = make(dataclasses.replace(SMALL, max_batch=3, max_waiting=6)), threading.Event(), []

    def scrape():
        while not stop.is_set():
            scrapes.append(numbers(engine.metrics.text()))

    thread = threading.Thread(target=scrape)
    thread.start()
    taken, refused = [engine.submit("first", "law", Sampling(max_tokens=4))], 0
    taken[0].result(60)
    try:
        for i in range(60):
            try:
                taken.append(engine.submit(f"number {i}", (*TASKS[:4], None)[i % 5], Sampling(max_tokens=4, seed=i)))
            except (QueueFullError, UnknownTaskError):
                refused += 1
                time.sleep(0.01)
            if i % 3 == 0:
                taken[i // 3].cancel()
            if i in (20, 30):
                engine.store.unload(TASKS[i // 10])
        ends = [one.result(60).finish_reason for one in taken]
    finally:
        stop.set()
        thread.join()
    last = numbers(engine.metrics.text())
    for now in [*scrapes, last]:
        ended = sum(value for name, value in now.items() if name.startswith("alora_requests_total{"))
        assert now["alora_requests_taken_total"] == (
            ended + now["alora_requests_running"] + now["alora_requests_waiting"]
        )
    assert len({now["alora_requests_taken_total"] for now in scrapes}) > 3 and refused
    assert last["alora_requests_taken_total"] == len(taken) and last["alora_requests_waiting"] == 0
    assert last["alora_request_seconds_count"] == ends.count("length") + ends.count("stop") < len(ends)
    assert last["alora_time_to_first_token_seconds_count"] == last["alora_request_seconds_count"]
    assert not any("law" in name or "news" in name for name in last) and any("math" in name for name in last)
    assert any(name.startswith("alora_requests_total") and "(unloaded)" in name for name in last)


def test_series_of_tasks_that_come_and_go_do_not_pile_up_where_nobody_scrapes(make, tmp_path):
    engine = make()
    other = alora_folder(tmp_path / "other", tiny_base()[0], ["one"], seed=7, seed_b=0)
    for turn in range(4):
        engine.store.load(other, name=f"name{turn}")
        engine.submit("x", f"name{turn}", Sampling(max_tokens=1)).result(60)
        engine.store.unload(f"name{turn}")
    labels = {sample.labels["task"] for family in engine.metrics.tokens.collect() for sample in family.samples}
    assert labels == {"(unloaded)", "name3"}
    text = engine.metrics.text().decode()
    assert "name3" not in text and 'alora_generated_tokens_total{task="(unloaded)"} 4.0' in text
