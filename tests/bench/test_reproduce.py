"""Every experiment end to end on a tiny random encoder: rows, figure, claims; taken up again; the command's errors."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alora_kernels import data
from bench.__main__ import app
from bench.report.sheet import Sheet, read
from bench.reproduce import command
from bench.reproduce.clients import split
from bench.reproduce.config import Config, ConfigError, available, load
from bench.reproduce.encoder import SHARED_A, factors, study
from bench.reproduce.numbers import DONE, Claim, Number, finished, spread

pytest.importorskip("matplotlib")
TASKS = {"init-similarity": ("movie", "amazon"), "before-after": ("movie",), "fedsa": ("movie",)}
OURS = [name for name in available() if "/" not in name]


@pytest.fixture(scope="module", autouse=True)
def _need_data() -> None:
    try:
        data.load_task("movie", test_size=2)
    except data.MissingPackageError as error:
        pytest.skip(str(error))


def tiny(name: str) -> Config:
    small: dict[str, Any] = {"model": "tiny-random-encoder"}
    if name in TASKS:
        small["tasks"] = TASKS[name]
    if name in ("sharing", "multitask", "multitask-budget"):
        small["tasks"] = ("movie", "amazon", "nyt")
    if name == "fedsa":
        small |= {"alphas": (1.0, 100.0), "variants": ("lora", "rslora", "vera")}
    if name == "federated":
        small["methods"] = ("local", "fedit", "fed-alora", "fedsa-lora")
    return dataclasses.replace(load(name), **small).quick()


def wide(rows: list[Number], measure: str, **where: Any) -> list[float]:
    chosen = [r for r in rows if r.measure == measure and all(getattr(r, k) == v for k, v in where.items())]
    assert chosen, (measure, where)
    return [float("nan") if r.value is None else r.value for r in chosen]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Number]]:
    """Finished rows of every experiment, with the CSV and the figure in a folder."""
    pytest.importorskip("flwr")
    folder = tmp_path_factory.mktemp("reproduction")
    patch = pytest.MonkeyPatch()
    patch.setattr("bench.reproduce.federated.RUNS", folder / "runs")
    found = {}
    for name in OURS:
        out = folder / f"{name}.csv"
        assert command.perform(tiny(name), out)
        assert out.with_suffix(".png").stat().st_size > 5000
        found[name] = finished(read(out, Number), tiny(name))
    patch.undo()
    return found


@pytest.mark.parametrize("name", OURS)
def test_every_experiment_gives_rows_claims_and_a_table(ran: dict[str, list[Number]], name: str) -> None:
    rows, kind, config = ran[name], command.module_of(name), tiny(name)
    assert {row.case for row in rows if row.measure == DONE} == set(kind.cases(config))
    assert all(row.commit and row.date and row.torch and row.peft for row in rows)
    claims = kind.claims(rows)
    assert claims and all(len(claim.agrees) == 1 and "1 seed" in claim.verdict for claim in claims)
    table = kind.table(rows)
    assert len({line.count("|") for line in table}) == 1, table  # every row has the header's columns
    assert all(claim.verdict == "not run yet" for claim in kind.claims([]))


def test_one_seed_begins_with_equal_a_and_two_do_not(ran: dict[str, list[Number]]) -> None:
    rows = ran["init-similarity"]
    assert min(wide(rows, "cosine", part="A", item="two tasks, same seed")) > 0.95  # two steps from one start
    assert max(map(abs, wide(rows, "cosine", part="A", item="same task, two seeds"))) < 0.5


def test_a_hardly_moves_in_two_steps_and_b_leaves_zero(ran: dict[str, list[Number]]) -> None:
    rows = ran["before-after"]
    assert min(wide(rows, "cosine", part="A", item="start")) > 0.99
    assert min(wide(rows, "direction", part="B", item="early")) > max(wide(rows, "direction", part="A", item="early"))
    assert min(wide(rows, "direction", part="W", item="W0")) > 0


def test_only_what_is_shared_can_conflict(ran: dict[str, list[Number]]) -> None:
    rows = ran["sharing"]
    pairs = 6 * 3  # linear layers in a block, pairs of three tasks
    assert set(wide(rows, "pairs", case="alora", part="A")) == {0.0}
    assert set(wide(rows, "pairs", case="alora", part="B")) == {float(pairs)}
    assert set(wide(rows, "pairs", case="shared-a", part="B")) == {0.0}
    assert set(wide(rows, "pairs", case="shared-a", part="A")) == {float(pairs)}


def test_parameters_are_those_of_the_methods(ran: dict[str, list[Number]]) -> None:
    count = {row.case: row.value for row in ran["multitask"] if row.measure == "parameters"}
    # per block: four layers 32 -> 32, one 32 -> 64, one 64 -> 32; rank 8, two blocks
    inputs, outputs = 4 * 32 + 32 + 64, 4 * 32 + 64 + 32
    assert count["lora"] == 2 * 8 * (inputs + outputs)
    assert count["lora-per-task"] == 3 * count["lora"]
    assert count["alora"] == 2 * 8 * (3 * inputs + outputs)


def test_a_finished_seed_is_not_run_again(tmp_path: Path) -> None:
    config, out = tiny("before-after"), tmp_path / "x.csv"
    command.perform(config, out)
    before = out.read_text()
    command.perform(config, out)
    assert out.read_text() == before
    more = dataclasses.replace(config, seeds=(0, 1))
    command.perform(more, out)
    assert out.read_text().startswith(before)
    assert {row.seed for row in finished(read(out, Number), config)} == {0, 1}
    other = dataclasses.replace(config, steps=3)
    assert command.units(other, command.module_of("before-after"), read(out, Number)) == [(0, "movie")]


def test_ctrl_c_keeps_what_is_finished_and_drops_half_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = dataclasses.replace(tiny("before-after"), seeds=(0, 1)), tmp_path / "x.csv"
    kind = command.module_of("before-after")
    run = kind.run

    def once(config: Config, seed: int, case: str) -> list[Number]:
        if seed == 1:
            raise KeyboardInterrupt
        return run(config, seed, case)

    monkeypatch.setattr(kind, "run", once)
    assert not command.perform(config, out)
    rows = read(out, Number)
    assert {row.seed for row in finished(rows, config)} == {0}
    sheet: Sheet[Number] = Sheet(out, Number)
    sheet.add(dataclasses.replace(rows[0], seed=1))  # a row whose unit never ended
    assert {row.seed for row in finished(read(out, Number), config)} == {0}


@pytest.mark.parametrize("name", [name for name in available() if name.startswith("paper/")])
def test_the_papers_size_is_one_clear_line_without_a_hub(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", name, "--out", str(tmp_path / "x.csv")], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "could not load encoder" in result.output and "Traceback" not in result.output


def test_equal_parameters_are_equal(ran: dict[str, list[Number]]) -> None:
    sizes = wide(ran["multitask-budget"], "parameters")
    assert len(sizes) == 5 and max(sizes) < 1.15 * min(sizes)  # to half a rank, which is much in a layer of 32
    at_equal_rank = wide(ran["multitask"], "parameters")
    assert max(at_equal_rank) > 2 * min(at_equal_rank)


@pytest.mark.parametrize("method", ["alora", SHARED_A, "vera"])
def test_target_modules_are_those_that_are_adapted(method: str) -> None:
    config = dataclasses.replace(tiny("sharing"), target_modules=("query", "value"))
    adapted = factors(study(config, method, 0).model)
    assert adapted and {name.rpartition(".")[2] for name in adapted} == {"query", "value"}


def test_list_names_every_experiment() -> None:
    result = CliRunner().invoke(app, ["reproduce", "--list"])
    assert result.exit_code == 0
    assert all(name in result.output for name in available())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: nothing\nmodel: minilm\ntasks: [trec]\n", "must be one of init-similarity"),
        ("experiment: sharing\nmodel: minilm\n", "tasks must be given"),
        ("experiment: sharing\nmodel: minilm\ntasks: trec\n", "must be a list"),
        ("experiment: sharing\nmodel: minilm\ntasks: [trec]\nsteep: 3\n", "unknown keys"),
        ("experiment: multitask\nmodel: minilm\ntasks: [trec]\nbudget: money\n", "budget must be one of rank"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["reproduce", str(path), "--out", str(tmp_path / "x.csv")], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and message in result.output


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match="learning_rate: fedsa needs it"):
        dataclasses.replace(load("fedsa"), learning_rate=None).number("learning_rate")


def test_seeds_are_not_part_of_the_hash_and_steps_are() -> None:
    config = load("sharing")
    assert dataclasses.replace(config, seeds=(7,)).hash == config.hash
    assert dataclasses.replace(config, steps=7).hash != config.hash
    assert dataclasses.replace(config, budget="parameters").hash != config.hash


def test_a_field_at_its_default_leaves_the_hash_alone() -> None:
    config = load("sharing")
    assert dataclasses.replace(config, max_length=Config.max_length).hash == config.hash
    spec = data.TaskSpec("own", "own.jsonl")
    assert dataclasses.replace(config, tasks=(spec,)).hash != config.hash


def test_the_page_agrees_with_the_numbers() -> None:
    assert command.rewritten(command.PAGE.read_text()) == command.PAGE.read_text(), (
        "python -m bench reproduce --write-docs"
    )


def test_the_page_says_what_was_not_run(tmp_path: Path) -> None:
    page = command.rewritten(command.PAGE.read_text(), tmp_path)
    assert page.count("Not run yet: `python -m bench reproduce") == len(command.EXPERIMENTS)


def test_csv_is_one_table_for_all(ran: dict[str, list[Number]], tmp_path: Path) -> None:
    sheet: Sheet[Number] = Sheet(tmp_path / "all.csv", Number)
    for rows in ran.values():
        sheet.add(rows[0])
    with sheet.path.open(newline="") as file:
        assert [line["experiment"] for line in csv.DictReader(file)] == list(ran)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 100.0])
def test_a_split_gives_every_row_to_one_client(alpha: float) -> None:
    targets = torch.arange(600) % 6
    parts = split(targets, 3, alpha, 8, seed=0)
    assert torch.cat(parts).sort().values.equal(torch.arange(600))
    assert min(map(len, parts)) >= 8


def test_small_alpha_makes_clients_differ() -> None:
    targets = torch.arange(600) % 6

    def distance(alpha: float) -> float:
        shares = [targets[p].bincount(minlength=6) / len(p) for p in split(targets, 3, alpha, 8, seed=0)]
        return float((shares[0] - shares[1]).abs().sum())

    assert distance(0.1) > 2 * distance(100.0)


def test_a_split_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 8"):
        split(torch.zeros(10, dtype=torch.int64), 3, 1.0, 8, seed=0)


@pytest.mark.parametrize(
    ("agrees", "words"),
    [
        ([], "not run yet"),
        ([True], "holds (1 of 1 seeds; 1 seed, too few for a spread)"),
        ([True, True, True], "holds (3 of 3 seeds)"),
        ([False, False], "does not hold at this size (0 of 2 seeds)"),
        ([True, False, True], "undecided at this size (2 of 3 seeds)"),
    ],
)
def test_a_verdict_counts_seeds(agrees: list[bool], words: str) -> None:
    assert Claim("", "", "", "", agrees).verdict == words


def test_a_spread_needs_two_seeds() -> None:
    assert spread([]) == "not run yet"
    assert spread([0.5]) == "0.500 (1 seed)"
    assert spread([1.0, 3.0], "+.1f") == "+2.0 ± 1.4"
