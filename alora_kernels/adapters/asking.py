"""From what somebody says to the prompt that a task was trained on: the one place where chats become text.

Training, generation and serving render alike, so that a task is asked as it learnt to be. Templates may come from
anybody: names in braces are replaced and never evaluated, chat templates run in transformers' sandbox.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cards import TaskCard

Turns = Sequence[Mapping[str, str]]  # each with `role` (system, user, assistant) and `content`


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, and what a tokenizer and a reader of the answer must know of it."""

    text: str
    bos: bool = True  # the tokenizer's first token goes before it; a chat template has written it already
    spaced: bool = False  # the answer begins with a space that is no part of it
    card: TaskCard | EllipsisType | None = field(default=..., compare=False)  # of the task it was made for, if known

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids, those of training."""
        start = tokenizer("", add_special_tokens=True)["input_ids"][:1] if self.bos else []
        own = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        return [*(id for id in start if id == tokenizer.bos_token_id), *own]


def prompt_of(tokenizer: Any, turns: Turns, card: TaskCard | None = None, *, task: str = "the base") -> Prompt:
    """What a task, or a model, that is asked as the card says reads of these turns; without a card they are a chat.

    A ValueError names the remedy where turns have no place in the task's prompt, or there is no template.
    """
    if card is None or card.template is None or card.chat:
        template, system = (None, None) if card is None else (card.chat_template, card.system)
        if system is not None and all(turn["role"] != "system" for turn in turns):
            turns = [{"role": "system", "content": system}, *turns]
        return Prompt(chat_text(tokenizer, turns, template, ask=True), bos=False)
    if [turn["role"] for turn in turns] != ["user"]:
        raise ValueError(
            f"task {task!r} was trained on single prompts, {card.template[:200]!r}, where system prompts and earlier"
            f" turns have no place: send one user message ({', '.join(turn['role'] for turn in turns)[:80]} came)"
        )
    try:
        return Prompt(filled(card.template, turns[0]["content"]), spaced=True)
    except ValueError as error:
        raise ValueError(f"task {task!r}: {error}") from None


def filled(template: str, content: str) -> str:
    """A template, as in `str.format`, with a text in its placeholder, or with the values of a JSON object in several.

    A text that is the template filled already stays as it is. A ValueError says what is asked for.
    """
    template, content = template.rstrip(), content.rstrip()
    if not content:
        raise ValueError("the text is empty: say what it is asked about")
    parts = list(string.Formatter().parse(template))
    names = list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
    fields = _object(content) if len(names) > 1 else None
    if fields is None and _is_filled(parts, content, several=len(names) > 1):
        return content
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError(f"its template {template[:200]!r} forms numbers: send the whole prompt, filled in")
    if not names:
        raise ValueError(f"its prompt is always {template[:200]!r}: send that")
    values: Mapping[str, Any] = {names[0]: content} if fields is None else fields
    if set(values) != set(names):
        wanted = json.dumps(dict.fromkeys(names, "..."), ensure_ascii=False)
        raise ValueError(f"it is asked with {', '.join(names)}: send a JSON object such as {wanted}"[:500])
    texts = {name: "" if value is None else str(value) for name, value in values.items()}  # as in training
    return "".join(literal + ("" if name is None else texts[name]) for literal, name, _, _ in parts).rstrip()


def _object(content: str) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_filled(parts: Sequence[tuple[Any, ...]], content: str, *, several: bool) -> bool:
    """Whether a text has what stands between the placeholders, in its places; blanks between several say nothing."""
    literals = [""]
    for literal, name, _, _ in parts:
        literals[-1] += literal
        if name is not None:
            literals.append("")
    if several and not "".join(literals).strip():
        return False
    pattern, *others = map(re.escape, literals)
    for number, literal in enumerate(others, 1):  # (?>): what was found is not sought again, however many there are
        pattern += f"(?>.*?{literal})" if number < len(others) else f".*{literal}"
    return re.fullmatch(pattern, content, re.DOTALL) is not None


def chat_text(tokenizer: Any, turns: Turns, template: str | None = None, *, ask: bool) -> str:
    """The turns as one text by a chat template, the tokenizer's if none is given; `ask` opens the assistant's turn.

    A ValueError without any template, or with the template's own reason to refuse the turns. The text holds the special
    tokens already: encode it without further ones.
    """
    if not (template or getattr(tokenizer, "chat_template", None)):
        raise ValueError(
            "this model's tokenizer has no chat template: give one (`chat_template:` in a recipe, --chat-template where"
            " it is served), train on prompts and answers, or send the whole prompt (--raw, /v1/completions)"
        )
    asked: dict[str, Any] = {"tokenize": False, "add_generation_prompt": ask}
    try:
        text = str(tokenizer.apply_chat_template([dict(turn) for turn in turns], chat_template=template, **asked))
    except Exception as error:  # a program of others fails in any way
        raise ValueError(f"the chat template refuses these turns: {str(error)[:300] or type(error).__name__}") from None
    if not text:
        raise ValueError("the chat template makes nothing of these turns: is it one?")
    return text


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that are marks and no text."""
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return named | {token.content: id for id, token in added.items() if token.special}


def turn_ends(tokenizer: Any, special: Mapping[str, int], template: str | None = None) -> list[int]:
    """What a chat template ends an answer with, if it is a special token; a trained task says it last."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = chat_text(tokenizer, turns, template, ask=False).rstrip()
    except ValueError:  # no template, or one that wants other turns
        return []
    return [id for token, id in special.items() if text.endswith(token)]


def answer_ends(model: Any, tokenizer: Any, templates: Iterable[str | None] = ()) -> list[int]:
    """Tokens that end an answer: the model's own, and those of training, the tokenizer's and a turn's in its chats.

    `templates` are chat templates of tasks, beside the tokenizer's own.
    """
    given = [getattr(owner, "eos_token_id", None) for owner in (model.generation_config, model.config, tokenizer)]
    own = next((eos for eos in given if eos is not None), None)
    ends, special = [*(own if isinstance(own, list) else [own]), given[-1]], special_tokens(tokenizer)
    for template in dict.fromkeys((None, *templates)):
        ends += turn_ends(tokenizer, special, template)
    return list(dict.fromkeys(end for end in ends if end is not None))
