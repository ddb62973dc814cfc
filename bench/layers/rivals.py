"""The alternatives, each as well as its idea allows: papers in plain torch, stock PEFT, kernels of other projects.

What a batch makes once for all layers (a sort, bounds of groups, metadata) is made outside of what is timed.
`formulas` has more.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import Layer, over
from .problem import Case, Problem

LORAFUSION_ADAPTERS, LORAFUSION_BLOCK = 4, 128


class _OneLora(torch.autograd.Function):
    """y = x w^T + s x a^T b^T, accumulated in place in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:  # type: ignore[override]
        rows = x.view(-1, x.shape[-1])
        h = rows @ a.t()
        y = rows @ w.t()
        y.addmm_(h, b.t(), alpha=s)
        ctx.save_for_backward(rows, w, a, b, h)
        ctx.scaling = s
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, w, a, b, h = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dh = (dy_rows @ b).mul_(ctx.scaling)
        db = (dy_rows.t() @ h).mul_(ctx.scaling)
        dx = dy_rows @ w
        dx.addmm_(dh, a)
        return dx.view(*dy.shape[:-1], w.shape[1]), None, dh.t() @ rows, db, None


def addmm(problem: Problem) -> Layer:
    """One LoRA with a hand-written backward: the fastest that plain torch calls give.

    No tensor of y's size besides y, no second one besides dx in the backward, and h is kept instead of computed again.
    Written from that idea, not from anybody's code.
    """
    w = problem.given.weight

    def forward(x: Tensor, a1: Tensor, b: Tensor) -> Tensor:
        return _OneLora.apply(x, w, a1.to(x.dtype), b.to(x.dtype), problem.scaling)  # type: ignore[no-any-return]

    return over(problem, "lora", forward)


def grouped_missing(case: Case) -> str | None:
    """`grouped_mm` on CUDA takes bf16 only, and float64 nowhere."""
    if case.device != "cpu" and case.dtype != torch.bfloat16:
        return "grouped_mm takes bf16 on CUDA devices"
    return None


