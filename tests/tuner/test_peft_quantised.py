"""Bases whose weights are not plain numbers: gradients after an evaluation, training, and merges that would be lost.

Fakes stand for the kinds: a weight that is made anew at every look, one that the forward does not read, one that is a
tensor subclass. The libraries themselves are tried where they are installed.
"""

from __future__ import annotations

import sys
import types
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from alora_kernels.tuner import base_layer, set_task

from ..support.tiny import adapted, config, layers_of, llama, tokens

NAMES = ["math", "code"]


def adapter_grads(model: nn.Module, ids: Tensor, **call: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids, **call).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if "asymlora" in n and p.grad is not None}


@pytest.fixture
def four_bit(tmp_path: Any) -> LlamaForCausalLM:
    """A whole model in 4 bits, on a CPU."""
    pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(tmp_path)  # blocks of 64
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.bfloat16)


@pytest.mark.parametrize("native", [False, True])
def test_gradients_pass_layers_without_an_adapter_after_an_evaluation(four_bit: Any, native: bool) -> None:
    """The adapter is on the first projection only, so all of its gradient has passed 4-bit layers without one."""
    ids = tokens()
    if native:
        four_bit.add_adapter(config(target_modules=["q_proj"], init_weights=False, tasks=["math"]))
        model, call = four_bit, {}
    else:
        model = adapted(four_bit, target_modules=["q_proj"])
        call = {"adapter_names": NAMES[: len(ids)]}
    before = adapter_grads(model, ids, **call)
    with torch.no_grad():
        model.eval()(input_ids=ids, **call)
    after = adapter_grads(model, ids, **call)
    assert before and before.keys() == after.keys()
    for name, grad in before.items():
        assert grad.abs().max() > 0, name
        assert (after[name] - grad).norm() < 0.1 * grad.norm(), name  # block scales come back in bf16


def test_packing_is_undone_for_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on CPUs that pack nothing: a fake packed weight."""
    undone: list[nn.Module] = []
    monkeypatch.setattr(base_layer, "undo_cpu_packing", undone.append)

    class Four(nn.Parameter):
        quant_state = None

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = Four(torch.randn(4, 4), requires_grad=False)
    for _ in range(2):
        base_layer.guard_gradients(model)
    with torch.no_grad():
        model(torch.randn(2, 4, requires_grad=True))
    model[1](torch.randn(2, 4))
    assert undone == []
    model[1](input=torch.randn(2, 4, requires_grad=True))
    assert undone == [model[1]]  # guarded twice, undone once; the plain layer is left alone


class MadeAnew(nn.Linear):
    """Its weight is dequantised at every look, so that a weight put into it is lost."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.packed = self._parameters.pop("weight").detach().clone()

    @property
    def weight(self) -> Tensor:
        return self.packed.clone()


class Cached(nn.Linear):
    """Its weight can be set, and its forward goes on with another copy."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.packed = self.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed, self.bias)


class Doubled(nn.Linear):
    """Merged, the low-rank part would count twice."""

    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Plain(nn.Linear):
    """A subclass that computes as its parent."""

    def __init__(self) -> None:
        super().__init__(8, 6)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x))


def held(layer: nn.Module) -> Any:
    return adapted(Holder(layer), task_type=None, target_modules=["first", "layer"])


@pytest.mark.parametrize("kind", [MadeAnew, Cached, Doubled])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_would_be_lost_is_refused_by_name(kind: type[nn.Module], how: str) -> None:
    model, x = held(kind()), torch.randn(2, 8)
    with torch.no_grad():
        mixed, base = model(x, adapter_names=NAMES), model(x, adapter_names=["__base__"] * 2)
    assert not torch.allclose(mixed, base, atol=1e-2)
    set_task(model, "math")
    with pytest.raises(ValueError, match=rf"layer, a {kind.__name__}, does not compute with a weight that is put into"):
        getattr(model, how)()
    with torch.no_grad():  # nothing was touched, the first layer neither
        assert torch.equal(model(x, adapter_names=["__base__"] * 2), base)
        assert torch.equal(model(x, adapter_names=NAMES), mixed)


def test_a_subclass_that_computes_as_linear_is_merged() -> None:
    model, x = held(Plain()), torch.randn(2, 8)
    set_task(model, "math")
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), wanted)


class Subclassed(Tensor):
    """A quantised weight as torchao makes them: a tensor subclass that can be dequantised."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        keep = func in (Tensor.detach, Tensor.requires_grad_)
        return out if keep or not isinstance(out, Subclassed) else out.as_subclass(Tensor)

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_a_base_that_was_quantised_in_place_trains_and_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import quantization_utils

    utils: Any = types.ModuleType("torchao.utils")
    utils.TorchAOBaseTensor = Subclassed
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.utils", utils)
    for name in ("is_torchao_available", "is_torchao_ge_v0_18_0"):
        monkeypatch.setattr(quantization_utils, name, lambda: True)
    plain = held(nn.Linear(8, 6))
    layer = deepcopy(layers_of(plain)[1].base_layer)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclassed), requires_grad=False)
    model = held(layer)
    same = {key: value for key, value in plain.state_dict().items() if not key.endswith("layer.base_layer.weight")}
    model.load_state_dict(same, strict=False)
    x, grads = torch.randn(2, 8), []
    for each in (plain, model):
        each(x, adapter_names=NAMES).square().sum().backward()
        grads.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert layers_of(model)[1].quantization_backend.backend_name == "torchao"
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
    set_task(model, "math")
    with pytest.raises(ValueError, match="layer, a Linear, has weights quantised by torchao, which cannot be merged"):
        model.merge_adapter()


def quantised_by(library: str) -> nn.Module:
    layer = nn.Sequential(nn.Linear(64, 64))
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    else:
        quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        quanto.quantize(layer, weights=quanto.qint8)
        quanto.freeze(layer)
    return layer


@pytest.mark.parametrize("library", ["torchao", "quanto"])
def test_libraries_that_are_installed(library: str) -> None:
    model = adapted(quantised_by(library), task_type=None, target_modules=["0"])
    x = torch.randn(2, 64)
    model(x, adapter_names=NAMES).square().mean().backward()
    assert layers_of(model)[0].asymlora_A["default"].weight.grad.abs().amax((1, 2)).min() > 0
    set_task(model, "math")
    with torch.no_grad():
        wanted = model(x)
        with pytest.raises(ValueError, match="keep the adapter"):
            model.merge_and_unload()
        assert torch.equal(model(x), wanted)
