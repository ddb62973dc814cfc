"""Folders that are no model's: each is named with what is missing; none loads with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from alora_kernels.data import load_model
from alora_kernels.data.models import byte_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "good"
    tokenizer = byte_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def moved(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    for path in folder.glob("*.*"):
        path.rename(inside / path.name)


def an_adapter(folder: Path) -> None:
    emptied(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def without(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def an_encoder(folder: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(folder)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (emptied, "is an empty folder"),
    "subfolder": (moved, "has no config.json.*one of its subfolders is meant. inside"),
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without("*.safetensors"), "has a config.json but no weights"),
    "no tokenizer": (without("tokenizer*"), "has no tokenizer"),
    "adapter": (an_adapter, "is an adapter's folder, not a base model: give its base, 'org/base', as the model"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "does not load as a causal language model"),
    "unknown config": (lambda f: (f / "config.json").write_text("{}"), "does not load as a causal language model"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "does not load"),
    "one layer more": (lambda f: settings(f, num_hidden_layers=2), "lacks 9 of the weights of a LlamaForCausalLM"),
    "other shapes": (lambda f: settings(f, intermediate_size=8), "does not load as a causal language model"),
    "encoder": (an_encoder, "lacks .* of the weights of a BertLMHeadModel"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_folder_is_named(good: Path, tmp_path: Path, what: str):
    change, said = WRONG[what]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(OSError, match=said) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)


def test_a_file_is_no_folder_and_a_whole_folder_loads(good: Path):
    with pytest.raises(OSError, match="is a file: give the folder"):
        load_model(str(good / "config.json"))
    model, _ = load_model(str(good))
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)  # tied: not in the file, not missing
