"""Packed copies of frozen weights: as exact as torch, never of an older weight, and nobody else sees them."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from alora_kernels import FusedALoRALinear, accelerate, alora_linear, reference
from alora_kernels.ops import packed
from tests.compare import assert_within_twice, problem

K, N, R, E = 900, 130, 4, 3
pytestmark = pytest.mark.skipif(not packed.AVAILABLE, reason="this torch has no oneDNN")
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 products in oneDNN here"
    ),
)
MKL = hasattr(torch.ops.mkl, "_mkl_linear") and torch.backends.mkl.is_available()
LIBRARIES = ["oneDNN", pytest.param("MKL", marks=pytest.mark.skipif(not MKL, reason="this torch has no MKL"))]


@pytest.fixture(autouse=True, params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each library packs float32, whichever is this chip's own; nothing is packed yet."""
    monkeypatch.setattr(packed, "mkl_packs", lambda: request.param == "MKL")
    packed._forward.clear()
    packed._backward.clear()
    return str(request.param)


def frozen(dtype: torch.dtype = torch.float32, n: int = N, k: int = K) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, k).to(dtype) / k**0.5, requires_grad=False)


def layer(**options: object) -> FusedALoRALinear:
    made = FusedALoRALinear(K, N, R, tasks=["code", "math"], **options)
    nn.init.normal_(made.lora_B)
    return made.eval()


def plain(made: FusedALoRALinear, x: Tensor, task: int) -> Tensor:
    how = {"bias": made.bias, "scaling": made.scaling, "task_ids": torch.full((len(x),), task)}
    return reference.alora_linear(x, made.weight, made.lora_A, made.lora_B, **how)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_as_good_as_torchs(dtype, routing, bias):
    p = problem((24,), K, N, R, E, routing=routing, dtype=dtype, ids=torch.arange(24) % E, bias=bias)
    p.weight = nn.Parameter(p.weight, requires_grad=False)
    truth, own = p.to(torch.float64).step(reference.alora_linear), p.step(reference.alora_linear)
    assert_within_twice(p.step(alora_linear, backend="torch"), own, truth, tiny=1e-6)
    assert len(packed._forward) == len(packed._backward) == 1


@pytest.mark.parametrize(("text", "rows"), [("", 128), ("0", 0), ("40", 40)])
def test_rows_of_the_environment(text, rows):
    assert packed._rows_of(text) == rows


@pytest.mark.parametrize("text", ["banana", "-1", "1.5"])
def test_a_wrong_number_of_rows_is_refused_by_name(text):
    with pytest.raises(ValueError, match=f"ALORA_PACK_ROWS must be a number of rows, .* got '{text}'"):
        packed._rows_of(text)


@pytest.mark.parametrize("size", [1e-39, 1e-41])
def test_denormal_weights_are_no_zeros(size):
    x, w = torch.randn(16, K), frozen()
    w.mul_(size)
    truth = x.double() @ w.double().t()
    ours, torchs = ((found.double() - truth).abs().max() for found in (packed.linear(x, w), x @ w.t()))
    assert len(packed._forward) == 1
    assert ours <= 2 * torchs + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("k", [576, 1024, 1025, 2048, 4096])
