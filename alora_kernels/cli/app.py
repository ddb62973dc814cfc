"""`alora`: the command line. Each command imports what it needs when it runs, so `--help` answers at once."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapters.method import METHODS
from ..version import __version__
from . import command, trained_in
from .adapters import export_lora, import_lora, verify
from .analyze import analyze
from .doctor import doctor
from .fed import app as federated
from .generate import generate
from .lm_eval import lm_eval
from .serve import serve
from .tasks import app as tasks
from .tune import tune

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    epilog="Exit codes: 0 done; 1 failed underway; 2 wrong input, said in a line or two; 130 interrupted.",
    rich_markup_mode="rich",
    help="Train and serve many tasks on one frozen language model: several low-rank A, one shared B (Asymmetric LoRA).",
)


app.add_typer(federated, name="fed")
app.add_typer(tasks, name="tasks")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"alora-kernels {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """Options of no command."""


@app.command()
def demo(
    routing: Annotated[str, typer.Option(help="task: an id picks A; soft: a learned router weighs them")] = "task",
    steps: Annotated[int | None, typer.Option(help="optimiser steps", min=1)] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for the adapter; default runs/demo, where an earlier demo is replaced")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a finished adapter in --output")] = False,
    seed: Annotated[int, typer.Option(help="of data, adapter and order")] = 0,
    model: Annotated[str | None, typer.Option(help="another base: a folder, a hub id, or tiny-random")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the base: auto, float32, bfloat16; default auto")] = None,
    compare: Annotated[bool, typer.Option(help="measure tokens/s beside unfused PEFT and the authors' loop")] = True,
) -> None:
    """Fine-tune SmolLM2-135M on four real tasks at once, answer a mixed batch, measure (under 6 minutes, 2 cores)."""
    with command():
        from ..recipes import demo as recipes
        from ..recipes.train import claim

        if output is not None:
            claim(output, overwrite=overwrite)
        folder = str(output) if output else None
        recipe = recipes.RECIPE.instead(
            routing=routing, steps=steps, output=folder, seed=seed, model=model, dtype=trained_in(dtype)
        )
        recipes.run(recipe, compare=compare)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML; `tasks: \\[trec, spam]` is enough, see examples/train.yaml")],
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint in the output folder")
    ] = False,
    method: Annotated[
        str | None, typer.Option(help=f"instead of the recipe's: {', '.join(METHODS)}", metavar="METHOD")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder, instead of the recipe's")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the base: auto, float32, bfloat16; or the recipe's")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in the output folder")] = False,
    steps: Annotated[int | None, typer.Option(help="optimiser steps, instead of the recipe's length", min=1)] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the rows, instead of the recipe's length")] = None,
    adapter: Annotated[
        Path | None, typer.Option("--from", help="an adapter folder to go on from", metavar="DIR")
    ] = None,
    train_tasks: Annotated[
        str | None, typer.Option(help="tasks that learn, the others stay as they are", metavar="A,B,...")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only errors and the last line")] = False,
) -> None:
    """Train as a recipe says, judge every task, save the adapter in the folder `adapter` of the output folder.

    The method is ALoRA, or one it is compared with: same data, steps and seeds.

    Paths of data start from the recipe's folder, the output folder from the current one.
    """
    with command():
        from ..recipes import display
        from ..recipes import train as recipes
        from ..recipes.recipe import load_recipe

        recipe = load_recipe(config).instead(
            method=method,
            output=str(output) if output else None,
            dtype=trained_in(dtype),
            steps=steps,
            epochs=epochs,
            adapter=str(adapter.resolve()) if adapter else None,
            train_tasks=tuple(train_tasks.split(",")) if train_tasks else None,
        )
        with display.silent(quiet):
            folder = recipes.run(recipe, resume=resume, overwrite=overwrite)
            display.result(f"adapter saved: {folder}")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="a table of the keys instead, for people")] = False,
) -> None:
    """Print the JSON schema of recipes.

    With `# yaml-language-server: $schema=FILE` as its first line an editor completes and checks a recipe.
    """
    from ..recipes.recipe import Recipe

    typer.echo(Recipe.key_table() if markdown else json.dumps(Recipe.schema_document(), indent=1))


@app.command("eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="an adapter folder written by `alora train` or `alora demo`")],
    base: Annotated[bool, typer.Option("--base", help="judge the untuned base as well")] = False,
    dtype: Annotated[str | None, typer.Option(help="of the base: auto, float32, bfloat16; default as trained")] = None,
    data: Annotated[
        Path | None, typer.Option(help="judge on other rows: a file of the one task, or a recipe", metavar="FILE")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many test rows of each task", min=1)] = None,
    confusion: Annotated[bool, typer.Option("--confusion", help="which label words were taken for which")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Judge a saved adapter on its tasks' test rows, each by its own metric: see `metric` in a recipe's tasks.

    All tasks are mixed in every batch.
    """
    with command():
        from ..recipes import display, judge

        with display.aside() if as_json else nullcontext():
            found = judge.evaluate(
                adapter, base=base, dtype=trained_in(dtype), rows=data, limit=limit, confusion=confusion
            )
        if as_json:
            _json(found)


app.command()(generate)
app.command("lm-eval")(lm_eval)


@app.command()
def data(
    config: Annotated[Path, typer.Argument(help="a recipe of `alora train`")],
    rows: Annotated[int, typer.Option(help="training rows shown of each task", min=0)] = 3,
    task: Annotated[str | None, typer.Option(help="one task alone")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything as JSON on standard output")] = False,
) -> None:
    """Look at a recipe's data before training: rows, lengths, duplicates, labels, and rows as training sees them.

    What is learnt is green on a terminal, and stands in [[ ]] elsewhere. Reads the model's tokenizer, not its weights.
    """
    with command():
        from ..recipes import look
        from ..recipes.recipe import load_recipe

        tasks, lines = look.look(load_recipe(config), rows, task)
        _json(tasks) if as_json else look.show(tasks, lines)


@app.command()
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

        with display.aside():
            found = recipes.plan(load_recipe(config), memory, processes)
        _json(found) if as_json else recipes.show(found)


def _json(found: Any) -> None:
    typer.echo(json.dumps(found, indent=1, ensure_ascii=False))


app.command()(doctor)
app.command()(tune)
app.command("export")(export_lora)
app.command("import")(import_lora)
app.command()(verify)
app.command()(serve)
app.command()(analyze)
