"""The OpenMP workers of a thread that only waits from now on are given back."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore, engine, openmp, store
from alora_kernels.serving.openmp import Threads
from alora_kernels.serving.request import AdapterRefusedError
from tests.support import adapters

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in Linux's /proc/self/task")

COUNT = """
import os
import torch
from alora_kernels.serving.openmp import release_workers

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = threads()
x = torch.arange(300_000.0)  # enough for three threads
first = x * x
working = threads()
done = release_workers()
released = threads()
second = x * x
print(before, working, released, threads(), int(done), bool(torch.equal(first, second)))
"""


@LINUX
def test_workers_end_and_come_back_when_they_are_needed() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    run = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    before, working, released, again, done, equal = run.stdout.split()
    if done == "0":
        pytest.skip("torch here computes without GNU's OpenMP: there is nothing to give back")
    assert int(working) == int(again) == int(before) + 2
    assert released == before
    assert equal == "True"


def test_without_a_library_that_can_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_gnu_libraries", lambda: ())
    assert openmp.release_workers() is False


def test_loading_gives_them_back_also_when_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(store, "release_workers", lambda: calls.append(None))
    base, _ = adapters.tiny_base()
    folder = adapters.alora_folder(tmp_path / "good", base, ["a", "b"])
    opened = TaskStore.open(base, [folder], resident=4)
    assert len(calls) == 1
    with pytest.raises(AdapterRefusedError):
        opened.load(tmp_path / "none")
    assert len(calls) == 2
    opened.close()


def test_a_starting_engine_gives_back_those_of_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    monkeypatch.setattr(engine, "release_workers", lambda: threads.append(threading.current_thread().name))
    base, tokenizer = adapters.tiny_base()
    with Engine(base, tokenizer, None, EngineConfig(max_batch=2, max_context=32)) as running:
        assert threads == [threading.current_thread().name]
        assert running.generate(["hello"], None, Sampling(max_tokens=2))[0].error is None


@pytest.fixture
def two():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Threads(2)
    torch.set_num_threads(before)


def test_a_step_that_waits_for_cores_is_followed_by_steps_on_one_thread(two):
    two.told(10.0, 0.30, 0.29)
    assert torch.get_num_threads() == 2  # it had a core all the time
    two.told(11.0, 5.0, 1.0)
    assert torch.get_num_threads() == 1
    two.told(12.0, 0.5, 0.5)
    assert torch.get_num_threads() == 1  # not before two seconds have passed
    two.told(13.5, 0.9, 0.5)
    assert torch.get_num_threads() == 1  # others still want the core
    two.told(13.6, 0.5, 0.5)
    assert torch.get_num_threads() == 2


def test_several_threads_are_tried_less_often_each_time_they_fail(two):
    now, waits = 0.0, []
    for _ in range(7):
        two.told(now, 5.0, 1.0)
        began = now
        while torch.get_num_threads() == 1:
            now += 0.5
            two.told(now, 0.5, 0.5)
        waits.append(now - began)
    assert waits == [2.5, 4.5, 8.5, 16.5, 32.5, 60.5, 60.5]
    two.told(now + 130, 0.3, 0.3)
    two.told(now + 131, 5.0, 1.0)
    two.told(now + 133.5, 0.5, 0.5)
    assert torch.get_num_threads() == 2  # long without neighbours: as in the beginning


def test_short_steps_say_nothing_and_torch_gets_its_number_back(two):
    two.told(1.0, 0.004, 0.001)
    assert torch.get_num_threads() == 2
    two.told(2.0, 5.0, 1.0)
    two.stop()
    assert torch.get_num_threads() == 2


def test_one_thread_stays_one():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threads = Threads(1)
        with threads.step():
            pass
        threads.told(1.0, 5.0, 1.0)
        threads.told(90.0, 1.0, 1.0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
