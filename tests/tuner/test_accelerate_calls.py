"""Accelerated models in PEFT's hands: files, copies, switching, merging, hooks; each call decides anew."""

from __future__ import annotations

import json
import pickle
import warnings
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import layer as lora
from torch import nn

import alora_kernels
from alora_kernels.ops import packed
from alora_kernels.tuner.accelerate import FusedLoraLinear

from ..support.stock_lora import MLP, fused_copy, spy_on_the_op, step, stock_lora
from ..support.tiny import Mlp, adapted, assert_same, gpt2, llama, logits, tokens

FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture
def calls(monkeypatch):
    return spy_on_the_op(monkeypatch)


def test_parameters_state_dict_copies_and_pickles():
    model = stock_lora(llama(), lora_dropout=0.1)
    before, state = dict(model.named_parameters()), {n: t.clone() for n, t in model.state_dict().items()}
    alora_kernels.accelerate(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[n] is after[n] for n in before)
    assert_same(state, model.state_dict())
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(type(m) is FusedLoraLinear for m in copy.modules()) == 14
        assert_same(state, copy.state_dict())
        assert torch.equal(logits(copy, tokens()), logits(model, tokens()))
    model.load_state_dict({n: t + 1 for n, t in state.items()})
    assert torch.equal(next(iter(before.values())), next(iter(state.values())) + 1)


def test_saved_adapters_are_the_same_files_and_load(tmp_path, calls):
    stock = stock_lora(llama())
    fused = fused_copy(stock)
    for name, model in (("stock", stock), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    weights, config = ([Path(tmp_path, n, f) for n in ("stock", "fused")] for f in FILES)
    assert weights[0].read_bytes() == weights[1].read_bytes()
    stocks, ours = (json.loads(file.read_text()) for file in config)
    assert sorted(stocks.pop("target_modules")) == sorted(ours.pop("target_modules"))  # a set has no order
    assert stocks == ours
    again = PeftModel.from_pretrained(llama(), tmp_path / "fused").eval()
    assert torch.equal(logits(again, tokens()), logits(stock, tokens()))
    alora_kernels.accelerate(again)
    again.load_adapter(tmp_path / "stock", "second")
    again.set_adapter("second")
    calls.clear()
    assert torch.equal(logits(again, tokens()), logits(fused, tokens()))
    assert len(calls) == 28


def _same_as_stock(stock, fused, calls, served: int, **kwargs) -> None:
    """Equal to PEFT's forward bit for bit where the op serves no layer, and close where it does."""
    calls.clear()
    ours, theirs = logits(fused, tokens(), **kwargs), logits(stock, tokens(), **kwargs)
    assert len(calls) == served
    if served:
        torch.testing.assert_close(ours, theirs)
    else:
        assert torch.equal(ours, theirs)


def test_merging_disabling_and_switching_are_decided_at_each_call(calls):
    stock = stock_lora(llama())
    stock.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    stock.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    fused = fused_copy(stock)
    _same_as_stock(stock, fused, calls, 14)
    with stock.disable_adapter(), fused.disable_adapter():
        _same_as_stock(stock, fused, calls, 0)
    _same_as_stock(stock, fused, calls, 0, adapter_names=["default", "other"])
    for model in (stock, fused):
        model.set_adapter("other")
    _same_as_stock(stock, fused, calls, 2)  # the other layers do not have it
    for model in (stock, fused):
        model.base_model.set_adapter(["default", "other"])
    _same_as_stock(stock, fused, calls, 12)  # both are active on the two q_proj
    for model in (stock, fused):
        model.set_adapter("dora")
    _same_as_stock(stock, fused, calls, 0)
    for model in (stock, fused):
        model.set_adapter("default")
        model.merge_adapter()
    _same_as_stock(stock, fused, calls, 0)
    for model in (stock, fused):
        model.unmerge_adapter()
    _same_as_stock(stock, fused, calls, 14)
    for model in (stock, fused):
        model.delete_adapter("default")
        model.set_adapter("other")
    _same_as_stock(stock, fused, calls, 2)
    stock, fused = stock.merge_and_unload(), fused.merge_and_unload()
    _same_as_stock(stock, fused, calls, 0)
    assert not any(isinstance(m, lora.LoraLayer) for m in fused.modules())


def test_adapters_added_later_are_served(calls):
    model = stock_lora(Mlp(), **MLP)
    alora_kernels.accelerate(model)
    model.add_adapter("later", LoraConfig(r=2, use_rslora=True, lora_dropout=0.5, init_lora_weights=False, **MLP))
    model.eval().set_adapter("later")
    stock = deepcopy(model)
    assert alora_kernels.restore(stock) == 2
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), stock(x))
    assert len(calls) == 2


class Doubled(nn.Linear):
    """An adapter half that does more than multiply."""

    def forward(self, x):
        return 2 * super().forward(x)


def _hooks(up, down):
    up.lora_A["default"].register_forward_hook(lambda _, args, out: 2 * out)
    down.base_layer.register_forward_pre_hook(lambda _, args: (3 * args[0],))


