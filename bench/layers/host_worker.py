"""Host time of one adapted layer of whatever `alora_kernels` an interpreter finds: `python -P host_worker.py JOB`.

`models.build.Worker` starts it, in this checkout or in a venv with another commit. The job is a file of torch's with
the kind of layer and sizes. It answers each line of its standard input, the name of a pass, with the CPU seconds of one
call and the launches it made, as JSON. The end of the input ends it.

No GPU is needed: tensors are on the CPU, the chip is the one that `recording` says, the backend is chosen as for a CUDA
device, the plan is two launches, and Triton's `run` does nothing. So a call is all that this package, torch's autograd
and its allocator do on the host. Not in it are what Triton and CUDA do to launch, the choice of the current device, and
the hand-over to autograd's thread of a device.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn

from alora_kernels import ALoRAConfig, FusedALoRALinear, kernels, route
from alora_kernels.kernels import tuned
from alora_kernels.ops import autograd, dispatch

CHIP, CALLS = "sm_90", 100
launches = 0


def count(*args: Any, **kwargs: Any) -> None:
    """What stands in the place of a launch."""
    global launches
    launches += 1


def pretend_cuda() -> None:
    """Decide from now on as for a CUDA device; a commit whose ops go through the dispatcher there does so here too."""
    explain, device = dispatch.explain, torch.device("cuda", 0)
    dispatch.explain = lambda _, backend=None: explain(device, backend)  # type: ignore[assignment]
    triton.JITFunction.run = count  # type: ignore[method-assign]
    if "cuda" not in getattr(autograd, "DIRECT", ()):
        autograd.traced = lambda x: True
    for rows, side in product(("decode", "short", "long"), ("wide", "tall", "square")):
        tuned.PLANS[CHIP, "task", 2, f"{rows} {side}"] = ("two_launch", "fused", False)


def layer_of(kind: str, sizes: Mapping[str, int]) -> nn.Module:
    """A module of this package, "fused", or an adapted layer of a PEFT model."""
    width, r, tasks = sizes["width"], sizes["r"], sizes["tasks"]
    if kind == "fused":
        return FusedALoRALinear(width, width, r, tasks=tasks, dtype=torch.float16)
    from peft import get_peft_model

    base: Any = nn.Sequential(OrderedDict(fc=nn.Linear(width, width))).half()
    config = ALoRAConfig(r=r, tasks=tasks, target_modules=["fc"])
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model.base_model.model.fc  # type: ignore[no-any-return]


def calls_of(layer: nn.Module, sizes: Mapping[str, int]) -> dict[str, Callable[[], Any]]:
    x = torch.randn(sizes["rows"], sizes["tokens"], sizes["width"], dtype=torch.float16, requires_grad=True)
    dy = torch.ones_like(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def infer() -> Any:
        with torch.no_grad():
            return layer(x)

    return {
        "forward": infer,
        "recorded forward": lambda: layer(x),
        "forward+backward": lambda: torch.autograd.grad(layer(x), leaves, dy),
    }


def main(file: Path) -> None:
    """Serve one job."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    job = torch.load(file)
    sizes = job["sizes"]
    torch.set_num_threads(1)
    layer = layer_of(job["layer"], sizes)
    pretend_cuda()
    calls = calls_of(layer, sizes)
    gc.disable()
    with route(torch.arange(sizes["rows"]) % sizes["tasks"]), kernels.recording(CHIP):
        for line in sys.stdin:
            call, before = calls[line.strip()], launches
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            seconds = time.thread_time() - start
            answer = {"seconds": seconds / CALLS, "launches": (launches - before) / CALLS}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
