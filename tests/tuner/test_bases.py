"""Bases that are not a plain nn.Linear: hooked, subclassed, Conv1D, quantised; and targets that are refused."""

from __future__ import annotations

import sys
import types
import warnings
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import alora_kernels
from alora_kernels import reference
from alora_kernels.tuner import base_layer, set_task
from alora_kernels.tuner.base_layer import takes_fused_op

from ..support.tiny import Mlp, adapted, adapter_grads, bert, config, gpt2, layers_of, llama, logits, tokens

NAMES = ["math", "code"]


class Doubled(nn.Linear):
    """A subclass with a forward of its own: merged, the low-rank part would count twice."""

    def forward(self, x):
        return 2 * super().forward(x)


def _one(layer, **before):
    held = nn.Sequential(OrderedDict(**before, layer=layer))
    return adapted(held, task_type=None, target_modules=[*before, "layer"])


def _low_rank(model, x, ids):
    """s (sum_e g_e A_e x) B^T by the reference."""
    layer = layers_of(model)[0]
    zero = torch.zeros(layer.out_features, layer.in_features)
    return reference.alora_linear(
        x,
        zero,
        layer.asymlora_A["default"].weight,
        layer.asymlora_B["default"].weight,
        task_ids=torch.tensor(ids),
        scaling=2.0,
    )


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), Doubled(8, 6), Conv1D(6, 8)])
@pytest.mark.parametrize("grad", [True, False])
def test_every_kind_of_base(layer, grad):
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        base = layer(x)
    model = _one(layer)
    assert takes_fused_op(layers_of(model)[0].base_layer) == (type(layer) is nn.Linear)
    with torch.set_grad_enabled(grad):
        out = model(x, adapter_names=["code", "__base__"])
    torch.testing.assert_close(out.detach(), base + _low_rank(model, x, [1, -1]).detach())


def test_hooks_on_the_base_run_and_keep_what_they_saw():
    layer, seen = nn.Linear(8, 6), []
    model = _one(layer)
    x = torch.randn(2, 8)
    wanted = model(x, adapter_names=NAMES)
    layer.register_forward_pre_hook(lambda _, args: (3 * args[0],))
    layer.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        out = model(x, adapter_names=NAMES)
    torch.testing.assert_close(seen[0], nn.functional.linear(3 * x, layer.weight, layer.bias))
    torch.testing.assert_close(out, wanted + nn.functional.linear(2 * x, layer.weight))


def test_a_replaced_forward_is_called():
    layer = nn.Linear(8, 6)
    model = _one(layer)
    layer.forward = lambda x: torch.ones(2, 6)
    torch.testing.assert_close(
        model(torch.zeros(2, 8), adapter_names=NAMES), torch.ones(2, 6), msg="the instance's own forward was not called"
    )


def test_an_output_that_the_base_holds_is_not_overwritten():
    class Cached(nn.Linear):
        def forward(self, x):
            return self.weight[0, 0] * x

    layer, x = Cached(6, 6), torch.randn(2, 6)
    model = _one(layer)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.forward = lambda x: x  # returns its very input
        before = x.clone()
        model(x, adapter_names=NAMES)
    assert torch.equal(x, before)


def test_a_base_weight_that_trains_gets_its_gradient():
    model = _one(nn.Linear(8, 6))
    base = layers_of(model)[0].base_layer
    base.weight.requires_grad_(True)
    model(torch.randn(2, 8), adapter_names=NAMES).sum().backward()
    assert base.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("asymlora_only", 1), ("all", 2)])
def test_bias(bias, count, tmp_path):
    model = adapted(Mlp(), task_type=None, target_modules=["up"], bias=bias).train()
    model(torch.randn(2, 8), adapter_names=NAMES).sum().backward()
    assert sum(p.grad is not None for n, p in model.named_parameters() if n.endswith("bias")) == count
    layers_of(model)[0].base_layer.bias.data.add_(1.0)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    again, x = PeftModel.from_pretrained(Mlp(), tmp_path), torch.randn(2, 8)
    same = torch.equal(model.eval()(x, adapter_names=NAMES), again(x, adapter_names=NAMES))
    assert same == (bias != "none")


def _quantised(kind):
    bnb = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    if kind == "4bit":
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return layer.to("cpu")  # quantises


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_base(kind):
    layer = _quantised(kind)
    x = torch.randn(2, 5, 64)
    model = _one(layer)
    with torch.no_grad():
        base = layer(x)  # only now: in evaluation bitsandbytes packs weights anew and rounds differently
    assert layers_of(model)[0].quantization_backend is not None
    out = model(x, adapter_names=["code", "__base__"])
    torch.testing.assert_close(out.detach(), (base + _low_rank(model, x, [1, -1])).detach(), rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    assert layers_of(model)[0].asymlora_A["default"].weight.grad[1].abs().max() > 0
    set_task(model, "code")
    with torch.no_grad():
        wanted = model(x)
        merged = model.merge_and_unload()(x)
    error = (merged - wanted).norm() / wanted.norm()
    assert error < 0.2, error  # the sum is quantised again
    assert (base - wanted).norm() / wanted.norm() > 2 * error


def test_four_bit_gradients_after_an_evaluation():
    """On some CPUs bitsandbytes packs weights in evaluation for a kernel without a backward."""
    model, grads = _one(_quantised("4bit")), []
    x = torch.randn(2, 64, requires_grad=True)
    for _ in range(2):
        (grad,) = torch.autograd.grad(model.train()(x, adapter_names=NAMES).sum(), x)
        grads.append(grad)
        with torch.no_grad():
            model.eval()(x.detach(), adapter_names=NAMES)
    # bitsandbytes gives the block scales back in bf16; without the ordinary layout the base's share was missing
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[0].norm()


def test_a_backend_that_cannot_merge_says_so():
    model = _one(nn.Linear(8, 6))
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    layers_of(model)[0].quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    set_task(model, "math")
    with pytest.raises(ValueError, match="layer, a Linear, has weights quantised by gptq, which cannot be merged"):
        model.merge_adapter()


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine = nn.Linear(8, 8)
        self.table = nn.Embedding(4, 8)
        self.filter = nn.Conv2d(1, 1, 3)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8)])


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("table", r"table is an Embedding.*modules_to_save"),
        ("filter", r"filter is a Conv2d.*linear layers"),
        ("norm", r"norm is a LayerNorm, which is not a linear layer"),
        ("attention.out_proj", r"attention.out_proj belongs to nn.MultiheadAttention"),
        ("attention", r"attention belongs to nn.MultiheadAttention"),
    ],
)
def test_refused_targets_leave_the_model_untouched(target, text):
    model = Zoo()
    with pytest.raises(ValueError, match=text):
        adapted(model, task_type=None, target_modules=["fine", target])
    assert not layers_of(model)


