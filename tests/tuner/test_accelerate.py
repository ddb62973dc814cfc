"""`accelerate`: PEFT's own LoRA on the fused op computes what PEFT does, in every dtype, with dropout and compiled."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import alora_kernels
from tests.compare import skip_unless_runnable

from ..support.stock_lora import MLP, dy_for, fused_copy, no_worse, spy_on_the_op, step, stock_lora
from ..support.tiny import Mlp, adapter_grads, assert_same, llama, tokens

SETTINGS = [{}, {"use_rslora": True}, {"lora_bias": True}, {"bias": "all"}, {"rank_pattern": {"up": 2}}]


@pytest.fixture
def calls(monkeypatch):
    return spy_on_the_op(monkeypatch)


def _as_good(stock: PeftModel, x: torch.Tensor, dtype: torch.dtype, calls: list[int], layers: int) -> dict:
    """Output and gradients of an accelerated copy, no worse than PEFT's against float64; so many layers ran the op."""
    ours = step(fused_copy(stock), x)
    assert len(calls) == layers
    no_worse(ours, step(stock, x), step(deepcopy(stock).double(), x.double()), dtype)
    return ours


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_and_gradients(settings, dtype, backend, device, calls, monkeypatch):
    skip_unless_runnable(backend, device, dtype)
    monkeypatch.setenv("ALORA_BACKEND", backend)
    stock = stock_lora(Mlp().to(device, dtype), autocast_adapter_dtype=False, **(MLP | settings))
    _as_good(stock, torch.randn(3, 5, 8).to(device, dtype), dtype, calls, layers=2)


