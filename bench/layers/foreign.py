"""Multi-LoRA kernels of other projects, where the user has them installed: LoRAFusion, vLLM, SGLang.

The calls follow the signatures in the projects' public repositories, which are internal to them and change: what no
longer fits is reported as failed, what computes something else as wrong; neither is timed. Metadata is made once per
batch, as those projects do. Nothing of theirs is in this repository.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer
from .problem import Case, Problem

LORAFUSION_ADAPTERS, LORAFUSION_BLOCK = 4, 128


def missing(package: str) -> Callable[[Case], str | None]:
    """Why a package's kernels cannot run a case here."""

    def reason(case: Case) -> str | None:
        if package == "lorafusion" and (
            case.e > LORAFUSION_ADAPTERS or case.layout != "runs" or (case.m // case.e) % LORAFUSION_BLOCK
        ):
            rule = f"at most {LORAFUSION_ADAPTERS} adapters, in runs of whole {LORAFUSION_BLOCK}-row blocks"
            return f"LoRAFusion takes {rule}"
        if find_spec(package) is None:
            return f"{package} is not installed"
        if case.device == "cpu":
            return f"{package} needs a CUDA device"
        return None if case.dtype == torch.bfloat16 else f"{package} is run in bf16 only"

    return reason


def lorafusion(problem: Problem) -> Layer:
    """LoRAFusion's `fused_linear_multi_lora`, dropout 0."""
    from lorafusion.ops import multi_lora  # type: ignore[import-not-found]
    from lorafusion.ops.triton_ops import config  # type: ignore[import-not-found]

    c, w = problem.case, problem.given.weight
    if torch.cuda.get_device_capability()[0] == 9:  # it lists the H100 only; other Hopper chips get its tiles
        config.HARDWARE_CONFIGS.setdefault(config.get_device_short_name(), config.H100_CONFIG)
    batch: Any = multi_lora.prepare_multi_lora_batch_info(
        seq_len_list=[c.m // c.e] * c.e,
        lora_idx_list=list(range(c.e)),
        lora_rank_list=[c.r] * c.e,
        dropout_p_list=[0.0] * c.e,
        alpha_list=[problem.scaling] * c.e,
        block_size_m=config.get_lora_kernel_config("fused_multi_lora_block_size_m"),
        output_dtype=c.dtype,
    )
    names = ["padded_seq_len_list", "block_to_lookup_table", "block_to_dropout_p", "block_to_alpha"]
    names += ["enable_dropout", "same_dropout_p_value", "max_r", "seq_len_list"]
    options = {name: getattr(batch, name) for name in names}
    x = problem.tensor("x")
    every_a = [a.detach().clone().requires_grad_() for a in problem.tensor("a")]
    every_b = [b.detach().clone().requires_grad_() for b in problem.tensor("bs")]

    def forward() -> Tensor:
        y = multi_lora.fused_linear_multi_lora(
            padded_x=x.view(1, c.m, c.k),
            linear_w=w,
            lora_a_list=list(every_a),  # it pads the lists it is given
            lora_b_list=list(every_b),
            **options,
        )
        return y.view(c.batch, -1, c.n)  # type: ignore[no-any-return]

    def rename(grads: Any) -> dict[str, Tensor]:
        return {"x": grads[0], "a": torch.stack(grads[1 : 1 + c.e]), "bs": torch.stack(grads[1 + c.e :])}

    return Layer(forward, [x, *every_a, *every_b], rename)


def vllm(problem: Problem) -> Layer:
    """vLLM's `lora_shrink` and `lora_expand`, the second adding to the base output in place."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink  # type: ignore[import-not-found]

    c, w = problem.case, problem.given.weight
    meta = LoRAKernelMeta.make(c.e, c.m, device=c.device)
    meta.prepare_tensors(problem.ids.repeat_interleave(c.m // c.batch).to(torch.int32))
    newer = "specialize_active_lora" in inspect.signature(meta.meta_args).parameters
    mapping = meta.meta_args(c.m, False) if newer else meta.meta_args(c.m)
    stacked_a = [problem.tensor("a").detach().unsqueeze(1)]  # [E, 1, R, K]
    stacked_b = [problem.tensor("bs").detach().unsqueeze(1)]  # [E, 1, N, R]
    x = problem.tensor("x").detach().view(c.m, c.k)

    def forward() -> Tensor:
        y = F.linear(x, w)
        h = torch.empty(1, c.m, c.r, dtype=torch.float32, device=x.device)
        lora_shrink(x, stacked_a, h, *mapping, problem.scaling)
        lora_expand(h, stacked_b, y, *mapping, offset_start=0, add_inputs=True)
        return y.view(c.batch, -1, c.n)

    return Layer(forward, [], lambda grads: {})


def sglang(problem: Problem) -> Layer:
    """SGLang's `sgemm_lora_a_fwd` and `sgemm_lora_b_fwd`, the second adding to the base output in place."""
    from sglang.srt.lora.triton_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd  # type: ignore[import-not-found]
    from sglang.srt.lora.utils import LoRABatchInfo  # type: ignore[import-not-found]

    c, w, device = problem.case, problem.given.weight, problem.case.device
    tokens = c.m // c.batch
    known = {
        "use_cuda_graph": True,  # metadata lies still, and no shortcut for a single adapter
        "bs": c.batch,
        "num_segments": c.batch,
        "seg_indptr": torch.arange(0, c.m + 1, tokens, dtype=torch.int32, device=device),
        "seg_lens": torch.full((c.batch,), tokens, dtype=torch.int32, device=device),
        "max_len": tokens,
        "weight_indices": problem.ids.to(torch.int32),
        "lora_ranks": torch.full((c.e,), c.r, dtype=torch.int32, device=device),
        "scalings": torch.full((c.e,), problem.scaling, dtype=torch.float32, device=device),
        "permutation": None,
    }
    fields = {field.name for field in dataclasses.fields(LoRABatchInfo)}
    batch = LoRABatchInfo(**{name: value for name, value in known.items() if name in fields})
    every_a, every_b = problem.tensor("a").detach(), problem.tensor("bs").detach()
    x = problem.tensor("x").detach().view(c.m, c.k)

    def forward() -> Tensor:
        y = F.linear(x, w)
        sgemm_lora_b_fwd(sgemm_lora_a_fwd(x, every_a, batch), every_b, batch, base_output=y)
        return y.view(c.batch, -1, c.n)

    return Layer(forward, [], lambda grads: {})
