"""OpenAI's endpoints /v1/completions and /v1/chat/completions: from the bytes of a POST to an answer.

Fields are OpenAI's, and vLLM's top_k and ignore_eos; `model` names the task or the base; ranges are left to the engine.
A chat is put into the prompt its task was trained on, the prompt of a completion only with `apply_template`.
No field is taken without effect: one that is not supported is refused unless its value asks for nothing (`NEUTRAL`);
one that only labels a request is dropped (`IGNORED`); any other name is a mistake and is refused.

Python's own JSON reader takes NaN, half surrogates and a nesting that ends in a RecursionError; pydantic's refuses all
three. Bytes are counted while they come, because a chunked request announces no length. Only `application/json` is
taken: a browser sends that across origins only after asking, and this server never says yes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from anyio.to_thread import run_sync
from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ...adapters.asking import Prompt
from ..request import MAX_LOGPROBS, Completion, Logprob, Piece, Sampling
from .answer import EventStream, Json, Reply, answer, submit
from .errors import ApiError
from .security import ServerConfig

if TYPE_CHECKING:
    from ..engine import Engine

MOST_CHOICES, MOST_PROMPTS, MOST_MESSAGES = 8, 64, 1024
SETTINGS = {"max_tokens", "temperature", "top_p", "top_k", "ignore_eos"}  # called alike in `Sampling`
UNLIMITED = -1  # vLLM's top_k for "no limit"; ours is 0
COMPLETION_TOKENS = 16  # OpenAI's default; a chat may fill the context

IGNORED = frozenset(["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"])
#: field -> values that ask for nothing; None is one of each
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (), "echo": (False,), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],),
    "logit_bias": ({},), "modalities": (["text"],), "parallel_tool_calls": (True, False),
    "prediction": (), "presence_penalty": (0,), "reasoning_effort": ("none",), "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"), "store": (False,), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "top_logprobs": (0,), "verbosity": (), "web_search_options": (),
}  # fmt: skip
#: what there is instead
REMEDY = {"response_format": 'only {"type": "text"} is: answers are not held to JSON, so say their form in the prompt'}


class Fields(BaseModel):
    """No conversions ("5" is not 5), no unknown names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Fields)
WHERE = "#/components/schemas/{model}"  # in the document that describes the interface


def takes(model: type[Fields]) -> Json:
    """Says to FastAPI, which does not read bodies here, what the body of a route is."""
    schema = {"$ref": WHERE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read(request: Request, model: type[Model], config: ServerConfig) -> Model:
    """Read a request's body, which may be so long and take so long, and check it; an ApiError 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be JSON with Content-Type: application/json, not {kind[:80]!r}")
    try:
        async with asyncio.timeout(config.request_timeout):
            content = await _bytes(request, config.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {config.request_timeout:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away before the body was complete") from None
    try:
        fields = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return _checked(fields, model)


async def _bytes(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    too_long = ApiError(413, f"the body is longer than {limit} bytes, the most this server takes", code="body_too_long")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_long
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise too_long
    return bytes(content)


def _checked(fields: Json, model: type[Model]) -> Model:
    for name in [name for name in fields if name not in model.model_fields]:
        if name in NEUTRAL and not _is_neutral(name, fields[name]):
            said = f"{name} is not supported: {REMEDY.get(name, 'leave it out')}"
            raise ApiError(400, said, name, "unsupported_field")
        if name in NEUTRAL or name in IGNORED:
            del fields[name]
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown field {where[:200]!r}", where[:200], "unknown_field") from None
        said = first["msg"].removeprefix("Value error, ")
        if not where:  # of several fields: the words begin with the one at fault
            raise ApiError(400, said, said.partition(" ")[0], "invalid_value") from None
        raise ApiError(400, f"{where}: {said}", where, "invalid_value") from None


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field that is not supported asks for nothing; 0 is not False: `logprobs: 0` asks for something."""
    alike = (value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name])
    return value is None or any(alike)


