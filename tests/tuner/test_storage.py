"""Adapter folders: round trips bit for bit, safetensors only, whole after an interruption, clear errors."""

from __future__ import annotations

import json
import pickle
import shutil
from copy import deepcopy
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from alora_kernels.adapters.writer import save_adapter
from alora_kernels.tuner import ALoRAConfig, set_task
from alora_kernels.tuner.register import adjust_peft

from ..support.adapters import CONFIG, WEIGHTS, half_written
from ..support.tiny import Mlp, adapted, assert_same, bert, config, layers_of, llama, logits, tokens

NAMES = ["math", "code"]


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

    def no_config(*args, **kwargs):
        raise KeyboardInterrupt

    target = (peft.peft_model, "safe_save_file", half_written) if broken == "weights" else (json, "dumps", no_config)
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

    monkeypatch.setattr(peft.peft_model, "safe_save_file", half_written)
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
    model, other = (adapted(Mlp(), task_type=None, target_modules=["up"]) for _ in range(2))
    for layer in layers_of(other):
        layer.asymlora_A["default"].weight.data.zero_()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(model(x, adapter_names=NAMES), other(x, adapter_names=NAMES))


THREE = ["math", "code", "law"]


def _state(model, name="default"):
    return {k: t.clone() for k, t in get_peft_model_state_dict(model, adapter_name=name).items()}


@pytest.fixture
def folder(tmp_path):
    """An adapter with three tasks, as `save_pretrained` writes it."""
    adapted(tasks=THREE).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("order", [["law", "math", "code"], ["code", "math", "law"], THREE])
def test_rows_go_by_name(folder, order, low_memory):
    saved = PeftModel.from_pretrained(llama(), folder)
    model = adapted(tasks=order, init_weights=True)
    model.load_adapter(folder, "default", low_cpu_mem_usage=low_memory)
    for task in THREE:  # each task answers as in the model that was saved, whatever its row
        row = tokens(1)
        assert torch.equal(logits(model, row, adapter_names=[task]), logits(saved, row, adapter_names=[task]))
    a = "base_model.model.model.layers.0.self_attn.q_proj.asymlora_A.weight"
    assert torch.equal(_state(model)[a], _state(saved)[a][[THREE.index(task) for task in order]])


