"""Names that torch.compile puts into files, and copies of the base that PEFT puts beside an adapter on lm_head."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.export import export_lora
from alora_kernels.adapters.import_lora import import_lora
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.adapters.writer import save_adapter
from alora_kernels.serving.errors import AdapterRefusedError
from alora_kernels.serving.store import TaskStore
from alora_kernels.tuner.config import unwrapped

from ..support.tiny import adapted, assert_same, llama, logits, tokens

WEIGHTS = "adapter_model.safetensors"
NAMES = ["math", "code"]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _whole(base):
    return torch.compile(base, backend="eager")


def _each_layer(base):
    layers = base.model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    return base


def _in_place(base):
    for layer in base.model.layers:
        layer.compile(backend="eager")
    return base


COMPILED = {"whole": _whole, "each layer": _each_layer, "in place": _in_place}


def _adapted(base):
    """The same adapter for each base; PEFT's "all-linear" would take the head of a compiled one too."""
    return adapted(base, target_modules=LAYERS)


def _stock(base, seed=5, **settings):
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **settings)).eval()


def test_only_wrappers_are_taken_out():
    assert unwrapped("base_model.model._orig_mod.model.layers.0._fsdp_wrapped_module.q.x") == (
        "base_model.model.model.layers.0.q.x"
    )
    assert unwrapped("my_orig_mod.q._orig_module._orig_mod") == "my_orig_mod.q._orig_module._orig_mod"


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED.keys())
def test_an_adapter_of_a_compiled_base_is_like_any_other(compiled, tmp_path):
    model = _adapted(compiled(llama()))
    save_adapter(model, tmp_path / "compiled")
    save_adapter(_adapted(llama()), tmp_path / "plain")
    assert_same(load_file(tmp_path / "plain" / WEIGHTS), load_file(tmp_path / "compiled" / WEIGHTS))
    wanted = logits(_adapted(llama()), tokens(), adapter_names=NAMES)
    for base, folder in ((llama(), "compiled"), (compiled(llama()), "plain"), (compiled(llama()), "compiled")):
        again = PeftModel.from_pretrained(base, tmp_path / folder)
        assert torch.equal(logits(again, tokens(), adapter_names=NAMES), wanted)
    model.load_adapter(tmp_path / "plain", "default")


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED.keys())
def test_export_names_modules_as_the_plain_base_does(compiled, tmp_path):
    model = _adapted(compiled(llama()))
    export_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "code")
    torch.testing.assert_close(logits(stock, tokens(1)), logits(_adapted(llama()), tokens(1), adapter_names=["code"]))
    around = torch.compile(_adapted(llama()), backend="eager")
    again = export_lora(around, tmp_path, overwrite=True)
    assert again.modules == 14


@pytest.mark.parametrize("compiled", [_whole, _each_layer])
def test_import_takes_compiled_and_plain_adapters_together(compiled, tmp_path):
    """Without the names put right, no module was common and the error was zero for a task that did nothing."""
    _stock(compiled(llama())).save_pretrained(tmp_path / "compiled")
    assert any("_orig_mod" in key for key in load_file(tmp_path / "compiled" / WEIGHTS))  # PEFT's own, as it is
    _stock(llama(), seed=6).save_pretrained(tmp_path / "plain")
    report = import_lora([tmp_path / "compiled", tmp_path / "plain"], tmp_path / "both", rank=8)
    assert not any(report.missing.values()) and len(report.norms) == 4
    both = PeftModel.from_pretrained(llama(), tmp_path / "both")
    for seed, task in ((5, "compiled"), (6, "plain")):
        wanted = logits(_stock(llama(), seed=seed), tokens(1))
        torch.testing.assert_close(logits(both, tokens(1), adapter_names=[task]), wanted, atol=1e-5, rtol=1e-4)
        assert (logits(llama(), tokens(1)) - wanted).abs().max() > 1e-3  # the control: the task does something


def test_import_refuses_modules_under_another_prefix(tmp_path):
    _stock(llama()).save_pretrained(tmp_path / "whole")
    _stock(llama().model, task_type="FEATURE_EXTRACTION").save_pretrained(tmp_path / "inner")
    with pytest.raises(ValueError, match=r"whole adapts model\.layers\.\d.* and inner adapts layers\..*classes"):
        import_lora([tmp_path / "whole", tmp_path / "inner"], tmp_path / "out")
    _stock(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "q")
    _stock(llama(), target_modules=["v_proj"]).save_pretrained(tmp_path / "v")
    assert import_lora([tmp_path / "q", tmp_path / "v"], tmp_path / "apart").error < 1e-6  # other modules are no fault


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:Model has `tie_word:UserWarning"
)
def test_adapters_on_the_output_layer(tied, tmp_path):
    base = lambda: llama(tie_word_embeddings=tied)  # noqa: E731
    for name, seed in (("one", 5), ("two", 6)):
        _stock(base(), seed=seed, target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path / name)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "one" / WEIGHTS)
    with pytest.warns(UserWarning, match=r"holds lm_head\.weight of its base too, which is left out"):
        import_lora([tmp_path / "one", tmp_path / "two"], tmp_path / "both", rank=8)
    both = PeftModel.from_pretrained(base(), tmp_path / "both")
    for seed, name in ((5, "one"), (6, "two")):
        wanted = logits(_stock(base(), seed=seed, target_modules=["q_proj", "lm_head"]), tokens(1))
        torch.testing.assert_close(logits(both, tokens(1), adapter_names=[name]), wanted, atol=1e-5, rtol=1e-4)
    both.save_pretrained(tmp_path / "again")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "again" / WEIGHTS)
    with pytest.warns(UserWarning, match="left out"):
        export_lora(tmp_path / "again", tmp_path / "loras")
    stock = PeftModel.from_pretrained(base(), tmp_path / "loras" / "two")
    torch.testing.assert_close(logits(stock, tokens(1)), logits(both, tokens(1), adapter_names=["two"]))
    reread = PeftModel.from_pretrained(base(), tmp_path / "again")
    assert_same(get_peft_model_state_dict(both), get_peft_model_state_dict(reread))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_store_compares_the_copy_with_its_base(tmp_path):
    adapted(target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path)
    store = TaskStore.open(llama(), [tmp_path], resident=2)
    assert sorted(store.names()) == sorted(NAMES)
    other = llama()
    other.lm_head.weight.data.add_(0.1)
    with pytest.raises(AdapterRefusedError, match=r"trained on another lm_head\.weight than the base's"):
        TaskStore.open(other, [tmp_path], resident=2)


def test_embeddings_that_were_saved_beside_are_refused_with_a_remedy_that_works(tmp_path):
    model = adapted(target_modules=["q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(AdapterFolderError, match=r"lm_head\.weight'.*save_embedding_layers=False\)"):
        read_adapter(tmp_path)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert read_adapter(tmp_path).tasks == tuple(NAMES)


def test_a_copy_without_its_adapter_is_refused(tmp_path):
    adapted(target_modules=["q_proj"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS) | {"base_model.model.lm_head.base_layer.weight": torch.ones(64, 32)}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFolderError, match=r"holds 'base_model\.model\.lm_head\.base_layer\.weight', no A or B"):
        read_adapter(tmp_path)