def test_long_sums_are_cut(k, rows, library):
    """oneDNN adds up in one go, MKL in parts: uncut the error at 2048 is 3.2 times MKL's."""
    x, w = torch.randn(rows, k), frozen(n=512, k=k)
    truth = x.double() @ w.double().t()
    ours, torchs = (
        (found.double() - truth).abs().max() / truth.abs().max() for found in (packed.linear(x, w), x @ w.t())
    )
    assert ours <= 2 * torchs + 1e-6
    assert len(packed._forward[w].parts) == (1 if library == "MKL" else -(-k // 1024))


@pytest.mark.parametrize("bias", [True, False])
def test_a_copy_serves_any_number_of_rows(bias):
    """MKL lays weights out for a number of rows, which is asked about here by others."""
    w, b = frozen(n=576, k=1536), torch.randn(1152)[::2] if bias else None
    for rows in (100, 1, 2, 5, 16, 128):
        x = torch.randn(rows + 1, 1536 + 16)[1:, 16:]
        wide = None if b is None else b.double()
        truth = F.linear(x.double(), w.double(), wide)
        error, own = ((y.double() - truth).abs().max() for y in (packed.linear(x, w, b), F.linear(x, w, b)))
        assert error <= 2 * own + 1e-6 * truth.abs().max()
    assert len(packed._forward) == 1


def test_which_products_are_packed(monkeypatch):
    w = frozen()

    def taken(x: Tensor, weight: Tensor = w) -> bool:
        nonlocal w
        before = len(packed._forward)
        assert torch.allclose(packed.linear(x, weight), F.linear(x, weight), atol=1e-5)
        found = len(packed._forward) > before
        packed._forward.clear()
        return found

    x = torch.randn(129, K)
    assert [taken(x[:rows]) for rows in (0, 1, 128, 129)] == [False, True, True, False]
    assert not taken(x[:4], w.detach())  # who owns it is not known
    assert not taken(x[:4], nn.Parameter(w.detach()))  # it trains
    assert not taken(x[:4, :24], frozen(n=18, k=24))
    assert not taken(x[:4].double(), frozen(torch.float64))
    assert not taken(x[:4], nn.Parameter(w.detach().t().contiguous().t(), requires_grad=False))
    monkeypatch.setattr(packed, "FEW", 0)
    assert not taken(x[:4])
    monkeypatch.setattr(packed, "FEW", 1000)
    assert taken(x)


def test_equal_calls_give_equal_bits():
    made, x = layer(), torch.randn(8, K)
    first = made(x, [0] * 8)
    assert torch.equal(first, made(x, [0] * 8))


def test_base_only_rows_are_the_base_bit_for_bit():
    made, x = layer(), torch.randn(8, K)
    y = made(x, [-1] * 4 + [0] * 4)
    assert torch.equal(y[:4], F.linear(x, made.weight, made.bias)[:4])


CHANGES = {
    "in place": lambda m: m.weight.add_(1.0),
    "past the counter": lambda m: m.weight.data.mul_(2.0),
    "as PEFT merges": lambda m: setattr(m.weight, "data", m.weight.data.add_(1.0)),
    "another tensor": lambda m: setattr(m.weight, "data", torch.randn(N, K)),
    "loaded": lambda m: m.load_state_dict({"weight": torch.randn(N, K)}, strict=False),
    "merged and back": lambda m: (m.merge("code"), m(torch.randn(2, K)), m.unmerge()),
    "drawn anew": lambda m: m.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_anew(change):
    made, x = layer(), torch.randn(8, K)
    with torch.no_grad():
        made(x, [1] * 8)
        CHANGES[change](made)
        torch.testing.assert_close(made(x, [1] * 8), plain(made, x, 1), atol=1e-4, rtol=1e-4)
    assert len(packed._forward) == 1


def test_merged_weights_are_the_ones_used():
    made, x = layer(), torch.randn(8, K)
    with torch.no_grad():
        wanted = made(x, ["code"] * 8)
        made.merge("code")
        torch.testing.assert_close(made(x), wanted, atol=1e-4, rtol=1e-4)


def test_another_dtype():
    made, x = layer(), torch.randn(8, K)
    with torch.no_grad():
        made(x, [1] * 8)
        made.double()
        torch.testing.assert_close(made(x.double(), [1] * 8), plain(made, x.double(), 1))
        made.bfloat16()
        torch.testing.assert_close(made(x.bfloat16(), [1] * 8), plain(made, x.bfloat16(), 1), atol=0.1, rtol=0.1)


def test_copies_pickles_and_state_dicts_do_not_carry_it():
    made, x = layer(), torch.randn(8, K)
    with torch.no_grad():
        wanted = made(x, [1] * 8)
        bare = layer()
        assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in bare.state_dict().items()}
        assert abs(len(pickle.dumps(made)) - len(pickle.dumps(bare))) < 64
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert other.weight not in packed._forward
            assert torch.equal(other(x, [1] * 8), wanted)
            other.weight.zero_()
            assert torch.equal(made(x, [1] * 8), wanted)


def test_tied_weights_share_a_copy_which_goes_with_them():
    made = layer()
    tied = FusedALoRALinear.from_linear(nn.Linear(K, N), R, tasks=2)
    tied.weight = made.weight
    x = torch.randn(8, K)
    made(x, [1] * 8), tied(x, [1] * 8)
    assert len(packed._forward) == 1
    assert packed.nbytes() >= made.weight.nbytes
    del made, tied
    gc.collect()
    assert packed.nbytes() == 0


def test_under_inference_mode_and_for_inference_tensors():
    made, x = layer(), torch.randn(8, K)
    with torch.inference_mode():
        torch.testing.assert_close(made(x, [1] * 8), plain(made, x, 1))
        inside = layer()
        torch.testing.assert_close(inside(x, [1] * 8), plain(inside, x, 1))
    torch.testing.assert_close(made(x, [1] * 8), plain(made, x, 1))
    assert list(packed._forward) == [made.weight]  # an inference tensor counts no versions


def test_autocast_packs_nothing():
    made, x = layer(), torch.randn(8, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(x, [1] * 8)
    assert not packed._forward


def test_compiled_layers_use_it():
    made, x = layer(), torch.randn(8, K)
    with torch.no_grad():
        wanted = made(x, torch.ones(8, dtype=torch.long))
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, torch.ones(8, dtype=torch.long)), wanted)
        made.weight.add_(1.0)
        torch.testing.assert_close(
            compiled(x, torch.ones(8, dtype=torch.long)), plain(made, x, 1), atol=1e-4, rtol=1e-4
        )


def test_accelerated_lora_uses_it():
    model = get_peft_model(
        nn.Sequential(nn.Linear(K, N)), LoraConfig(r=R, target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(8, K)
    wanted = model(x)
    accelerate(model)
    torch.testing.assert_close(model(x), wanted)
    assert len(packed._forward) == 1
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip that multiplies float32 faster than bf16."""
    monkeypatch.setattr(packed, "widens", lambda: True)


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("bias", [True, False])
def test_widened_products_are_as_good_as_torchs(routing, bias, slow_bf16, monkeypatch):
    calls = []
    monkeypatch.setattr(packed, "_widened", lambda *args, kept=packed._widened: calls.append(args) or kept(*args))
    many = packed.BLOCK + 90
    ids = torch.arange(many) % E
    p = problem((many,), K, N, R, E, routing=routing, dtype=torch.bfloat16, ids=ids, bias=bias)
    p.weight = nn.Parameter(p.weight, requires_grad=False)
    truth, own = p.to(torch.float64).step(reference.alora_linear), p.step(reference.alora_linear)
    assert_within_twice(p.step(alora_linear, backend="torch"), own, truth, tiny=1e-6)
    assert len(calls) == 2  # forward and backward


def test_a_widened_product_is_rounded_once(slow_bf16):
    """What float32 holds of it, bias included, in the nearest bf16: but for sums in another order."""
    x, w, b = torch.randn(600, K).bfloat16(), frozen(torch.bfloat16), torch.randn(N).bfloat16()
    exact = F.linear(x.double(), w.double(), b.double())
    torch.testing.assert_close(packed.linear(x, w, b).double(), exact, rtol=2**-8 + 1e-5, atol=1e-5)
    dy = torch.randn(600, N).bfloat16()
    torch.testing.assert_close(packed.matmul(dy, w).double(), dy.double() @ w.double(), rtol=2**-8 + 1e-5, atol=1e-5)


def test_which_products_are_widened(slow_bf16, monkeypatch):
    w, x = frozen(torch.bfloat16), torch.randn(129, K).bfloat16()
    assert packed._widens(x, w) and packed._widens(x, w.detach())
    assert not packed._widens(x[:128], w)
    assert not packed._widens(x.float(), frozen()) and not packed._widens(x.double(), frozen(torch.float64))
    assert not packed._widens(x, w.to("meta"))

    class Quantised(nn.Parameter):
        pass

    assert not packed._widens(x, Quantised(w.detach(), requires_grad=False))
    monkeypatch.setattr(packed, "widens", lambda: False)
    assert not packed._widens(x, w)


def test_base_only_rows_of_a_widened_product_are_the_base_bit_for_bit(slow_bf16):
    made, x = layer().bfloat16(), torch.randn(200, K).bfloat16()
    y = made(x, [-1] * 100 + [0] * 100)
    assert torch.equal(y[:100], F.linear(x, made.weight, made.bias)[:100])


CHIPS = {
    "GenuineIntel flags: avx512f": (True, True),
    "GenuineIntel flags: avx512_bf16": (True, True),
    "GenuineIntel flags: avx512_bf16 amx_bf16": (True, False),
    "AuthenticAMD flags: avx512f": (False, False),
    "AuthenticAMD flags: avx512_bf16": (False, False),
    None: (False, False),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_the_chips_name_says_how_it_multiplies(chip, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if chip is not None:
        path.write_text(chip)
    monkeypatch.setattr(packed, "Path", lambda _: path)
    for kept in (packed._intel, packed.widens):
        kept.cache_clear()
    try:
        assert (bool(packed._intel()), packed.widens()) == CHIPS[chip]
    finally:
        monkeypatch.undo()
        for kept in (packed._intel, packed.widens):
            kept.cache_clear()
