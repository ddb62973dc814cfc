"""Adapter folders: round trips bit for bit, safetensors only, whole after an interruption, clear errors."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from alora_kernels.adapters.writer import save_adapter
from alora_kernels.tuner import ALoRAConfig, set_task
from alora_kernels.tuner.register import adjust_peft

from ..support.tiny import Mlp, adapted, assert_same, bert, config, layers_of, llama, logits, tokens

NAMES = ["math", "code"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("save", [lambda m, f: m.save_pretrained(f), save_adapter])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"routing": "soft"}, {"rank_pattern": {"q_proj": 2}, "bias": "all"}])
def test_round_trip(tmp_path, save, low_memory, dtype, settings):
    model = adapted(llama().to(dtype), **settings)
    save(model, tmp_path)
    again = PeftModel.from_pretrained(llama().to(dtype), tmp_path, low_cpu_mem_usage=low_memory)
    assert_same(get_peft_model_state_dict(model), get_peft_model_state_dict(again))
    names = {} if settings.get("routing") == "soft" else {"adapter_names": NAMES}
    assert torch.equal(logits(model, tokens(), **names), logits(again, tokens(), **names))
    saved = load_file(tmp_path / WEIGHTS)
    assert saved["base_model.model.model.layers.0.self_attn.q_proj.asymlora_A.weight"].dtype == torch.float32
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(llama().to(dtype), tmp_path, is_trainable=True)
    assert all(p.requires_grad for n, p in trainable.named_parameters() if "asymlora_" in n)


def test_config_is_readable_and_complete(tmp_path):
    adapted().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    assert stored["peft_type"] == "ASYMLORA"
    assert (stored["tasks"], stored["routing"], stored["lora_alpha"]) == (NAMES, "task", 8)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ALoRAConfig)
    assert loaded.tasks == NAMES
    assert isinstance(loaded.target_modules, set)


def test_the_card_names_the_import_once(tmp_path):
    model = adapted()
    for save in (model.save_pretrained, lambda f: save_adapter(model, f)):
        save(tmp_path)
        assert (tmp_path / "README.md").read_text().count("import alora_kernels") == 1
    assert "PEFT" in (tmp_path / "README.md").read_text()


def test_a_config_saved_alone_leaves_other_files_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    config().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_several_adapters(tmp_path):
    model = adapted()
    model.add_adapter("other", config(r=2, tasks=3))
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS, "other"]
    assert "import alora_kernels" in (tmp_path / "other" / "README.md").read_text()
    again = PeftModel.from_pretrained(llama(), tmp_path)
    again.load_adapter(tmp_path / "other", adapter_name="second")
    again.set_adapter("second")
    model.set_adapter("other")
    for names in (["0", "2"], [1, -1]):
        assert torch.equal(logits(model, tokens(), adapter_names=names), logits(again, tokens(), adapter_names=names))


def test_saved_head(tmp_path):
    model = adapted(bert(), task_type="SEQ_CLS", modules_to_save=["classifier"])
    model.base_model.model.classifier.modules_to_save["default"].weight.data.add_(1.0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(logits(model, tokens(), adapter_names=NAMES), logits(again, tokens(), adapter_names=NAMES))


@pytest.mark.parametrize("broken", ["weights", "config"])
def test_an_interrupted_save_leaves_the_old_adapter_whole(tmp_path, monkeypatch, broken):
    old = adapted()
    save_adapter(old, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(tensors, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise KeyboardInterrupt

    def no_config(*args, **kwargs):
        raise KeyboardInterrupt

    target = (peft.peft_model, "safe_save_file", half) if broken == "weights" else (json, "dumps", no_config)
    with monkeypatch.context() as patch:
        patch.setattr(*target)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(adapted(routing="soft"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert_same(get_peft_model_state_dict(old), get_peft_model_state_dict(again))


def test_stock_save_pretrained_replaces_the_weights_at_once(tmp_path, monkeypatch):
    old = adapted()
    old.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def half(tensors, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.peft_model, "safe_save_file", half)
    adjust_peft()  # as for the first model, around a writer that breaks midway
    with pytest.raises(KeyboardInterrupt):
        adapted(routing="soft").save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".saving-*"))


def test_adapters_of_other_types_are_written_as_before(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(peft.peft_model, "safe_save_file", lambda tensors, path, **_: written.append(path))
    adjust_peft()
    stock = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    stock.save_pretrained(tmp_path / "lora")
    adapted().save_pretrained(tmp_path / "alora")
    assert written[0] == str(tmp_path / "lora" / "adapter_model.safetensors")
    assert Path(written[1]).parent.parent == tmp_path / "alora"


def test_pickles_are_refused(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=r"safetensors only.*adapter_model.bin"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False)
    assert not (tmp_path / "a" / CONFIG).exists()
    with pytest.raises(ValueError, match="safetensors only"):
        save_adapter(model, tmp_path / "b", safe_serialization=False)
    model.save_pretrained(tmp_path / "c")
    (tmp_path / "c" / WEIGHTS).rename(tmp_path / "c" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle.*save_file"):
        PeftModel.from_pretrained(llama(), tmp_path / "c")


def test_another_base_is_refused_by_name_and_left_usable(tmp_path):
    adapted(init_weights=True).save_pretrained(tmp_path)
    base = llama(hidden_size=64, head_dim=16)
    wanted = logits(base, tokens())
    with pytest.raises(ValueError, match=r"q_proj.asymlora_A .* is \(2, 4, 32\) in the file but \(2, 4, 64\) here"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers_of(base)
    assert not base._forward_pre_hooks
    assert torch.equal(logits(base, tokens()), wanted)
    model = adapted(base)
    wanted = logits(model, tokens(), adapter_names=NAMES)
    with pytest.raises(ValueError, match="does not fit this base"):
        model.load_adapter(tmp_path, adapter_name="other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, tokens(), adapter_names=NAMES), wanted)


def test_wrong_tensors_for_a_trained_adapter_leave_it_as_it_was():
    model = adapted()
    wanted = logits(model, tokens(), adapter_names=NAMES)
    tensors = {k: v[..., :2] for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match="does not fit this base"):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model, tokens(), adapter_names=NAMES), wanted)
    model.unload()
    with pytest.raises(ValueError, match="no ALoRA layers for adapter"):
        set_peft_model_state_dict(model, tensors)


def test_copies_and_pickles():
    model = adapted()
    set_task(model, "code")
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copy, tokens()), logits(model, tokens()))
        assert torch.equal(logits(copy, tokens(), adapter_names=NAMES), logits(model, tokens(), adapter_names=NAMES))
        set_task(copy, "math")
    assert not torch.equal(logits(copy, tokens()), logits(model, tokens()))
    for copy in (deepcopy(config()), pickle.loads(pickle.dumps(config()))):
        assert copy == config()
        assert copy.peft_type is config().peft_type


def test_state_dict_of_the_whole_model():
    model, other = (
        adapted(Mlp(), task_type=None, target_modules=["up"]),
        adapted(Mlp(), task_type=None, target_modules=["up"]),
    )
    for layer in layers_of(other):
        layer.asymlora_A["default"].weight.data.zero_()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(model(x, adapter_names=NAMES), other(x, adapter_names=NAMES))
