"""The HTTP server around a fake engine: replies, streams, refusals, clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from enginefakes import FakeEngine, FakeStore
from httpserver import running

from alora_kernels.adapters.asking import Prompt
from alora_kernels.adapters.cards import TaskCard
from alora_kernels.serving.http import ServerConfig, create_app
from alora_kernels.serving.http import app as application
from alora_kernels.serving.request import NotServingError, QueueFullError, Sampling

ASK = {"model": "movie", "prompt": "is it good"}
CHAT = "/v1/chat/completions"


def asker(app, address: str = "127.0.0.1"):
    """Requests from an address to an application, without a socket."""

    def ask(method: str, path: str, **more) -> httpx.Response:
        async def one() -> httpx.Response:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **more)

        return asyncio.run(one())

    return ask


def call(engine, method: str, path: str, config: ServerConfig | None = None, **more) -> httpx.Response:
    return asker(create_app(engine, config or ServerConfig("tiny")))(method, path, **more)


def post(engine, path: str = "/v1/completions", **fields) -> httpx.Response:
    return call(engine, "POST", path, json=fields)


def events(response: httpx.Response) -> list:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refused(response: httpx.Response, status: int, *words: str) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error
    return error


def test_completion(engine):
    reply = post(engine, **ASK).json()
    assert reply["object"] == "text_completion" and reply["model"] == "movie" and reply["id"].startswith("cmpl-")
    choice = {"index": 0, "text": "movie0 movie1 movie2 movie3 ", "logprobs": None, "finish_reason": "stop"}
    assert reply["choices"] == [choice]
    assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert engine.submitted == [("is it good", "movie", Sampling(max_tokens=16))]


def test_the_base_is_asked_by_its_name(engine):
    assert post(engine, model="tiny", prompt="x").json()["choices"][0]["text"].startswith("base0")
    assert engine.submitted[0][1] is None


@pytest.mark.parametrize(
    ("prompt", "taken"),
    [("a b", ["a b"]), (["a", "b c"], ["a", "b c"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_kind_of_prompt(engine, prompt, taken):
    choices = post(engine, model="spam", prompt=prompt).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(taken)))
    assert [prompt for prompt, _, _ in engine.submitted] == taken


def test_n_answers_per_prompt_have_their_own_seeds_and_the_prompt_counts_once(engine):
    reply = post(engine, model="movie", prompt=["a b", "c"], n=3, seed=7, max_tokens=2).json()
    assert [(prompt, s.seed) for prompt, _, s in engine.submitted] == [(p, s) for p in ("a b", "c") for s in (7, 8, 9)]
    assert len(reply["choices"]) == 6 and reply["choices"][5]["finish_reason"] == "length"
    assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_completion_stream(engine):
    chunks = events(post(engine, **ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == "movie0 movie1 movie2 movie3 "
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1 and {c["object"] for c in chunks} == {"text_completion"}


def test_a_stream_of_several_answers_tells_them_apart(engine):
    chunks = events(post(engine, model="movie", prompt=["a", "b"], n=2, stream=True))
    assert all("usage" not in chunk for chunk in chunks)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == dict.fromkeys(range(4), "movie0 movie1 movie2 movie3 ")


def test_chat():
    turns = [{"role": "developer", "content": "short"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    with FakeEngine(chat_template="yes") as engine:
        reply = post(engine, CHAT, model="spam", messages=turns).json()
        assert engine.submitted[0][0] == Prompt("<system> short <user> hi <assistant>", bos=False)
        assert engine.submitted[0][2].max_tokens == 64 - 5  # the whole context: OpenAI's default
        wrong = post(engine, CHAT, model="spam", messages=[{"role": "assistant", "content": "x"}])
        assert refused(wrong, 400, "must begin with the user")["param"] == "messages"
        refused(post(engine, CHAT, model="nope", messages=turns), 404, "no model or task is called 'nope'")
    assert reply["object"] == "chat.completion"
    message = {"role": "assistant", "content": "spam0 spam1 spam2 spam3 ", "refusal": None}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


def test_a_chat_without_any_template_is_refused_and_takes_the_newer_max_tokens_with_one(engine):
    fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "max_completion_tokens": 2}
    for model in ("spam", "tiny"):
        error = refused(post(engine, CHAT, model=model, **fields), 400, "no chat template", "/v1/completions")
        assert error["param"] == "messages"
    chunks = events(post(engine, CHAT, model="movie", **fields, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "movie0 "}, {"content": "movie1 "}, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_is_put_into_the_prompt_its_task_was_trained_on_and_a_completion_only_if_asked(engine):
    rendered, said = Prompt("Review: is it good\nSentiment:", spaced=True), ASK["prompt"]
    post(engine, CHAT, model="movie", messages=[{"role": "user", "content": said}])
    post(engine, **ASK)
    post(engine, **(ASK | {"prompt": [said, rendered.text]}), apply_template=True)
    assert [prompt for prompt, _, _ in engine.submitted] == [rendered, said, rendered, rendered]
    engine.store = FakeStore(["spam"], {"spam": TaskCard(chat=True, chat_template="{0} / {1} >", system="be short")})
    post(engine, model="spam", prompt=said, apply_template=True)
    assert engine.submitted[-1][0] == Prompt("be short / is it good >", bos=False)


@pytest.mark.parametrize(
    ("path", "fields", "said", "param"),
    [
        (CHAT, {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
         "task 'movie' was trained on single prompts, 'Review: {text}\\nSentiment:'", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": " "}]}, "the text is empty", "messages"),
        ("/v1/completions", {"prompt": "x", "model": "spam", "apply_template": True}, "no chat template", "prompt"),
        ("/v1/completions", {"prompt": [1, 2], "apply_template": True}, "needs texts", "apply_template"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_a_task_s_prompt_is_refused(engine, path, fields, said, param):
    assert refused(post(engine, path, **({"model": "movie"} | fields)), 400, said)["param"] == param
    assert not engine.submitted


def test_an_answer_without_a_text_is_said_once_and_embeddings_are_refused(engine, caplog):
    engine.words = 0
    for _ in range(2):
        assert post(engine, **ASK).json()["choices"][0]["text"] == ""
    assert caplog.text.count("task 'movie' ended an answer without a text: is it asked as in training?") == 1
    error = refused(post(engine, "/v1/embeddings", model="movie", input="x"), 400, "makes no embeddings")
    assert error["code"] == "unsupported_endpoint" and error["type"] == "invalid_request_error"


def test_models(engine):
    listed = call(engine, "GET", "/v1/models").json()
    parents = {one["id"]: one["parent"] for one in listed["data"]}
    assert list(parents.items()) == [("tiny", None), ("movie", "tiny"), ("spam", "tiny")]
    assert call(engine, "GET", "/v1/models/spam").json() == listed["data"][2]
    movie = {"template": "Review: {text}\nSentiment:", "answers": ["positive", "negative"]}
    asked = [one.get("prompt", "no key") for one in listed["data"]]
    movie |= {"sample": "Review: a warm, funny film.\nSentiment:", "chat": False, "chat_template": None, "system": None}
    assert asked == ["no key", movie, None]
    refused(call(engine, "GET", "/v1/models/nope"), 404, "nope", "tiny, movie, spam")
    slashes = ServerConfig("org/tiny")
    assert call(engine, "GET", "/v1/models/org/tiny", slashes).json()["id"] == "org/tiny"


def test_a_task_cannot_have_the_bases_name(engine):
    with pytest.raises(ValueError, match="movie"):
        create_app(engine, ServerConfig("movie"))


def test_an_unknown_model_is_404_with_the_known_names(engine):
    error = refused(post(engine, model="nope", prompt="x"), 404, "nope", "tiny, movie, spam")
    assert error["code"] == "model_not_found" and error["param"] == "model"


def test_engine_refusals_have_their_status(engine):
    full, soon = QueueFullError(9, 2.2), QueueFullError(9, 0.1)
    engine.refuse_next = [full, soon, NotServingError("draining"), KeyError("secret")]
    full = post(engine, **ASK)
    refused(full, 429, "9 requests")
    assert full.headers["retry-after"] == "3"
    assert post(engine, **ASK).headers["retry-after"] == "1"
    refused(post(engine, **ASK), 503, "draining")
    assert "secret" not in refused(post(engine, **ASK), 500)["message"]


def test_a_refused_prompt_cancels_those_before_it(engine):
    engine.hold()
    refused(post(engine, model="movie", prompt=["a", "b", ""]), 400, "empty")
    assert len(engine.submitted) == 2 and engine.cancelled == {"movie"} and engine.idle()


def test_more_answers_than_the_queue_holds_are_refused_as_such(engine):
    refused(post(engine, model="movie", prompt=["x"] * 64, n=2), 400, "128", "64")


def test_a_failed_answer_is_a_500_and_ends_its_siblings(engine):
    engine.words = 10**6  # the sibling would go on
    error = refused(post(engine, model="movie", prompt=["boom", "x"], max_tokens=60, ignore_eos=True), 500, "as asked")
    assert error["type"] == "server_error"
    assert engine.idle()


def test_a_failed_stream_says_so_in_the_stream():
    with FakeEngine(delay=0.01, words=10**6) as engine:
        chunks = events(post(engine, model="movie", prompt=["boom", "x"], stream=True, max_tokens=60))
        assert "as asked" in chunks[-1]["error"]["message"] and len(chunks) > 1
        assert engine.idle() and engine.cancelled == {"movie"}


def test_health_stats_metrics(engine):
    assert call(engine, "GET", "/health").json() == {"status": "ready"}
    post(engine, **ASK)
    stats = call(engine, "GET", "/stats").json()
    assert stats["requests_finished"] == 1 and stats["tasks"] == ["movie", "spam"] and stats["base"] == "tiny"
    metrics = call(engine, "GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain") and "alora_requests_total" in metrics.text
    engine.close()
    sick = call(engine, "GET", "/health")
    assert sick.status_code == 503 and sick.json() == {"status": "draining"}


def test_no_such_route_and_no_such_method(engine):
    refused(call(engine, "GET", "/v1/nothing"), 404, "/v1/nothing")
    wrong = call(engine, "GET", "/v1/completions")
    refused(wrong, 405, "GET")
    assert wrong.headers["allow"] == "POST"
    refused(call(engine, "GET", "/redoc"), 404)
    keyed = ServerConfig("tiny", api_keys=("key",))
    refused(call(engine, "GET", "/openapi.json", keyed), 401)
    assert call(engine, "GET", "/docs", keyed).status_code == 200  # a page that knows nothing by itself
    told = call(engine, "GET", "/openapi.json", keyed, headers={"Authorization": "Bearer key"}).json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"} < set(told["paths"])
    assert {"/", "/docs", "/v1/embeddings"}.isdisjoint(told["paths"])
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)))
    assert {"ChatRequest", "LoadAdapter", "Message"} <= named <= set(told["components"]["schemas"])
    assert told["components"]["schemas"]["CompletionRequest"]["required"] == ["model", "prompt"]


def test_the_page_comes_with_a_policy_and_only_what_lies_beside_it(engine, monkeypatch, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<h1>here</h1>")
    (tmp_path / "page" / "page.js").write_text("1")
    (tmp_path / "secret.js").write_text("no")
    monkeypatch.setattr(application, "PAGE", tmp_path / "page")
    page = call(engine, "GET", "/")
    assert page.text == "<h1>here</h1>" and "default-src 'self'" in page.headers["content-security-policy"]
    script = call(engine, "GET", "/page.js")
    assert "javascript" in script.headers["content-type"] and script.headers["x-content-type-options"] == "nosniff"
    for path in ("/secret.js", "/../secret.js", "/%2e%2e/secret.js", "/index.html"):
        refused(call(engine, "GET", path), 404)
    monkeypatch.setattr(application, "PAGE", tmp_path / "absent")
    refused(call(engine, "GET", "/"), 404, "not installed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answers(stream):
    with FakeEngine(words=10**6, delay=0.005) as engine, running(engine) as url:
        engine.hold() if not stream else None
        fields = {"model": "movie", "prompt": ["a", "b"], "max_tokens": 60, "stream": stream}
        with httpx.Client(base_url=url) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=fields) as response:
                    next(response.iter_lines())
                    engine.hold()
            else:
                with ThreadPoolExecutor(1) as pool:
                    asked = pool.submit(client.post, "/v1/completions", json=fields, timeout=httpx.Timeout(60, read=2))
                    while not engine.stats().running and not asked.done():
                        time.sleep(0.01)
                    assert isinstance(asked.exception(), httpx.ReadTimeout)
        assert engine.idle(60), "answers that nobody reads still run"
        assert engine.cancelled == {"movie"}


def test_the_event_loop_is_free_while_an_engine_submits(engine):
    slow, seen, real = asyncio.Event(), threading.Event(), engine.submit

    def submit(*args, **more):
        seen.wait(30)  # in vain where the loop itself waits for this call
        return real(*args, **more)

    engine.submit = submit
    app = create_app(engine, ServerConfig("tiny"))

    async def both() -> list[str]:
        order: list[str] = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://here") as client:

            async def ask() -> None:
                slow.set()
                await client.post("/v1/completions", json=ASK)
                order.append("answer")

            async def look() -> None:
                await slow.wait()
                await client.get("/health")
                order.append("health")
                seen.set()

            await asyncio.gather(ask(), look())
        return order

    assert asyncio.run(both()) == ["health", "answer"]
