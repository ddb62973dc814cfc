"""The real server around the real engine, under load and with clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from http.client import HTTPConnection

import httpx
import openai
import pytest
import torch
from enginefakes import FakeEngine
from httpserver import running
from truth import alone, merged_models

from alora_kernels import files
from alora_kernels.serving import Engine, EngineConfig, TaskStore
from alora_kernels.serving.http import ServerConfig
from tests.support.adapters import alora_folder, tiny_base

TASKS = ("movie", "spam", "news", "law")
MODELS = (*TASKS, "base")
TOKENS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def folder(root):
    return alora_folder(root / "four", tiny_base()[0], TASKS)


@pytest.fixture(scope="module")
def truth(folder):
    """model name, prompt -> the text and tokens of the answer."""
    models, tokenizer, known = merged_models(folder, TASKS), tiny_base()[1], {}

    def answer(model, prompt):
        if (model, prompt) not in known:
            tokens = alone(models[None if model == "base" else model], tokenizer(prompt)["input_ids"], TOKENS)
            head = tokenizer(prompt)["input_ids"]
            whole = tokenizer.decode(head + list(tokens), skip_special_tokens=True)
            known[model, prompt] = whole[len(tokenizer.decode(head, skip_special_tokens=True)) :]
        return known[model, prompt]

    return answer


@pytest.fixture
def serve(folder, root):
    """Start a server; its address and its engine."""
    open_ones = []

    def start(sizes=None, resident=8, host=None, spill=None, **config):
        base, tokenizer = tiny_base()
        store = TaskStore.open(base, [folder], resident=resident, host=host, spill=spill)
        defaults = {"max_batch": 16, "max_waiting": 400, "max_context": 256, "cache_tokens": 2048, "page_size": 16}
        engine = Engine(base, tokenizer, store, EngineConfig(**(defaults | (sizes or {})))).start()
        server = running(engine, ServerConfig("base", adapter_roots=(root,), **config))
        open_ones.append((server, engine, store))
        return server.__enter__(), engine

    yield start
    for server, engine, store in open_ones:
        server.__exit__(None, None, None)
        engine.stop()
        store.close()


def body(i, **more):
    prompt = f"text number {i % 20} of the many"
    return {"model": MODELS[i % 5], "prompt": prompt, "max_tokens": TOKENS, "temperature": 0} | more


def empty(engine):
    """Nothing runs, waits, or holds a task."""
    deadline = time.monotonic() + 60
    while True:
        now = engine.stats()
        held = sum(task.in_use for task in engine.store.tasks())
        if (now.running, now.waiting, now.cache_used, held) == (0, 0, 0, 0):
            return True
        assert time.monotonic() < deadline, (now, held)
        time.sleep(0.01)


async def many(url, jobs):
    """All jobs at once, each a coroutine of a client."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(job(client) for job in jobs))


def whole(i, **more):
    async def job(client):
        return await client.post("/v1/completions", json=body(i, **more))

    return job


def streamed(i, leave_after=None):
    async def job(client):
        text = ""
        async with client.stream("POST", "/v1/completions", json=body(i, stream=True)) as response:
            assert response.status_code == 200
            n = 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    n += 1
                    if n == leave_after:
                        return None
        return text

    return job


def test_two_hundred_at_once_each_get_their_own_task(serve, truth):
    url, engine = serve(resident=3)  # fewer slots than tasks: rows come and go under load
    jobs = [streamed(i) if i % 2 else whole(i) for i in range(200)]
    for i, answer in enumerate(asyncio.run(many(url, jobs))):
        text = answer if i % 2 else answer.json()["choices"][0]["text"]
        assert text == truth(body(i)["model"], body(i)["prompt"])
    assert engine.stats().requests_finished == 200 and empty(engine)


def test_clients_that_leave_mid_stream_leave_nothing_behind(serve, truth):
    url, engine = serve()
    jobs = [streamed(i, leave_after=1 + i % 3 if i % 3 else None) for i in range(60)]
    for i, answer in enumerate(asyncio.run(many(url, jobs))):
        assert answer is None if i % 3 else answer == truth(body(i)["model"], body(i)["prompt"])
    assert empty(engine)


