"""Every field of OpenAI's requests has its effect or is refused by name; none is taken and forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from enginefakes import FakeEngine
from test_serve_http import ASK, events, post, refused

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TURN = {"role": "user", "content": "is it good"}
BODY = {COMPLETIONS: ASK, CHAT: {"model": "movie", "messages": [TURN]}}
TOOL = {"type": "function", "function": {"name": "f"}}

#: what asks for something that is not done here
REFUSED: list[tuple[str, str, Any]] = [
    *((COMPLETIONS, "logprobs", value) for value in (-1, 6, 0.0, True, False)),
    *((CHAT, "logprobs", value) for value in (0, 1)),
    *((CHAT, "top_logprobs", value) for value in (1, 20, 21, -1, False)),  # and logprobs is not true
    *((COMPLETIONS, "apply_template", value) for value in (1, "yes")),
    (CHAT, "apply_template", True),
    *((COMPLETIONS, "best_of", value) for value in (0, 2, True, "1")),
    *((COMPLETIONS, "echo", value) for value in (True, 0, 1)),
    (COMPLETIONS, "suffix", "x"),
    (COMPLETIONS, "max_completion_tokens", 3),
    (CHAT, "best_of", 1),
    *((CHAT, "tools", value) for value in ([TOOL], {}, "f")),
    *((CHAT, "tool_choice", value) for value in ("required", {"type": "function", "function": {"name": "f"}})),
    (CHAT, "functions", [{"name": "f"}]),
    (CHAT, "function_call", {"name": "f"}),
    (CHAT, "audio", {"voice": "a", "format": "wav"}),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "prediction", {"type": "content", "content": "x"}),
    (CHAT, "reasoning_effort", "high"),
    (CHAT, "verbosity", "low"),
    (CHAT, "web_search_options", {}),
    *((path, "response_format", {"type": kind}) for path in BODY for kind in ("json_object", "json_schema")),
    *((path, "logit_bias", {"50": -100}) for path in BODY),
    *(
        (path, name, value)
        for path in BODY
        for name in ("presence_penalty", "frequency_penalty")
        for value in (0.5, -2)
    ),
    *((path, "store", True) for path in BODY),
    *((path, "service_tier", "priority") for path in BODY),
    *((path, "n", value) for path in BODY for value in (0, 9, True, "2")),
    *((path, "seed", value) for path in BODY for value in (True, 0.5, 2**64)),
    *((path, "top_p", value) for path in BODY for value in (0, 1.5)),
    *((path, "stream_options", value) for path in BODY for value in ({"include_usage": 1}, {"other": True})),
    *((path, "stream_options", {"include_obfuscation": True}) for path in BODY),
    *((path, name, 1) for path in BODY for name in ("min_p", "repetition_penalty", "guided_json", "min_tokens")),
]

#: the same names, asking for nothing
NONE = ["logprobs", "n", "temperature", "stop", "seed", "max_tokens", "stream", "top_k"]
NEUTRAL: list[tuple[str, str, Any]] = [
    (COMPLETIONS, "best_of", 1), (COMPLETIONS, "echo", False), (COMPLETIONS, "suffix", ""),
    (CHAT, "logprobs", False), (CHAT, "modalities", ["text"]), (COMPLETIONS, "apply_template", False),
    *((path, name, value) for path in BODY for name, value in [
        ("top_logprobs", 0), ("tools", []), ("tool_choice", "none"), ("parallel_tool_calls", True),
        ("response_format", {"type": "text"}), ("presence_penalty", 0.0), ("frequency_penalty", 0), ("logit_bias", {}),
        ("store", False), ("service_tier", "auto"), ("user", "me"), ("metadata", {"a": "b"}), ("top_k", -1),
        *((name, None) for name in NONE),
    ]),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    with FakeEngine(chat_template="yes") as fake:
        yield fake


@pytest.mark.parametrize(("path", "name", "value"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_has_no_effect_here_is_refused_by_name(engine, path, name, value, stream):
    before = len(engine.submitted)
    error = refused(post(engine, path, **BODY[path], stream=stream, **{name: value}), 400, name)
    assert error["param"].partition(".")[0] == name and error["type"] == "invalid_request_error"
    assert len(engine.submitted) == before


@pytest.mark.parametrize(("path", "name", "value"), NEUTRAL)
def test_what_asks_for_nothing_changes_nothing(engine, path, name, value):
    plain, other = post(engine, path, **BODY[path]), post(engine, path, **BODY[path], **{name: value})
    assert other.status_code == 200, other.text
    assert other.json()["choices"] == plain.json()["choices"]
    assert engine.submitted[-1] == engine.submitted[-2]


@pytest.mark.parametrize("path", BODY)
@pytest.mark.parametrize(
    ("name", "value", "setting", "seen"),
    [("max_tokens", 2, "max_tokens", 2), ("temperature", 0, "temperature", 0), ("top_p", 0.5, "top_p", 0.5),
     ("top_k", 3, "top_k", 3), ("stop", "x", "stop", ("x",)), ("stop", ["\n", "."], "stop", ("\n", ".")),
     ("seed", 5, "seed", 5), ("ignore_eos", True, "ignore_eos", True)],
)  # fmt: skip
def test_what_is_taken_reaches_the_engine(engine, path, name, value, setting, seen):
    post(engine, path, **BODY[path])
    assert getattr(engine.submitted[-1][2], setting) != seen
    post(engine, path, **BODY[path], **{name: value, **({"max_tokens": 5} if name == "ignore_eos" else {})})
    assert getattr(engine.submitted[-1][2], setting) == seen


def test_log_probabilities_in_both_of_openais_forms_and_in_streams(engine):
    prompt = {"text_offset": [0, 7], "tokens": ["movie0 ", "movie1 "], "token_logprobs": [-0.5, -0.5]}
    prompt["top_logprobs"] = [{f"movie{n} ": -0.5, "other0": -0.5, "other1": -1.5} for n in (0, 1)]
    asked = BODY[COMPLETIONS] | {"logprobs": 2, "max_tokens": 2}
    assert post(engine, **asked).json()["choices"][0]["logprobs"] == prompt
    streamed = [chunk["choices"][0]["logprobs"] for chunk in events(post(engine, **asked, stream=True))]
    assert {name: [value for one in streamed for value in one[name]] for name in prompt} == prompt

    def of(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    top = [of("other0", -0.5), of("other1", -1.5)]
    tokens = [of(f"movie{n} ", -0.5) | {"top_logprobs": top} for n in (0, 1)]
    asked = BODY[CHAT] | {"logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    assert post(engine, CHAT, **asked).json()["choices"][0]["logprobs"] == {"content": tokens, "refusal": None}
    chunks = [chunk["choices"][0] for chunk in events(post(engine, CHAT, **asked, stream=True))]
    assert [one for chunk in chunks if chunk["logprobs"] for one in chunk["logprobs"]["content"]] == tokens
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "movie0 movie1 "
    plain = post(engine, CHAT, **BODY[CHAT], logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert plain == [of("movie0 ", -0.5) | {"top_logprobs": []}]


def test_the_number_of_answers_usage_and_the_newer_name_of_the_length(engine):
    assert len(post(engine, **ASK, n=2).json()["choices"]) == 2
    assert len(post(engine, **ASK, n=3, best_of=3).json()["choices"]) == 3
    refused(post(engine, **ASK, n=3, best_of=1), 400, "best_of is only supported where it equals n")
    chat = BODY[CHAT]
    assert post(engine, CHAT, **chat, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2
    with_usage = events(post(engine, CHAT, **chat, stream=True, stream_options={"include_usage": True}))
    without = events(post(engine, CHAT, **chat, stream=True, stream_options={"include_obfuscation": False}))
    assert with_usage[-1]["usage"] and all("usage" not in chunk for chunk in without)
    refused(post(engine, CHAT, **chat, stream_options={"include_usage": True}), 400, "stream_options needs stream")


def test_a_name_in_a_chat_is_for_the_template(engine):
    from enginefakes import FakeTokenizer

    seen: list[dict[str, str]] = []
    real = FakeTokenizer.apply_chat_template
    engine.tokenizer.apply_chat_template = lambda messages, **more: (
        seen.extend(messages) or real(engine.tokenizer, messages, **more)
    )
    post(engine, CHAT, model="spam", messages=[TURN | {"name": "Ann"}, TURN])
    assert [message.get("name", "none") for message in seen] == ["Ann", "none"]
