"""The texts of a request: OpenAI allows one or many, as text or as token ids, and chats as a list of turns.

In:   what JSON holds under `prompt` or under a message's `content`; turns of a chat.
Out:  a list of prompts; a text; a prompt made with the model's chat template.
Who:  `schema` checks with the first two; `chat` builds its prompt with the last.

Checked by hand and only up to the first mistake: a union type would report each of 300 000 wrong ids four times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import ApiError

if TYPE_CHECKING:
    from ..engine import Engine

MOST_PROMPTS = 64

# what the checks below return is not looked at again
Prompt: TypeAlias = Any  # str | list[int]
Content: TypeAlias = Any  # str


def prompt_list(value: Any) -> list[str | list[int]]:
    """One prompt or many, of text or of token ids, as a list of prompts.

    Raises:
        ValueError: anything else.
    """
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
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def content_text(value: Any) -> str:
    """The text of a message: a string, or parts of type text joined by line ends.

    Raises:
        ValueError: anything else, such as a picture.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("content must be a text or a list of parts of type text")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('parts of content must be {"type": "text", "text": ...}: this model reads only text')
    return "\n".join(part["text"] for part in value)


def chat_prompt(engine: Engine, turns: Sequence[tuple[str, str, str | None]]) -> str | list[int]:
    """The prompt of a chat.

    With a chat template: what the template makes of the turns, as token ids, for the template writes the special
    tokens itself. Without one: the contents joined by line ends, as text.

    Args:
        engine: whose tokenizer has the template.
        turns: role, text and name of each message; a name is for templates that look at it.

    Raises:
        ApiError: the template refuses these turns; its reason is quoted.
    """
    tokenizer = engine.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(text for _, text, _ in turns)
    import jinja2

    messages = [
        {"role": "system" if role == "developer" else role, "content": text} | ({} if name is None else {"name": name})
        for role, text, name in turns
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        said = f"messages: the model's chat template refuses them: {str(error)[:300]}"
        raise ApiError(400, said, "messages", "invalid_value") from None
    return engine.encode(text, special=False)
