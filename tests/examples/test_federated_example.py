"""The federated example: every method on a tiny model, and what it leaves behind."""

from __future__ import annotations

import json

import pytest

from alora_kernels.federated import METHODS

from ..support.toyrows import need_data
from .test_examples import load

TINY = {"model": "tiny-random-encoder", "rounds": 1, "local_steps": 1, "batch_size": 2, "train_size": 8, "test_size": 8}


@pytest.fixture(autouse=True)
def _need_data():
    need_data("bbc", "movie")


def test_all_methods_on_four_clients(tmp_path, capsys):
    example = load("federated_sentiment")
    results = example.main(methods=["all"], output=str(tmp_path), **TINY)
    assert {r.method for r in results} == {"majority", "untuned", *METHODS}
    assert all(tuple(r.accuracy) == ("movie", "amazon", "nyt", "tweets") for r in results[:2])
    assert all(set(r.accuracy) == {"movie", "amazon", "nyt", "tweets"} for r in results)
    assert all(r.rejected == 0 for r in results)
    folder = tmp_path / "tiny-random-encoder" / "four"
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == 2 + len(METHODS)
    assert (folder / "results.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "fed-alora" in shown
    assert "results.png" in shown


def test_eight_clients_with_label_words_of_their_own(tmp_path):
    results = load("federated_sentiment").main("eight", ["fed-alora-het"], output=str(tmp_path), **TINY)
    assert set(results[-1].accuracy) == {"movie", "amazon", "nyt", "tweets", "trec", "spam", "bbc", "words"}
    assert results[-1].bytes_total > 0


def test_a_causal_model(tmp_path):
    results = load("federated_sentiment").main(
        methods=["fedit"], output=str(tmp_path), **TINY | {"model": "tiny-random"}
    )
    assert len(results) == 3
