"""What outlives what: a fresh adapter starts fresh, and disabled adapters come back as they were."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

from alora_kernels.tuner import set_task

from ..support.tiny import Mlp, adapted, bert, config, layers_of, llama, logits, tokens


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


def test_a_frozen_part_stays_frozen_through_an_evaluation():
    """The federated case: A must not drift after a client evaluated the base."""
    model = adapted(Mlp(), task_type=None)
    for layer in layers_of(model):
        layer.asymlora_A["default"].requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters() if "asymlora_A" in n}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.randn(2, 8)
    with model.disable_adapter():
        assert torch.equal(model(x), Mlp()(x))
    model(x, adapter_names=["math", "code"]).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
