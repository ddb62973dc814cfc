"""Names of parameters: as PEFT's LoRA has them, so that what copies adapters by name finds ours; older files load."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file, save_file

from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.adapters.writer import save_adapter

from ..support.tiny import adapted, assert_same, config, layers_of, llama, logits, tokens

NAMES = ["math", "code"]
WEIGHTS = "adapter_model.safetensors"


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


@pytest.mark.parametrize("whole", [True, False])
def test_all_linear_of_a_compiled_base_is_saved_by_plain_names(whole, tmp_path):
    base = llama()
    if not whole:
        base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    model = adapted(torch.compile(base, backend="eager") if whole else base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    given = {"input_ids": tokens(), "adapter_names": ["code", "math"]}
    torch.testing.assert_close(again(**given).logits, model(**given).logits)