def grouped(problem: Problem) -> Layer:
    """Multi-LoRA on `grouped_mm`, what a good engineer writes today without the shared B; sorted rows stay."""
    c = problem.case
    ids = problem.ids.repeat_interleave(c.m // c.batch)
    order = torch.argsort(ids, stable=True)
    ends = torch.bincount(ids, minlength=c.e).cumsum(0).to(torch.int32)
    is_sorted = bool((ids[1:] >= ids[:-1]).all())
    inverse = torch.argsort(order)
    w = problem.given.weight

    def forward(x: Tensor, a: Tensor, bs: Tensor) -> Tensor:
        rows = x.view(-1, c.k) if is_sorted else x.view(-1, c.k)[order]
        h = F.grouped_mm(rows, a.to(x.dtype).transpose(1, 2), offs=ends) * problem.scaling
        low = F.grouped_mm(h, bs.to(x.dtype).transpose(1, 2), offs=ends)
        return F.linear(x, w) + (low if is_sorted else low[inverse]).view(c.batch, -1, c.n)

    return over(problem, "multi", forward)


def hydra(problem: Problem) -> Layer:
    """HydraLoRA: one A, a router, and all B kept as one `[N, E*R]` matrix, the layout that suits the forward.

    The sum over experts is one product: the rows g_e h are laid side by side. A loop of E products of full width gives
    the same values and takes longer. Source: Tian et al. 2024, HydraLoRA, its formula.
    """
    x, a1, router = (problem.tensor(name) for name in ("x", "a1", "router"))
    bs = problem.tensor("bs")
    experts, out, rank = bs.shape
    wide_b = bs.detach().transpose(0, 1).reshape(out, experts * rank).clone().requires_grad_()

    def forward() -> Tensor:
        g = F.softmax(F.linear(x, router.to(x.dtype)), dim=-1)
        h = F.linear(x, a1.to(x.dtype)) * problem.scaling
        wide = (g.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)
        return F.linear(x, problem.given.weight) + F.linear(wide, wide_b.to(x.dtype))

    def rename(grads: Any) -> dict[str, Tensor]:
        dx, da1, drouter, dwide = grads
        return {"x": dx, "a1": da1, "router": drouter, "bs": dwide.unflatten(1, (experts, rank)).transpose(0, 1)}

    return Layer(forward, [x, a1, router, wide_b], rename)


# ---- stock PEFT: its own layer around an `nn.Linear`
#
# PEFT widens adapters over a 16-bit base to float32 by default and is then slower: here they keep the problem's dtype.
# Poly's router runs in eval mode, because in training it samples its weights, which no float64 truth can match.


class _Host(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        with torch.device("meta"):
            self.proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.proj.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


def _adapt(problem: Problem, config: Any, names: Sequence[str]) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that a bare module has no config
        model: Any = get_peft_model(
            _Host(problem.given.weight), config, adapter_name=names[0], autocast_adapter_dtype=False
        )
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.base_model.model.proj


def _lora_config(problem: Problem) -> Any:
    from peft import LoraConfig

    rank = problem.case.r
    return LoraConfig(r=rank, lora_alpha=rank * problem.scaling, target_modules=["proj"])  # type: ignore[arg-type]


def _own(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


def peft_lora(problem: Problem) -> Layer:
    layer = _adapt(problem, _lora_config(problem), ["one"])
    layer.lora_A["one"].weight, layer.lora_B["one"].weight = _own(problem.tensor("a1")), _own(problem.tensor("b"))
    x = problem.tensor("x")
    leaves = [x, layer.lora_A["one"].weight, layer.lora_B["one"].weight]
    return Layer(lambda: layer(x), leaves, lambda grads: dict(zip(("x", "a1", "b"), grads, strict=True)))


def peft_mixed_batch(problem: Problem) -> Layer:
    """One LoRA per task, chosen row by row with `adapter_names`; PEFT refuses that in training."""
    names = [str(task) for task in range(problem.case.e)]
    layer = _adapt(problem, _lora_config(problem), names)
    for task, name in enumerate(names):
        layer.lora_A[name].weight = _own(problem.tensor("a")[task])
        layer.lora_B[name].weight = _own(problem.tensor("bs")[task])
    layer.eval()
    x, chosen = problem.tensor("x"), [names[task] for task in problem.ids.tolist()]
    return Layer(lambda: layer(x, adapter_names=chosen), [], lambda grads: {})


def peft_poly(problem: Problem) -> Layer:
    from peft import PolyConfig

    c = problem.case
    config = PolyConfig(r=c.r, n_tasks=c.e, n_skills=c.e, n_splits=1, target_modules=["proj"])
    layer = _adapt(problem, config, ["one"])
    layer.poly_lora_A["one"] = _own(problem.tensor("a").mT.unsqueeze(0))
    layer.poly_lora_B["one"] = _own(problem.tensor("bs").mT.unsqueeze(0))
    layer.poly_router["one"].module_logits = _own(problem.tensor("logits"))
    layer.eval()
    x = problem.tensor("x")
    leaves = [x, layer.poly_lora_A["one"], layer.poly_lora_B["one"], layer.poly_router["one"].module_logits]
    for leaf in leaves:
        leaf.requires_grad_()

    def rename(grads: Sequence[Tensor]) -> dict[str, Tensor]:
        dx, da, dbs, dlogits = grads
        return {"x": dx, "a": da[0].mT, "bs": dbs[0].mT, "logits": dlogits}

    return Layer(lambda: layer(x, task_ids=problem.ids), leaves, rename)


# ---- kernels of other projects, where the user has them installed
#
# The calls follow the signatures in the projects' public repositories, which are internal to them and change: what no
# longer fits is reported as failed, what computes something else as wrong; neither is timed. Nothing of theirs is here.


def not_here(package: str) -> Callable[[Case], str | None]:
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