def test_a_bias_of_the_adapter_where_the_base_has_none(calls):
    base = Mlp()
    base.up = nn.Linear(8, 16, bias=False)
    with pytest.warns(match="no bias"):
        stock = stock_lora(base, lora_bias=True, **MLP)
    _as_good(stock, torch.randn(5, 8), torch.float32, calls, layers=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_model(dtype, calls):
    stock = stock_lora(llama().to(dtype), autocast_adapter_dtype=False)
    _as_good(stock, torch.randn(2, 6, 32).to(dtype), dtype, calls, layers=14)


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapters_over_a_sixteen_bit_base(dtype, lora_bias, calls):
    """PEFT's default: output and every gradient as good as PEFT's, which takes the low-rank path in float32."""
    stock = stock_lora(nn.Sequential(nn.Linear(64, 48)).to(dtype), target_modules=["0"], lora_bias=lora_bias)
    for name, grad in _as_good(stock, torch.randn(40, 64).to(dtype), dtype, calls, layers=1).items():
        if "lora_A" in name or "lora_B.default.weight" in name:
            assert grad.dtype == torch.float32 and (grad != grad.to(dtype).float()).float().mean() > 0.5, name


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base, calls):
    stock = stock_lora(Mlp().to(base), **MLP)
    x = torch.randn(3, 5, 8)
    fused = fused_copy(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = step(fused, x), step(stock, x)
    assert len(calls) == 2
    assert ours["y"].dtype == torch.bfloat16 and ours["x"].dtype == torch.float32
    no_worse(ours, theirs, step(deepcopy(stock).double(), x.double()), torch.bfloat16)


def _one_layer(p: float) -> tuple[PeftModel, Any]:
    stock = stock_lora(nn.Sequential(nn.Linear(16, 8).double()), target_modules=["0"], lora_dropout=p).double().train()
    return stock, fused_copy(stock)


def test_dropout_forward_and_backward_use_one_mask(calls):
    """With its mask fixed the layer is linear in x, A and B, so <dleaf, leaf> is what the leaf adds to <dy, y>."""
    _, fused = _one_layer(0.5)
    x, base = torch.randn(30, 16).double(), fused.base_model.model[0].base_layer
    torch.manual_seed(7)
    got = step(fused, x)
    dy = dy_for(got["y"])
    low_rank = (dy * (got["y"] - base(x))).sum()
    assert low_rank.abs() > 1
    for name, leaf in fused.named_parameters():
        if leaf.requires_grad:
            torch.testing.assert_close((got[name] * leaf).sum(), low_rank)
    torch.testing.assert_close((got["x"] * x).sum(), (dy * (got["y"] - base.bias)).sum())
    torch.manual_seed(7)
    assert torch.equal(fused(x), got["y"])
    assert not torch.equal(fused(x), got["y"])
    assert len(calls) == 3


def test_dropout_has_the_moments_of_torchs():
    stock, fused = _one_layer(0.3)
    x = torch.randn(1, 16).double().expand(20000, 16)
    ours, theirs, plain = fused(x), stock(x), fused.eval()(x)
    spread = theirs.std(0)
    assert (spread > 0.01).all()
    torch.testing.assert_close(ours.std(0), spread, rtol=0.05, atol=0)
    assert ((ours.mean(0) - plain[0]).abs() < 5 * spread / 20000**0.5).all()


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_at_its_ends_and_in_evaluation(p, calls):
    stock, fused = _one_layer(p)
    x = torch.randn(5, 16).double()
    if p != 0.5:
        torch.testing.assert_close(fused(x), stock(x))
    torch.testing.assert_close(fused.eval()(x), stock.eval()(x))
    fused.train()
    fused.base_model.model[0].lora_dropout["default"].eval()  # PEFT asks the dropout module, not the layer
    torch.testing.assert_close(fused(x), stock(x))
    assert len(calls) == (2 if p == 0.5 else 3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_the_backward_keeps(dropout):
    """Over a 16-bit base PEFT keeps a float32 copy of x for every layer, and with dropout a mask and a product."""

    def kept(model):
        seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

        def keep(t):
            seen.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(
                inputs_embeds=torch.randn(4, 64, 32, dtype=torch.bfloat16, requires_grad=True)
            ).logits.sum().backward()
        return sum(seen.values())

    stock = stock_lora(llama().to(torch.bfloat16), lora_dropout=dropout).train()
    assert kept(fused_copy(stock)) < (0.6 if dropout else 0.8) * kept(stock)


def test_no_tokens_and_writing_into_the_output(calls):
    base = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    stock = stock_lora(base, target_modules=["0", "2"])
    fused = fused_copy(stock)
    for x in (torch.randn(5, 8), torch.randn(0, 8), torch.randn(8)):
        ours, theirs = step(fused, x), step(stock, x)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])
    assert len(calls) == 6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_bit_identical(dropout, reentrant, calls):
    def run(checkpointed):
        model = stock_lora(llama(), lora_dropout=dropout).train()
        alora_kernels.accelerate(model)
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return adapter_grads(model)

    assert_same(run(False), run(True))
    assert len(calls) == 14 + 28


@pytest.mark.parametrize("base", [lambda: (Mlp(), MLP), lambda: (llama(layers=1), {})], ids=["mlp", "llama"])
def test_compiles_into_one_graph_with_the_op_in_it(base):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "alora" in str(node.target))
        return graph

    base, settings = base()
    stock = stock_lora(base, lora_dropout=0.1, **settings)
    fused = fused_copy(stock)
    kwargs = {"x": torch.randn(3, 8)} if settings else {"input_ids": tokens(), "labels": tokens()}
    ours, theirs = torch.compile(fused, backend=backend, fullgraph=True)(**kwargs), stock(**kwargs)
    assert len(seen) == (2 if settings else 7)
    torch.testing.assert_close(*((t if settings else t.logits) for t in (ours, theirs)))
    (ours if settings else ours.loss).sum().backward()
    assert adapter_grads(fused)


def test_the_stock_trainer_learns_the_same(tmp_path, calls):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    stock = stock_lora(llama(), task_type="CAUSAL_LM")
    models = {"stock": stock, "fused": fused_copy(stock)}
    for name, model in models.items():
        arguments = TrainingArguments(
            tmp_path / name, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=3, optim="sgd",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
    assert len(calls) == 4 * 14
    trained = {name: dict(model.named_parameters()) for name, model in models.items()}
    for name, parameter in trained["stock"].items():
        torch.testing.assert_close(trained["fused"][name], parameter)
