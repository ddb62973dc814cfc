"""Bases that are not a plain nn.Linear: hooked, subclassed, Conv1D, quantised; and targets that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import alora_kernels
from alora_kernels import reference
from alora_kernels.tuner import set_task
from alora_kernels.tuner.base_layer import takes_fused_op

from ..support.tiny import Mlp, adapted, bert, config, gpt2, layers_of, llama, logits, tokens

NAMES = ["math", "code"]


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def _one(layer):
    return adapted(Holder(layer), task_type=None, target_modules=["layer"])


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


def _bnb():
    return pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_base(kind):
    bnb, plain = _bnb(), nn.Linear(64, 64)
    if kind == "4bit":
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")  # quantises
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
    bnb, plain = _bnb(), nn.Linear(64, 64)
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    model, grads = _one(layer.to("cpu")), []
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
