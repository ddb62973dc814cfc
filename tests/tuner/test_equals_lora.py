"""One task is LoRA: the same weights give the values and gradients of stock PEFT LoRA, to rounding."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from ..support.stock_lora import stock_lora
from ..support.tiny import adapted, config, gpt2, layers_of, llama, tokens


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
        assert layer._cast_input_dtype(torch.ones(1, dtype=torch.bfloat16), torch.float32).dtype == torch.bfloat16
    model(input_ids=tokens(), adapter_names=["math", "code"])
    assert seen == {torch.bfloat16}
