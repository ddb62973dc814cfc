"""What `accelerate` leaves to PEFT: listed by reason, said once, computed as before."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import alora_kernels
from alora_kernels.tuner.accelerate import FusedLoraLinear

from ..support.stock_lora import MLP, spy_on_the_op, stock_lora
from ..support.tiny import Mlp, adapted, gpt2, llama, logits, tokens


@pytest.fixture
def calls(monkeypatch):
    return spy_on_the_op(monkeypatch)


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
