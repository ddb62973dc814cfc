"""`adapter_tasks.json`: how each task of an adapter was asked in training, beside the adapter's weights.

A task answers well only the prompts it was trained on, and no weight says which these are. The file may come from
anybody: an adapter without it or, after a warning, with a broken one is served all the same.
"""

from __future__ import annotations

import json
import logging
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import written_whole
from ..text import some
from .config import json_of, refused

log = logging.getLogger("alora_kernels.task_cards")
FILE = "adapter_tasks.json"
VERSION = 1
MAX_BYTES = 4 * 2**20
MAX_TEXT, MAX_ANSWERS = 8192, 1024  # characters of a text; label words of a task
MAX_TEMPLATE = 65536  # characters of a chat template, which may be a program of some pages
TEXTS = ("template", "sample", "chat_template", "system")


@dataclass(frozen=True)
class TaskCard:
    """How one task was asked in training, as far as that is known."""

    template: str | None = None  # "Review: {text}\nSentiment:", as in `str.format`; one space and the answer follow
    answers: tuple[str, ...] = ()  # the words it answers with; none if it answers in texts
    sample: str | None = None  # a whole prompt, ready to be sent
    chat: bool = False  # asked in turns, which a chat template makes one text of, and not by `template`
    chat_template: str | None = None  # in place of the tokenizer's own
    system: str | None = None  # the first turn of every chat, unless the asker brings another


def described(card: TaskCard | None, most: int = 8, width: int = MAX_TEXT) -> str | None:
    """What a task answers, in words on one line: a template or chats, and with which words; None if nobody knows."""
    if card is None or not (card.chat or card.template):
        return None
    shown = [" ".join(answer.split())[:width] for answer in card.answers]
    words = f" with {some(shown, most)}" if shown else ""
    if not card.chat:
        return _quoted(card.template or "", width) + words
    own = " (in a chat template of its own)" if card.chat_template else ""
    return f"chats{own}{f' after the system prompt {_quoted(card.system, width)}' if card.system else ''}{words}"


def _quoted(text: str, width: int) -> str:
    return json.dumps(text if len(text) <= width else text[:width] + "…", ensure_ascii=False)


def write_task_cards(folder: str | Path, cards: Mapping[str, TaskCard]) -> None:
    """Write the file, or remove it where there is nothing to say; a card that could not be read back is left out."""
    good = {}
    for task, card in cards.items():
        try:
            good[task] = checked_fields(task, card)
        except ValueError as error:
            _warn(folder, error)
    if not good:
        Path(folder, FILE).unlink(missing_ok=True)
        return
    with written_whole(folder) as temporary:
        text = json.dumps({"version": VERSION, "tasks": good}, indent=1)
        Path(temporary, FILE).write_text(text, encoding="utf-8")


def checked_fields(task: str, card: TaskCard) -> dict[str, Any]:
    """What the file says of a task; a ValueError, naming the field, for a card that could not be read back."""
    fields = asdict(card) | {"answers": list(card.answers)}
    _card(task, fields)
    return fields


def read_task_cards(folder: str | Path, tasks: Sequence[str]) -> dict[str, TaskCard]:
    """Task -> card, of the tasks that have one; nothing, after a warning, of a file that is not as it was written."""
    path = Path(folder, FILE)
    if not path.exists():
        return {}
    try:
        cards = {task: _card(task, fields) for task, fields in _content(path).items()}
    except ValueError as error:
        _warn(folder, error)
        return {}
    if len(tasks) == len(cards) == 1:  # whatever it is called: a stock LoRA is called as its folder is
        return {tasks[0]: next(iter(cards.values()))}
    return {task: cards[task] for task in tasks if task in cards}


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would never end
        raise ValueError("is no file")
    try:
        content = json_of(path, MAX_BYTES)
    except OverflowError:
        raise ValueError(f"is longer than {MAX_BYTES} bytes") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"does not read ({str(error)[:200]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise ValueError("must be an object whose 'tasks' is an object")
    version, tasks = content.get("version"), content["tasks"]
    if type(version) is not int or version != VERSION:
        raise ValueError(f"has version {str(version)[:40]}, and only {VERSION} is known")
    return tasks


def _card(task: str, fields: Any) -> TaskCard:
    where = f"tasks[{task[:80]!r}]"
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must be an object, not {type(fields).__name__}")
    answers = fields.get("answers", [])
    if not isinstance(answers, list) or len(answers) > MAX_ANSWERS:
        raise ValueError(f"{where}.answers must be a list of at most {MAX_ANSWERS} texts")
    checked = tuple(_text(f"{where}.answers", answer) for answer in answers)
    chat = fields.get("chat", False)
    if not isinstance(chat, bool):
        raise ValueError(f"{where}.chat must be true or false, not {str(chat)[:40]!r}")
    given = {name: fields[name] for name in TEXTS if fields.get(name) is not None}
    texts: dict[str, Any] = {name: _text(f"{where}.{name}", text) for name, text in given.items()}
    try:
        list(string.Formatter().parse(texts.get("template", "")))
    except ValueError as error:
        raise ValueError(f"{where}.template has braces that do not match ({error})") from None
    return TaskCard(answers=checked, chat=chat, **texts)


def _text(where: str, text: Any) -> str:
    limit = MAX_TEMPLATE if where.endswith(".chat_template") else MAX_TEXT
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} must be a text that is not empty, not {str(text)[:40]!r}")
    if len(text) > limit:
        raise ValueError(f"{where} has more than {limit} characters")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t" for c in text):
        raise ValueError(f"{where} has control characters or halves of characters")
    return text


def _warn(folder: str | Path, why: ValueError) -> None:
    log.warning("%s", refused(Path(folder), f"{FILE} {why}: write it again, or delete it; the adapter works without"))
