"""Which backend and plan are taken, and that every plan computes the same layer, values and gradients."""

from __future__ import annotations

import pytest
import torch

from alora_kernels import alora_linear
from alora_kernels import kernels as ak
from alora_kernels.kernels import tiles, tuned
from alora_kernels.modules import FusedALoRALinear
from alora_kernels.ops import dispatch, triton_backend
from alora_kernels.ops.dispatch import PLANS, BackendError, Plan, choose, explain, explain_plan, interpreting
from alora_kernels.ops.types import Adapter
from alora_kernels.routing import RowGroups
from tests.compare import assert_as_good_as_torch, problem, skip_unless_runnable
from tests.support.tiny import adapted

SHAPES = [(2, 35, 32, 48, 4, 3), (3, 7, 32, 64, 4, 2)]  # 70 rows and 21: the one-pass kernels and the decode kernel


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_forced_plan(plan: str, routing: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    skip_unless_runnable("triton", device, dtype)
    if plan.endswith("+overlap") and device == "cpu" and (dtype, shape) != (torch.float32, SHAPES[1]):
        pytest.skip("without streams a plan with overlap is the plan without")
    *leading, k, n, r, e = shape
    p = problem(leading, k, n, r, e, routing=routing, dtype=dtype, device=device)
    try:
        assert_as_good_as_torch(p, alora_linear, dtype, backend=f"triton:{plan}")
    except BackendError as error:
        if device == "cpu":  # the interpreter takes all of them
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("plan", PLANS)
def test_a_forced_plan_with_dropout_repeats_its_mask(plan: str) -> None:
    """With B = 0 the layer is its base; its gradient for B is linear in the dropped x, so both passes must agree."""
    skip_unless_runnable("triton", "cpu", torch.float32)
    p = problem((4, 20), 32, 32, 4, 2, routing="task", dtype=torch.float32)
    x, a, b = (p.leaves[name] for name in ("x", "a", "b"))
    options = {"task_ids": p.given["task_ids"], "dropout_p": 0.5, "training": True}

    def run(backend: str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        y = alora_linear(x, p.weight, a, b, backend=backend, **options)  # type: ignore[arg-type]
        return [y, *torch.autograd.grad(y.square().sum(), [x, a, b])]

    for got, expected in zip(run(f"triton:{plan}"), run("triton:two_launch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_backend_choice(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("ALORA_BACKEND", raising=False)
    assert explain(cpu).name == "torch"
    assert explain(cpu, "torch").reason == "asked for by the caller"
    monkeypatch.setenv("ALORA_BACKEND", "torch")
    assert "ALORA_BACKEND is set" in explain(torch.device("cuda")).reason
    monkeypatch.setenv("ALORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="unknown backend 'cuda'.*triton, torch"):
        explain(cpu)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        explain(cpu, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match="does not model bfloat16"):
        choose(torch.zeros(1, dtype=torch.bfloat16), "triton")


UNSERVED = {"sm_75": "older than sm_80", "sm_70": "older than sm_80", "gfx1030": "no products for gfx1030"}


@pytest.mark.parametrize("chip", [*UNSERVED, "sm_80", "sm_120", "gfx90a", "gfx1100"])
def test_torch_serves_chips_on_which_triton_is_no_use(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALORA_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_refusals", {})
    monkeypatch.setattr(ak, "chip_of", lambda device: chip)
    gpu = torch.device("cuda", 0)
    assert explain(gpu).name == ("torch" if chip in UNSERVED else "triton")
    assert UNSERVED.get(chip, "ROCm device") in explain(gpu).reason
    if chip in UNSERVED:
        with pytest.raises(BackendError, match=f"cannot serve this GPU: .*{UNSERVED[chip]}"):
            explain(gpu, "triton:base_first")
    else:
        assert explain(gpu, "triton:base_first").name == "triton:base_first"


def test_adapting_a_model_prepares_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launches share is allocated then, for the first call may be inside a graph's private memory."""
    seen: list[torch.device] = []
    monkeypatch.setattr("alora_kernels.modules.linear.prepare", seen.append)
    monkeypatch.setattr("alora_kernels.tuner.layer.prepare", seen.append)
    FusedALoRALinear.from_linear(torch.nn.Linear(8, 8), 2, tasks=2)
    before = len(seen)
    adapted()
    assert 0 < before < len(seen) and set(seen) >= {torch.device("cpu")}


def test_without_triton_the_torch_backend_serves(monkeypatch):
    monkeypatch.delenv("ALORA_BACKEND", raising=False)
    monkeypatch.setattr("alora_kernels.ops.dispatch.TRITON_INSTALLED", False)
    assert explain(torch.device("cuda")) == ("torch", "triton is not installed: pip install triton (Linux)")
    with pytest.raises(RuntimeError, match="pip install triton"):
        explain(torch.device("cuda"), "triton")


def launches(
    plan: str | None, routing: str = "task", m: int = 8192, chip: str = "sm_90", x_dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Kernels of one forward on a chip under a plan; a + after those that overlap the one before."""

    def meta(*shape: int, dtype: torch.dtype = x_dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    ids = meta(m, dtype=torch.int32)
    soft = routing == "soft"
    adapter = Adapter(
        meta(8, 16, 4096), meta(8, 4096) if soft else None, None if soft else RowGroups(ids, ids, ids), 2.0, None
    )
    with ak.recording(chip) as seen:
        triton_backend.linear(meta(m, 4096), meta(4096, 4096), None, adapter, meta(4096, 16), plan and PLANS[plan])
    return [launch.kernel.__name__ + "+" * launch.meta.get("launch_pdl", False) for launch in seen]


def test_plans_launch_what_they_say() -> None:
    assert launches("one_pass") == ["_one_pass_task_kernel"]
    assert launches("one_pass", "soft") == ["_one_pass_soft_kernel"]
    assert launches("one_pass", m=64) == ["_decode_kernel"]
    assert launches("two_launch") == ["_shrink_task_kernel", "_expand_kernel"]
    assert launches("two_launch+pdl") == ["_shrink_task_kernel", "_expand_kernel+"]
    assert launches("two_launch+pdl", "soft", m=16) == ["shrink_soft_kernel", "_expand_kernel+"]
    assert launches("base_first") == launches("low_rank_first") == ["_shrink_task_kernel"]


@pytest.mark.parametrize(("chip", "dtype"), [("sm_80", "bfloat16"), ("gfx942", "bfloat16"), ("sm_90", "float64")])
def test_launches_overlap_where_that_can_be(chip: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by name where it was asked for; a table's plan is two launches there."""
    layer = {"chip": chip, "x_dtype": getattr(torch, dtype)}
    with pytest.raises(BackendError, match=rf"two_launch\+pdl needs .* \(this is {chip}, x is torch.{dtype}\)"):
        launches("two_launch+pdl", **layer)
    size = layer["x_dtype"].itemsize
    monkeypatch.setattr(tuned, "PLANS", {(chip, "task", size, "long square"): ("two_launch+pdl", "fused", False)})
    assert launches(None, **layer) == launches("two_launch", **layer)
    assert launches(None) == launches("two_launch+pdl" if chip == "sm_90" and size == 2 else "base_first")


def test_without_a_measurement_the_vendors_gemm_computes_the_base() -> None:
    layers = [("sm_90", "task", 8192, 4096), ("sm_90", "soft", 64, 1001), ("gfx942", "soft", 8192, 64)]
    for chip, routing, m, n in layers:
        assert explain_plan(chip, routing, 2, m, 4096, n)[0] == PLANS["base_first"]
    plan, reason = explain_plan("sm_999", "task", 2, 8, 64, 64)
    assert plan == PLANS["base_first"] and "sm_999" in reason
    assert explain_plan("interpreter", "task", 4, 8, 64, 64)[0] == PLANS["two_launch"]  # our kernels are what it tests
    assert launches(None) == launches("base_first")


def test_a_measurement_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "PLANS", {("sm_90", "task", 2, "long square"): ("one_pass", "fused", True)})
    monkeypatch.setattr(tuned, "MEASURED", "somewhere")
    plan, reason = explain_plan("sm_90", "task", 2, 8192, 4096, 4096)
    assert plan == Plan("one_pass", "fused", True) and "somewhere" in reason
    assert explain_plan("sm_90", "soft", 2, 8192, 4096, 4096)[0] == PLANS["base_first"]
    assert launches(None) == ["_one_pass_task_kernel"]


def test_tables_name_real_plans_and_tiles() -> None:
    for forward, dx, overlap in tuned.PLANS.values():
        assert forward in {p.forward for p in PLANS.values()} and dx in ("fused", "low_rank_first")
        assert isinstance(overlap, bool)
    for fields in tuned.TILES.values():
        tiles.Tile(*fields)


@pytest.mark.parametrize(
    ("rows", "depth", "cols", "name"),
    [
        (1, 64, 64, "decode square"),
        (64, 64, 128, "decode wide"),
        (65, 64, 64, "short square"),
        (2048, 9, 4, "long tall"),
    ],
)
def test_classes_of_shapes(rows: int, depth: int, cols: int, name: str) -> None:
    assert tiles.shape_class(rows, depth, cols) == name


def test_unknown_plans_list_the_known_ones() -> None:
    device = torch.device("cpu")
    for wish in ("triton:fast", "torch:one_pass", "triton:"):
        with pytest.raises(ValueError, match="triton:one_pass, triton:two_launch"):
            explain(device, wish)
    assert explain(device, "triton:base_first").name == "triton:base_first" or not interpreting()


def test_one_pass_says_what_it_needs() -> None:
    skip_unless_runnable("triton", "cpu", torch.float32)
    p = problem((4, 20), 33, 31, 4, 2, routing="task", dtype=torch.float32)
    with pytest.raises(BackendError, match="16-byte aligned"):
        p.step(alora_linear, backend="triton:one_pass")
    wide = problem((4, 20), 32, 32, 16, 16, routing="soft", dtype=torch.float32)
    with pytest.raises(BackendError, match="E \\* R <= 128"):
        wide.step(alora_linear, backend="triton:one_pass")


def test_the_side_stream_is_nothing_without_cuda() -> None:
    x = torch.ones(3)
    with triton_backend.side_stream(x, wanted=True) as join:
        y = x + 1
    join(y, None)
    assert torch.equal(y, torch.full((3,), 2.0))


@pytest.mark.gpu
def test_the_side_stream_is_joined() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        with triton_backend.side_stream(x, wanted=True) as join:
            small = (x[:64] * 2).sum(1)
        large = x @ x
        join(small)
        torch.testing.assert_close(small, (x[:64] * 2).sum(1))
        x = x + large * 0


def test_a_plan_is_asked_for_once_while_the_tables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plan_on = triton_backend.plan_on
    monkeypatch.setattr(triton_backend, "plan_on", lambda *layer: asked.append(layer[3]) or plan_on(*layer))
    monkeypatch.setattr(tuned, "PLANS", {})
    for m in (4096, 8192, 4096, 64, 64):
        launches(None, m=m)
    assert asked == [4096, 64]
    tuned.PLANS["sm_90", "task", 2, "long square"] = ("two_launch", "fused", False)
    assert launches(None) == launches("two_launch")
    monkeypatch.setattr(tuned, "PLANS", {("sm_90", "task", 2, "long square"): ("base_first", "fused", False)})
    assert launches(None) == launches("base_first") and asked[2:] == [8192, 8192]
