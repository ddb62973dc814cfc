"""A frozen linear layer and a low-rank part beside it: what `HydraLinear` and `PerTaskLinear` have in common.

In:   an `nn.Linear` of the model; its weight and bias are shared, not copied, and frozen.
Out:  a module under the same parameter names whose forward adds what a subclass computes.
Who:  the baselines' modules; `baselines.methods` puts them in the place of target layers.

These layers are ALoRA's neighbours in the literature, in plain torch under autograd: to train them on the same data
and compare, not to be the fastest.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import Layout
from .init import lora_scaling


class AdaptedLinear(nn.Module):
    """`y = x W0^T + bias + delta(x)`.

    Args:
        linear: the layer to replace; only a plain `nn.Linear`.
        r: rank R >= 1.
        lora_alpha: numerator of the scaling s; defaults to 2 r.
        use_rslora: s = lora_alpha / sqrt(r).
        lora_dropout: dropout on the input of the low-rank path, in training mode.

    Attributes:
        weight, bias: the frozen base.
        tasks: task names; empty where ids of the batch do not matter.
        enabled: False leaves the base alone.
        rows_name: the layer's name in the model, if somebody told it.
        rows: where the batch rows are in what the layer is given; None if nobody knows.

    Raises:
        TypeError: linear is something else, such as a quantised layer.
        ValueError: r < 1, or a dropout that is no probability.
    """

    tasks: tuple[str, ...] = ()
    rows_name: str | None = None
    rows: Layout | None = None

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        *,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if type(linear) is not nn.Linear:
            raise TypeError(f"{type(self).__name__} replaces an nn.Linear, got {type(linear).__name__}")
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be a whole number >= 1, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        self.in_features, self.out_features, self.r = linear.in_features, linear.out_features, r
        self.lora_alpha = float(2 * r if lora_alpha is None else lora_alpha)
        self.use_rslora, self.lora_dropout = use_rslora, float(lora_dropout)
        self.scaling = lora_scaling(self.lora_alpha, r, use_rslora)
        self.weight, self.bias = cast(nn.Parameter, linear.weight), linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.enabled = True
        self.train(linear.training)

    def _empty(self, *shape: int) -> nn.Parameter:
        """A parameter of the base's dtype where the base is."""
        return nn.Parameter(torch.empty(*shape, dtype=self.weight.dtype, device=self.weight.device))

    def _added(self, y: Tensor, x: Tensor, dropped: Tensor, leading: torch.Size) -> Tensor:
        """The base output y `[M, N]` plus the low-rank part of x `[M, K]`; the leading shape x had in the call."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """y `[..., N]` from x `[..., K]`; adapters wider than x are rounded to its dtype."""
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, self.weight, self.bias)
        if self.enabled:
            y = self._added(y, rows, F.dropout(rows, self.lora_dropout, self.training), x.shape[:-1])
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha:g}, bias={self.bias is not None}"
            + (f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else "")
            + (", use_rslora=True" if self.use_rslora else "")
        )
