"""Several adapters on one model, and PEFT's options, helpers and ways in."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import alora_kernels
from alora_kernels.adapters.writer import save_adapter
from alora_kernels.tuner import ALoRAConfig, set_task

from ..support.tiny import adapted, assert_same, bert, config, layers_of, llama, logits, tokens

NAMES = ["math", "code"]


def _two():
    model = adapted()
    torch.manual_seed(9)
    model.add_adapter("style", config(r=2, tasks=["formal", "code"], target_modules=["q_proj", "lm_head"]))
    return model


def test_adapters_are_switched():
    model, ids = _two(), tokens()
    first = logits(model, ids, adapter_names=NAMES)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".style" in n)
    model.set_adapter("style")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    second = logits(model, ids, adapter_names=["formal", "__base__"])
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(ValueError, match="valid tasks are formal, code"):
        model(input_ids=ids, adapter_names=NAMES)
    model.set_adapter("default")
    assert torch.equal(first, logits(model, ids, adapter_names=NAMES))


def test_active_adapters_add_up_and_each_knows_its_tasks():
    model = _two()
    model.base_model.set_adapter(["default", "style"])
    layer = next(layer for layer in layers_of(model) if len(layer.asymlora_spec) == 2)
    base, delta, seen = layer.base_layer, {}, {}
    handle = layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    logits(model, tokens(), adapter_names=["math", "code"])
    handle.remove()
    for name, names in (("default", [0, 1]), ("style", [-1, 1])):
        model.base_model.set_adapter([name])
        with torch.no_grad(), alora_kernels.route(names):
            delta[name] = layer(seen["x"]) - base(seen["x"])
    torch.testing.assert_close(seen["out"], base(seen["x"]) + delta["default"] + delta["style"])


def test_disable_adapter():
    model, ids = adapted(), tokens()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(llama(), ids))
        assert torch.equal(logits(model, ids, adapter_names=NAMES), logits(llama(), ids))
    assert not torch.equal(logits(model, ids, adapter_names=NAMES), logits(llama(), ids))
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, ids), logits(llama(), ids))
    model.base_model.enable_adapter_layers()
    assert not torch.equal(logits(model, ids, adapter_names=NAMES), logits(llama(), ids))


def test_delete_adapter():
    model, ids = _two(), tokens()
    wanted = logits(model, ids, adapter_names=NAMES)
    model.set_adapter("style")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("style")
    assert torch.equal(wanted, logits(model, ids, adapter_names=NAMES))
    assert not any("style" in name for name in model.state_dict())
    model.add_adapter("style", config(tasks=5))
    model.delete_adapter("default")
    assert list(model.peft_config) == ["style"]


def test_status():
    status = _two().get_model_status()
    assert (status.peft_types, status.active_adapters) == ({"default": "ASYMLORA", "style": "ASYMLORA"}, ["default"])
    assert status.enabled is True
    assert status.requires_grad == {"default": True, "style": False}
    assert status.merged_adapters == []


def test_patterns_and_layer_choice():
    model = adapted(
        target_modules=["q_proj", "v_proj", "down_proj"], exclude_modules=["v_proj"], layers_to_transform=[1],
        layers_pattern="layers", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 6},
    )  # fmt: skip
    found = {n.removeprefix("base_model.model.model."): m for n, m in model.named_modules() if m in layers_of(model)}
    assert set(found) == {"layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"}
    query, down = (found[n].asymlora_spec["default"] for n in ("layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"))
    assert (query.r, query.scaling, down.r, down.scaling) == (2, 4.0, 4, 1.5)
    assert found["layers.1.self_attn.q_proj"].asymlora_A["default"].weight.shape == (2, 2, 32)


def test_default_targets_are_those_of_lora():
    assert {n.rpartition(".")[2] for n in adapted(target_modules=None).targeted_module_names} == {"q_proj", "v_proj"}


def test_initialisation():
    fresh = layers_of(adapted(init_weights=True))[0]
    a, b = fresh.asymlora_A["default"].weight, fresh.asymlora_B["default"].weight
    assert torch.equal(b, torch.zeros_like(b))
    assert not torch.equal(a[0], a[1])
    assert a.abs().max() <= 32**-0.5
    assert torch.equal(logits(adapted(init_weights=True), tokens(), adapter_names=NAMES), logits(llama(), tokens()))
    assert layers_of(adapted(use_rslora=True))[0].asymlora_spec["default"].scaling == 4.0


def test_dropout_only_in_training():
    model, ids = adapted(lora_dropout=0.5), tokens()
    assert torch.equal(logits(model, ids, adapter_names=NAMES), logits(adapted(), ids, adapter_names=NAMES))
    model.train()
    assert not torch.equal(logits(model, ids, adapter_names=NAMES), logits(model, ids, adapter_names=NAMES))


def test_print_trainable_parameters(capsys):
    adapted().print_trainable_parameters()
    assert "trainable params: 5,632 " in capsys.readouterr().out


def test_modules_to_save():
    model = adapted(modules_to_save=["lm_head"]).train()
    model(input_ids=tokens(), labels=tokens(), adapter_names=NAMES).loss.backward()
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.grad.abs().max() > 0
    assert any("lm_head" in key for key in get_peft_model_state_dict(model))


def test_inject_in_place():
    base = llama()
    assert inject_adapter_in_model(config(), base) is base
    with alora_kernels.route([0, 1]):
        routed = logits(base, tokens())
    assert not torch.equal(routed, logits(llama(), tokens(), output_attentions=False))
    set_task(base, "code")
    assert not torch.equal(routed[0], logits(base, tokens())[0])
    torch.testing.assert_close(routed[1], logits(base, tokens())[1])


def test_inject_on_the_meta_device():
    base = inject_adapter_in_model(config(), llama(), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in base.named_parameters() if "asymlora_" in n)
    assert not any(p.is_meta for n, p in base.named_parameters() if "asymlora_" not in n)


def test_transformers_own_adapter_methods(tmp_path):
    base, ids = llama(), tokens()
    base.add_adapter(config(), adapter_name="default")
    with alora_kernels.route([0, 1]):
        wanted = logits(base, ids)
        base.disable_adapters()
        assert torch.equal(logits(base, ids), logits(llama(), ids))
        base.enable_adapters()
        assert torch.equal(logits(base, ids), wanted)
    base.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = llama()
        again.load_adapter(str(tmp_path), low_cpu_mem_usage=low_memory)
        with alora_kernels.route([0, 1]):
            assert torch.equal(logits(again, ids), wanted)
    assert again.active_adapters() == ["default"]
    again.add_adapter(config(tasks=1), adapter_name="other")
    assert again.active_adapters() == ["other"]
    again.delete_adapter("other")


def test_a_peft_folder_loads_into_transformers(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    base = llama()
    base.load_adapter(str(tmp_path))
    with alora_kernels.route([0, 1]):
        assert torch.equal(logits(base, tokens()), logits(model, tokens()))


def test_a_second_peft_model_after_unloading():
    base = adapted().unload()
    assert_same(get_peft_model_state_dict(adapted(base)), get_peft_model_state_dict(adapted(llama())))


def test_layers_name_themselves():
    assert "r=4, tasks=['math', 'code']" in repr(layers_of(adapted())[0])
    assert "num_experts=3" in repr(layers_of(adapted(routing="soft"))[0])
    assert isinstance(layers_of(adapted())[0], BaseTunerLayer)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tasks": None}, "needs tasks"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["a", "a"]}, "unique"),
        ({"tasks": ["__base__"]}, "reserved"),
        ({"num_experts": 2}, 'belongs to routing="soft"'),
        ({"routing": "hard"}, "one of task, soft"),
        ({"routing": "soft", "num_experts": None}, "num_experts >= 1"),
        ({"routing": "soft", "tasks": ["a"]}, "takes no tasks"),
        ({"r": 0}, "rank must be an integer >= 1"),
        ({"rank_pattern": {"q": 0}}, "rank must be .* for q"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"bias": "some"}, "none, all, asymlora_only"),
        ({"init_weights": "gaussian"}, "True or False"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "regular expression"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_contradictory_configs_are_refused(settings, text):
    with pytest.raises((ValueError, TypeError), match=text):
        config(**settings)


def test_no_argument_is_called_alora():
    assert not any(name.startswith("alora") for name in ALoRAConfig.__dataclass_fields__)


def test_targets_that_do_not_exist():
    with pytest.raises(ValueError, match="nothing_like_it"):
        get_peft_model(llama(), config(target_modules=["nothing_like_it"]))
    assert isinstance(adapted(), PeftModel)


def _fresh(base, **settings):
    torch.manual_seed(4)
    return get_peft_model(base, config(**settings)).eval()


def _delete_and_add(model, **settings):
    model.delete_adapter("default")
    torch.manual_seed(4)
    model.add_adapter("default", config(**settings))
    model.set_adapter("default")
    return model


AGAIN = {
    "unload": lambda model, **s: _fresh(model.unload(), **s),
    "delete and add": _delete_and_add,
    "wrap once more": lambda model, **s: _fresh(model.get_base_model(), **s),
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN.keys())
@pytest.mark.parametrize("fixed", ["code", "__base__"])
@pytest.mark.filterwarnings("ignore:.*peft_config.*:UserWarning", "ignore:You are trying to modify:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter default was active:UserWarning")
def test_a_fresh_adapter_has_no_fixed_task(again, fixed):
    model = adapted()
    set_task(model, fixed)
    model = again(model, tasks=["law", "art", "math"])
    with pytest.raises(ValueError, match="has the tasks law, art, math and this call says none"):
        logits(model, tokens())
    wanted = logits(_fresh(llama(), tasks=["law", "art", "math"]), tokens(), adapter_names=["art", "law"])
    assert torch.equal(logits(model, tokens(), adapter_names=["art", "law"]), wanted)
    model.train()(input_ids=tokens(), labels=tokens(), adapter_names=["art", "law"]).loss.backward()
    assert all(layer.asymlora_B["default"].weight.grad.abs().max() > 0 for layer in layers_of(model))


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_routed_adapter_in_the_place_of_a_soft_one_saves_no_router(again):
    model = again(adapted(routing="soft"), tasks=["a", "b"])
    assert not [key for key in get_peft_model_state_dict(model) if "router" in key]
    assert not [name for name, _ in model.named_parameters() if "router" in name]
    model = again(model, routing="soft")
    assert len([key for key in get_peft_model_state_dict(model) if "router" in key]) == 14


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_fewer_modules_leaves_none_of_the_earlier_one():
    base = inject_adapter_in_model(config(), llama())
    set_task(base, "code")
    torch.manual_seed(4)
    inject_adapter_in_model(config(target_modules=["q_proj"]), base)
    assert sum("default" in layer.asymlora_spec for layer in layers_of(base)) == 2
    wanted = llama()
    torch.manual_seed(4)
    inject_adapter_in_model(config(target_modules=["q_proj"]), wanted)
    for model in (base, wanted):
        set_task(model, "math")
    assert torch.equal(logits(base, tokens()), logits(wanted, tokens()))
    assert get_peft_model_state_dict(base).keys() == get_peft_model_state_dict(wanted).keys()


@pytest.mark.filterwarnings("ignore:.*peft_config.*:UserWarning")
def test_a_merged_adapter_is_not_replaced():
    model = adapted()
    set_task(model, "code")
    model.merge_adapter()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="is merged into the base: call unmerge_adapter"):
        inject_adapter_in_model(config(tasks=3), model.get_base_model())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_further_adapter_freezes_and_thaws_nothing_else():
    model = adapted()
    for layer in layers_of(model):
        layer.asymlora_A["default"].requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for name, inference in (("other", False), ("more", True)):
        model.add_adapter(name, config(inference_mode=inference))
        now = {n: p.requires_grad for n, p in model.named_parameters()}
        assert {n: now[n] for n in before} == before
        assert not any(now[n] for n in now if f".{name}." in n)


def _frozen_a(**settings):
    """As in ffa-lora, A is frozen; also one of two heads."""
    model = adapted(bert(), task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"], **settings)
    for layer in layers_of(model):
        layer.asymlora_A["default"].requires_grad_(False)
    model.base_model.model.bert.pooler.modules_to_save["default"].requires_grad_(False)
    return model


def _trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_disabled_adapters_come_back_as_they_were():
    model = _frozen_a()
    before = _trained(model)
    assert {n.split(".")[-3] for n in before} == {"asymlora_B", "modules_to_save"}
    with model.disable_adapter():
        assert not _trained(model)
        with model.disable_adapter():
            pass
        assert not _trained(model)
        assert all(layer.disable_adapters for layer in layers_of(model))
    assert _trained(model) == before
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert _trained(model) == before
    model.base_model.enable_adapter_layers()  # as they are already
    assert _trained(model) == before
    for _ in range(2):
        model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert _trained(model) == before
    assert not any(layer.disable_adapters for layer in layers_of(model))


def test_transformers_own_methods_give_them_back_too():
    base = llama()
    base.add_adapter(config())
    for layer in layers_of(base):
        layer.asymlora_A["default"].requires_grad_(False)
    before = _trained(base)
    base.disable_adapters()
    assert not _trained(base)
    base.enable_adapters()
    assert _trained(base) == before and len(before) == 14


def test_what_is_said_while_they_are_disabled_holds():
    model = _frozen_a()
    model.add_adapter("other", config(task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"]))
    with model.disable_adapter():
        model.set_adapter("other")
    assert len(_trained(model)) > 2 and all(".other." in n for n in _trained(model))
    with model.disable_adapter():
        model.set_requires_grad("other", False)
    assert not {n for n in _trained(model) if "asymlora" in n}