def test_bad_requests_among_good_ones(serve, truth):
    url, engine = serve()
    bad = [
        ({"model": "maths"}, 404, "movie, spam, news, law"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "word " * 400}, 400, "together may have 256"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [49152 + 5]}, 400, "vocabulary"),
        ({"temperature": -1}, 400, "temperature"),
        ({"logprobs": 9}, 400, "logprobs"),
    ]
    jobs = [whole(i) for i in range(70)]
    jobs[::10] = [whole(i, **fields) for i, (fields, _, _) in enumerate(bad)]
    raw = [b'{"model": "movie", "temperature": NaN}', b"{not json", b'{"prompt": "' + b"a" * (2 << 20) + b'"}']
    kind = {"content-type": "application/json"}
    jobs += [lambda client, raw=raw: client.post("/v1/completions", content=raw, headers=kind) for raw in raw]
    *answers, nan, broken, huge = asyncio.run(many(url, jobs))
    for i, answer in enumerate(answers):
        if i % 10:
            assert answer.json()["choices"][0]["text"] == truth(body(i)["model"], body(i)["prompt"])
        else:
            _, status, words = bad[i // 10]
            assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert (nan.status_code, broken.status_code, huge.status_code) == (400, 400, 413)
    assert all("message" in answer.json()["error"] for answer in (nan, broken, huge))
    assert empty(engine)


def test_a_small_queue_pushes_back_and_patient_clients_are_all_served(serve, truth):
    url, engine = serve({"max_batch": 2, "max_waiting": 3})
    refused = [r for r in asyncio.run(many(url, [whole(i) for i in range(30)])) if r.status_code == 429]
    assert refused and all(int(r.headers["retry-after"]) >= 1 for r in refused)
    assert {r.json()["error"]["code"] for r in refused} == {"queue_full"}

    async def patient():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=12)
        async with client:
            return await asyncio.gather(*(client.completions.create(**body(i)) for i in range(12)))

    for i, answer in enumerate(asyncio.run(patient())):
        assert answer.choices[0].text == truth(body(i)["model"], body(i)["prompt"])
    assert empty(engine)


def spoiled(folder, to, how):
    """A copy of an adapter folder with one thing wrong."""
    shutil.copytree(folder, to)
    weights = to / "adapter_model.safetensors"
    data = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "corrupt":
        weights.write_bytes(b"\xff" * 64 + data[64:])
    elif how == "pickle":
        weights.unlink()
        torch.save({"a": torch.zeros(1)}, to / "adapter_model.bin")
    elif how == "no config":
        (to / "adapter_config.json").unlink()
    return to


def test_adapters_come_go_and_are_refused_while_requests_run(serve, truth, root, folder, tmp_path):
    url, engine = serve()
    other = alora_folder(root / "more", tiny_base()[0], ["sport"], seed=5, seed_b=0)
    own_b = alora_folder(root / "own_b", tiny_base()[0], ["alien"], seed=6, seed_b=6)
    outside = shutil.copytree(other, tmp_path / "outside")
    (root / "link").symlink_to(outside)
    wrong = [
        (spoiled(other, root / how.replace(" ", "_"), how), 400)
        for how in ("truncated", "corrupt", "pickle", "no config")
    ]
    wrong += [
        (own_b, 400),
        (outside, 403),
        (root / "link", 403),
        (root / ".." / outside.name, 403),
        (root / "absent", 400),
    ]

    def load(name, path, **more):
        fields = {"lora_name": name, "lora_path": str(path)} | more
        return lambda client: client.post("/v1/load_lora_adapter", json=fields)

    jobs = [whole(i) for i in range(80)]
    jobs += [load(f"bad{i}", path) for i, (path, _) in enumerate(wrong)]
    jobs += [load("sport", other)]
    answers = asyncio.run(many(url, jobs))
    for i in range(80):
        assert answers[i].json()["choices"][0]["text"] == truth(body(i)["model"], body(i)["prompt"])
    for (path, status), answer in zip(wrong, answers[80:]):
        assert answer.status_code == status, (path, answer.text)
    assert "success" in answers[-1].text.lower()
    names = {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
    assert names == {*MODELS, "sport"}

    async def unload_in_use(client):
        async with client.stream(
            "POST", "/v1/completions", json=body(0, model="sport", max_tokens=200, stream=True)
        ) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "sport"})
            late = await client.post("/v1/completions", json=body(0, model="sport"))
            rest = [line async for line in lines if line.startswith("data: {")]
        return gone, late, rest

    ((gone, late, rest),) = asyncio.run(many(url, [unload_in_use]))
    assert gone.status_code == 200 and late.status_code == 404
    assert json.loads(rest[-1][6:])["choices"][0]["finish_reason"] == "length"  # the one that ran went on to its end
    assert empty(engine)


