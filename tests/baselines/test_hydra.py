"""`HydraLinear` against its formula written out in float64, and as a layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alora_kernels
from alora_kernels.baselines.layers import HydraLinear
from tests.modules.steps import assert_as_good


def layer(experts: int = 3, *, k: int = 10, n: int = 8, r: int = 4, bias: bool = True, **options: float) -> HydraLinear:
    """A layer whose B are not zero."""
    new = HydraLinear(nn.Linear(k, n, bias=bias), r, num_experts=experts, **options)
    with torch.no_grad():
        new.lora_B.normal_()
    return new


def written_out(layer: HydraLinear, x: Tensor) -> Tensor:
    """`y = x W0^T + bias + s sum_e g_e(x) B_e A x`, one output of full width per expert."""
    y = F.linear(x, layer.weight, layer.bias)
    gate = torch.softmax(x @ layer.router.t(), -1)
    for e in range(layer.num_experts):
        y = y + layer.scaling * gate[..., e, None] * (x @ layer.lora_A.t() @ layer.lora_B[e].t())
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("leading", "experts", "bias"), [((3, 6), 3, True), ((7,), 1, False), ((1, 1), 5, True)])
def test_values_and_gradients(leading, experts, bias, dtype):
    assert_as_good(layer(experts, bias=bias, lora_alpha=6.0), written_out, torch.randn(*leading, 10), dtype)


def test_gradcheck():
    one = layer(k=5, n=4, r=2).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = ("lora_A", "lora_B", "router")
    values = [getattr(one, name).detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(one, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_rows(leading):
    one = layer()
    y = one(torch.randn(*leading, 10))
    assert y.shape == (*leading, 8)
    y.sum().backward()
    assert all(not p.grad.any() for p in (one.lora_A, one.lora_B, one.router))


def test_one_expert_is_lora():
    one = layer(1)
    x = torch.randn(4, 10)
    want = F.linear(x, one.weight + one.scaling * one.lora_B[0] @ one.lora_A, one.bias)
    torch.testing.assert_close(one(x), want)


def test_it_starts_as_its_base_which_it_shares():
    linear = nn.Linear(10, 8)
    one = HydraLinear(linear, 4, num_experts=3)
    x = torch.randn(2, 5, 10)
    assert torch.equal(one(x), linear(x))
    assert one.weight is linear.weight and one.bias is linear.bias
    assert [n for n, p in one.named_parameters() if p.requires_grad] == ["lora_A", "lora_B", "router"]
    assert set(one.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "router"}
    assert float(one.lora_A.detach().abs().max()) <= 10**-0.5  # kaiming uniform, a = sqrt 5: bound 1 / sqrt(K)
    assert not torch.equal(one.router[0], one.router[1])


def test_the_b_part_at_the_first_step_because_their_gates_differ():
    one = HydraLinear(nn.Linear(10, 8), 4, num_experts=2)
    one(torch.randn(6, 10)).square().sum().backward()
    assert not torch.allclose(one.lora_B.grad[0], one.lora_B.grad[1])


def test_the_routing_context_is_harmless():
    one, x = layer(), torch.randn(3, 10)
    want = one(x)
    with alora_kernels.route(torch.tensor([5, -1, 0])):
        assert torch.equal(one(x), want)


def test_dropout_is_seeded_spares_the_router_and_stops_in_evaluation():
    one, x = layer(lora_dropout=0.5), torch.randn(50, 10)
    torch.manual_seed(3)
    first = one(x)
    torch.manual_seed(3)
    assert torch.equal(one(x), first)
    torch.manual_seed(3)
    h = F.dropout(x, 0.5) @ one.lora_A.t()
    gate = torch.softmax(x @ one.router.t(), -1)
    want = F.linear(x, one.weight, one.bias) + one.scaling * torch.einsum("me,mr,enr->mn", gate, h, one.lora_B)
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(one.eval()(x), written_out(one, x))


def test_autocast_and_wide_adapters_on_a_narrow_base():
    one, x = layer(), torch.randn(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = one(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), written_out(one, x), atol=0.1, rtol=0.05)
    narrow = HydraLinear(nn.Linear(10, 8).bfloat16(), 4, num_experts=2)
    for name in ("lora_A", "lora_B", "router"):
        getattr(narrow, name).data = getattr(narrow, name).data.float()
    narrow(x.bfloat16()).sum().backward()
    assert narrow.lora_B.grad.dtype == torch.float32


def test_bad_arguments_and_repr():
    linear = nn.Linear(10, 8)
    for options, message in [({"r": 0}, "r must be a whole number >= 1"), ({"num_experts": 0}, "num_experts must be"),
                             ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HydraLinear(linear, **{"r": 4, "num_experts": 2, **options})
    with pytest.raises(TypeError, match=r"HydraLinear replaces an nn.Linear, got Conv1d"):
        HydraLinear(nn.Conv1d(3, 3, 1), 4, num_experts=2)
    text = repr(HydraLinear(linear, 4, num_experts=2, use_rslora=True, lora_dropout=0.1))
    assert "r=4, lora_alpha=8, bias=True, lora_dropout=0.1, use_rslora=True, num_experts=2" in text
