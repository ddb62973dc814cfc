"""`python -m bench reproduce NAME`: run an experiment, or take up again one that was interrupted.

A seed of a case that the CSV has already, with the same settings, is not run again. Ctrl-C keeps what is finished.
`docs/reproduction.md` has a block `reproduce-NAME` for each shipped configuration, and one of all claims.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from alora_kernels.data import MissingPackageError

from ..report.readme import replace_block
from ..report.rows import RESULTS as ALL_RESULTS
from ..report.rows import ROOT
from ..report.sheet import Sheet, read
from ..run import INTERRUPTED
from .config import Config, ConfigError, available, load
from .numbers import DONE, Claim, Number, claim_table, finished, pick, stamped

#: experiment -> its module here, loaded when asked for: PEFT and transformers take seconds
EXPERIMENTS = {
    "init-similarity": "similarity",
    "before-after": "change",
    "sharing": "sharing",
    "multitask": "multitask",
    "multitask-budget": "multitask_budget",
    "fedsa": "clients",
    "federated": "federated",
}
RESULTS = ALL_RESULTS / "reproduction"
PAGE = ROOT / "docs" / "reproduction.md"
FEW = "fewer than 3 seeds: too few for a spread that means something"


def module_of(experiment: str) -> Any:
    """The module with an experiment's `cases`, `run`, `claims`, `table` and `figure`; ConfigError if there is none."""
    if experiment not in EXPERIMENTS:
        raise ConfigError(f"experiment: must be one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
    return importlib.import_module(f"{__package__}.{EXPERIMENTS[experiment]}")


def units(config: Config, kind: Any, rows: Sequence[Number]) -> list[tuple[int, str]]:
    """(seed, case) of what is still to do, seed by seed."""
    known = {(row.seed, row.case) for row in finished(rows, config)}
    return [(seed, case) for seed in config.seeds for case in kind.cases(config) if (seed, case) not in known]


def perform(config: Config, out: Path) -> bool:
    """Run what is missing and draw the figure beside the CSV; False after Ctrl-C."""
    from alora_kernels.recipes.display import progress, quiet, say

    quiet()
    kind = module_of(config.experiment)
    sheet: Sheet[Number] = Sheet(out, Number)
    todo, complete = units(config, kind, read(out, Number)), True
    with progress("") as bar:
        task = bar.add_task(config.experiment, total=len(todo), note="")
        try:
            for seed, case in todo:
                bar.update(task, note=f"seed {seed}, {case}")
                start = time.perf_counter()
                rows = kind.run(config, seed, case)
                rows.append(Number(measure=DONE, value=time.perf_counter() - start))
                for row in stamped(rows, config, seed, case):
                    sheet.add(row)
                bar.advance(task)
        except KeyboardInterrupt:
            complete = False
    say(sheet.summary if complete else f"interrupted: {sheet.summary}")
    found = finished(read(out, Number), config)
    if found and importlib.util.find_spec("matplotlib") is not None:
        kind.figure(found, out.with_suffix(".png"))
    for line in [*kind.table(found), "", *claim_table(kind.claims(found))] if found else []:
        say(line)
    if len({row.seed for row in found}) < 3:
        say(FEW)
    return complete


def block(config: Config, rows: Sequence[Number], source: str) -> str:
    """What the page says about one experiment; `source` is the folder of CSV and figure, as the page links it."""
    name = config.experiment
    command = f"`python -m bench reproduce {name}`"
    if not rows:
        return f"Not run yet: {command}."
    kind = module_of(name)
    seeds = sorted({row.seed for row in rows})
    minutes = sum(row.value or 0 for row in pick(rows, measure=DONE)) / 60
    had = {(row.seed, row.case) for row in rows if row.seed in config.seeds}
    missing = len(config.seeds) * len(kind.cases(config)) - len(had)
    lines = [
        f"{command}, {setting(config)}, seeds {', '.join(map(str, seeds))}, {minutes:.0f} minutes;"
        f" rows: [{name}.csv]({source}/{name}.csv).{'' if len(seeds) >= 3 else f' {FEW.capitalize()}.'}",
        "",
        *[f"- {line}" for line in sorted({_origin(row) for row in rows})],
        "",
        *kind.table(rows),
        "",
        f"![{name}]({source}/{name}.png)",
    ]
    if missing > 0:
        lines += ["", f"{missing} of the runs that the file asks for are not run yet."]
    return "\n".join(lines)


def _origin(row: Number) -> str:
    versions = f"torch {row.torch}, transformers {row.transformers}, peft {row.peft}"
    return f"{row.device}, {versions}, commit {row.commit}, {row.date[:10]}"


def setting(config: Config) -> str:
    parts = [config.model, f"tasks {', '.join(config.names)}"]
    if config.budget != "rank":
        parts.append("ranks by parameters")
    for key, label in (("r", "r"), ("steps", "steps"), ("rounds", "rounds"), ("batch_size", "rows a task and step")):
        if (value := getattr(config, key)) is not None:
            parts.append(f"{label} {value}")
    return ", ".join([*parts, f"learning rate {config.learning_rate:g}"] if config.learning_rate else parts)


def rewritten(text: str, results: Path = RESULTS, source: str = "../bench/results/reproduction") -> str:
    everything: list[Claim] = []
    for name in EXPERIMENTS:
        config, path = load(name), results / f"{name}.csv"
        rows = finished(read(path, Number), config) if path.exists() else []
        text = replace_block(text, f"reproduce-{name}", block(config, rows, source))
        everything += module_of(name).claims(rows)
    return replace_block(text, "reproduce-claims", "\n".join(claim_table(everything)))


def write(*, check: bool) -> None:
    """Rewrite the page, or exit with 1 where it is out of date."""
    old = PAGE.read_text()
    new = rewritten(old)
    if check and new != old:
        typer.echo(f"{PAGE} is out of date: run `python -m bench reproduce --write-docs`", err=True)
        raise typer.Exit(1)
    if not check:
        PAGE.write_text(new)
    typer.echo(f"{PAGE} {'agrees with' if check else 'rewritten from'} {RESULTS}")


def main(
    name: Annotated[str | None, typer.Argument(help="an experiment, `paper/NAME`, or a .yaml file")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="instead of the file's; give it once for each")] = None,
    fast: Annotated[bool, typer.Option("--quick", help="tiny: tries the machinery in seconds")] = False,
    out: Annotated[Path | None, typer.Option(help="the CSV; default: bench/results/reproduction/NAME.csv")] = None,
    listed: Annotated[bool, typer.Option("--list", help="show the experiments")] = False,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="rewrite the tables of docs/reproduction.md")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="exit 1 if docs/reproduction.md is out of date")] = False,
) -> None:
    """Run one of the papers' experiments at a small size, or write the page about all of them."""
    if listed or (name is None and not write_docs and not check):
        for known in available():
            typer.echo(f"{known:24}  {module_of(load(known).experiment).__doc__.splitlines()[0]}")
        return
    complete = True
    if name is not None:
        try:
            config = load(name)
            config = dataclasses.replace(config, seeds=tuple(seeds)) if seeds else config
            config = config.quick() if fast else config
            folder = ROOT / "runs" / "reproduce-quick" if fast else RESULTS
            own = Path(name).stem if name.endswith(".yaml") else name.replace("/", "-")
            complete = perform(config, out or folder / f"{own}.csv")
        except (ValueError, OSError, ImportError, MissingPackageError) as error:
            raise typer.BadParameter(str(error).splitlines()[0], param_hint=name) from None
    if write_docs or check:
        write(check=check)
    if not complete:
        raise typer.Exit(INTERRUPTED)
