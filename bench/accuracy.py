"""`python -m bench accuracy`: what the demo's default dtype costs in accuracy, beside float32 on the same seeds.

The demo's recipe, trained and judged for each seed and dtype. `docs/cpu.md` has the newest run as a table, in the block
`bench-accuracy`. It is no matter of time: a busy machine gives the same numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from .report.readme import linked, markdown
from .report.rows import RESULTS, ROOT, newest, origin
from .report.sheet import Sheet, read
from .reproduce.numbers import spread
from .run import checked, write_block

WIDE, BLOCK = "float32", "bench-accuracy"


@dataclass(frozen=True)
class Accuracy:
    """One task's share of right choices on its test rows, after a training in a dtype with a seed."""

    commit: str = ""
    date: str = ""
    device: str = ""
    torch: str = ""
    model: str = ""
    steps: int = 0
    dtype: str = ""
    seed: int = 0
    task: str = ""
    accuracy: float = 0.0


def trained(dtype: str, seed: int, model: str | None, steps: int | None) -> list[Accuracy]:
    """The demo once: a row per task; the columns of the run are left empty."""
    from alora_kernels.recipes import job as jobs
    from alora_kernels.recipes import train
    from alora_kernels.recipes.demo import RECIPE
    from alora_kernels.recipes.judge import judge

    with TemporaryDirectory() as folder:
        changes = {"dtype": dtype, "seed": seed, "model": model, "steps": steps, "output": folder}
        job = jobs.load(RECIPE.instead(**changes))
        train.trainer_for(job, save=False).train()
        scores = judge(job, f"{dtype}, seed {seed}").accuracy
    told: dict[str, Any] = {
        "model": job.recipe.model,
        "steps": job.recipe.steps,
        "dtype": job.recipe.dtype,
        "seed": seed,
    }
    return [Accuracy(**told, task=task, accuracy=scores[task]) for task in job.tasks]


def means(rows: Sequence[Accuracy], dtype: str) -> list[float]:
    """The mean over tasks in per cent, of each seed."""
    seeds = dict.fromkeys(row.seed for row in rows if row.dtype == dtype)
    found = [[row.accuracy for row in rows if row.dtype == dtype and row.seed == seed] for seed in seeds]
    return [100 * statistics.fmean(values) for values in found]


def block(rows: Sequence[Accuracy], source: str) -> str:
    """The newest run in Markdown: accuracies in per cent, mean ± standard deviation over its seeds, and the verdict."""
    rows = newest(rows, lambda row: row.model)
    tasks, dtypes = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("task", "dtype"))
    lines = []
    for dtype in dtypes:
        of = {task: [100 * row.accuracy for row in rows if (row.task, row.dtype) == (task, dtype)] for task in tasks}
        lines.append([dtype, *(spread(values, ".1f") for values in [*of.values(), means(rows, dtype)])])
    first, seeds = rows[0], ", ".join(map(str, dict.fromkeys(row.seed for row in rows)))
    where = f"{first.device}, torch {first.torch}, commit {first.commit}, {first.date}"
    about = f"{first.model}, {first.steps} steps, seeds {seeds}; {where}; rows: [{Path(source).name}]({source})."
    verdicts = [_verdict(rows, dtype) for dtype in dtypes if dtype != WIDE]
    return "\n\n".join([about, "\n".join(markdown(["dtype"], [*tasks, "mean"], lines)), *verdicts])


def blocks(results: Path, page: Path) -> list[str]:
    """The same from the committed rows, for `bench plot`; `page` is the folder of the page."""
    path = results / "accuracy" / "demo.csv"
    return [block(read(path, Accuracy), linked(path, page))] if path.exists() else []


def _verdict(rows: Sequence[Accuracy], dtype: str) -> str:
    wide, other = means(rows, WIDE), means(rows, dtype)
    apart = statistics.fmean(other) - statistics.fmean(wide)
    said = f"Mean in {dtype} less that in {WIDE}: {apart:+.1f} points"
    if min(len(wide), len(other)) < 2:
        return f"{said}; one seed has no spread."
    largest = max(map(statistics.stdev, (wide, other)))
    return f"{said}, {'within' if abs(apart) <= largest else '**beyond**'} the seeds' spread of {largest:.1f}."


def main(
    seed: Annotated[list[int] | None, typer.Option(help="repeatable; default 0, 1, 2")] = None,
    model: Annotated[str | None, typer.Option(help="another base than the demo's")] = None,
    steps: Annotated[int | None, typer.Option(help="fewer steps than the demo's", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="what to compare with float32: auto or bfloat16")] = "auto",
    out: Annotated[Path, typer.Option(help="rows are appended to this CSV")] = RESULTS / "accuracy" / "demo.csv",
    page: Annotated[Path, typer.Option(help=f"its block {BLOCK} is rewritten")] = ROOT / "docs" / "cpu.md",
) -> None:
    """Accuracy of the demo in float32 and in the default dtype, three seeds (about 20 minutes, 2 cores)."""
    from alora_kernels import precision
    from alora_kernels.recipes.display import quiet, say

    quiet()
    other = checked("--dtype", precision.explain, None, dtype)
    if other.name == WIDE:
        say(f"auto is {WIDE} here ({other.reason}): only that is trained")
    sheet = checked("--out", Sheet, out, Accuracy)
    run = origin("cuda" if torch.cuda.is_available() else "cpu")
    for number in seed or (0, 1, 2):
        for name in dict.fromkeys((WIDE, other.name)):
            for row in checked(None, trained, name, number, model, steps):
                sheet.add(Accuracy(**{**vars(row), **run}))
    text = block(read(out, Accuracy), linked(out, page.parent))
    say(f"{text}\n\n{sheet.summary}")
    if page.exists() and model is None and steps is None:
        write_block(page, BLOCK, text)
