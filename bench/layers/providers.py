"""The registry: everything that is measured, by name, with the function it computes and where it can run.

In:   a `Problem`.
Out:  a `Layer` of the provider, or the reason why there is none here.
Who:  the commands choose by name; `bench.layers.work` verifies and runs.

A provider is fused, a competitor written in torch, or another package. It says for each routing which function of
`bench.layers.functions` it computes; where it has none for a routing it takes no part in such a case.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import alora_kernels
from alora_kernels.baselines import formulas as torch_baselines
from alora_kernels.ops.dispatch import PLANS

from .baselines import addmm, foreign, grouped, hydra, peft_layers
from .layer import Layer, over
from .problem import Case, Problem


@dataclass(frozen=True)
class Provider:
    """One way to compute a layer.

    Attributes:
        name: in tables, targets and on the command line.
        computes: routing of the case -> function; a routing it does not have is left out.
        build: a layer on a problem.
        trains: False where it has no backward.
        missing: why it cannot run a case on this machine, or None.
        uncapturable: why it cannot be captured in a CUDA graph, or None.
    """

    name: str
    computes: Mapping[str, str]
    build: Callable[[Problem], Layer]
    trains: bool = True
    missing: Callable[[Case], str | None] = lambda case: None
    uncapturable: str | None = None


def _frozen(problem: Problem) -> Layer:
    return over(problem, "frozen", lambda x: F.linear(x, problem.given.weight))


def _plain_gemm(problem: Problem) -> Layer:
    from alora_kernels import kernels

    gemm = kernels.plain_gemm  # type: ignore[attr-defined]
    return over(
        problem, "frozen", lambda x: gemm(x.view(-1, x.shape[-1]), problem.given.weight).view(*x.shape[:-1], -1)
    )


def _plain_gemm_missing(case: Case) -> str | None:
    if case.device == "cpu" or find_spec("triton") is None:
        return "a Triton kernel, needs a CUDA device and triton"
    from alora_kernels import kernels

    return None if hasattr(kernels, "plain_gemm") else "alora_kernels.kernels has no plain_gemm"


def _alora(layer: Callable[..., Tensor], problem: Problem, **options: object) -> Layer:
    """A layer with the reference's arguments, for the routing of the case."""
    w, s = problem.given.weight, problem.scaling
    if problem.case.routing == "soft":
        return over(problem, "soft", lambda x, a, b, router: layer(x, w, a, b, router=router, scaling=s, **options))
    ids = options.pop("task_ids", problem.ids)
    return over(problem, "task", lambda x, a, b: layer(x, w, a, b, task_ids=ids, scaling=s, **options))


def _fused(problem: Problem, backend: str | None = None) -> Layer:
    # the ids as a `Routing`: sorted and checked once per batch, as every layer of a model gets them
    routed = {} if problem.case.routing == "soft" else {"task_ids": problem.routing}
    return _alora(alora_kernels.alora_linear, problem, backend=backend, **routed)


def _compiled(problem: Problem) -> Layer:
    torch.compiler.reset()  # dynamo falls back to eager after eight shapes of one function, silently
    mode = None if problem.case.device == "cpu" else "max-autotune-no-cudagraphs"
    return _alora(torch.compile(torch_baselines.hoisted, fullgraph=True, dynamic=False, mode=mode), problem)


def _no_compiler(case: Case) -> str | None:
    if case.device != "cpu":
        return None if find_spec("triton") else "torch.compile needs triton on CUDA devices"
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return None if found else "torch.compile needs a C++ compiler on CPUs"


def _no_cuda(case: Case) -> str | None:
    return "a plan of the Triton kernels, needs a CUDA device and triton" if case.device == "cpu" else None


def _no_peft(case: Case) -> str | None:
    return None if find_spec("peft") else "peft is not installed"


def _both(task: str, soft: str | None = None) -> dict[str, str]:
    """The functions for task routing and soft routing; one name stands for both."""
    return {"task": task, "soft": soft or task}


_READS_IDS = "it reads ids on the host in every call, which a CUDA graph cannot hold"
_ALL = (
    Provider("frozen", _both("frozen"), _frozen),
    Provider("plain Triton GEMM", _both("frozen"), _plain_gemm, trains=False, missing=_plain_gemm_missing),
    Provider("fused", _both("task", "soft"), _fused),
    *(
        Provider(
            f"fused:{plan}",
            _both("task", "soft"),
            functools.partial(_fused, backend=f"triton:{plan}"),
            missing=_no_cuda,
        )
        for plan in PLANS
    ),
    Provider("hoisted", _both("task", "soft"), functools.partial(_alora, torch_baselines.hoisted)),
    Provider("hoisted compiled", _both("task", "soft"), _compiled, missing=_no_compiler),
    Provider("authors' loop", _both("task", "soft"), functools.partial(_alora, torch_baselines.authors_loop)),
    Provider(
        "grouped by task",
        {"task": "task"},
        functools.partial(_alora, torch_baselines.grouped_by_task),
        uncapturable=_READS_IDS,
    ),
    Provider("PEFT LoRA", _both("lora"), peft_layers.lora, missing=_no_peft),
    Provider(
        "PEFT mixed batch",
        {"task": "multi"},
        peft_layers.mixed_batch,
        trains=False,
        missing=_no_peft,
        uncapturable="it copies row numbers from the host in every call, which a CUDA graph cannot hold",
    ),
    Provider("PEFT Poly", {"task": "poly"}, peft_layers.poly, missing=_no_peft, uncapturable=_READS_IDS),
    Provider("HydraLoRA", {"soft": "hydra"}, hydra.build),
    Provider("grouped_mm multi-LoRA", {"task": "multi"}, grouped.build, missing=grouped.missing),
    Provider("Unsloth-style addmm", _both("lora"), addmm.build),
    Provider("LoRAFusion", {"task": "multi"}, foreign.lorafusion, missing=foreign.lorafusion_missing),
    Provider("vLLM", {"task": "multi"}, foreign.vllm, trains=False, missing=foreign.vllm_missing),
    Provider("SGLang", {"task": "multi"}, foreign.sglang, trains=False, missing=foreign.sglang_missing),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _ALL}


def find(names: Iterable[str]) -> list[Provider]:
    """Providers by name, in the order of the registry.

    Raises:
        ValueError: a name that is not registered; the message lists those that are.
    """
    wanted = set(names)
    if unknown := wanted - PROVIDERS.keys():
        raise ValueError(
            f"unknown provider {', '.join(map(repr, sorted(unknown)))}: choose from {', '.join(PROVIDERS)}"
        )
    return [provider for name, provider in PROVIDERS.items() if name in wanted]
