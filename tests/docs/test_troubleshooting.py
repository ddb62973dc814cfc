"""Every message that the page on trouble quotes is one that the package says: its fixed parts stand in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| (`.+?`|``.+?``) (?:from PEFT itself )?\|", re.MULTILINE)


def texts() -> Iterator[str]:
    """Every text of the package's source, a NUL in the place of what an f-string fills in."""
    for path in sorted((ROOT / "alora_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted() -> list[tuple[int, str]]:
    """The page's messages with their lines."""
    text = PAGE.read_text()
    return [(text.count("\n", 0, row.start()) + 1, row[1]) for row in ROW.finditer(text) if "PEFT itself" not in row[0]]


def test_the_page_quotes_many():
    assert len(quoted()) > 40


def test_what_it_quotes_is_said():
    said = "\n".join(texts())
    gone = []
    for line, message in quoted():
        parts = [part.strip() for part in message.strip("`").split("…")]
        if not all(part in said for part in parts if len(part) > 3):
            gone.append(f"docs/troubleshooting.md:{line}: {message}")
    assert not gone, "no longer said: " + "\n".join(gone)


@pytest.mark.parametrize("remedy", ["alora_kernels.keep_routing", "alora_kernels.set_task", "alora_kernels.add_task"])
def test_a_remedy_in_code_exists(remedy):
    import alora_kernels

    assert hasattr(alora_kernels, remedy.removeprefix("alora_kernels."))