def post(connection, path, fields):
    """On a connection that is not opened again: its status, JSON or text, and headers."""
    connection.auto_open = 0
    connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text = reply.read().decode()
    return reply.status, json.loads(text) if text.startswith("{") else text, reply.headers


def connected(url):
    connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.connect()
    return connection


def test_a_full_disk_is_said_and_the_connection_goes_on(serve, truth, root, tmp_path, monkeypatch):
    url, _ = serve(resident=4, host=0, spill=tmp_path / "spill")
    other = alora_folder(root / "fifth", tiny_base()[0], ["fifth"], seed=5, seed_b=0)
    load = {"lora_name": "fifth", "lora_path": str(other)}
    connection = connected(url)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        status, said, _ = post(connection, "/v1/load_lora_adapter", load)
    message = said["error"]["message"]
    assert (status, said["error"]["code"]) == (507, "insufficient_storage")
    assert "No space left on device" in message and str(tmp_path / "spill") in message and "--spill" in message
    assert post(connection, "/v1/completions", body(0))[1]["choices"][0]["text"] == truth("movie", body(0)["prompt"])
    assert post(connection, "/v1/load_lora_adapter", load)[0] == 200
    assert post(connection, "/v1/completions", body(0, model="fifth"))[0] == 200


def test_a_connection_that_ends_after_a_fault_says_so():
    with FakeEngine() as engine, running(engine) as url:
        engine.faults["movie"] = RuntimeError("nobody has thought of it")
        status, said, headers = post(connected(url), "/v1/completions", {"model": "movie", "prompt": "x"})
        assert (status, said["error"]["code"], headers["connection"]) == (500, "internal_error", "close")


def test_tasks_whose_folder_on_the_disk_is_removed_answer_right_or_say_what_to_do(serve, truth, folder, tmp_path):
    url, engine = serve(resident=1, host=0, spill=tmp_path / "spill")
    shutil.rmtree(tmp_path / "spill")
    for i in range(8):
        assert httpx.post(f"{url}/v1/completions", json=body(i)).json()["choices"][0]["text"] == truth(
            body(i)["model"], body(i)["prompt"]
        )
    assert httpx.post(f"{url}/v1/completions", json=body(0)).status_code == 200  # the others are on the disk
    shutil.rmtree(tmp_path / "spill")
    shutil.move(folder, tmp_path / "kept")
    try:
        alora_folder(folder, tiny_base()[0], TASKS, seed=9, seed_b=0)
        lost = httpx.post(f"{url}/v1/completions", json=body(1))
        streamed = httpx.post(f"{url}/v1/completions", json=body(1, stream=True))
    finally:
        shutil.rmtree(folder)
        shutil.move(tmp_path / "kept", folder)
    for said in (lost.json(), json.loads(streamed.text.split("\n")[0].removeprefix("data: "))):
        assert said["error"]["code"] == "task_lost" and "load_inplace" in said["error"]["message"]
    assert lost.status_code == 503
    assert httpx.post(f"{url}/v1/completions", json=body(0)).status_code == 200
    assert empty(engine)
