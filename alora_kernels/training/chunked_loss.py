"""Sum of the cross entropies of an output layer at some positions, a chunk of positions at a time.

Taken: hidden states of the positions, their labels, the layer. Given: the sum, with gradients, and each position's
loss. No more than a chunk's logits exist at once; `ModelLoss` asks for it through `OutputHead`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor, slice], Tensor]  # hidden states `[C, H]` and which of the positions they are, to logits

# Positions of a chunk. Two threads of an EPYC need 256 of them to multiply float32 as fast as all at once: with 128 a
# loss over 49k and 128k classes takes 1.2 times as long, with 384 as long. A GPU takes as many as fit these bytes.
CHUNK, CHUNK_BYTES_CUDA = 256, 512 << 20


class PositionLosses(NamedTuple):
    """Of P positions."""

    total: Tensor  # sum of the losses, `[]`; gradients flow from here
    losses: Tensor  # negative log-likelihood of each label, smoothed, `[P]`, without gradient
    right: Tensor  # whether the largest logit is the label's `[P]`


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    vocabulary: int,
    trained: Sequence[Tensor] = (),
    label_smoothing: float = 0.0,
) -> PositionLosses:
    """Losses of positions whose logits are computed chunk by chunk, forward and backward.

    Formula: `total = sum_p CE(head(h_p), l_p)`, in float32 like `row_losses`. Where gradients are asked for they are
    made with the losses, d total / d h `[P, H]` and the sums for what the head trains; the backward pass only scales
    them.

    `hidden` are inputs of the output layer `[P, H]`, labels `[P]` are in 0 .. vocabulary - 1; `trained` are the leaf
    tensors that `head` reads.
    """
    wanted = torch.is_grad_enabled()
    trained = [tensor for tensor in trained if tensor.requires_grad]
    return PositionLosses(*_Chunked.apply(head, vocabulary, label_smoothing, wanted, labels, hidden, *trained))


class _Chunked(torch.autograd.Function):
    """Gradients are made in the forward: the logits of a chunk are there, and nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, vocabulary: int, smoothing: float, wanted: bool, labels: Tensor, *leaves: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, trained = leaves[0], leaves[1:]
        wanted = wanted and (hidden.requires_grad or bool(trained))
        losses = hidden.new_empty(len(labels), dtype=torch.float32)
        right = torch.empty_like(labels, dtype=torch.bool)
        moved = torch.zeros_like(hidden) if wanted and hidden.requires_grad else None
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in trained if wanted]
        for at in _slices(hidden, vocabulary, trained):
            with torch.set_grad_enabled(wanted):
                part = hidden[at].detach().requires_grad_(moved is not None)
                logits = head(part, at)
            losses[at], right[at], gradient = _cross_entropy(logits.detach(), labels[at], smoothing, wanted)
            if gradient is not None and logits.requires_grad:
                inputs = [*([part] if moved is not None else []), *trained]
                found = list(torch.autograd.grad(logits, inputs, gradient, allow_unused=True))
                if moved is not None:
                    moved[at] = found.pop(0)
                for total, new in zip(sums, found, strict=True):
                    if new is not None:
                        total += new
        ctx.gradients, ctx.dtypes = [moved, *sums], [t.dtype for t in leaves]
        ctx.mark_non_differentiable(losses, right)
        return losses.sum(), losses, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        wide = [None if g is None else g.to(torch.promote_types(g.dtype, upstream.dtype)) for g in ctx.gradients]
        scaled = [None if g is None else (g * upstream).to(d) for g, d in zip(wide, ctx.dtypes, strict=False)]
        return (None, None, None, None, None, *scaled)


def _slices(hidden: Tensor, vocabulary: int, trained: Sequence[Tensor]) -> list[slice]:
    """Chunks of positions; as many as H at least where a matrix as large as the layer's is summed over chunks."""
    size = max(CHUNK, CHUNK_BYTES_CUDA // (4 * vocabulary)) if hidden.is_cuda else CHUNK
    if any(t.numel() >= hidden.shape[-1] * vocabulary for t in trained):
        size = max(size, hidden.shape[-1])
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses `[C]`, whether each is right, and the gradient of their sum, softmax - smoothed one-hot, `[C, V]`."""
    right = logits.argmax(-1) == labels
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    places = labels[:, None]
    losses = log_p.gather(1, places)[:, 0].neg()
    each = smoothing / logits.shape[-1]
    if smoothing:
        losses = (1 - smoothing) * losses - each * log_p.sum(-1)
    if not wanted:
        return losses, right, None
    gradient = log_p.exp_()
    if smoothing:
        gradient -= each
    gradient.scatter_add_(1, places, gradient.new_full((1, 1), smoothing - 1).expand_as(places))
    return losses, right, gradient.to(logits.dtype)
