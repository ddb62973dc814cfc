"""One fixed task: merged it equals routing, to rounding; what cannot be merged is refused whole; alone it is LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import alora_kernels
from alora_kernels.tuner import set_task

from ..support.stock_lora import stock_lora
from ..support.tiny import adapted, config, gpt2, layers_of, llama, logits, tokens


def _weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "asymlora_" not in n and n.endswith("weight")}


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("safe", [False, True])
def test_merged_equals_routed(base, safe):
    model, ids = adapted(base()), tokens(3)
    wanted = logits(model, ids, adapter_names=["code"] * 3)
    plain = logits(base(), ids)
    before = _weights(model)
    set_task(model, "code")
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.unmerge_adapter()
    for name, weight in _weights(model).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged, ids), wanted, rtol=1e-4, atol=1e-5)
    assert not layers_of(merged)
    assert type(merged) is type(base())
    assert not torch.allclose(logits(merged, ids), plain, atol=1e-3)


def test_one_task_merges_without_being_set():
    model, ids = adapted(tasks=["only"]), tokens()
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), wanted, rtol=1e-4, atol=1e-5)


def test_unload_gives_back_the_base():
    ids = tokens()
    assert torch.equal(logits(adapted().unload(), ids), logits(llama(), ids))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("settings", "task", "text"),
    [
        ({}, None, "set_task"),
        ({}, "__base__", "nothing to merge"),
        ({"routing": "soft"}, None, "per token"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_changes(merge, settings, task, text):
    model = adapted(**settings)
    before = _weights(model)
    if task:
        set_task(model, task)
    with pytest.raises(ValueError, match=text):
        getattr(model, merge)()
    assert all(torch.equal(weight, before[name]) for name, weight in _weights(model).items())
    assert len(layers_of(model)) == 14


def test_broken_adapters_are_refused_by_safe_merge():
    model = adapted()
    set_task(model, "math")
    layers_of(model)[0].asymlora_B["default"].weight.data[0] = float("nan")
    before = _weights(model)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(_weights(model)["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
                       before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"])  # fmt: skip


def test_a_merged_model_refuses_other_tasks():
    model, ids = adapted(), tokens()
    set_task(model, "math")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter"):
        set_task(model, "code")
    with pytest.raises(ValueError, match=r"'math'.* merged .*unmerge_adapter"):
        model(input_ids=ids, adapter_names=["code", "code"])
    with alora_kernels.route([0, 1]), pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=ids)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(llama(), ids), rtol=1e-4, atol=1e-5)


def test_two_adapters_merge_together():
    model, ids = adapted(), tokens()
    model.add_adapter("style", config(tasks=["formal", "casual"], r=2))
    model.base_model.set_adapter(["default", "style"])
    set_task(model, "math")
    set_task(model, "casual")
    wanted = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["style"])
    assert layers_of(model)[0].merged_adapters == ["style"]
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("style")


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
def test_a_tied_head_is_adapted_but_not_merged():
    base = llama(tie_word_embeddings=True)
    ids = tokens()
    embedded = base.get_input_embeddings().weight.detach().clone()
    model = adapted(base, target_modules=["lm_head", "q_proj"])
    assert not torch.equal(logits(model, ids, adapter_names=["math", "code"]), logits(llama(), ids))
    set_task(model, "math")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"weight of lm_head is also that of model.embed_tokens.*untie"):
            merge()
    assert torch.equal(base.get_input_embeddings().weight, embedded)


def test_a_weight_shared_by_two_layers_is_not_merged():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    model = adapted(Shared(), task_type=None, target_modules=["one"])
    set_task(model, "math")
    with pytest.raises(ValueError, match="weight of one is also that of two"):
        model.merge_adapter()


def _stock(base, **settings):
    """PEFT's LoRA in the base's dtype: with 16 bits, the adapters too (PEFT would otherwise widen x for them)."""
    return stock_lora(base, autocast_adapter_dtype=False, task_type="CAUSAL_LM", **settings)


def _copy_weights(ours, stock):
    modules = dict(stock.named_modules())
    for name, layer in ours.named_modules():
        if layer in layers_of(ours):
            modules[name].lora_A["default"].weight.data.copy_(layer.asymlora_A["default"].weight[0])
            modules[name].lora_B["default"].weight.data.copy_(layer.asymlora_B["default"].weight)


def _run(model):
    ids = tokens(3)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach().double(), {
        n.replace(".asymlora_", ".lora_").replace(".default.weight", ".default"): p.grad.double().reshape(-1)
        for n, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(base, settings, dtype):
    ours = adapted(base().to(dtype), tasks=["only"], **settings)
    stock, exact = _stock(base().to(dtype), **settings), _stock(base().double(), **settings)
    assert layers_of(ours)[0].asymlora_A["default"].weight.dtype == torch.float32
    _copy_weights(ours, stock)
    _copy_weights(ours, exact)
    exact.base_model.model.load_state_dict(  # the same rounded base weights, in float64
        {k: v for k, v in stock.base_model.model.state_dict().items() if "lora_" not in k}, strict=False
    )
    (y, grads), (y_stock, grads_stock), (y_exact, grads_exact) = (_run(m) for m in (ours, stock, exact))
    assert grads.keys() == grads_stock.keys() == grads_exact.keys()
    _no_worse(y, y_stock, y_exact)
    _no_worse(torch.cat(list(grads.values())), *(torch.cat([g[n] for n in grads]) for g in (grads_stock, grads_exact)))


def _no_worse(ours, stock, exact):
    """Ours may be off by twice what stock PEFT is off by."""
    error, allowed = (ours - exact).norm(), (stock - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), (error, allowed)


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}])
def test_same_numbers_of_parameters(settings):
    ours, stock = adapted(tasks=["only"], **settings), _stock(llama(), **settings)
    assert ours.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()


def test_autocast_and_sixteen_bit_adapters():
    ids = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for base in (llama(), gpt2()):
            model = adapted(base).train()
            model(input_ids=ids, labels=ids, adapter_names=["math", "code"]).loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    model = get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=False).train()
    assert layers_of(model)[0].asymlora_A["default"].weight.dtype == torch.bfloat16
    model(input_ids=ids, labels=ids, adapter_names=["math", "code"]).loss.backward()


def test_activations_stay_in_their_dtype():
    model, seen = adapted(llama().bfloat16()), set()
    for layer in layers_of(model):
        layer.register_forward_hook(lambda _, args, out: seen.update({args[0].dtype, out.dtype}))
    model(input_ids=tokens(), adapter_names=["math", "code"])
    assert seen == {torch.bfloat16}
