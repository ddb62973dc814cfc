"""The notebooks run at tiny size, and what is committed of them is a whole run without errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from ..support.toyrows import need_data

pytest.importorskip("nbclient", reason="notebooks are executed by the extra `dev`")
pytest.importorskip("ipykernel", reason="notebooks are executed by the extra `dev`")

from ..support.notebooks import NOTEBOOKS, executed

NEEDS = {"several_tasks": ["trec", "spam"], "stock_loras": ["trec", "movie", "spam"]}
PLACES = re.compile(r"/(?:home|root|tmp|work|Users|usr|var|opt|mnt)/")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """The folder a notebook runs in; nothing is written at home."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def outputs(book):
    return [output for cell in book.cells for output in cell.get("outputs", ())]


def shown(book) -> str:
    """Everything that its outputs say in words."""
    return "".join(
        output.text if output.output_type == "stream" else "".join(map(str, output.data.values()))
        for output in outputs(book)
    )


def test_both_are_there():
    assert {path.stem for path in NOTEBOOKS} == set(NEEDS)


@every
def test_it_runs_at_tiny_size(path, quiet):
    need_data(*NEEDS[path.stem])
    book = executed(path, quiet, MODEL="tiny-random", STEPS=2, ROWS=16)
    if path.stem == "several_tasks":
        assert "the same logits: True" in shown(book)
        assert (quiet / "exported" / "tickets" / "adapter_model.safetensors").exists()
    else:
        lost = float(re.search(r"all tasks and modules ([\d.]+)%", shown(book))[1])
        assert 1 < lost < 100  # percent: trained apart, so one B of their rank loses something
        assert float(re.search(r"imported again, .* loses (\S+)", shown(book))[1]) < 1e-6
    differences = [
        float(number) for number in re.findall(r"largest difference (?:of a logit:? )?([\de+-]+)", shown(book))
    ]
    assert len(differences) >= 5 and max(differences) < 1e-4


@every
def test_what_is_committed_is_one_whole_run(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), f"{path.name}: run it anew"
    kinds = {output.output_type for output in outputs(book)}
    assert "error" not in kinds and any("image/png" in output.get("data", ()) for output in outputs(book))
    assert all(output.get("name") != "stderr" for output in outputs(book))


@every
def test_nothing_in_it_tells_of_the_machine(path):
    book = nbformat.read(path, as_version=4)
    words = [shown(book), json.dumps(book.metadata), *(cell.source for cell in book.cells)]
    words = [re.sub(r"[A-Za-z0-9+/=\n]{200,}", "", text) for text in words]  # figures
    assert not [found for text in words for found in PLACES.findall(text)]
    assert not [output for output in outputs(book) if any("widget" in kind for kind in output.get("data", ()))]
    assert set(book.metadata) == {"kernelspec", "language_info"} and book.metadata.kernelspec.name == "python3"
    assert all(set(cell.metadata) <= {"tags"} for cell in book.cells)


@every
def test_it_stays_short_and_its_links_lead_somewhere(path):
    book = nbformat.read(path, as_version=4)
    assert len(book.cells) < 25
    for number, cell in enumerate(book.cells, 1):
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 15, f"{path.name}, cell {number}"
        for link in LINK.findall(cell.source) if cell.cell_type == "markdown" else ():
            assert (path.parent / link).exists(), f"{path.name}, cell {number}: {link} is not there"


def test_a_wrong_cell_is_named_with_its_notebook(quiet):
    made = nbformat.v4.new_notebook()
    made.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    sources = ("STEPS = 1", "x = STEPS", "y = x / 0", "z = y")
    made.cells = [nbformat.v4.new_markdown_cell("# A"), *map(nbformat.v4.new_code_cell, sources)]
    made.cells[1].metadata.tags = ["parameters"]
    path = Path(quiet / "wrong.ipynb")
    nbformat.write(made, path)
    with pytest.raises(AssertionError, match=r"wrong\.ipynb, cell 4, .*'y = x / 0': ZeroDivisionError"):
        executed(path, quiet, STEPS=2)