def test_routed_experts_are_left_alone_unless_rows_do_not_matter():
    with pytest.raises(ValueError, match=r"cannot adapt.*\n.*an order that the data decide.*: experts.0"):
        adapted(Zoo(), task_type=None, target_modules=["experts.0"])
    with pytest.warns(UserWarning, match=r"leaves 1 of 2 target modules alone.*\n.*: experts.0\n.*soft"):
        model = adapted(Zoo(), task_type=None, target_modules=["fine", "experts.0"])
    assert [layer.rows_name for layer in layers_of(model)] == ["fine"]
    assert model.peft_config["default"].exclude_modules == {"experts.0"}
    for other in ({"routing": "soft"}, {"tasks": ["only"]}):
        assert adapted(Zoo(), task_type=None, target_modules=["experts.0"], **other)


def told(target_modules, base=None, **settings):
    """The warnings of an adapter on these modules."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        adapted(base, target_modules=target_modules, **settings)
    return [str(one.message) for one in found if "target_modules" in str(one.message)]


def test_names_that_match_nothing_are_told_once():
    said = "target_modules: no module of this model is called c_attn, self_attn.q_prj (did you mean self_attn.q_proj?)"
    assert told(["v_proj", "self_attn.q_prj", "c_attn"]) == [said]
    assert told(["v_proj"], exclude_modules=["layers.0.self_attn.v_proj"]) == []
    assert told(["v_proj", "down_proj"], exclude_modules=["down_proj"]) == []
    assert told("all-linear") == told(r".*v_proj") == []
    with pytest.raises(ValueError, match="not found in the base model"):
        told(["v_prj"])


def test_two_adapters_of_a_model_with_conv1d():
    model, ids = adapted(gpt2(), target_modules=["c_attn"]), tokens()
    model.add_adapter("other", config(tasks=3, r=2, target_modules=["c_attn", "c_fc"]))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, ids, adapter_names=torch.tensor([0, 1]))
    assert not torch.allclose(both, logits(gpt2(), ids), atol=1e-3)


def test_meta_device_base():
    with torch.device("meta"):
        base = llama()
    model = adapted(base)
    assert all(p.is_meta for n, p in model.named_parameters() if "base_layer" in n)


def test_rows_that_are_flattened_must_be_declared():
    """A layer that sees [batch * tokens, K]: nobody but the caller knows that tokens of a row follow each other."""
    model = _one(nn.Linear(8, 6))
    x = torch.randn(2, 5, 8)
    wanted = model(x, adapter_names=torch.tensor([0, 1])).view(10, 6)
    with alora_kernels.route([0, 1]), pytest.raises(ValueError, match=r"2 entries .* 10 rows.*route\(ids, repeats"):
        model(x.reshape(10, 8))
    with alora_kernels.route([0, 1], repeats=5):
        torch.testing.assert_close(model(x.reshape(10, 8)), wanted)
    with alora_kernels.route(torch.tensor([0, 1])[:, None].expand(2, 5)):
        torch.testing.assert_close(model(x.reshape(10, 8)), wanted)


def test_bert_all_linear_leaves_the_classifier():
    model = adapted(bert(), task_type="SEQ_CLS")
    assert not any(n.endswith("classifier") for n in model.targeted_module_names)


def _gradients_of(model: nn.Module, ids: Tensor, **call: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, **call).loss.backward()
    return {n: g for n, g in adapter_grads(model).items() if "asymlora" in n}


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
    before = _gradients_of(model, ids, **call)
    with torch.no_grad():
        model.eval()(input_ids=ids, **call)
    after = _gradients_of(model, ids, **call)
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

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.packed = self._parameters.pop("weight").detach().clone()

    @property
    def weight(self) -> Tensor:
        return self.packed.clone()


class Cached(nn.Linear):
    """Its weight can be set, and its forward goes on with another copy."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.packed = self.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed, self.bias)


class Plain(nn.Linear):
    """A subclass that computes as its parent."""


@pytest.mark.parametrize("kind", [MadeAnew, Cached, Doubled])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_would_be_lost_is_refused_by_name(kind: type[nn.Module], how: str) -> None:
    model, x = _one(kind(8, 6), first=nn.Linear(8, 8)), torch.randn(2, 8)
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
    model, x = _one(Plain(8, 6), first=nn.Linear(8, 8)), torch.randn(2, 8)
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
    plain = _one(nn.Linear(8, 6), first=nn.Linear(8, 8))
    layer = deepcopy(layers_of(plain)[1].base_layer)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclassed), requires_grad=False)
    model = _one(layer, first=nn.Linear(8, 8))
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
