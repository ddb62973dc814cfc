"""OpenAI's own client, sync and async, against a real server on a loopback port."""

from __future__ import annotations

import asyncio

import pytest
from enginefakes import FakeEngine
from httpserver import running

from alora_kernels.serving.http import ServerConfig
from alora_kernels.serving.request import QueueFullError

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: pip install openai")

ANSWER = "movie0 movie1 movie2 movie3 "
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def engine():
    with FakeEngine(chat_template="yes") as fake:
        yield fake


@pytest.fixture(scope="module")
def url(engine):
    with running(engine, ServerConfig("tiny", api_keys=("key",))) as address:
        yield address + "/v1"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="key", max_retries=0) as one:
        yield one


def test_completion_and_stream(client):
    reply = client.completions.create(model="movie", prompt="a b", max_tokens=9, extra_body={"top_k": 4})
    assert reply.choices[0].text == ANSWER and reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == 6
    options = {"include_usage": True}
    chunks = list(client.completions.create(model="movie", prompt="a b", stream=True, stream_options=options))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == 4 and not chunks[-1].choices


def test_chat_and_stream(client):
    reply = client.chat.completions.create(model="movie", messages=MESSAGES)
    assert reply.choices[0].message.content == ANSWER and reply.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="movie", messages=MESSAGES, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_stream_helper_puts_the_answer_together(client):
    with client.chat.completions.stream(model="movie", messages=MESSAGES, n=2) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == [ANSWER] * 2


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "movie", "spam"]
    assert client.models.retrieve("spam").owned_by == "alora-kernels"


def test_refusals_become_the_clients_exceptions(client, engine, url):
    with pytest.raises(openai.NotFoundError, match="movie"):
        client.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools") as caught:
        client.chat.completions.create(
            model="movie", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert caught.value.param == "tools" and caught.value.code == "unsupported_field"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    engine.refuse_next = [QueueFullError(3, 1.0)]
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="movie", prompt="x")
    assert full.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.InternalServerError, match="boom"):
        client.completions.create(model="movie", prompt="boom")


def test_a_failure_in_a_stream_is_raised_by_the_client(client):
    with pytest.raises(openai.APIError, match="boom"):
        list(client.completions.create(model="movie", prompt="boom", stream=True))


def test_a_full_queue_is_waited_for_by_a_client_that_retries(engine, url):
    engine.refuse_next = [QueueFullError(3, 0.1)]
    with openai.OpenAI(base_url=url, api_key="key", max_retries=2) as patient:
        assert patient.completions.create(model="movie", prompt="x").choices[0].text == ANSWER


def test_many_at_once_in_asyncio(url):
    async def ask(client, model: str, stream: bool) -> str:
        if not stream:
            return (await client.completions.create(model=model, prompt="x")).choices[0].text
        chunks = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="key") as client:
            models = ["movie", "spam", "tiny"] * 8
            return await asyncio.gather(*(ask(client, model, at % 2 == 0) for at, model in enumerate(models)))

    answers = asyncio.run(all_of_them())
    assert answers == [ANSWER, ANSWER.replace("movie", "spam"), ANSWER.replace("movie", "base")] * 8
