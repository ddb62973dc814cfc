"""Figures and the tables of README and docs from the CSV files: `python -m bench plot`.

Of several runs of the same case the newest counts. A block goes to the page that has its markers. The blocks
`bench-static` and `bench-mixtures` hold predictions, which need triton. CI only compares the pages, with `--check`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from alora_kernels.plotting import check_matplotlib

from . import accuracy
from .report import federation, figures, readme
from .report.rows import RESULTS, ROOT, Row, grouped, newest
from .report.sheet import read
from .report.targets import CPU_TARGETS, GPU_TARGETS, HOST_TARGETS, MOE_TARGETS, Verdict, judge
from .run import checked
from .serving import page as serving

COMPILED = RESULTS / "static" / "compiled.csv"
PREDICTED = RESULTS / "static" / "predicted.png"
_OTHERS = {
    "accuracy": accuracy.blocks,
    "peer": serving.of_servers,
    "serving": serving.of_engine,
    "federated": federation.blocks,
}
_TARGETS = {"cpu": CPU_TARGETS, "gpu": GPU_TARGETS, "host": HOST_TARGETS, "moe": MOE_TARGETS}


def load(folder: Path) -> dict[Path, list[Row]]:
    found = {path: checked("--results", read, path, Row) for path in sorted(folder.glob("*.csv"))}
    found = {path: newest(rows, lambda row: row.group, lambda row: row.timed) for path, rows in found.items()}
    if not any(found.values()):
        raise typer.BadParameter(f"no results in {folder}: run `python -m bench cpu` first", param_hint="--results")
    return {path: rows for path, rows in found.items() if rows}


def families(rows: list[Row]) -> dict[str, list[Row]]:
    """The cases that share a figure: those whose names begin with the same word."""
    found = {same[0].case.split()[0]: same for same in grouped(rows, lambda row: row.case.split()[0])}
    return {name: same for name, same in found.items() if any(row.timed for row in same)}


def verdicts_of(rows: list[Row]) -> list[Verdict]:
    return [judge(target, rows) for target in _TARGETS[rows[0].command]]


def figure_files(path: Path, rows: list[Row]) -> dict[str, str]:
    """What figures a CSV has: name -> file name."""
    asked = any(v.measured is not None and v.target.must is not None for v in verdicts_of(rows))
    return {name: f"{path.stem}-{name}.png" for name in [*families(rows), *["targets"] * asked]}


def predicts(text: str) -> bool:
    """Whether the README has a place for predictions, and this machine can make them."""
    return importlib.util.find_spec("triton") is not None and "<!-- bench-static:begin -->" in text


@cache
def predictions() -> list[Any]:
    from .static import roofline

    return list(roofline.predict_all(roofline.Rates()))


def rewritten(pages: list[Path], results: dict[Path, list[Row]], others: Path) -> dict[Path, str]:
    """The pages' texts with a block per command, its CSV files one after the other; other kinds of rows in `others`."""
    texts = {page: page.read_text() for page in pages}
    commands = {f"bench-{rows[0].command}" for rows in results.values()}
    for name in sorted(commands):
        if not any(_begins(name) in text for text in texts.values()):
            texts[pages[0]] = readme.replace_block(texts[pages[0]], name, "")  # says what is missing
    return {page: _with_blocks(text, results, page.resolve().parent, others) for page, text in texts.items()}


def _begins(name: str) -> str:
    return f"<!-- {name}:begin -->"


def _with_blocks(text: str, results: dict[Path, list[Row]], folder: Path, others: Path) -> str:
    blocks: dict[str, list[str]] = {}
    for path, rows in results.items():
        command = rows[0].command
        link = readme.linked(path.parent, folder)
        files = {name: f"{link}/{file}" for name, file in figure_files(path, rows).items()}
        content = readme.block(rows, _TARGETS[command], f"{link}/{path.name}", files, cases=command != "gpu")
        blocks.setdefault(command, []).append(content)
    if predicts(text):
        from .static import roofline

        blocks["static"] = [roofline.block(predictions(), roofline.Rates(), readme.linked(PREDICTED, folder))]
    if _begins("bench-mixtures") in text and importlib.util.find_spec("triton") is not None:
        from .static import mixtures, roofline

        blocks["mixtures"] = [mixtures.block(roofline.Rates())]
    if _begins("bench-compiled") in text and COMPILED.exists():
        blocks["compiled"] = [readme.compiled(COMPILED, readme.linked(COMPILED, folder))]
    for name, made_by in _OTHERS.items():
        if _begins(f"bench-{name}") in text and (made := made_by(others, folder)):
            blocks[name] = made
    for command, contents in blocks.items():
        if _begins(f"bench-{command}") in text:
            text = readme.replace_block(text, f"bench-{command}", "\n\n".join(contents))
    return text


def _pages() -> list[Path]:
    return [page for page in sorted((ROOT / "docs").glob("*.md")) if "<!-- bench-" in page.read_text()]


def main(
    results: Annotated[Path, typer.Option(help="folder of the CSV files; figures are written there")] = RESULTS,
    readme_file: Annotated[Path, typer.Option("--readme", help="file whose blocks are rewritten")] = ROOT / "README.md",
    docs: Annotated[list[Path] | None, typer.Option(help="others; by default those of docs that have blocks")] = None,
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit 1 if a page is out of date")] = False,
) -> None:
    """Figures and the tables of README and docs from the results."""
    found = load(results)
    pages = [page for page in (readme_file, *(docs or _pages())) if page.exists()]
    new: dict[Path, str] = checked("--readme", rewritten, pages, found, results)
    if check:
        if old := [str(page) for page, text in new.items() if text != page.read_text()]:
            typer.echo(f"{', '.join(old)} is out of date: run `python -m bench plot`", err=True)
            raise typer.Exit(1)
        typer.echo(f"{', '.join(map(str, new))} agree with {', '.join(path.name for path in found)}")
        return
    checked(None, check_matplotlib)
    for path, rows in found.items():
        for name, file in figure_files(path, rows).items():
            if name == "targets":
                figures.targets(verdicts_of(rows), rows, results / file)
            else:
                figures.times(families(rows)[name], results / file)
            typer.echo(f"wrote {results / file}")
    if any(map(predicts, new.values())):
        from .static import roofline

        roofline.draw(predictions(), PREDICTED, roofline.Rates())
        typer.echo(f"wrote {PREDICTED}")
    for page, text in new.items():
        page.write_text(text)
    typer.echo(f"rewrote the tables of {', '.join(map(str, new))}")
