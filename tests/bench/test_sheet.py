"""Records survive the CSV, whatever their class; what is no such file is refused with the remedy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bench.report import rows
from bench.report.sheet import Sheet, columns, read
from bench.serving import rows as serving_rows


@dataclass(frozen=True)
class Record:
    name: str = ""
    direction: str = field(default="", metadata={"column": "pass"})
    count: int = 0
    share: float = 0.0
    ms: float | None = None


FULL = Record('a, "b"\nc', "forward", 3, 0.5, 2.0)
KINDS: dict[Path, Any] = {rows.RESULTS: rows.Row, rows.RESULTS / "serving": serving_rows.Repeat}


def written(path: Path, *records: Any) -> Path:
    for record in records:
        Sheet(path, type(record)).add(record)
    return path


@pytest.mark.parametrize(
    "record", [FULL, rows.Row(direction="forward", p50_ms=2.0), serving_rows.Repeat(tasks=3, equal=0.5)]
)
@pytest.mark.parametrize("number", [None, 0.0, 1e-300, 123456.0, float("inf"), float("-inf")])
def test_records_survive_and_are_appended(tmp_path: Path, record: Any, number: float | None) -> None:
    name = {Record: "ms", rows.Row: "p50_ms", serving_rows.Repeat: "equal"}[type(record)]
    both = [record, replace(record, **{name: number})]
    path = written(tmp_path / "deep" / "out.csv", *both)
    assert read(path, type(record)) == both


def test_the_file_as_it_is_on_disk(tmp_path: Path) -> None:
    path = written(tmp_path / "out.csv", FULL, Record(share=1 / 3))
    assert path.read_bytes() == b'name,pass,count,share,ms\r\n"a, ""b""\nc",forward,3,0.5,2\r\n,,0,0.333333,\r\n'


@pytest.mark.parametrize("folder", KINDS, ids=["results", "serving"])
def test_committed_results_are_read_and_would_be_written_the_same(tmp_path: Path, folder: Path) -> None:
    files = sorted(folder.glob("*.csv"))
    assert files
    for file in files:
        found = read(file, KINDS[folder])
        assert found
        assert written(tmp_path / file.name, *found).read_text().splitlines() == file.read_text().splitlines()


def test_columns() -> None:
    assert columns(Record) == ["name", "pass", "count", "share", "ms"]
    assert "pass" in columns(rows.Row) and "direction" not in columns(rows.Row)


def test_a_row_is_on_disk_at_once_and_counted(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "out.csv", Record)
    assert (sheet.count, sheet.summary) == (0, f"0 rows written to {sheet.path}")
    assert read(sheet.path, Record) == []
    sheet.add(FULL)
    assert read(sheet.path, Record) == [FULL]
    assert sheet.summary == f"1 row written to {sheet.path}"
    assert Sheet(sheet.path, Record).count == 0


def test_an_empty_file_gets_its_header(tmp_path: Path) -> None:
    (tmp_path / "out.csv").touch()
    assert read(written(tmp_path / "out.csv", FULL), Record) == [FULL]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "other columns"),
        ("name,direction,count,share,ms\n", "other columns"),
        ("name,pass,count,share,ms\na,b,1,0.5,\na,b,1", "line 3, is no row .*delete it"),
        ("name,pass,count,share,ms\na,b,many,0.5,\n", "line 2, is no row .*many"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "out.csv"
    path.write_text(text)
    refusing: list[Any] = [read, Sheet]
    for opened in refusing:
        with pytest.raises(ValueError, match=said):
            opened(path, Record)
    assert path.read_text() == text


def test_an_empty_file_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "out.csv").touch()
    with pytest.raises(ValueError, match="other columns"):
        read(tmp_path / "out.csv", Record)


def test_a_record_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Odd:
        name: str = ""
        good: bool = False

    with pytest.raises(TypeError, match=r"Odd: good must be a str, an int"):
        Sheet(tmp_path / "out.csv", Odd)
    assert not (tmp_path / "out.csv").exists()
