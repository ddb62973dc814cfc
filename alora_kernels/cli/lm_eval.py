"""`alora lm-eval`: the lm-evaluation-harness for each task of an adapter folder, and for its base."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes import display
from ..text import install
from . import command
from .generate import open_base


def lm_eval(
    adapter: Annotated[Path, typer.Argument(help="a folder that `alora train`, `alora demo` or PEFT wrote")],
    tasks: Annotated[str, typer.Option(help="of the harness, with commas: arc_easy,my_task", show_default=False)],
    include_path: Annotated[
        Path | None, typer.Option(help="a folder with YAML tasks of your own", exists=True, file_okay=False)
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="this task of the adapter; again for more")] = None,
    base: Annotated[bool, typer.Option(help="judge the untuned base as well")] = True,
    model: Annotated[str | None, typer.Option(help="the base; default the one that the folder names")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the base: auto, float32, bfloat16; default as trained")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="examples in a prompt; default the harness's", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="rows of each harness task, for a first look", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    out: Annotated[Path, typer.Option(help="all numbers as JSON")] = Path("lm-eval.json"),
) -> None:
    """Run EleutherAI's lm-evaluation-harness for each task of an adapter, and for its base; needs the extra lm-eval."""
    with command(KeyError):  # the harness's word for tasks that it does not know
        if find_spec("lm_eval") is None:
            raise ImportError(f"this needs EleutherAI's harness: {install('lm-eval')}")
        import torch
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from ..baselines.methods import base_alone, load_method, tasks_of
        from ..integrations.lm_eval import ALoRALM
        from ..modules.adapter import BASE

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is loaded already
        plain, tokenizer, name, chosen = open_base(adapter, model, dtype)
        adapted = load_method(plain, adapter).to("cuda" if torch.cuda.is_available() else "cpu")
        own, manager = tasks_of(adapted), TaskManager(include_path=str(include_path) if include_path else None)
        if unknown := [name for name in only or () if own and name not in own]:
            raise ValueError(f"unknown task {unknown[0]!r}: valid tasks are {', '.join(own)}")
        asked, found = {"num_fewshot": num_fewshot, "limit": limit}, {}
        about = {"adapter": str(adapter), "model": name, "dtype": chosen.name, "lm_eval": metadata.version("lm_eval")}
        out.parent.mkdir(parents=True, exist_ok=True)
        for run in [BASE] * base + [*(only or own or (adapter.name,))]:
            with base_alone(adapted) if run == BASE else nullcontext():
                task = run if own or only else None
                lm = ALoRALM(adapted, task=task, tokenizer=tokenizer, batch_size=batch_size)
                done = simple_evaluate(lm, tasks=tasks.split(","), task_manager=manager, log_samples=False, **asked)
            found[run if run != BASE or "base" in own else "base"] = done["results"]
            # written each time: it outlives a later failure
            text = json.dumps({**about, **asked, "results": found}, indent=1, default=str)
            out.write_text(text, encoding="utf-8")
    columns, rows = _table(found)
    display.console.print(display.table("", columns, rows, left=2))
    display.say(f"all numbers: {out}", "dim")


def _table(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row per task and metric of the harness, a column per task of ours; standard errors are in the file alone."""
    rows = []
    for task, key in sorted({(t, key) for results in found.values() for t in results for key in results[t]}):
        values = [results.get(task, {}).get(key) for results in found.values()]
        if "," in key and "_stderr" not in key and any(isinstance(value, float) for value in values):
            cells = [f"{value:.4f}" if isinstance(value, float) else "" for value in values]
            rows.append([task, key.removesuffix(",none"), *cells])
    return ["harness task", "metric", *found], rows
