"""Float32 adapters over a 16-bit base on the torch backend: as good as stock PEFT, which widens x, in every layout."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from alora_kernels import alora_linear, reference
from alora_kernels.ops import packed, products
from tests.compare import Problem, assert_within_twice, over_a_base, problem
from tests.ops.test_torch_rows import BATCHES

LOWS = [torch.bfloat16, torch.float16]
S, K, N, R, E = 0.75, 24, 18, 4, 5


def mixed_problem(leading: tuple[int, ...], low: torch.dtype, routing: str, ids: Tensor | None = None) -> Problem:
    """A 16-bit layer with adapters in float32, so fine that 16 bits cannot hold them."""
    p = problem(leading, K, N, R, E, routing=routing, dtype=torch.float32, ids=ids, scaling=S)
    for name in ("x", "bias"):
        p.leaves[name] = p.leaves[name].detach().to(low).requires_grad_()
    return Problem(p.leaves, p.weight.to(low), p.given)


def assert_finer_than(low: torch.dtype, grads: dict[str, Tensor]) -> None:
    """Float32 gradients are more than 16-bit numbers."""
    for name, g in grads.items():
        if g.dtype == torch.float32 and g.any():
            found = g[g != 0]
            assert (found != found.to(low).float()).float().mean() > 0.5, name


def stock_step(p: Problem, low: torch.dtype) -> dict[str, Tensor]:
    """The same numbers from stock PEFT, one task for all rows."""
    base = nn.Sequential(nn.Linear(K, N)).to(low)
    base[0].weight.data.copy_(p.weight)
    base[0].bias.data.copy_(p.leaves["bias"])
    model = get_peft_model(base, LoraConfig(r=R, lora_alpha=S * R, target_modules=["0"], bias="all"))
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    a.data.copy_(p.leaves["a"][0])
    b.data.copy_(p.leaves["b"])
    bias = layer.base_layer.bias

    def forward(x, weight, a_, b_, *, bias, **_):
        return model(x)

    stock = Problem({"x": p.leaves["x"], "a": a, "b": b, "bias": bias}, p.weight)
    step = stock.step(forward)
    return {**step, "da": torch.cat([step["da"][None], torch.zeros(E - 1, R, K)])}


OPS = {"linear": alora_linear, "delta": over_a_base}


@pytest.mark.parametrize("low", LOWS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_one_task_is_as_exact_as_stock_peft(op: str, low: torch.dtype) -> None:
    p = mixed_problem((3, 70), low, "task", torch.zeros(3, 70, dtype=torch.long))
    truth, stock = p.to(torch.float64).step(reference.alora_linear), stock_step(p, low)
    ours = p.step(OPS[op], backend="torch")
    assert_within_twice(ours, stock, truth, tiny=1e-7)
    assert_finer_than(low, ours)


@pytest.mark.parametrize("low", LOWS, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", [*BATCHES, "soft"])
def test_every_layout(name: str, op: str, low: torch.dtype) -> None:
    ids = BATCHES[name][0] if name != "soft" else None
    leading = (40,) if ids is None else (len(ids),)
    p = mixed_problem(leading, low, "soft" if ids is None else "task", ids)
    truth, own = p.to(torch.float64).step(reference.alora_linear), p.step(reference.alora_linear)
    ours = p.step(OPS[op], backend="torch")
    assert_within_twice(ours, own, truth, tiny=1e-6)
    assert_finer_than(low, ours)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", [*BATCHES, "soft"])
def test_dropout_in_every_layout(name: str, op: str) -> None:
    """The mask is the seed's, whatever the dtype, so float64 gives the right values."""
    ids = BATCHES[name][0] if name != "soft" else None
    leading = (40,) if ids is None else (len(ids),)
    p = mixed_problem(leading, torch.bfloat16, "soft" if ids is None else "task", ids)
    options = {"dropout_p": 0.4, "training": True, "backend": "torch"}
    torch.manual_seed(3)
    truth = p.to(torch.float64).step(OPS[op], **options)
    torch.manual_seed(3)
    ours = p.step(OPS[op], **options)
    for key, t in truth.items():
        if t.numel():  # y, dx and dbias end in bfloat16: one or two roundings of it
            eps = 2**-8 if ours[key].dtype == torch.bfloat16 else 2**-20
            assert (ours[key].double() - t).abs().max() <= 2 * eps * max(1.0, t.abs().max()), key
    assert_finer_than(torch.bfloat16, ours)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["whole", "runs", "ragged slots", "gathered", "soft"])
