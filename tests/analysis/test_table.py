"""Rows as means and as files: what does not exist counts nowhere and is blank."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from alora_kernels.analysis import table
from alora_kernels.analysis.report import Column, groups, number, pair_columns, pairs, shown, unit_columns, which
from alora_kernels.analysis.table import Mean, Row, mean_of, means, measures, over_layers, square, where, write_csv

from ..support.adapters import alora, lora
from .adapters import UP, Q, compared, randn

NAN = math.nan


def row(unit1="x", unit2="y", value=0.5, layer=0, kind="q", part="A", measure="cosine"):
    return Row(f"layers.{layer}.{kind}", layer, kind, part, unit1, unit2, measure, value)


def test_means_leave_out_what_does_not_exist():
    assert mean_of([1.0, NAN, 3.0]) == Mean(2.0, pytest.approx(math.sqrt(2)), 1.0, 3.0, 2)
    assert mean_of([NAN]).known == 0 and math.isnan(mean_of([]).mean)
    assert math.isnan(mean_of([1.0]).sd)


def test_squares_are_symmetric_with_an_empty_diagonal():
    rows = [row(value=0.2), row(value=0.4, layer=1), row("z", "x", 0.9), row("y", "z", NAN)]
    found = square(rows, ["x", "y", "z"])
    expected = np.array([[NAN, 0.3, 0.9], [0.3, NAN, NAN], [0.9, NAN, NAN]])
    np.testing.assert_allclose(found, expected)


def test_layers_and_units():
    rows = [row(value=0.2), row("x", "z", 0.4), row(value=0.6, layer=1), row(value=1.0, kind="up"), row(layer=None)]
    found = over_layers(rows)
    assert set(found) == {"q", "up"} and list(found["q"]) == [0, 1]
    assert found["q"][0].mean == pytest.approx(0.3) and found["q"][0].low == 0.2
    assert means(rows, "unit1")["x",].known == 5
    assert measures([row(value=NAN), row(measure="overlap")]) == [("A", "overlap")]
    mixed = [row(measure="overlap"), row(part="B"), row()]
    assert measures(mixed) == [("A", "cosine"), ("A", "overlap"), ("B", "cosine")]
    assert where(rows, "B", "cosine") == [] and len(where(rows, "A", "cosine", "z")) == 1


def test_files_are_whole_and_blank_where_there_is_no_number(tmp_path):
    path = write_csv(tmp_path / "t.csv", ["a", "b", "c"], [["=x,\n", 1 / 3, None], ["y", NAN, 2]])
    assert list(csv.reader(path.open())) == [["a", "b", "c"], ["=x,\n", "0.333333333", ""], ["y", "", "2"]]
    with pytest.raises(ZeroDivisionError):
        write_csv(path, ["a"], ([1 / 0] for _ in range(1)))
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"] and "0.333" in path.read_text()


def test_save_writes_every_row(tmp_path):
    modules = [Q.format(0), UP.format(0), Q.format(1)]
    a, b = {m: randn(3, 2, 8, seed=i) for i, m in enumerate(modules)}, {m: randn(6, 2) for m in modules}
    study = compared(alora(tmp_path / "a", ["x", "y", "z"], a, b))
    files = study.save(tmp_path / "out" / "deep")
    assert [f.name for f in files] == ["similarity.csv", "changes.csv", "norms.csv", "not_compared.csv"]
    similarity = list(csv.DictReader(files[0].open()))
    assert tuple(similarity[0]) == table.COLUMNS
    assert len(similarity) == len(study.similarity) == 3 * 3 * 2  # modules, pairs, cosine and overlap of A
    first = study.similarity[0]
    assert similarity[0]["module"] == first.module and similarity[0]["layer"] == "0"
    assert float(similarity[0]["value"]) == pytest.approx(first.value, rel=1e-8)
    changes = list(csv.DictReader(files[1].open()))
    assert {r["unit2"] for r in changes} == {"zero"} and any(r["value"] == "" for r in changes)
    assert len(study.rows) == sum(len(list(csv.DictReader(f.open()))) for f in files[:3])
    left = list(csv.DictReader(files[3].open()))
    assert tuple(left[0]) == table.SKIPPED and left[0]["modules"] == "3"


def test_summaries(tmp_path):
    modules = [Q.format(0), Q.format(1)]
    shared, other = randn(2, 8), randn(2, 8, seed=1)
    for name, a in (("x", shared), ("y", shared), ("z", other)):
        lora(tmp_path / name, dict.fromkeys(modules, a), {m: randn(6, 2, seed=ord(name)) for m in modules})
    study = compared(*(tmp_path / name for name in "xyz"))
    columns = pair_columns(study)
    assert [c.title for c in columns][:2] == ["cosine of A", "subspace overlap of A"]
    assert columns[1].chance == pytest.approx(2 / 8)
    assert columns[1].values["x", "y"].mean == pytest.approx(1.0) and columns[1].values["x", "y"].known == 2
    chosen, more = pairs(columns, 2)
    assert chosen[0] == ("x", "y") and more == 1
    assert pairs([], 5) == ([], 0)
    titles = [c.title for c in unit_columns(study)]
    assert titles == ["change of length, B, from zero", "effective rank of s B A", "norm of s B A"]


def test_reasons_are_grouped(tmp_path):
    study = compared(alora(tmp_path / "a", list("pqr"), {"up": randn(3, 2, 8)}, {"up": randn(6, 2)}))
    (group,) = groups(study)
    assert (group.part, len(group.units), group.modules) == ("B", 3, ["up"])
    assert which(group.units) == "p with q, p with r and 1 more"
    assert which([("x",)]) == "x"


def test_numbers_as_text():
    assert shown(Mean(0.5, 0.25, 0, 1, 3)) == "0.500 ± 0.250"
    assert shown(Mean(0.5, NAN, 0, 1, 1)) == "0.500" and shown(mean_of([])) == "–"
    shown_as = {0.0: "0.000", 3e-16: "0.000", 0.01389: "0.0139", 1e-5: "1e-05", -0.05: "-0.0500", 12345.6: "1.235e+04"}
    assert {value: number(value) for value in shown_as} == shown_as
    assert Column("t", {}).values == {}
