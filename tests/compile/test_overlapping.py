"""The shrink and the GEMM that begins beside it, as Triton would launch and has compiled them."""

from __future__ import annotations

import json
import re

import pytest

from bench.static.ptx import hazards, parse

from .process import compiling
from .test_ptx import OLD, changed

SAMPLES = """
import json
from bench.static.aot import awaited, build, jobs

found = {}
for job in jobs(["sm_90"], ("shrink_task", "shrink_soft", "expand")):
    if dict(job.constexprs)["PDL"] and job.kernel not in found:
        found[job.kernel] = awaited(job), build(job).asm["ptx"]
print(json.dumps(found))
"""
# A driver that launches nothing: what reaches it from `kernel[grid]` and from `overlapping`, in order.
LAUNCHES = """
import json
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from alora_kernels import kernels as ak
from alora_kernels.kernels import launch, tiles
from alora_kernels.routing import group_rows

seen = []

class Launcher:
    def __init__(self, src, metadata):
        self.name, self.pdl = src.fn.__name__, metadata.launch_pdl

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        def plain(arg):
            base = getattr(arg, "base", arg)
            return list(base.shape) if isinstance(base, torch.Tensor) else str(arg)

        seen.append([self.name, self.pdl, [x, y, z], [plain(arg) for arg in args]])

utils = SimpleNamespace(
    get_device_properties=lambda device: {"max_shared_mem": 232448},
    load_binary=lambda *args: seen.append(["load", args[0]]) or (1, 2, 0, 0, 1024),
    unload_module=lambda module: None,
)
target = GPUTarget("cuda", 90, 32)
driver.set_active(SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    launcher_cls=Launcher, utils=utils, get_device_interface=lambda: torch.cuda,
))
tiles._device_chip = lambda device: "sm_90"
x, w, a, b = (torch.zeros(*s, dtype=torch.bfloat16) for s in ((128, 64), (256, 64), (2, 16, 64), (256, 16)))
groups = group_rows(torch.zeros(128, dtype=torch.int64), 2)

class Gpu(torch.Tensor):
    is_cuda = True

def pair(x):
    seen.clear()
    with ak.overlapping():
        ak.expand(x, w, None, ak.shrink_task(x, a, groups, scaling=1.0), b)
    return list(seen)

launch.torch = SimpleNamespace(cuda=SimpleNamespace(device=lambda place: nullcontext()))
together = pair(x.as_subclass(Gpu))  # nothing is compiled yet
print(json.dumps([together, pair(x)]))
"""


@pytest.fixture(scope="module", params=["this Triton", "Triton 3.6"])
def python(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "this Triton":
        return {}
    if not OLD.exists():
        pytest.skip(f"no {OLD}: `make static` makes it, ALORA_OLD_TRITON names another")
    return {"python": str(OLD)}


@pytest.mark.slow
def test_compiled_before_the_first_is_launched(python: dict[str, str]) -> None:
    together, one_by_one = json.loads(compiling("-c", LAUNCHES, **python))
    assert together == [["load", "_shrink_task_kernel"], ["load", "_expand_kernel"], *one_by_one]
    assert [entry[:2] for entry in one_by_one] == [["_shrink_task_kernel", False], ["_expand_kernel", True]]


@pytest.fixture(scope="module")
def samples(python: dict[str, str]) -> dict[str, tuple[int | None, str]]:
    return {name: (of, ptx) for name, (of, ptx) in json.loads(compiling("-c", SAMPLES, **python)).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["_shrink_task_kernel", "shrink_soft_kernel"])
def test_the_shrink_lets_the_gemm_start_at_once(samples: dict[str, tuple[int | None, str]], kernel: str) -> None:
    of, ptx = samples[kernel]
    ops = [line.op for line in parse(ptx)]
    assert of is None and "griddepcontrol.wait" not in ops
    work = [place for place, op in enumerate(ops) if re.match(r"ld\.global|cp\.async|wgmma|st\.", op)]
    assert ops.index("griddepcontrol.launch_dependents") < min(work)


@pytest.fixture
def gemm(samples: dict[str, tuple[int | None, str]]) -> tuple[int, str]:
    of, ptx = samples["_expand_kernel"]
    assert of is not None
    return of, ptx


@pytest.mark.slow
def test_the_gemm_waits_between_its_products(gemm: tuple[int, str]) -> None:
    of, ptx = gemm
    assert hazards(ptx, of) == []
    ops = [line.op for line in parse(ptx)]
    wait = ops.index("griddepcontrol.wait")
    assert ops.count("griddepcontrol.wait") == 1 and "griddepcontrol.launch_dependents" not in ops
    products = [place for place, op in enumerate(ops) if op.startswith(("wgmma.mma_async", "mma.sync"))]
    assert min(products) < wait < max(products)


WAIT = r"griddepcontrol\.wait\s*;"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "new", "words"),
    [
        (WAIT, "", "not every thread waits"),
        (WAIT, "@%p1 griddepcontrol.wait;", "not every thread waits"),
        (rf"(?s)({WAIT})(.*?)(ld\.global[^;]*;)", r"\2\3\n\1", "read before the wait"),
        (rf"(?s)({WAIT})(.*)(cp\.async\.bulk\.tensor\S*global\.shared[^;]*;)", r"\2\3\n\1", "a store before the wait"),
        (rf"(?s)(\$L__BB0_\d+:)(.*)({WAIT})", r"\1\n@%p1 bra $L__late;\2\3\n$L__late:", "a way round the wait"),
        (rf"({WAIT})", r"@%p1 ret;\n\1", "a way round the wait"),
        (r"ld\.global(?=\.)", "ld.global.nc", "that may be stale"),
    ],
)
def test_a_gemm_that_is_too_early_is_found(gemm: tuple[int, str], pattern: str, new: str, words: str) -> None:
    of, ptx = gemm
    assert any(words in hazard for hazard in hazards(changed(ptx, pattern, new), of))
