"""The serving demo: a real server process, OpenAI's client, a table; and what it says when the server fails."""

from __future__ import annotations

import json
import os
import signal
import urllib.request

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra `serving`")
pytest.importorskip("openai", reason="the demo's requests are sent by OpenAI's client")

import serve_kit
from serve_kit import NOTHING, TASKS, Answer, served

from ..support.toyrows import need_data
from .test_examples import load


@pytest.fixture
def quick_adapter(tmp_path):
    return serve_kit.adapter_folder("tiny-random", tmp_path)[0]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_demo(tmp_path, capsys):
    need_data(*TASKS)
    answered = load("serve_many_tasks").main(model="tiny-random", requests=12, output=str(tmp_path))
    assert answered == {"trec": 3, "movie": 3, "spam": 2, "bbc": 2, "base": 2}
    shown = " ".join(capsys.readouterr().out.split())
    for said in (*TASKS, "base", "12 requests at once", "tokens/s", "MB per task", "mean nothing", "alora serve"):
        assert said in shown
    assert (tmp_path / "server.log").stat().st_size > 0


def test_an_adapter_is_made_once_and_says_that_it_means_nothing(tmp_path):
    folder, note = serve_kit.adapter_folder("tiny-random", tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["tasks"] == list(TASKS)
    assert note == NOTHING
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert serve_kit.adapter_folder("tiny-random", tmp_path) == (folder, NOTHING)
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_the_trained_adapter_is_taken_for_its_model_only(tmp_path, monkeypatch):
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(serve_kit, "TRAINED", trained)
    folder, note = serve_kit.adapter_folder(serve_kit.RECIPE.model, tmp_path)
    assert folder == trained
    assert "trained by `make demo`" in note
    assert serve_kit.adapter_folder("tiny-random", tmp_path)[1] == NOTHING


def test_prompts_are_of_the_task_they_go_to():
    need_data(*TASKS)
    asked = serve_kit.prompts(10)
    assert [task for task, _ in asked] == [*TASKS, None] * 2
    ends = {"trec": "Type:", "movie": "Sentiment:", "spam": "Spam or ham:", "bbc": "Section:", None: "Type:"}
    assert all(prompt.endswith(ends[task]) for task, prompt in asked)
    assert len({prompt for _, prompt in asked}) == 8  # the base is asked what the first task is asked


def test_a_server_that_does_not_start_is_quoted(tmp_path, quick_adapter):
    with (
        pytest.raises(RuntimeError, match="before it was ready") as caught,
        served("tiny-random", tmp_path / "nowhere", tmp_path / "server.log"),
    ):
        pass
    assert "nowhere" in str(caught.value)
    assert str(tmp_path / "server.log") in str(caught.value)


def test_a_server_that_dies_is_an_error_and_its_end_is_waited_for(tmp_path, quick_adapter):
    with (
        pytest.raises(RuntimeError, match="ended by itself with exit code -9"),
        served("tiny-random", quick_adapter, tmp_path / "server.log") as (_, server),
    ):
        pid = server.pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # leaves the exit code to the demo
    assert gone(pid)


def test_an_error_in_the_block_stops_the_server(tmp_path, quick_adapter):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(ZeroDivisionError),
        served("tiny-random", quick_adapter, tmp_path / "server.log") as (address, server),
    ):
        assert urllib.request.urlopen(f"{address}/health", timeout=60).status == 200
        assert "MB per task" in serve_kit.memory(address)
        raise ZeroDivisionError
    assert gone(server.pid)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_table(capsys):
    answers = [Answer("movie", "a\nlong answer " * 9, 4, 1.0, 0.1), Answer("movie", "b", 4, 3.0, 0.3)]
    counted = serve_kit.show([*answers, Answer(None, "c", 2, 2.0)], seconds=5.0)
    assert counted == {"movie": 2, "base": 1}
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 requests at once, 10 tokens in 5.0 s: 2 tokens/s" in shown
    assert "100 / 300 ms" in shown
    assert "…" in shown
