"""`bench accuracy`: the table's numbers and verdict, and the command from end to end on a tiny model."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.accuracy import Accuracy, block
from bench.report.sheet import read
from tests.support.toyrows import need_data


def rows(wide: dict[int, float], half: dict[int, float], date: str = "2") -> list[Accuracy]:
    """Two tasks, one 10 points above, one 10 below the given mean of each seed."""
    return [
        Accuracy(date=date, model="m", steps=3, dtype=dtype, seed=seed, task=task, accuracy=(mean + shift) / 100)
        for dtype, means in (("float32", wide), ("bfloat16", half))
        for seed, mean in means.items()
        for task, shift in (("one", 10), ("two", -10))
    ]


@pytest.mark.parametrize(
    ("half", "verdict"),
    [({0: 79, 1: 81}, "+0.0 points, within the seeds' spread of 1.4"), ({0: 76, 1: 78}, "-3.0 points, **beyond**")],
)
def test_the_table_and_its_verdict(half, verdict):
    text = block([*rows({0: 1, 1: 2}, half, date="1"), *rows({0: 79, 1: 81}, half)], "../x/demo.csv")
    assert "| float32 | 90.0 ± 1.4 | 70.0 ± 1.4 | 80.0 ± 1.4 |" in text  # of the newest run alone
    assert verdict in text and "seeds 0, 1;" in text and "[demo.csv](../x/demo.csv)" in text


def test_one_seed_and_one_dtype_say_so():
    assert "one seed has no spread" in block(rows({0: 80}, {0: 70}), "x.csv")
    assert "points" not in block(rows({0: 80, 1: 81}, {}), "x.csv")


def test_from_end_to_end(tmp_path):
    need_data("trec", "bbc")
    out, page = tmp_path / "a.csv", tmp_path / "page.md"
    page.write_text("as it was")
    options = ["--model", "tiny-random", "--steps", "1", "--seed", "3", "--dtype", "bfloat16", "--page", page]
    done = CliRunner().invoke(app, ["accuracy", "--out", str(out), *map(str, options)])
    assert done.exit_code == 0, done.output
    found = read(out, Accuracy)
    assert {(row.dtype, row.seed, row.steps) for row in found} == {("float32", 3, 1), ("bfloat16", 3, 1)}
    assert len(found) == 8 and all(0 <= row.accuracy <= 1 and row.commit for row in found)
    assert "| bfloat16 |" in done.output
    assert page.read_text() == "as it was", "a trial took the place of the demo's table"


def test_a_dtype_that_is_none_is_refused():
    done = CliRunner().invoke(app, ["accuracy", "--dtype", "fp8"])
    assert done.exit_code == 2