def _other_modules(up, down):
    up.lora_dropout["default"] = nn.Tanh()
    down.scaling["default"] = torch.tensor(0.7)


def _a_subclass(up, down):
    up.lora_dropout["default"] = nn.Identity()
    up.lora_B["default"].__class__ = Doubled
    down.base_layer.weight.requires_grad_(True)


def _narrow_adapters(up, down):
    up.base_layer.weight.requires_grad_(True)
    down.lora_A.to(torch.bfloat16), down.lora_B.to(torch.bfloat16)  # narrower than x: PEFT rounds x for them


@pytest.mark.parametrize("change", [_hooks, _other_modules, _a_subclass, _narrow_adapters])
def test_hooks_and_unusual_modules_run_as_in_peft(change, calls):
    stock = stock_lora(Mlp(), lora_dropout=0.5, **MLP)
    fused, x = fused_copy(stock), torch.randn(4, 8)
    for model in (stock, fused):
        change(model.base_model.model.up, model.base_model.model.down)
    assert_same(step(stock, x), step(fused, x))
    assert not calls


class Tagged(torch.Tensor):
    """A subclass: whoever made it wants to see every operation."""


def test_unusual_inputs_run_as_in_peft(calls):
    stock = stock_lora(Mlp(), lora_dropout=0.5, **MLP)
    fused, x = fused_copy(stock), torch.randn(4, 8)
    out = fused(x.as_subclass(Tagged))
    assert type(out) is Tagged and torch.equal(out, stock(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # torch casts float16 as well, the op does not
        assert torch.equal(fused.base_model.model.up(x.half()), stock.base_model.model.up(x.half()))
    with pytest.raises(RuntimeError, match="same dtype"):
        fused(x.double())
    for model in (stock, fused):
        for name in MLP["target_modules"]:
            getattr(model.base_model.model, name).lora_dropout["default"].register_forward_hook(lambda *a: 2 * a[2])
    assert torch.equal(fused(x), stock(x))
    assert not calls


def test_input_casting_that_was_turned_off(calls):
    fused, x = fused_copy(stock_lora(Mlp(), **MLP)), torch.randn(4, 8)
    wide = fused_copy(stock_lora(Mlp().to(torch.bfloat16), **MLP))
    with peft.helpers.disable_input_dtype_casting(fused), peft.helpers.disable_input_dtype_casting(wide):
        fused(x)
        assert len(calls) == 2
        with pytest.raises(RuntimeError):  # as PEFT: nobody casts x for the float32 adapter
            wide(x.to(torch.bfloat16))
    wide(x.to(torch.bfloat16))
    assert len(calls) == 4


def test_transforms_of_torch_func_run_pefts_forward(calls):
    model = stock_lora(Mlp(), **MLP)
    alora_kernels.accelerate(model)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(params, row):
        return torch.func.functional_call(model, params, (row[None],)).square().sum()

    x = torch.randn(3, 8)
    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    assert not calls
    model(x).square().sum().backward()
    assert len(calls) == 2
    for name, grads in per_row.items():
        torch.testing.assert_close(grads.sum(0), dict(model.named_parameters())[name].grad)


def test_offloading_hooks_that_come_later_still_work(calls):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    stock = stock_lora(Mlp(), **MLP)
    fused = fused_copy(stock)
    x = torch.randn(4, 8)
    add_hook_to_module(fused.base_model.model.up, ModelHook())
    add_hook_to_module(fused.base_model.model.down.base_layer, ModelHook())
    torch.testing.assert_close(fused(x), stock(x))
    assert len(calls) == 1  # `up`; the base of `down` must be called
    alora_kernels.restore(fused)
    assert torch.equal(fused(x), stock(x))  # the hook of `up` still holds our function
    remove_hook_from_module(fused, recurse=True)
    assert torch.equal(fused(x), stock(x))
    assert len(calls) == 1


class Zoo(nn.Module):
    """One of everything PEFT's LoRA takes, and two plain linear layers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.plain, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.conv, self.gpt = nn.Embedding(4, 8), nn.Conv1d(8, 8, 1), Conv1D(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hooked, self.subclassed = nn.Linear(8, 8), nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)
        self.replaced, self.trained, self.parameter = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.other(self.plain(self.table(ids)))
        x = self.conv(self.gpt(x).transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.parameter(self.trained(self.replaced(self.subclassed(self.hooked(x)))))


def _zoo() -> PeftModel:
    from accelerate.hooks import ModelHook, add_hook_to_module

    names = [n for n, _ in Zoo().named_children() if n != "parameter"]
    model = stock_lora(Zoo(), target_modules=names, target_parameters=["parameter.weight"])
    inner = model.base_model.model
    inner.hooked.base_layer.register_forward_hook(lambda *_: None)
    add_hook_to_module(inner.replaced, ModelHook())
    inner.trained.base_layer.weight.requires_grad_(True)
    return model


def test_what_stays_is_listed_once_and_computes_the_same(calls):
    torch.manual_seed(0)
    model = _zoo()
    ids = torch.tensor([[0, 3, 1]])
    wanted = _as_numbers(model, ids)
    with pytest.warns(UserWarning, match="accelerate left some") as caught:
        report = alora_kernels.accelerate(model)
    told = [str(w.message) for w in caught if "accelerate left" in str(w.message)]
    assert len(told) == 1
    reasons = {n.removeprefix("base_model.model."): reason for n, reason in report.skipped.items()}
    assert [n.removeprefix("base_model.model.") for n in report.layers] == ["plain", "other"]
    words = {
        "table": "embedding", "conv": "convolution", "gpt": "is a Conv1D", "attention": "MultiheadAttention",
        "attention.base_layer.out_proj": "NonDynamicallyQuantizableLinear", "hooked": "hooks",
        "subclassed": "NonDynamicallyQuantizableLinear", "replaced": "replaced its forward", "trained": "trains",
        "parameter": "target_parameters",
    }  # fmt: skip
    assert reasons.keys() == words.keys()
    for name, word in words.items():
        assert word in reasons[name], name
        assert reasons[name] in told[0] and reasons[name] in str(report)
    assert str(report).splitlines()[0] == "2 LoRA layers run the fused op"
    assert "2 keep PEFT's forward: its base is a NonDynamically" in str(report)
    ours = _as_numbers(model, ids)
    assert len(calls) == 2
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alora_kernels.accelerate(model) == report  # again: nothing changes, nothing is said
    assert alora_kernels.restore(model) == 2
    assert alora_kernels.restore(model) == 0
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())
    calls.clear()
    assert torch.equal(_as_numbers(model, ids)["y"], wanted["y"])
    assert not calls


def _as_numbers(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients; PEFT's attention merges for the call, so some parameters get none."""
    model.zero_grad()
    y = model(ids)
    y.square().sum().backward()
    return {"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_many_layers_with_one_reason_are_one_line():
    model = stock_lora(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    with pytest.warns(UserWarning, match=r"8 keep PEFT's forward: its base is a Conv1D.*h\.0\.attn.*, \.\.\.\)"):
        report = alora_kernels.accelerate(model)
    assert not report.layers and len(report.skipped) == 8
    assert len(str(report).splitlines()) == 2


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}])
def test_variants_are_listed(settings):
    with pytest.warns(UserWarning, match="LinearVariant is more than plain LoRA"):
        assert len(alora_kernels.accelerate(stock_lora(llama(), **settings)).skipped) == 14


def test_quantised_bases_stay(calls):
    bnb = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    base = nn.Sequential(layer)
    base.is_loaded_in_4bit = True  # as transformers says it
    model = stock_lora(base, target_modules=["0"])
    with pytest.warns(UserWarning, match="Linear4bit has a forward of its own"):
        alora_kernels.accelerate(model)
    model(torch.randn(2, 64))
    assert not calls


def test_injected_adapters_and_other_tuners(calls):
    base = inject_adapter_in_model(LoraConfig(r=4, init_lora_weights=False, **MLP), Mlp())
    assert alora_kernels.accelerate(base).layers == ["up", "down"]
    base(torch.randn(2, 8))
    assert len(calls) == 2
    ours = adapted(tasks=["only"])
    report = alora_kernels.accelerate(ours)  # ALoRA layers are fused already
    assert not report.layers and not report.skipped
    assert logits(ours, tokens()).isfinite().all()


@pytest.mark.parametrize("base", [Mlp, lambda: get_peft_model(Mlp(), peft.IA3Config(**MLP, feedforward_modules=[]))])
def test_a_model_without_lora_is_refused_with_the_remedy(base):
    model = base()
    with pytest.raises(ValueError, match=r"no LoRA layer.*get_peft_model"):
        alora_kernels.accelerate(model)
    assert alora_kernels.restore(model) == 0


@pytest.mark.parametrize("how", ["unload", "merge and unmerge", "restore"])
def test_what_peft_writes_to_a_packed_weight_is_seen(how):
    """It adds to `weight.data`, past the version counter; a change of one row lies between the sample's entries."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512, bias=False))
    x = torch.randn(4, 512)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    alora_kernels.accelerate(model)
    with torch.no_grad():
        (layer,) = (module for module in model.modules() if isinstance(module, lora.Linear))
        layer.lora_B["default"].weight[3] = 5.0
        model(x)
        assert packed._forward.get(layer.base_layer.weight) is not None or not packed.AVAILABLE
        if how == "restore":
            alora_kernels.restore(model)
        elif how == "merge and unmerge":
            model.merge_adapter()
            layer.lora_B["default"].weight[3] = 0.0  # what is taken off again is not what was added
            model.unmerge_adapter()
        base = model.merge_and_unload()
        again = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        alora_kernels.accelerate(again)
        torch.testing.assert_close(again(x), x @ base[0].base_layer.weight.t(), rtol=1e-4, atol=1e-4)
