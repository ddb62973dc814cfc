"""What a page tells a reader to type runs as it stands, a tiny model in the place of the named one.

A block of python runs in the names of the blocks above it, a block of console or bash as the command line in this
process; both in one empty folder per page. `<!-- sketch -->` or `<!-- sketch: why -->` on the line above a block
says that it does not run here; `<!-- file: NAME -->` that the block is written to this file, for the blocks below.
"""

from __future__ import annotations

import re
import shlex
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from alora_kernels import data

from ..support.cli import alora
from ..support.toyrows import need_data

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("console", "bash", "sh")
FENCE = re.compile(r"^(?P<in> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=in)```", re.MULTILINE | re.DOTALL)
SKETCH = re.compile(r"<!-- sketch(: [^\n]+)? -->\n+ *\Z")
FILE = re.compile(r"<!-- file: (\S+) -->\n+ *\Z")
HUB = re.compile(r"\"(HuggingFaceTB|meta-llama|Qwen)/[\w.-]+\"")  # the names of models that pages use
NEEDS = {"recipes": ("trec", "spam"), "trainer": ("trec", "spam")}


class Snippet(NamedTuple):
    line: int  # of its first line, from 1
    language: str
    code: str
    runs: bool
    file: str | None = None  # where it is written to


def snippets(text: str) -> list[Snippet]:
    """The blocks of a page that a reader may run."""
    found = []
    for match in FENCE.finditer(text):
        line, before = text.count("\n", 0, match.start()) + 2, text[: match.start()]
        if file := FILE.search(before):
            found.append(Snippet(line, match["language"], match["code"], True, file[1]))
        elif match["language"] in ("python", *SHELL):
            found.append(Snippet(line, match["language"], match["code"], SKETCH.search(before) is None))
    return found


def commands(code: str) -> list[tuple[int, list[str]]]:
    """The commands of a block with the lines they begin on, counted from 0: after `$`, or every line of a script."""
    lines = code.replace("\\\n", "  ").split("\n")
    prompted = any(line.startswith("$ ") for line in lines)
    kept = [(i, line.removeprefix("$ ")) for i, line in enumerate(lines) if line.startswith("$ ") or not prompted]
    return [(i, words) for i, line in kept if (words := shlex.split(line, comments=True))]


def where(error: BaseException, page: Path, line: int) -> str:
    """The page's line that an error came from."""
    own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
    return f"{page.relative_to(ROOT)}:{(own or [line])[-1]}"


def run(page: Path, snippet: Snippet, names: dict[str, Any], model: Path) -> None:
    code = HUB.sub(f'"{model.as_posix()}"', snippet.code.replace("smollm2-135m", "tiny-random"))
    line = snippet.line
    try:
        if snippet.file:
            Path(snippet.file).write_text(code)
            return
        if snippet.language == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
            return
        for offset, (program, *arguments) in commands(code):
            line = snippet.line + offset
            assert program == "alora", f"{program} cannot run here: mark the block as <!-- sketch: why -->"
            alora(*arguments)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{where(error, page, line)}: {type(error).__name__}: {error}") from error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    for part in data.load_model("tiny-random"):
        part.save_pretrained(folder)
    return folder


WITH_CODE = [page for page in PAGES if any(snippet.runs for snippet in snippets(page.read_text()))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_snippets_of_a_page_run(page, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    need_data(*NEEDS.get(page.stem, ()))
    threads, names = torch.get_num_threads(), {"__name__": page.stem}
    try:
        for snippet in snippets(page.read_text()):
            if snippet.runs:
                run(page, snippet, names, tiny)
    finally:
        torch.set_num_threads(threads)


def test_a_snippet_that_fails_is_named_with_file_and_line(tmp_path):
    page = ROOT / "docs" / "page.md"
    text = (
        "# A\n\n```python\nx = 1\ny = z\n```\n\n<!-- sketch -->\n```bash\nmake it\n```\n\n```console\n$ make it\n```\n"
    )
    python, sketch, console = snippets(text)
    assert (python.runs, sketch.runs, console.runs) == (True, False, True)
    with pytest.raises(AssertionError, match=r"docs/page\.md:5: NameError: name 'z' is not defined"):
        run(page, python, {}, tmp_path)
    with pytest.raises(AssertionError, match=r"docs/page\.md:14: .*make cannot run here"):
        run(page, console, {}, tmp_path)


def test_every_block_of_code_says_its_language():
    """A block without one would not be run: output is `text`."""
    bare = []
    for page in PAGES:
        inside = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if line.strip().startswith("```"):
                if not inside and line.strip() == "```":
                    bare.append(f"{page.relative_to(ROOT)}:{number}")
                inside = not inside
    assert bare == [], "blocks without a language: say python, console, yaml, or text for output"
