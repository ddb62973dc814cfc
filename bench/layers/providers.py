"""The registry: everything that is measured, by name, with the function it computes and where it can run.

A provider is fused, a competitor written in torch, or another package. It says for each routing which function of
`problem.FUNCTIONS` it computes; where it has none for a routing it takes no part in such a case.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import alora_kernels
from alora_kernels.baselines.layers import authors_loop
from alora_kernels.ops.dispatch import PLANS

from . import formulas, rivals
from .layer import Layer, Provider, over
from .problem import Case, Problem


def _frozen(problem: Problem) -> Layer:
    return over(problem, "frozen", lambda x: F.linear(x, problem.given.weight))


def _plain_gemm(problem: Problem) -> Layer:
    from alora_kernels.kernels import plain_gemm  # needs triton

    w = problem.given.weight
    return over(problem, "frozen", lambda x: plain_gemm(x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], -1))


def _plain_gemm_missing(case: Case) -> str | None:
    if case.device == "cpu" or find_spec("triton") is None:
        return "a Triton kernel, needs a CUDA device and triton"
    return None


def _alora(layer: Callable[..., Tensor], problem: Problem, **options: object) -> Layer:
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
    return _alora(torch.compile(formulas.hoisted, fullgraph=True, dynamic=False, mode=mode), problem)


def _no_compiler(case: Case) -> str | None:
    if case.device != "cpu":
        return None if find_spec("triton") else "torch.compile needs triton on CUDA devices"
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return None if found else "torch.compile needs a C++ compiler on CPUs"


def _no_cuda(case: Case) -> str | None:
    return "a plan of the Triton kernels, needs a CUDA device and triton" if case.device == "cpu" else None


_READS_IDS = "it reads ids on the host in every call, which a CUDA graph cannot hold"
_COPIES_ROWS = "it copies row numbers from the host in every call, which a CUDA graph cannot hold"
_ALORA, _MULTI = {"task": "task", "soft": "soft"}, {"task": "multi"}
_FROZEN, _LORA = {"task": "frozen", "soft": "frozen"}, {"task": "lora", "soft": "lora"}
_ALL = (
    Provider("frozen", _FROZEN, _frozen),
    Provider("plain Triton GEMM", _FROZEN, _plain_gemm, trains=False, missing=_plain_gemm_missing),
    Provider("fused", _ALORA, _fused),
    *(Provider(f"fused:{p}", _ALORA, partial(_fused, backend=f"triton:{p}"), missing=_no_cuda) for p in PLANS),
    Provider("hoisted", _ALORA, partial(_alora, formulas.hoisted)),
    Provider("hoisted compiled", _ALORA, _compiled, missing=_no_compiler),
    Provider("authors' loop", _ALORA, partial(_alora, authors_loop)),
    Provider("grouped by task", {"task": "task"}, partial(_alora, formulas.grouped_by_task), uncapturable=_READS_IDS),
    Provider("PEFT LoRA", _LORA, rivals.peft_lora),
    Provider("PEFT mixed batch", _MULTI, rivals.peft_mixed_batch, trains=False, uncapturable=_COPIES_ROWS),
    Provider("PEFT Poly", {"task": "poly"}, rivals.peft_poly, uncapturable=_READS_IDS),
    Provider("HydraLoRA", {"soft": "hydra"}, rivals.hydra),
    Provider("grouped_mm multi-LoRA", _MULTI, rivals.grouped, missing=rivals.grouped_missing),
    Provider("Unsloth-style addmm", _LORA, rivals.addmm),
    Provider("LoRAFusion", _MULTI, rivals.lorafusion, missing=rivals.not_here("lorafusion")),
    Provider("vLLM", _MULTI, rivals.vllm, trains=False, missing=rivals.not_here("vllm")),
    Provider("SGLang", _MULTI, rivals.sglang, trains=False, missing=rivals.not_here("sglang")),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _ALL}


def find(names: Iterable[str]) -> list[Provider]:
    """Providers by name, in the order of the registry; ValueError for a name that is not in it."""
    wanted = set(names)
    if unknown := wanted - PROVIDERS.keys():
        raise ValueError(
            f"unknown provider {', '.join(map(repr, sorted(unknown)))}: choose from {', '.join(PROVIDERS)}"
        )
    return [provider for name, provider in PROVIDERS.items() if name in wanted]
