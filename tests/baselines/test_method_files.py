"""Adapter folders of every method: the same answers again, or an error that says what to do."""

from __future__ import annotations

import json

import pytest
import torch

from alora_kernels.adapters.method import METHODS, SETTINGS, STATE, read_method
from alora_kernels.baselines.methods import adapt, load_method, save_method, trained
from tests.baselines.adaptations import PLAIN, adapted, adapted_layers, answers, method
from tests.support.refusals import refused
from tests.support.tiny import llama


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded(name, tmp_path):
    model = adapted(name, modules_to_save=("lm_head",))
    with torch.no_grad():
        next(p for key, p in trained(model).items() if "lm_head" in key).add_(0.1)
    want = answers(model)
    save_method(model, tmp_path, method(name, modules_to_save=("lm_head",)), {"budget": "rank"})
    assert json.loads((tmp_path / SETTINGS).read_text())["record"] == {"budget": "rank"}
    assert read_method(tmp_path) == method(name, modules_to_save=("lm_head",))
    assert torch.equal(answers(load_method(llama(), tmp_path).eval()), want)
    assert (tmp_path / STATE).exists() == (name in PLAIN)


def test_another_method_in_the_same_folder_replaces_the_first(tmp_path):
    for name in ("alora", "hydralora", "lora", "lora-per-task"):
        model = adapted(name)
        save_method(model, tmp_path, method(name))
        assert {p.name for p in tmp_path.glob("*.safetensors")} == {
            STATE if name in PLAIN else "adapter_model.safetensors"
        }
        assert torch.equal(answers(load_method(llama(), tmp_path).eval()), answers(model))


def test_a_folder_of_peft_without_our_settings_loads(tmp_path):
    model = adapted("lora")
    model.save_pretrained(tmp_path)
    assert read_method(tmp_path) is None
    assert torch.equal(answers(load_method(llama(), tmp_path).eval()), answers(model))


@pytest.mark.parametrize("name", PLAIN)
def test_bad_folders(name, tmp_path):
    refused(r"holds neither method.json nor adapter_config.json", load_method, llama(), tmp_path)
    save_method(adapted(name), tmp_path, method(name))
    with pytest.raises(ValueError, match=r"has no model.layers.1.* which this model needs: load it on the base"):
        one_layer = adapted(name, llama(layers=1))
        save_method(one_layer, tmp_path / "small", method(name))
        load_method(llama(), tmp_path / "small")
    refused(r"has model.layers.1.* more that this model has no place for", load_method, llama(layers=1), tmp_path)
    with pytest.raises(ValueError, match=r"is \(.*\) in the file but \(.*\) here; load it on the base"):
        load_method(llama(intermediate_size=40), tmp_path)
    whole = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(whole[:100])
    refused("does not read", load_method, llama(), tmp_path)
    (tmp_path / STATE).unlink()
    refused("is missing: method.json alone is no adapter", load_method, llama(), tmp_path)
    for text in ("{", "[]", "{}", '{"settings": {"name": "vera"}}', '{"settings": {"nam": 1}}', '{"settings": []}'):
        (tmp_path / SETTINGS).write_text(text)
        refused("is not what `alora train` writes", load_method, llama(), tmp_path)


def test_a_refused_load_gives_the_base_back(tmp_path):
    save_method(adapted("hydralora"), tmp_path, method("hydralora"))
    base = llama(layers=1)
    weight, want = base.model.layers[0].mlp.up_proj.weight, answers(base)
    refused("no place for", load_method, base, tmp_path)
    assert not adapted_layers(base) and base.model.layers[0].mlp.up_proj.weight is weight
    assert torch.equal(answers(base), want)
    base.save_pretrained(tmp_path / "base")  # all of it, not only what would have trained
    assert torch.equal(answers(type(base).from_pretrained(tmp_path / "base")), want)
    assert adapted_layers(adapt(base, method("lora")))
