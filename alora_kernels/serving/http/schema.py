"""The fields of requests, as OpenAI names them; our extensions are top_k and ignore_eos, as vLLM names them.

In:   parsed JSON.
Out:  `CompletionRequest`, `ChatRequest`, `LoadAdapter`, `UnloadAdapter`: types checked, ranges left to `Sampling`.
Who:  `body.read` makes them; the routes use them.

What is taken has its effect. A field that would have one and is not supported is refused unless its value asks for
nothing (`NEUTRAL`); what only labels a request is dropped (`IGNORED`); any other name is a mistake and is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from ..request import Sampling
from .prompts import Content, Prompt, content_text, prompt_list

MOST_CHOICES = 8
MOST_MESSAGES = 1024
UNLIMITED = -1  # vLLM's top_k for "no limit"; ours is 0

IGNORED = frozenset(["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"])
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def is_neutral(name: str, value: Any) -> bool:
    """Whether a field that is not supported asks for nothing; 0 is not False: `logprobs: 0` asks for something."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name])


def _stops(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class Fields(BaseModel):
    """No conversions ("5" is not 5), no unknown names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, choice: int, max_tokens: int) -> Sampling:
        """Settings of one of the n choices: with a seed each has its own.

        Args:
            choice: 0 .. n - 1.
            max_tokens: where the request names none.

        Raises:
            RequestError: a setting outside its range.
        """
        return Sampling(
            max_tokens=max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k in (None, UNLIMITED) else self.top_k,  # type: ignore[arg-type]
            stop=tuple(self.stop),
            seed=None if self.seed is None else self.seed + choice,
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: Annotated[list[Prompt], BeforeValidator(prompt_list)]
    best_of: int | None = None

    @model_validator(mode="after")
    def _all_are_best(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is only supported where it equals n: answers are not ranked")
        return self


class Message(Fields):
    """One turn of a chat; a developer's message is a system message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Content, BeforeValidator(content_text)]
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = None


class LoadAdapter(Fields):
    """POST /v1/load_lora_adapter; `task` chooses one of a folder that holds several."""

    lora_name: str = Field(min_length=1, max_length=512)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    task: str | None = None


class UnloadAdapter(Fields):
    """POST /v1/unload_lora_adapter; names are enough here, vLLM's number is taken and not used."""

    lora_name: str = Field(min_length=1, max_length=512)
    lora_int_id: int | None = None
