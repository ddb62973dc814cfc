"""Several ways to compute the same layer, and which one is taken.

In:   the sizes of a layer, its chip and routing; or the name of a plan that somebody forces.
Out:  a `Plan`: how forward computes y, how backward computes dx, whether small kernels run beside large ones.
Who:  `triton_backend` once per pass; `backend` knows the names; `bench tune` measures them; `alora doctor` explains.

What was measured on a chip (`kernels/tuned.py`) decides for it. Without a measurement a rule does:
our own GEMM on chips it was written for, where sizes are multiples of 16; the vendor's GEMM everywhere else, which can
only lose the low-rank part's own time. The one-pass kernels are never taken without a measurement: programs that wait
for each other deserve a proof on the chip itself.
"""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """How one layer is computed.

    Attributes:
        forward: "one_pass": one launch. "two_launch": the shrink, then a GEMM whose last step is the expand.
            "base_first": the vendor's GEMM, then y += h b^T. "low_rank_first": y = h b^T, to which the vendor's
            GEMM adds.
        dx: "fused": one launch. "low_rank_first": the low-rank part, then the vendor's GEMM adds dy w to it.
        overlap: small kernels (shrink before base_first, da beside dx) run on a side stream.
    """

    forward: str
    dx: str
    overlap: bool = False


PLANS = {
    "one_pass": Plan("one_pass", "fused"),
    "two_launch": Plan("two_launch", "fused"),
    "base_first": Plan("base_first", "low_rank_first"),
    "low_rank_first": Plan("low_rank_first", "low_rank_first"),
    "one_pass+overlap": Plan("one_pass", "fused", True),
    "two_launch+overlap": Plan("two_launch", "fused", True),
    "base_first+overlap": Plan("base_first", "low_rank_first", True),
    "low_rank_first+overlap": Plan("low_rank_first", "low_rank_first", True),
}


def explain_plan(chip: str, routing: str, itemsize: int, m: int, k: int, n: int) -> tuple[Plan, str]:
    """The plan for a layer, and why.

    Args:
        chip: as `kernels.config.chip_of` names it.
        routing: "task" or "soft".
        itemsize: bytes per element of x.
        m: rows.
        k: in_features.
        n: out_features.
    """
    from ..kernels import tuned  # the kernels package needs triton
    from ..kernels.tiles import chip_class, shape_class

    measured = tuned.PLANS.get((chip, routing, itemsize, shape_class(m, k, n)))
    if measured is not None:
        return Plan(*measured), f"measured: {tuned.MEASURED}"
    if chip_class(chip) == "interpreter":
        return PLANS["two_launch"], "the interpreter is there to test our kernels"
    if chip_class(chip) == "small":
        return PLANS["base_first"], f"no measurement on {chip}, and our GEMM was not written for it"
    if k % 16 or n % 16:
        return PLANS["base_first"], "K or N is no multiple of 16: the vendor's GEMM copes better"
    return PLANS["two_launch"], f"no measurement on {chip}"
