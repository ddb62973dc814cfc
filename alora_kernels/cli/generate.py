"""`alora generate`: the tasks of an adapter folder answer, mixed in one batch, each asked as in its training.

The model's own `generate` does the work: the extra `serving` is not needed.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..dtypes import AUTO
from ..recipes import display
from ..text import listed, printable
from . import command, wish_of

if TYPE_CHECKING:
    from ..adapters.asking import Prompt
    from ..adapters.reader import AdapterFile
    from ..precision import Choice

ALL = "all"
ROWS = 32  # of one batch


def generate(
    adapter: Annotated[Path, typer.Argument(help="a folder that `alora train`, `alora demo` or PEFT wrote")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="what is asked, several in one batch; none: standard input is the text")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"who answers; again for more, {ALL}, or __base__ for the base alone")
    ] = None,
    model: Annotated[str | None, typer.Option(help="the base; default the one that the folder names")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt of a chat task, instead of its own")] = None,
    max_tokens: Annotated[int, typer.Option(help="of an answer, at most", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token", min=0, max=100)] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from the likeliest tokens of this probability", max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="of sampling", min=0)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object per answer and line, its prompt too")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="texts are whole prompts: no template is applied")] = False,
    dtype: Annotated[str | None, typer.Option(help="of the base: auto, float32, bfloat16; default as trained")] = None,
) -> None:
    """Ask tasks of an adapter, each as it was asked in training: its prompt template, or a chat."""
    with command():
        import torch
        from peft import PeftModel

        from ..adapters.asking import Prompt, answer_ends, prompt_of
        from ..adapters.cards import read_task_cards
        from ..serving.slots import check_model

        if not 0 < top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")
        if top_p < 1 and not temperature:
            raise ValueError("--top-p chooses among sampled tokens: give a --temperature above 0 too")
        if raw and system is not None:
            raise ValueError("--raw takes whole prompts, so --system has no place: give one of them")
        file = _read(adapter)
        names, given = _chosen(file, task), _texts(texts)
        base, tokenizer, _, _ = open_base(adapter, model, dtype)
        check_model(base, file)
        cards = {} if raw else read_task_cards(adapter, file.tasks)
        opening = [] if system is None else [{"role": "system", "content": system}]
        asked = [(one, text, Prompt(text)) for text in given for one in names]
        if not raw:
            turns = {text: [*opening, {"role": "user", "content": text}] for text in given}
            asked = [(t, text, prompt_of(tokenizer, turns[text], cards.get(t), task=t)) for t, text, _ in asked]
        how: dict[str, Any] = {"do_sample": temperature > 0}
        how |= {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        if seed is not None:
            from transformers import set_seed

            set_seed(seed)
        adapted: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
        adapted.to("cuda" if torch.cuda.is_available() else "cpu")
        ends = answer_ends(base, tokenizer, (card.chat_template for card in cards.values()))
        for answer in answers(adapted, tokenizer, asked, ends, max_tokens, how):
            label = f"{answer['task']}: " if len(names) > 1 else ""
            of = f"{printable(answer['text'], 60)} -> " if len(given) > 1 else ""
            print(json.dumps(answer, ensure_ascii=False)) if as_json else display.say(f"{of}{label}{answer['answer']}")
            if not answer["answer"].strip():
                why = "" if answer["task"] in cards else ": is this how it was asked in training? Nothing here says how"
                why = ": is this the whole of a prompt of its training?" if raw else why
                display.err.print(f"{answer['task']} answered without a text{why}", markup=False, soft_wrap=True)


def _read(adapter: Path) -> AdapterFile:
    """The folder's adapter; a ValueError for none, and for methods whose tasks have no names of their own."""
    from ..adapters.method import SETTINGS, read_method
    from ..adapters.reader import read_adapter
    from ..tuner.config import CONFIG

    if (adapter / SETTINGS).is_file() and not (adapter / CONFIG).is_file() and (method := read_method(adapter)):
        raise ValueError(f"{adapter} is of the method {method.name}, whose tasks cannot be asked: train it as alora")
    return read_adapter(adapter)


