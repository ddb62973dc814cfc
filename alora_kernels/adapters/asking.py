"""From what somebody says to the prompt that a task was trained on: the one place where chats become text.

Training, generation and serving render alike, so that a task is asked as it learnt to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Turns = Sequence[Mapping[str, str]]  # each with `role` (system, user, assistant) and `content`


def chat_text(tokenizer: Any, turns: Turns, template: str | None = None, *, ask: bool) -> str:
    """The turns as one text by a chat template, the tokenizer's if none is given; `ask` opens the assistant's turn.

    A ValueError without any template, or with the template's own reason to refuse the turns. The text holds the special
    tokens already: encode it without further ones.
    """
    import jinja2

    template = template or getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            "this model's tokenizer has no chat template: give one (`chat_template:` in a recipe, --chat-template where"
            " it is served), or train on prompts and answers"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=template, tokenize=False, add_generation_prompt=ask
            )
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these turns: {str(error)[:300]}") from None
