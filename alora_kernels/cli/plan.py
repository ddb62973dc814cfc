"""`alora plan`: what a recipe needs of a GPU, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from . import command


def plan(
    config: Annotated[Path, typer.Argument(help="a recipe of `alora train`")],
    memory: Annotated[
        str | None, typer.Option(help="of each GPU, such as 24GB; default the GPU that is here, else 24, 48 and 80 GB")
    ] = None,
    processes: Annotated[int, typer.Option(help="GPUs that share a step, a process each", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Predict the GPU memory of a training run from the model's config, and say what to change where it does not fit.

    Reads the model's config.json, not its weights, and the data where it lies on this machine.
    """
    with command():
        from ..recipes import display
        from ..recipes import plan as recipes
        from ..recipes.recipe import load_recipe

        size = None if memory is None else _bytes(memory)
        with display.aside():
            found = recipes.plan(load_recipe(config), size, processes)
        if as_json:
            typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        else:
            _show(found)


def _bytes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"--memory must be a size in GB, such as 24GB or 80GiB, got {text!r}")
    return float(match[1]) * (2**30 if (match[2] or "").lower() == "gib" else 1e9)


def _show(found: dict[str, Any]) -> None:
    from ..recipes import display
    from ..text import size

    cells = [[name, size(value)] for name, value in found["bytes"].items()]
    title = f"PREDICTED memory of a GPU in a step: {found['rows_at_once']} x {found['tokens_of_a_row']} tokens at once"
    display.say(title)
    if found["length_assumed"]:
        display.say(
            "the length is assumed: there is no max_length, and the rows or the tokenizer are not here", "yellow"
        )
    display.console.print(display.table("", ("for", "bytes"), [*cells, ["total", size(found["total"])]]))
    display.say(f"{found['parameters'] / 1e9:.3g} G parameters, {found['trained'] / 1e6:.3g} M of adapters train")
    if rows := found["data"]:
        tokens = rows["count"] * rows["mean"]
        display.say(
            f"{rows['count']} training rows, about {tokens:.3g} tokens, {rows['epoch']} steps an epoch;"
            f" {rows['steps']} steps in all"
        )
    else:
        display.say("the rows' lengths are not known here, so every row is taken to be as long as max_length")
    for device, fits in found["fits"].items():
        display.say(f"{device}: {'fits' if fits else 'does not fit'}", "green" if fits else "red")
    if found["changes"]:
        display.say("to need less, one after the other:")
        for change in found["changes"]:
            display.say(f"  {change['change']}  ->  {size(change['total'])}")