def test_loading_as_it_was_saved_changes_nothing_else(folder):
    model = adapted(tasks=THREE, init_weights=True)
    model.load_adapter(folder, "default", is_trainable=True)
    assert_same(_state(model), _state(PeftModel.from_pretrained(llama(), folder)))
    assert all(p.requires_grad for n, p in model.named_parameters() if "asymlora_" in n)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tasks": ["math", "code"]}, r"tasks, math, code, law there and math, code here.*tasks=\['math',"),
        ({"tasks": [*THREE, "art"]}, r"tasks, math, code, law there and math, code, law, art here"),
        ({"tasks": ["math", "code", "poetry"]}, r"tasks, math, code, law there and math, code, poetry here"),
        ({"tasks": 3}, r"tasks, math, code, law there and 0, 1, 2 here"),
        ({"tasks": None, "routing": "soft", "num_experts": 3}, r"routing, 'task' there and 'soft' here"),
        ({"lora_alpha": 4}, r"scaling of model.layers.0.self_attn.q_proj, 2 there and 1 here \(lora_alpha=8 there"),
        ({"use_rslora": True}, r"2 there and 4 here \(use_rslora=False there and True here"),
        ({"alpha_pattern": {"down_proj": 4}}, r"scaling of model.layers.0.mlp.down_proj, 2 there and 1 here"),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 4}}, r"scaling of model.layers.1.mlp.up_proj, 2 there and 1 here"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.asymlora_A .* is \(3, 4, 32\) in the file but \(3, 2, 32\) here"),
        ({"r": 2}, r"q_proj.asymlora_A .* is \(3, 4, 32\) in the file but \(3, 2, 32\) here"),
        ({"target_modules": ["q_proj"]}, r"only there: model.layers.0.mlp.down_proj, .* more; only here: none"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_other_settings_are_refused_before_a_write(folder, settings, text, trained):
    model = adapted(**{"tasks": THREE, "init_weights": not trained} | settings)
    before = _state(model)
    with pytest.raises(ValueError, match=text):
        model.load_adapter(folder, "default", is_trainable=True)
    after = _state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("settings", [{"lora_alpha": 16, "alpha_pattern": {".*": 8}}, {"alpha_pattern": {"q_proj": 8}}])
def test_other_words_for_the_same_scaling_load(folder, settings):
    model = adapted(tasks=THREE, **settings)
    model.load_adapter(folder, "default")
    assert_same(_state(model), _state(PeftModel.from_pretrained(llama(), folder)))


def test_another_dropout_stays_and_is_said(folder):
    model = adapted(tasks=THREE, lora_dropout=0.5)
    with pytest.warns(UserWarning, match="lora_dropout, 0.0 there and 0.5 here, which stays"):
        model.load_adapter(folder, "default")
    assert {layer.asymlora_spec["default"].dropout for layer in layers_of(model)} == {0.5}


def test_a_config_beside_the_folder_is_compared_too(folder):
    given = PeftConfig.from_pretrained(folder)
    given.tasks = ["code", "math", "law"]
    model = PeftModel.from_pretrained(llama(), folder, config=given)
    saved = PeftModel.from_pretrained(llama(), folder)
    row = tokens(1)
    assert torch.equal(logits(model, row, adapter_names=["math"]), logits(saved, row, adapter_names=["math"]))
    given.lora_alpha = 100
    base = llama()
    with pytest.raises(ValueError, match=r"scaling .* or leave config= out"):
        PeftModel.from_pretrained(base, folder, config=given)
    assert not layers_of(base)
    with pytest.raises(ValueError, match=r"scaling .* or load it under a name of its own"):
        adapted(tasks=THREE, lora_alpha=100).load_adapter(folder, "default")


def test_a_new_name_takes_the_folder_as_it_is(folder):
    model = adapted(tasks=["other"], r=2, lora_alpha=1)
    model.load_adapter(folder, "saved")
    model.set_adapter("saved")
    saved = PeftModel.from_pretrained(llama(), folder)
    names = ["law", "math"]
    assert torch.equal(logits(model, tokens(), adapter_names=names), logits(saved, tokens(), adapter_names=names))


def test_an_adapter_of_a_deeper_base_is_refused_and_leaves_nothing(folder):
    base = llama(layers=1)
    with pytest.raises(ValueError, match=r"only there: model.layers.1.mlp.down_proj"):
        PeftModel.from_pretrained(base, folder)
    assert not layers_of(base)
    model = adapted(llama(layers=1))
    with pytest.raises(ValueError, match="only there"):
        model.load_adapter(folder, "saved")
    assert list(model.peft_config) == ["default"]
    assert {name for layer in layers_of(model) for name in layer.asymlora_spec} == {"default"}


def test_another_kind_of_adapter_is_refused(tmp_path):
    get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a .*LORA adapter and adapter 'default' is an ALoRA adapter"):
        adapted().load_adapter(tmp_path, "default")


def test_other_types_load_as_before(tmp_path):
    stock = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    stock.save_pretrained(tmp_path)
    again = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=99, target_modules="all-linear"))
    again.load_adapter(tmp_path, "default")  # PEFT compares nothing
    assert_same(_state(stock), _state(again))


def _trainer(model, folder):
    set_task(model, "law")
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8)]
    return Trainer(model, TrainingArguments(str(folder), report_to=[], use_cpu=True, **settings), train_dataset=rows)


def test_a_resumed_training_is_refused_in_another_order(tmp_path):
    """The optimizer's state goes by rows, and only the adapter's could be put in order."""
    first = adapted(tasks=THREE)
    _trainer(first, tmp_path / "run").train()
    again = adapted(tasks=["law", "math", "code"])
    before = _state(again)
    with pytest.raises(ValueError, match=r"another order, math, code, law there and law, math, code here, and the opt"):
        _trainer(again, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(before, _state(again))
    same = adapted(tasks=THREE, init_weights=True)
    _trainer(same, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(_state(first), _state(same))  # as if it had never been interrupted
    save_adapter(first, tmp_path / "alone")
    again.load_adapter(tmp_path / "alone", "default")
    assert torch.equal(
        logits(again, tokens(1), adapter_names=["law"]), logits(first.eval(), tokens(1), adapter_names=["law"])
    )


def test_a_folder_without_its_config_is_refused(folder):
    model = adapted(tasks=THREE)
    before = _state(model)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        model.load_adapter(folder, "default")
    assert_same(before, _state(model))
    shutil.rmtree(folder)


def test_transformers_own_adapters_refuse_a_name_that_is_taken(folder):
    base = llama()
    base.add_adapter(config(tasks=["other"]), adapter_name="default")
    with pytest.raises(ValueError, match="already exists"):
        base.load_adapter(str(folder))
    base.load_adapter(str(folder), adapter_name="saved")
    assert base.peft_config["saved"].tasks == THREE
