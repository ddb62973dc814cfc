"""The specification: ALoRA's linear layer in plain torch, any float dtype.

Tests judge every fast path against it in float64, autograd derives every gradient from this very text, and a reader
learns the layer from it. It is written for the eye, not for speed: it materialises A_{t(m)} x_m for every expert.
Arguments are taken as they come; the public ops (`alora_kernels.ops`) are the edge that checks them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gate(x: Tensor, num_experts: int, router: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
    """How much each expert counts for each row: `[..., E]` in x's dtype.

    Formula: `softmax(x router^T)` (soft routing) or the one-hot of the task id (task routing).

    x is `[..., K]`, router `[E, K]`; there is an id per row of the batch or per token, and -1 gives a row of zeros.
    """
    if router is not None:
        return F.softmax(F.linear(x, router.to(x.dtype)), dim=-1)
    assert task_ids is not None
    if task_ids.shape != x.shape[:-1]:  # one id per batch row: every token of the row has it
        task_ids = task_ids.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    experts = torch.arange(num_experts, device=x.device)
    return (task_ids.unsqueeze(-1) == experts).to(x.dtype)


def alora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    router: Tensor | None = None,
    task_ids: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A frozen linear layer plus several low-rank A under one shared B.

    Formula: `y = x W0^T + bias + s (sum_e g_e(x) A_e dropout(x)) B^T`.

    Args:
        x: activations `[..., K]`.
        weight: frozen base weight `[N, K]`.
        lora_A: the E matrices A, `[E, R, K]`; float32 ones over 16-bit x make the low-rank part float32, as in PEFT.
        lora_B: the shared B, `[N, R]`.
        bias: base bias `[N]`, or None.
        router: router weight `[E, K]` for soft routing; it sees x before dropout.
        task_ids: integer ids `[batch]` or `x.shape[:-1]` for task routing; -1 means the base alone.
        scaling: s, `lora_alpha / r` (rsLoRA: `lora_alpha / sqrt(r)`).
        dropout_p: probability that an entry of x is dropped from the low-rank path.
        training: dropout is active only when True.

    Returns:
        y `[..., N]`.

    Source: Ban & Ji 2025, ALoRA: multiple A, single B.
    """
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    g = gate(x.to(wide), lora_A.shape[0], router, task_ids)
    p = torch.einsum("...k,erk->...er", F.dropout(x.to(wide), dropout_p, training), lora_A.to(wide))
    h = torch.einsum("...e,...er->...r", g, p)
    return (F.linear(x, weight, bias) + scaling * F.linear(h, lora_B.to(wide))).to(x.dtype)


def alora_experts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    expert_ids: Tensor,
    task_ids: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """One stacked weight of a mixture of experts with task routing: every row meets one expert and one task.

    Formula: `y_m = W_e x_m + bias_e + s B_e A_{t(,e)} x_m` with e the expert and t the task of row m.

    Args:
        x: rows `[S, K]`, in any order; a token with k experts stands in k rows.
        weight: frozen weights `[X, N, K]` of the X experts.
        lora_A: `[T, R, K]`, one A per task for all experts, or `[T, X, R, K]`, one per task and expert.
        lora_B: `[X, N, R]`, one B per expert, or `[N, R]`, one for all; shared by all tasks in either case.
        expert_ids: the expert of each row `[S]`; a row that no expert takes (-1, or X and above) gives zeros.
        task_ids: the task of each row `[S]`; -1 means the base alone.
        bias: `[X, N]`, or None.
        scaling: s.

    Returns:
        y `[S, N]`.

    Source: Ban & Ji 2025, ALoRA, for each expert of a mixture (Shazeer et al. 2017).
    """
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    taken = (expert_ids >= 0) & (expert_ids < weight.shape[0])
    expert, task = torch.where(taken, expert_ids, 0), task_ids.clamp(min=0)
    a = lora_A[task] if lora_A.dim() == 3 else lora_A[task, expert]
    b = lora_B[expert] if lora_B.dim() == 3 else lora_B.expand(x.shape[0], -1, -1)
    h = torch.einsum("srk,sk->sr", a.to(wide), x.to(wide)) * (task_ids >= 0).unsqueeze(1)
    y = torch.einsum("snk,sk->sn", weight[expert], x)
    if bias is not None:
        y = y + bias[expert]
    return (y + scaling * torch.einsum("snr,sr->sn", b.to(wide), h)).to(x.dtype) * taken.unsqueeze(1)
