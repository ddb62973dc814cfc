"""Names of parameters: as PEFT's LoRA has them, so that what copies adapters by name finds ours; older files load."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file, save_file

from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.export import export_lora
from alora_kernels.adapters.import_lora import import_lora
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.adapters.writer import save_adapter
from alora_kernels.serving.request import AdapterRefusedError
from alora_kernels.serving.store import TaskStore
from alora_kernels.tuner.config import unwrapped

from ..support.adapters import WEIGHTS
from ..support.tiny import adapted, assert_same, config, layers_of, llama, logits, tokens

NAMES = ["math", "code"]


def _named_before(tensors):
    """The same tensors by the names of the first versions: no `.weight` behind the matrices."""
    return {k.removesuffix(".weight") if "asymlora_" in k else k: t for k, t in tensors.items()}


def _reference(model):
    """A second adapter "ref" with the trained one's weights, copied by name as preference trainers do."""
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    copied = []
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
            copied.append(name)
    return copied


def _log_probability(model, ids):
    scores = logits(model, ids, adapter_names=NAMES).double().log_softmax(-1)[:, :-1]
    return scores.gather(-1, ids[:, 1:, None]).sum((1, 2))


@pytest.mark.parametrize("settings", [{}, {"routing": "soft"}])
def test_names_are_those_of_lora(settings):
    ours = {n for n, _ in adapted(**settings).named_parameters() if "asymlora_" in n}
    lora = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {n for n, _ in lora.named_parameters() if "lora_" in n}
    assert {n.replace("asymlora_", "lora_") for n in ours if "router" not in n} == theirs
    assert all(n.endswith(".default.weight") for n in ours)


def test_a_reference_copied_by_name_is_the_policy():
    model = adapted()
    copied = _reference(model)
    assert len(copied) == len(get_peft_model_state_dict(model)) == 2 * len(layers_of(model)) == 28
    assert_same(get_peft_model_state_dict(model), get_peft_model_state_dict(model, adapter_name="ref"))
    chosen, rejected = tokens(seed=5), tokens(seed=6)
    policy = [_log_probability(model, ids) for ids in (chosen, rejected)]
    model.set_adapter("ref")
    reference = [_log_probability(model, ids) for ids in (chosen, rejected)]
    margin = (policy[0] - policy[1]) - (reference[0] - reference[1])
    torch.testing.assert_close(-torch.nn.functional.logsigmoid(margin).mean().item(), math.log(2))
    with model.disable_adapter():
        base = [logits(model, ids).double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum((1, 2))
                for ids in (chosen, rejected)]  # fmt: skip
    assert ((policy[0] - policy[1]) - (base[0] - base[1])).abs().max() > 1e-3  # the control: the base is no reference


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("settings", [{}, {"routing": "soft"}])
def test_adapters_saved_before_load(tmp_path, low_memory, settings):
    model = adapted(**settings)
    save_adapter(model, tmp_path)
    new = load_file(tmp_path / WEIGHTS)
    assert all(key.endswith(".weight") for key in new)
    save_file(_named_before(new), tmp_path / WEIGHTS, metadata={"format": "pt"})
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory)
    assert_same(get_peft_model_state_dict(model), get_peft_model_state_dict(again))
    other = adapted(**settings | {"init_weights": True})
    other.load_adapter(tmp_path, "default")
    assert_same(get_peft_model_state_dict(model), get_peft_model_state_dict(other))
    if not settings:
        assert torch.equal(read_adapter(tmp_path).b[next(iter(read_adapter(tmp_path).b))], next(
            t for k, t in sorted(new.items()) if "asymlora_B" in k))  # fmt: skip


def test_state_dicts_saved_before_load():
    model, other = adapted(), adapted(init_weights=True)
    tensors = get_peft_model_state_dict(model)
    missing = set_peft_model_state_dict(other, _named_before(tensors))
    assert not missing.unexpected_keys
    assert_same(tensors, get_peft_model_state_dict(other))
    whole = adapted(init_weights=True)
    whole.load_state_dict(_named_before(model.state_dict()))  # strict: every name is known
    assert_same(model.state_dict(), whole.state_dict())


def test_a_matrix_that_a_file_holds_twice_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    twice = {k: t.clone() for k, t in _named_before(tensors).items()}
    save_file(tensors | twice, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFolderError, match=r"A of model.layers.0.mlp.down_proj twice"):
        read_adapter(tmp_path)


def test_housekeeping_over_named_modules():
    """PEFT widens 16-bit parameters by replacing them, which would make those of an inactive adapter train."""
    model = adapted(llama().to(torch.bfloat16))
    model.add_adapter("other", config(tasks=3))
    ours = {n: p for n, p in model.named_parameters() if "asymlora_" in n}
    assert {p.dtype for p in ours.values()} == {torch.float32}
    assert all(p.requires_grad == (".default." in n) for n, p in ours.items())
    model.set_adapter("other")
    assert all(p.requires_grad == (".other." in n) for n, p in model.named_parameters())
    model.delete_adapter("default")
    assert {n.split(".")[-2] for n, _ in model.named_parameters() if "asymlora_" in n} == {"other"}


def test_no_matrix_is_sharded_alone():
    """The layer reads all its matrices in one op: FSDP must gather them with the layer, not one by one."""
    model = adapted()
    policy = fsdp_auto_wrap_policy(model)
    wrapped = [n for n, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert sorted(wrapped) == [f"base_model.model.model.layers.{i}" for i in (0, 1)]


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


@pytest.mark.parametrize("compiled", [_whole, _each_layer])
def test_all_linear_of_a_compiled_base_is_saved_by_plain_names(compiled, tmp_path):
    model = adapted(compiled(llama()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    given = {"input_ids": tokens(), "adapter_names": ["code", "math"]}
    torch.testing.assert_close(again(**given).logits, model(**given).logits)


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
