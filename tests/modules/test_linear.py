"""`FusedALoRALinear` as a user meets it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import alora_kernels
from alora_kernels import FusedALoRALinear, reference
from tests.compare import assert_module_as_good


def trained(layer: FusedALoRALinear) -> FusedALoRALinear:
    """B is zero at the start; give it values, as training would."""
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def test_it_starts_as_its_base_and_shares_the_weight():
    linear = nn.Linear(8, 6)
    layer = FusedALoRALinear.from_linear(linear, 4, tasks=["math", "code"])
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x, torch.tensor([0, 1, -1])), F.linear(x, linear.weight, linear.bias))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_every_a_has_its_own_draw_and_torch_seed_decides():
    layers = []
    for _ in range(2):
        torch.manual_seed(4)
        layers.append(FusedALoRALinear(8, 6, 4, num_experts=3))
    assert torch.equal(layers[0].lora_A, layers[1].lora_A)
    a = layers[0].lora_A
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[1], a[2])
    assert float(a.detach().abs().max()) <= 8**-0.5  # kaiming uniform, a = sqrt 5: bound 1 / sqrt(K)


@pytest.mark.parametrize("kind", [{"tasks": ["a", "b", "c"]}, {"num_experts": 3}])
def test_forward_is_the_reference(kind):
    layer = trained(FusedALoRALinear(8, 6, 4, **kind, lora_alpha=4, use_rslora=True).double())
    x, ids = torch.randn(4, 3, 8).double(), torch.tensor([2, 0, -1, 1])
    routed = {"router": layer.router} if layer.router is not None else {"task_ids": ids}
    want = reference.alora_linear(x, layer.weight, layer.lora_A, layer.lora_B, bias=layer.bias, scaling=4 / 2, **routed)
    torch.testing.assert_close(layer(x) if layer.router is not None else layer(x, ids), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(device, dtype):
    layer = trained(FusedALoRALinear(32, 24, 8, tasks=["math", "code"])).to(device)
    x, ids = torch.randn(5, 7, 32, dtype=torch.float64, device=device), torch.tensor([0, 1, -1, 1, 0], device=device)

    def formula(module: FusedALoRALinear, x: torch.Tensor) -> torch.Tensor:
        a, b, s = module.lora_A, module.lora_B, module.scaling
        return reference.alora_linear(x, module.weight, a, b, bias=module.bias, scaling=s, task_ids=ids)

    with alora_kernels.route(ids):
        assert_module_as_good(layer, formula, x, dtype)


def test_ids_from_argument_context_and_names():
    layer = trained(FusedALoRALinear(8, 6, 4, tasks=["math", "code"]))
    x, ids = torch.randn(3, 8), torch.tensor([1, -1, 0])
    want = layer(x, ids)
    assert torch.equal(layer(x, ["code", "__base__", "math"]), want)
    with alora_kernels.route(ids):
        assert torch.equal(layer(x), want)
    with pytest.raises(ValueError, match="has the tasks math, code: pass task_ids to forward"):
        layer(x)
    with pytest.raises(ValueError, match="unknown task 'maths': valid tasks are math, code"):
        layer(x, ["maths", "code", "math"])
    only = trained(FusedALoRALinear(8, 6, 4, tasks=1))
    torch.testing.assert_close(only(x), only(x, torch.zeros(3, dtype=torch.long)))


def test_soft_routing_takes_no_ids():
    layer = FusedALoRALinear(8, 6, 4, num_experts=2)
    with pytest.raises(ValueError, match="learned router"):
        layer(torch.randn(3, 8), torch.tensor([0, 1, 0]))


def test_merge_and_unmerge():
    layer = trained(FusedALoRALinear(8, 6, 4, tasks=["math", "code"]))
    x, before = torch.randn(5, 8), layer.weight.clone()
    want = layer(x, torch.ones(5, dtype=torch.long))
    layer.merge("code")
    torch.testing.assert_close(layer(x), want)
    assert "merged_task='code'" in repr(layer)
    with pytest.raises(ValueError, match="merged already: call unmerge"):
        layer.merge("math")
    with pytest.raises(ValueError, match=r"merged into the weight: call unmerge\(\) before routing"):
        layer(x, torch.ones(5, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before saving"):
        layer.state_dict()
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before)
    with pytest.raises(ValueError, match="cannot merge"):
        FusedALoRALinear(8, 6, 4, num_experts=2).merge(0)


def test_state_dict_deepcopy_pickle_and_to():
    layer = trained(FusedALoRALinear(8, 6, 4, tasks=["math", "code"], lora_dropout=0.1)).eval()
    x, ids = torch.randn(4, 8), torch.tensor([0, 1, 1, -1])
    want = layer(x, ids)
    assert torch.equal(copy.deepcopy(layer)(x, ids), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, ids), want)
    other = FusedALoRALinear(8, 6, 4, tasks=["math", "code"]).eval()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x, ids), want)
    wide = copy.deepcopy(layer).to(torch.float64)
    torch.testing.assert_close(wide(x.double(), ids).float(), want)
    assert layer.to("meta").lora_A.is_meta


def test_a_plain_linear_state_dict_loads_into_it():
    linear = nn.Linear(8, 6)
    layer = FusedALoRALinear(8, 6, 4, tasks=2)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(missing) == {"lora_A", "lora_B"}
    assert not unexpected
    assert torch.equal(layer.weight, linear.weight)


def test_it_replaces_linears_in_a_model_nobody_prepared():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x):
            return self.body(x)

    net = Net()
    x, want = torch.randn(6, 8), None
    want = net(x)
    for i in (0, 2):
        net.body[i] = FusedALoRALinear.from_linear(net.body[i], 4, tasks=["a", "b"])
    with alora_kernels.route(torch.tensor([0, 0, 1, 1, -1, -1])):
        torch.testing.assert_close(net(x), want)
        net(x).sum().backward()
    assert net.body[0].lora_B.grad is not None
    assert net.body[0].weight.grad is None


def test_recomputation_keeps_the_routing_or_is_refused():
    layer = trained(FusedALoRALinear(8, 6, 4, tasks=["math", "code"]))
    x, ids = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 1, 1, -1])
    (want,) = torch.autograd.grad(layer(x, ids).square().sum(), x)
    with alora_kernels.route(ids):
        kept = checkpoint(alora_kernels.keep_routing(layer), x, use_reentrant=False)
        lost = checkpoint(layer, x, use_reentrant=False)
        given = checkpoint(layer, x, ids, use_reentrant=False)
    with alora_kernels.route(1 - ids.abs()):  # another batch came in between
        assert torch.equal(torch.autograd.grad(kept.square().sum(), x)[0], want)
        assert torch.equal(torch.autograd.grad(given.square().sum(), x)[0], want)
        with pytest.raises(RuntimeError, match=r"alora_kernels\.keep_routing\(block\)"):
            torch.autograd.grad(lost.square().sum(), x)


def test_device_dtype_no_bias_and_repr():
    layer = FusedALoRALinear(8, 6, 4, tasks=["a"], bias=False, dtype=torch.float64, use_rslora=True)
    assert layer.bias is None
    assert layer.lora_A.dtype == torch.float64
    assert layer.scaling == 8 / 2
    assert "in_features=8, out_features=6, r=4, tasks=['a'], lora_alpha=8, bias=False, use_rslora=True" in repr(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of tasks"),
        ({"tasks": 2, "num_experts": 2}, "exactly one of tasks"),
        ({"tasks": 2, "r": 0}, "at least 1"),
        ({"tasks": ["a", "a"]}, "unique"),
        ({"tasks": ["__base__"]}, "reserved"),
        ({"tasks": []}, "at least one task"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FusedALoRALinear(8, 6, **{"r": 4, **options})


def test_bad_types():
    with pytest.raises(TypeError, match=r"takes an nn.Linear, got Conv1d"):
        FusedALoRALinear.from_linear(nn.Conv1d(3, 3, 1), 4, tasks=2)
    with pytest.raises(TypeError, match=r"use \['math'\]"):
        FusedALoRALinear(8, 6, 4, tasks="math")
