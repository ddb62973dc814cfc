"""Studies: rows by hand, runs kept and resumed, a table, JSON and a picture. No order of methods is asserted."""

from __future__ import annotations

import json

import pytest

from alora_kernels.federated import FedConfig
from alora_kernels.recipes import study as fed_study
from alora_kernels.recipes.display import Console
from alora_kernels.recipes.study import Result, rows_of

from ..support.toyrows import letters

RESULTS = [
    Result("majority", 0, {"a": 0.5, "b": 0.6}),
    Result("local", 0, {"a": 0.8, "b": 0.5}),
    Result("local", 1, {"a": 0.4, "b": 0.5}),
    Result("fedit", 0, {"a": 0.6, "b": 0.75}, 3000.0, 24_000),
    Result("fedit", 1, {"a": 0.5, "b": 0.75}, 3000.0, 26_000, rejected=1),
    Result("other-method", 2, {"a": 0.5, "b": 0.5}, 2e6, 8_000_000),
]


@pytest.fixture
def config(tmp_path):
    clients = [{"name": name, "task": str(letters(tmp_path / "toy.jsonl", 90))} for name in ("a", "b")]
    small = dict(rank=2, rounds=3, train_size=30, test_size=20, local_steps=2, batch_size=4)
    return FedConfig(method="fed-alora", model="tiny-random-encoder", clients=clients, output=tmp_path / "run", **small)


def printed(table, width=100):
    console = Console(record=True, width=width)
    console.print(table)
    return console.export_text()


def test_rows_by_hand():
    rows = {row.method: row for row in rows_of(RESULTS)}
    assert list(rows) == ["majority", "local", "fedit", "other-method"]
    fedit = rows["fedit"]
    assert fedit.mean == pytest.approx([0.675, 0.625])
    assert fedit.worst == [0.6, 0.5]
    assert fedit.worst_client == "a"
    assert fedit.delta == pytest.approx([-100 / 2 * (-0.25 + 0.5), -100 / 2 * (0.25 + 0.5)])
    assert (fedit.bytes_round, fedit.bytes_total) == (3000, 25_000)
    assert rows["local"].delta == pytest.approx([0, 0])
    assert rows["other-method"].delta == [None]  # no local run with its seed
    with pytest.raises(ValueError, match="results is empty"):
        rows_of([])


def test_table_says_what_was_computed():
    text = printed(fed_study.table(RESULTS, "study"))
    line = next(line for line in text.splitlines() if "fedit" in line)
    assert "65.0 ±3.5" in line
    assert "55.0 ±7.1 (a)" in line
    assert "-25.0 ±17.7" in line
    assert "3.0 kB" in line
    assert "25.0 kB" in line
    other = next(line for line in text.splitlines() if "other" in line)
    assert "2.00 MB" in other
    assert "±" not in other  # one seed
    narrow = printed(fed_study.table(RESULTS, "study"), width=80)
    assert "…" not in narrow
    assert all(line.endswith(("│", "┃")) for line in narrow.splitlines() if line.startswith(("│", "┃")))


def test_saved_files(tmp_path, config):
    data, picture = fed_study.save(RESULTS, [config], tmp_path / "out")
    values = json.loads(data.read_text())
    assert [r["method"] for r in values["results"]] == [r.method for r in RESULTS]
    assert values["configs"][0]["method"] == "fed-alora"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    many = [Result("local", 0, {f"c{i}": i / 20 for i in range(12)})]
    fed_study.save(many, [config], tmp_path / "out")


def test_a_finished_run_is_read_back(config, monkeypatch):
    seen = []
    first = fed_study.result(config, seen.append)
    assert len(seen) == 2 * 2 * (3 + 1)
    monkeypatch.setattr(fed_study, "run", lambda *_, **__: pytest.fail("ran again"))
    assert fed_study.result(config) == first
    assert set(first.accuracy) == {"a", "b"}
    assert first.bytes_total == first.bytes_round * 2 * 3 > 0
    with pytest.raises(ValueError, match="other settings: choose another output"):
        fed_study.result(config.model_copy(update={"local_steps": 9}))


def test_an_interrupted_run_goes_on_to_the_same_result(config, tmp_path):
    whole = fed_study.result(config)
    messages = []

    def interrupt(message):
        messages.append(message)
        if len(messages) == 7:  # in round 2
            raise KeyboardInterrupt

    other = config.model_copy(update={"output": tmp_path / "other"})
    with pytest.raises(KeyboardInterrupt):
        fed_study.result(other, interrupt)
    assert fed_study.result(other) == whole


def test_a_study_has_baselines_and_every_run(config, tmp_path):
    configs = [
        config.model_copy(update={"seed": seed, "method": method, "rounds": 1, "output": tmp_path / f"{method}{seed}"})
        for seed in (0, 1)
        for method in ("local", "fedit")
    ]
    results = fed_study.study(configs)
    assert [(r.method, r.seed) for r in results] == [
        ("majority", 0), ("untuned", 0), ("majority", 1), ("untuned", 1),
        ("local", 0), ("fedit", 0), ("local", 1), ("fedit", 1),
    ]  # fmt: skip
    assert all(set(r.accuracy) == {"a", "b"} for r in results)
    assert all((r.bytes_total > 0) == (r.method == "fedit") for r in results)


def test_a_run_that_stops_says_why(config, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no data today")

    monkeypatch.setattr(fed_study, "participant", fail)
    with pytest.raises(RuntimeError, match=r"no data today|stopped:"):
        fed_study.result(config)
