"""What a row says: a prompt and its answer by templates, a chat, or Alpaca's columns; its columns tell which.

All rows of a task have one form, so that the task can be asked in one way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from .sources import FileRows, Rows, TaskSpec, place, placeholders

ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant", "tool")}
#: what turns may say that would be lost: a wish that they are not trained, calls, thoughts
UNREAD = ("weight", "train", "tool_calls", "function_call", "reasoning_content", "thinking")
#: columns that belong to a form, and would be lost as well
LOST = {"chat": ("tools",), "Alpaca": ("system", "history")}


class Example(NamedTuple):
    """A row as training takes it."""

    prompt: str  # of a chat: its last user's turn
    answer: str  # of a chat: its last assistant's turn, which is its end
    task: str
    messages: str = ""  # a chat's turns as JSON, [{"role": ..., "content": ...}, ...]

    @property
    def question(self) -> str:
        """All that stands before the answer; texts that differ in nothing but case and spaces are one question."""
        return self.questions()[-1]

    def questions(self) -> list[str]:
        """All that stands before each answer that is learnt, of a chat before each turn of the assistant."""
        turns = json.loads(self.messages) if self.messages else [{"role": "", "content": self.prompt}]
        said = [f"{turn['role']} {' '.join(turn['content'].casefold().split())}" for turn in turns]
        places = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"] if self.messages else [1]
        return ["\n".join(said[:at]) for at in places]


@dataclass(frozen=True)
class Form:
    """How rows are read."""

    name: str
    columns: tuple[str, ...]  # which all rows need
    prompt: str = ""  # templates; none of a chat
    answer: str = ""


ALPACA = Form("Alpaca", ("instruction", "output"), "### Instruction:\n{instruction}\n\n### Response:", "{output}")
FORMS = (
    Form("prompt and answer", ("prompt", "answer"), "{prompt}", "{answer}"),
    Form("chat", ("messages",)),
    Form("chat", ("conversations",)),
    ALPACA,
)


def is_alpaca(prompt: str) -> bool:
    """Whether a prompt reads as Alpaca's rows do here."""
    head, _, tail = ALPACA.prompt.partition("{instruction}")
    return prompt.startswith(head) and prompt.endswith(tail)


def form_of(spec: TaskSpec, rows: Rows) -> Form:
    """The form of a task's rows, by the first one; a ValueError names the row of a file that has another."""
    form = _form(spec, rows[0])
    if form.prompt and spec.system is not None:
        raise ValueError(
            f"task {spec.name!r}: system: is of chats, and its rows are {form.name}; write it into prompt:"
        )
    if not form.prompt and spec.words:
        raise ValueError(f"task {spec.name!r}: words: replaces answers of prompts, and its rows are chats")
    if not isinstance(rows, FileRows):
        return form
    needed = (*form.columns, *([spec.task_column] if spec.task_column in rows[0] else []))
    for number, row in enumerate(rows):
        if missing := [name for name in needed if name not in row]:
            other = next((other for other in FORMS if set(other.columns) <= row.keys()), None)
            mixed = (
                f". It is {other.name}, the first one {form.name}: give each form a file and a task" if other else ""
            )
            raise ValueError(
                f"{rows.places[number]}: lacks {', '.join(missing)}, which the first one has; present: {', '.join(row)}"
                f"{mixed}"
            )
    return form


def _form(spec: TaskSpec, row: Mapping[str, Any]) -> Form:
    """Templates of the task's own before all else; a ValueError lists the columns if they tell nothing."""
    own = Form("templates", tuple(placeholders(spec.prompt, spec.answer)), spec.prompt, spec.answer)
    default = (spec.prompt, spec.answer) == (TaskSpec.prompt, TaskSpec.answer)
    found = next((form for form in (FORMS if default else [own]) if set(form.columns) <= row.keys()), None)
    if found is not None:
        return found
    present, missing = list(row), [name for name in own.columns if name not in row]
    others = "; or have columns messages, conversations, or instruction and output" if default else ""
    raise ValueError(
        f"{', '.join(map(repr, spec.files))} has no column {' and no column '.join(map(repr, missing))}; present:"
        f" {', '.join(present)}. Name the columns in the task's prompt and answer, e.g. prompt: 'Text:"
        f" {{{present[0]}}}\\nLabel:' and answer: '{{{present[-1]}}}'{others}"
    )


def to_example(spec: TaskSpec, form: Form, rows: Rows, number: int) -> Example:
    """A raw row as training takes it; a ValueError, with its place, if it lacks a prompt or an answer."""
    where = place(rows, ", ".join(spec.files), number)
    row = {c: "" if value is None or value != value else value for c, value in rows[number].items()}  # NaN: none
    named = "" if spec.task_column is None else row.get(spec.task_column, "")
    task = spec.name if named == "" else str(named)
    if lost := [column for column in LOST.get(form.name, ()) if row.get(column)]:
        raise ValueError(f"{where}: has {', '.join(lost)}, which is not understood: take it out, or drop such rows")
    if not form.prompt:
        turns = _turns(row[form.columns[0]], spec.system, where)
        user = next(turn["content"] for turn in reversed(turns) if turn["role"] == "user")
        return Example(user, turns[-1]["content"], task, json.dumps(turns, ensure_ascii=False))
    if form is ALPACA and row.get("input"):  # in the same place: the task is asked by one template
        row["instruction"] = f"{row['instruction']}\n\n{row['input']}"
    try:
        prompt = form.prompt.format_map(row).rstrip()
        answer = form.answer.format_map(row).strip()
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} does not fit the templates {form.prompt!r}, {form.answer!r}: {error!r}") from None
    answer = spec.words.get(answer, answer)
    if not prompt or not answer:
        raise ValueError(
            f"{where} has an empty {'answer' if prompt else 'prompt'} (templates {form.prompt!r}, {form.answer!r});"
            " drop such rows, or choose a labelled split"
        )
    return Example(prompt, answer, task)


def answers_of(form: Form, rows: Rows) -> Iterator[str]:
    """The rows' answers before `words`; those that do not fit the template are left to `to_example` to refuse."""
    for row in rows:
        with suppress(LookupError, AttributeError, TypeError, ValueError):
            if answer := form.answer.format_map(row).strip():
                yield answer


def _turns(value: Any, system: str | None, where: str) -> list[dict[str, str]]:
    """A chat's turns as `role` and `content`, up to its last answer."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
        turns = [_turn(turn) for turn in given]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: expected a list of turns with role and content: {error}") from None
    turns = [turn for turn in turns if turn["content"] or turn["role"] != "system"]
    if system is not None and "system" not in roles(turns):
        turns.insert(0, {"role": "system", "content": system})
    while turns and turns[-1]["role"] != "assistant":  # what nobody answers teaches nothing
        turns.pop()
    if "user" not in roles(turns):
        raise ValueError(f"{where}: has no assistant's turn after a user's: drop such rows, there is nothing to learn")
    return turns


def roles(turns: Iterable[Mapping[str, str]]) -> list[str]:
    """Who speaks, in order."""
    return [turn["role"] for turn in turns]


def _turn(turn: Any) -> dict[str, str]:
    role, content = turn.get("role") or turn.get("from"), turn.get("content")
    content = turn.get("value") if content is None else content
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str) or not (content.strip() or role == "system"):
        raise ValueError(f"content of {role} must be a text that is not empty, got {str(content)[:40]!r}")
    if lost := [key for key in UNREAD if turn.get(key) not in (None, 1, "", [])]:
        raise ValueError(f"a turn has {', '.join(lost)}, which is not understood: take it out, or drop such rows")
    return {"role": ROLES[role], "content": content}
