"""A table that a command wrote says which, at which commit, from which file; the file is committed, the table its own.

`bench plot` and `bench reproduce --write-docs` make their blocks again from committed rows, so those must agree to the
letter. A block of a verification has no file: what the command found is the block.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import plot
from bench.reproduce.command import rewritten

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"<!-- (?P<name>[\w-]+):begin -->\n(?P<text>.*?)<!-- (?P=name):end -->", re.DOTALL)
SOURCE = re.compile(r"\]\(((?:\.\./)*bench/results/[^)]+)\)")
COMMANDS = {  # block: what writes it
    "bench-accuracy": "python -m bench accuracy",
    "bench-chaos": "python -m bench chaos",
    "bench-compiled": "python -m bench static --csv",
    "bench-cpu": "python -m bench cpu",
    "bench-federated": "python examples/federated_sentiment.py",
    "bench-gpu": "make gpu",
    "bench-host": "python -m bench host",
    "bench-mixtures": "python -m bench plot",
    "bench-moe": "python -m bench moe",
    "bench-peer": "python -m bench serving --peer vllm",
    "bench-processes": "python -m bench processes",
    "bench-serving": "python -m bench serving",
    "bench-static": "python -m bench static --roofline-only",
    "verify-lm-eval": "make verify-lm-eval",
    "verify-quant": "make verify-quant",
    "verify-vllm": "make verify-vllm",
}
COMPUTED = ("bench-mixtures", "bench-static", "reproduce-claims")  # from formulas, and from the rows of other blocks


class Block(NamedTuple):
    page: Path
    line: int
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.name}"


def blocks(page: Path, text: str | None = None) -> Iterator[Block]:
    text = page.read_text() if text is None else text
    for found in BLOCK.finditer(text):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found["name"], found["text"].strip())


EVERY = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", EVERY, ids=lambda block: block.name)
def test_a_block_names_its_command_and_commit(block):
    command = COMMANDS.get(block.name, "python -m bench reproduce")
    assert command in block.page.read_text(), f"{block} is written by {command}, which its page does not say"
    if block.text and block.name not in COMPUTED:
        assert re.search(r"\bcommit(?:ted in)? [0-9a-f]{7,}\b", block.text), f"{block} says no commit"


@pytest.mark.parametrize("block", [b for b in EVERY if SOURCE.search(b.text)], ids=lambda block: block.name)
def test_what_a_block_is_made_of_is_committed(block):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    for link in SOURCE.findall(block.text):
        path = (block.page.parent / link).resolve()
        asked = ["git", "-C", str(ROOT), "status", "--porcelain", "--ignored", "--", str(path)]
        said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
        assert path.exists() and not said, f"{block}: {link} is not the committed file ({said.strip() or 'missing'})"


def stale(page: Path, new: str) -> list[str]:
    """The blocks of a page that another text of it has otherwise."""
    made = {block.name: block.text for block in blocks(page, new)}
    return [str(block) for block in blocks(page) if made[block.name] != block.text]


def test_blocks_are_what_the_committed_rows_give():
    pages = [page for page in PAGES if "<!-- bench-" in page.read_text()]
    found = plot.rewritten(pages, plot.load(plot.RESULTS), plot.RESULTS)
    old = [said for page, text in found.items() for said in stale(page, text)]
    assert not old, f"{', '.join(old)} is out of date: run `python -m bench plot`"
    page = ROOT / "docs" / "reproduction.md"
    old = stale(page, rewritten(page.read_text()))
    assert not old, f"{', '.join(old)} is out of date: run `python -m bench reproduce --write-docs`"


def test_a_number_changed_by_hand_is_named_with_file_and_line():
    page = ROOT / "docs" / "cpu.md"
    [block] = [block for block in blocks(page) if block.name == "bench-cpu"]
    changed = page.read_text().replace(block.text, block.text.replace("| frozen |", "| frozen! |", 1))
    assert stale(page, changed) == [f"docs/cpu.md:{block.line}: bench-cpu"]