# Texts are checked by hand and only up to the first mistake: a union type would report each of 300 000 wrong ids four
# times. What these return is not looked at again.


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or many, of text or of token ids, as a list of prompts; the engine knows which ids there are."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, a list of token ids, or a list of one of them that is not empty")
    if len(value) > MOST_PROMPTS:
        raise ValueError(f"at most {MOST_PROMPTS} prompts in one request, got {len(value)}")
    if all(isinstance(one, str) for one in value) or all(_is_ids(one) for one in value):
        return value
    raise ValueError("prompts must be all texts or all lists of token ids (whole numbers >= 0), none of them empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _content(value: Any) -> str:
    """The text of a message: a string, or parts of type text joined by line ends."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("content must be a text or a list of parts of type text")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('parts of content must be {"type": "text", "text": ...}: this model reads only text')
    return "\n".join(part["text"] for part in value)


def _stops(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class StreamOptions(Fields):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # padding against traffic analysis: none is added here


class Asked(Fields):
    """What completions and chats have in common."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: Annotated[list[str], FailFast(), BeforeValidator(_stops)] = Field(default_factory=list, max_length=64)
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def samplings(self, max_tokens: int) -> list[Sampling]:
        """Settings of the n choices, with a seed each its own; `max_tokens` where the request names none."""
        asked = {"max_tokens": max_tokens} | self.model_dump(include=SETTINGS, exclude_none=True)
        if asked.get("top_k") == UNLIMITED:
            asked["top_k"] = 0
        seeds = [None if self.seed is None else self.seed + choice for choice in range(self.n or 1)]
        return [Sampling(**asked, stop=tuple(self.stop), seed=seed, logprobs=self.scores()) for seed in seeds]

    def scores(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells no log probability."""
        raise NotImplementedError


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts, json_schema_input_type=str | list[str | int | list[int]])]
    apply_template: bool | None = None  # texts are what a user says, and are put into the task's prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None

    def scores(self) -> int | None:
        """As asked."""
        return self.logprobs

    @model_validator(mode="after")
    def _all_are_best(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is only supported where it equals n: answers are not ranked")
        return self


class Message(Fields):
    """One turn of a chat; a developer's message is a system message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, BeforeValidator(_content, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None


class ChatRequest(Asked):
    """POST /v1/chat/completions; max_completion_tokens is the newer name of max_tokens."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _scores_are_asked_for(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def scores(self) -> int | None:
        """As asked."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionReply(Reply):
    """Of /v1/completions: the text, whole or piece by piece; an empty piece that is not the last is left out."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, said: Completion | Piece) -> Json:
        """A text, and why it ends if it does."""
        logprobs = self._logprobs(said.logprobs) if self.scored else None
        return {"text": said.text, "logprobs": logprobs, "finish_reason": said.finish_reason}

    def parts(self, piece: Piece) -> list[Json]:
        """At most one."""
        return [self.choice(piece)] if piece.text or piece.finish_reason or piece.logprobs else []

    @staticmethod
    def _logprobs(tokens: Sequence[Logprob]) -> Json:
        """Of tokens that read alike the likelier one is told; the token itself always is."""
        likely = [{one.text: one.value for one in (token, *reversed(token.top), token)} for token in tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.value for token in tokens],
            "top_logprobs": likely,
            "text_offset": [token.offset for token in tokens],
        }


def _delta(delta: Json, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _scored(token: Logprob) -> Json:
    known = None if "\ufffd" in token.text else list(token.text.encode())  # a part of a character reads so
    return {"token": token.text, "logprob": token.value, "bytes": known}


class ChatReply(Reply):
    """Of /v1/chat/completions: the first delta of a stream has the role, the last one only the finish reason."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening = (_delta({"role": "assistant", "content": ""}),)

    def choice(self, completion: Completion) -> Json:
        """The whole message."""
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(completion), "finish_reason": completion.finish_reason}

    def parts(self, piece: Piece) -> list[Json]:
        """The text, if any; then the finish reason, if any."""
        logprobs = self._logprobs(piece) if piece.logprobs else None
        text = [_delta({"content": piece.text}, None, logprobs)] if piece.text or logprobs else []
        return text + ([_delta({}, piece.finish_reason)] if piece.finish_reason else [])

    def _logprobs(self, said: Completion | Piece) -> Json | None:
        if not self.scored:
            return None
        content = [_scored(token) | {"top_logprobs": [_scored(one) for one in token.top]} for token in said.logprobs]
        return {"content": content, "refusal": None}


def chat_prompt(engine: Engine, task: str | None, messages: Sequence[Message]) -> Prompt:
    """The prompt of a chat, as the task was asked in training; a developer's turns are the system's."""
    turns = [message.model_dump(include={"role", "content", "name"}, exclude_none=True) for message in messages]
    return engine.prompt([turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns], task)


def text_prompts(engine: Engine, task: str | None, texts: Sequence[Any]) -> list[Prompt]:
    """The prompts of what a user says, as the task was asked in training."""
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(
            400, "apply_template needs texts: token ids are a whole prompt", "apply_template", "invalid_value"
        )
    return [engine.prompt(text, task) for text in texts]


def add_routes(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """The two routes. A stream's status is sent with its first event: all that can be refused is refused before."""

    def task_of(asked: Asked) -> str | None:
        return None if asked.model == config.base_model_id else asked.model

    async def answered(
        request: Request, asked: Asked, prompts: Sequence[Any], kind: type[Reply], max_tokens: int
    ) -> Response:
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options needs stream to be true", "stream_options", "invalid_value")
        samplings = asked.samplings(max_tokens)
        generations = await submit(engine, task_of(asked), prompts, samplings)
        with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        reply = kind(asked.model, generations, len(samplings), with_usage, asked.scores() is not None)
        return EventStream(reply) if asked.stream else await answer(reply, request.receive)

    @app.post("/v1/completions", openapi_extra=takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        asked = await read(request, CompletionRequest, config)
        if asked.apply_template:
            asked.prompt = await run_sync(text_prompts, engine, task_of(asked), asked.prompt)
        return await answered(request, asked, asked.prompt, CompletionReply, COMPLETION_TOKENS)

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat(request: Request) -> Response:
        asked = await read(request, ChatRequest, config)
        if asked.max_completion_tokens is not None:
            asked.max_tokens = asked.max_completion_tokens
        # a template is a program: not in the loop
        prompt = await run_sync(chat_prompt, engine, task_of(asked), asked.messages)
        whole_context = engine.config.max_context or 1  # named: the engine cuts it to what the prompt leaves
        return await answered(request, asked, [prompt], ChatReply, whole_context)

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        said = "this server generates texts and makes no embeddings: ask a model that is made for them"
        raise ApiError(400, said, None, "unsupported_endpoint")
