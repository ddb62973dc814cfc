"""`docs/reproduction.md`: the tables between its markers, from the CSV files.

In:   finished rows of every shipped configuration.
Out:  the page with each block `reproduce-NAME` and `reproduce-claims` written anew; everything else stays.
Who:  `command` (`--write-docs`, `--check`), and the test that the page agrees with the numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..report.readme import replace_block
from ..report.rows import ROOT
from ..report.sheet import read
from .claims import Claim
from .claims import table as claim_table
from .config import Config, ConfigError, load
from .rows import DONE, Row, finished, pick

#: experiment -> its module here, loaded when asked for: PEFT and transformers take seconds
EXPERIMENTS = {
    "init-similarity": "similarity",
    "before-after": "change",
    "sharing": "sharing",
    "multitask": "multitask",
    "multitask-budget": "equal_parameters",
    "fedsa": "clients",
    "federated": "federated",
}
RESULTS = ROOT / "bench" / "results" / "reproduction"
PAGE = ROOT / "docs" / "reproduction.md"


def module_of(experiment: str) -> Any:
    """The module with an experiment's `cases`, `run`, `claims`, `table` and `figure`.

    Raises:
        ConfigError: no such experiment.
    """
    if experiment not in EXPERIMENTS:
        raise ConfigError(f"experiment: must be one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
    return importlib.import_module(f"{__package__}.{EXPERIMENTS[experiment]}")


def block(config: Config, rows: Sequence[Row], source: str) -> str:
    """What the page says about one experiment.

    Args:
        config: its settings.
        rows: finished ones.
        source: folder of CSV and figure, as the page links it.
    """
    name = config.experiment
    command = f"`python -m bench reproduce {name}`"
    if not rows:
        return f"Not run yet: {command}."
    kind = module_of(name)
    seeds = sorted({row.seed for row in rows})
    few = "" if len(seeds) >= 3 else " Fewer than 3 seeds: too few for a spread that means something."
    minutes = sum(row.value or 0 for row in pick(rows, measure=DONE)) / 60
    origin = sorted({_origin(row) for row in rows})
    had = {(row.seed, row.case) for row in rows if row.seed in config.seeds}
    missing = len(config.seeds) * len(kind.cases(config)) - len(had)
    lines = [
        f"{command}, {setting(config)}, seeds {', '.join(map(str, seeds))}, {minutes:.0f} minutes;"
        f" rows: [{name}.csv]({source}/{name}.csv).{few}",
        "",
        *[f"- {line}" for line in origin],
        "",
        *kind.table(rows),
        "",
        f"![{name}]({source}/{name}.png)",
    ]
    if missing > 0:
        lines += ["", f"{missing} of the runs that the file asks for are not run yet."]
    return "\n".join(lines)


def _origin(row: Row) -> str:
    """Where a row comes from, in one line."""
    versions = f"torch {row.torch}, transformers {row.transformers}, peft {row.peft}"
    return f"{row.device}, {versions}, commit {row.commit}, {row.date[:10]}"


def setting(config: Config) -> str:
    """The settings in one line."""
    parts = [config.model, f"tasks {', '.join(config.names)}"]
    if config.budget != "rank":
        parts.append("ranks by parameters")
    for key, label in (("r", "r"), ("steps", "steps"), ("rounds", "rounds"), ("batch_size", "rows a task and step")):
        if (value := getattr(config, key)) is not None:
            parts.append(f"{label} {value}")
    return ", ".join([*parts, f"learning rate {config.learning_rate:g}"] if config.learning_rate else parts)


def rewritten(text: str, results: Path = RESULTS, source: str = "../bench/results/reproduction") -> str:
    """The page's text with all blocks anew.

    Raises:
        ValueError: a marker is missing.
    """
    everything: list[Claim] = []
    for name in EXPERIMENTS:
        config, path = load(name), results / f"{name}.csv"
        rows = finished(read(path, Row), config) if path.exists() else []
        text = replace_block(text, f"reproduce-{name}", block(config, rows, source))
        everything += module_of(name).claims(rows)
    return replace_block(text, "reproduce-claims", "\n".join(claim_table(everything)))


def write(*, check: bool = False) -> None:
    """Rewrite the page, or compare.

    Raises:
        typer.Exit: with 1 where the page is out of date.
    """
    old = PAGE.read_text()
    new = rewritten(old)
    if check and new != old:
        typer.echo(f"{PAGE} is out of date: run `python -m bench reproduce --write-docs`", err=True)
        raise typer.Exit(1)
    if not check:
        PAGE.write_text(new)
    typer.echo(f"{PAGE} {'agrees with' if check else 'rewritten from'} {RESULTS}")