def _chosen(file: AdapterFile, wanted: Sequence[str] | None) -> list[str]:
    from ..modules.adapter import BASE

    known = listed(file.tasks, 20)
    if not wanted:
        if len(file.tasks) == 1:
            return [*file.tasks]
        raise ValueError(
            f"{file.folder} has {known}: say who answers with --task NAME, again for more, or --task {ALL}"
        )
    names = [one for name in wanted for one in (file.tasks if name == ALL and ALL not in file.tasks else [name])]
    for name in names:
        if name != BASE and name not in file.tasks:
            close = difflib.get_close_matches(name, [*file.tasks, ALL, BASE], n=1)
            hint = f", did you mean {close[0]}?" if close else "."
            raise ValueError(f"{file.folder} has no task {name!r}{hint} It has {known}, and {BASE} is the base alone")
    return list(dict.fromkeys(names))


def _texts(texts: Sequence[str] | None) -> list[str]:
    if not texts and sys.stdin.isatty():
        raise ValueError('say what is asked, such as alora generate DIR --task NAME "some text", or pipe it in')
    given = [*texts] if texts else [sys.stdin.read().rstrip("\n")]
    if any(not text.strip() for text in given):
        raise ValueError("a text is empty: say what is asked")
    return given


def open_base(adapter: Path, model: str | None, dtype: str | None) -> tuple[Any, Any, str, Choice]:
    """The base that a folder names, or another, and its tokenizer; its name, and its dtype with the reason.

    A ValueError if the folder names none.
    """
    from .. import data, precision
    from ..adapters.config import read_settings
    from ..recipes.recipe import FILE, load_recipe

    trained = load_recipe(adapter / FILE, root=Path()) if (adapter / FILE).exists() else None
    name = model or (trained.model if trained else read_settings(adapter).get("base_model_name_or_path"))
    if not name:
        raise ValueError(f"{adapter} does not name its base: give it as --model")
    wish = wish_of(dtype) if dtype else trained.dtype if trained else AUTO
    chosen = precision.explain(None, wish, "asked for" if dtype else "as trained")
    display.err.print(f"base {name} in {chosen.name} ({chosen.reason})", style="dim", markup=False, soft_wrap=True)
    return (*data.load_model(name, dtype=chosen.dtype), name, chosen)


def answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, str, Prompt]],
    ends: Sequence[int],
    max_tokens: int,
    how: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Answers to (task, text, prompt), in order; `ends` and `how` as in `written_answers`.

    Each has both texts and the task, `answer`, how many `tokens` it took, and why it ends: at an end of text ("stop")
    or at the most tokens ("length").
    """
    from ..modules.adapter import BASE
    from ..training.answers import written_answers

    own = model.active_adapter  # the whole of a stock LoRA, which knows no tasks
    routed = (BASE, *(getattr(model.peft_config[own], "tasks", None) or ()))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for start in range(0, len(asked), ROWS):
        part = asked[start : start + ROWS]
        names = [task if task in routed else own for task, _, _ in part]
        prompts = [{"input_ids": p.ids(tokenizer), "adapter": n} for (_, _, p), n in zip(part, names, strict=True)]
        room = limit - max(len(prompt["input_ids"]) for prompt in prompts)
        if room < 1:
            raise ValueError(f"a prompt has {limit - room} tokens and this model reads at most {limit}: shorten it")
        most = {"max_tokens": min(max_tokens, room), "pad_token_id": tokenizer.pad_token_id}
        written = written_answers(model, prompts, tasks=None, ends=ends, how=how, **most)
        for (task, text, prompt), (ids, ended) in zip(part, written, strict=True):
            said = tokenizer.decode(ids, skip_special_tokens=True)
            said = said.removeprefix(" ") if prompt.spaced else said
            reason = {"finish_reason": "stop" if ended else "length", "tokens": len(ids) + ended}
            yield {"task": task, "text": text, "prompt": prompt.text, "answer": said, **reason}