def test_autocast_leaves_the_low_rank_part_alone(name: str, op: str) -> None:
    """x and the base are cast to 16 bits: the same numbers as over a 16-bit base, also where backward is under it."""
    ids = BATCHES[name][0] if name != "soft" else None
    p = mixed_problem((40,) if ids is None else (len(ids),), torch.bfloat16, "soft" if ids is None else "task", ids)
    plain = p.step(OPS[op], backend="torch")
    wide = Problem({key: t.detach().float().requires_grad_() for key, t in p.leaves.items()}, p.weight.float(), p.given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = wide.step(OPS[op], backend="torch")
    for key in ("y", "da", "db", *(["dx"] if op != "delta" else [])):  # autograd itself adds the two dx of a delta
        assert torch.equal(cast[key].float(), plain[key].float()), key


def test_only_one_of_a_and_b_is_float32() -> None:
    for kept in ("a", "b"):
        p = mixed_problem((40,), torch.bfloat16, "task", torch.arange(40) % E)
        p.leaves[kept] = p.leaves[kept].detach().bfloat16().requires_grad_()
        truth = p.to(torch.float64).step(reference.alora_linear)
        ours = p.step(alora_linear, backend="torch")
        for key, t in truth.items():
            assert ours[key].dtype == (p.leaves[key[1:]].dtype if key != "y" else torch.bfloat16)
            assert (ours[key].double() - t).abs().max() <= 2**-6 * max(1.0, t.abs().max()), key


@pytest.mark.parametrize("low", LOWS, ids=str)
def test_blocks_of_rows_are_put_together(monkeypatch: pytest.MonkeyPatch, low: torch.dtype) -> None:
    monkeypatch.setattr(products, "BLOCK", 50)  # rows of 18 and 24 entries: two at a time
    p = mixed_problem((41,), low, "task", torch.arange(41) % E)
    truth, own = p.to(torch.float64).step(reference.alora_linear), p.step(reference.alora_linear)
    for op in OPS.values():
        assert_within_twice(p.step(op, backend="torch"), own, truth, tiny=1e-6)


def test_the_compiled_op_knows_its_dtypes() -> None:
    for routing in ("task", "soft"):
        p = mixed_problem((6,), torch.bfloat16, routing)
        compiled = torch.compile(alora_linear, fullgraph=True, backend="aot_eager")
        eager, ours = p.step(alora_linear, backend="torch"), p.step(compiled, backend="torch")
        for key, t in eager.items():
            torch.testing.assert_close(ours[key], t)


@pytest.mark.parametrize("slow", [False, True])
def test_a_large_sum_in_bf16_is_rounded_once(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of halves, or of blocks in float32 where bf16 is slow: the error is the last rounding's, also where
    addends cancel.
    """
    halves: list[Tensor] = []
    split = products._add_split_
    monkeypatch.setattr(products, "_add_split_", lambda out, *args: halves.append(out) or split(out, *args))
    monkeypatch.setattr(packed, "widens", lambda: slow)
    rows, width = 300, products.BLOCK // 256
    left, right = torch.randn(rows, R), torch.randn(R, width)
    out = (left @ right).neg().to(torch.bfloat16) + torch.randn(rows, width).to(torch.bfloat16) / 64
    truth = out.double() + 0.75 * left.double() @ right.double()
    wide = out.float().addmm(left, right, alpha=0.75).to(torch.bfloat16)
    found = products.add_product_(out.clone(), left, right, 0.75)
    assert out.numel() > products.BLOCK
    assert bool(halves) is not slow
    assert (found.double() - truth).abs().max() <= 1.01 * (wide.double() - truth).abs().max() + 2**-15
