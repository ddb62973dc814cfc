"""Triton kernels of the layer, a step of it per file; needs `triton`.

`alora_kernels.ops` checks arguments, groups ids by task (`alora_kernels.routing.RowGroups`) and puts forward and
backward together. The arguments of all launchers, any strides unless a `takes_` function says otherwise:

    x [M, K], w [N, K] in x's dtype, bias [N] or None, dy [M, N]   activations, the frozen layer, the gradient of y
    a [E, R, K], b [N, R], router [E, K]                           the adapter, in x's dtype or float32
    h [M, R] in x's dtype, p [M, E*R + E] in the accumulator's     the scaled h; unscaled products beside logits
    dh [M, R] in the accumulator dtype, dp [M, E*R + E]            gradients of the unscaled h and of p
    ids [M] int32, groups, num_experts (num_tasks)                 task of each row, rows by task, E
    scaling, dropout                                               s; of x on the low-rank path, or None

README.md in this folder has the derivations, and what each launch reads and writes.
"""

from alora_kernels.records import Dropout

from .da import da_soft, da_task, sum_partials
from .decode import decode, takes_decode
from .dropout import dropout_mask
from .dx import dx_soft, dx_task
from .expand import expand, expand_backward, plain_gemm
from .gate_backward import gate_backward
from .launch import Launch, overlapping, recording
from .one_pass import one_pass_soft, one_pass_task, takes_one_pass_soft, takes_one_pass_task
from .shrink import shrink_soft, shrink_task
from .tiles import chip_of, overlaps_launches

__all__ = [
    "Dropout", "Launch", "chip_of", "da_soft", "da_task", "decode", "dropout_mask", "dx_soft", "dx_task", "expand",
    "expand_backward", "gate_backward", "one_pass_soft", "one_pass_task", "overlapping", "overlaps_launches",
    "plain_gemm", "recording", "shrink_soft", "shrink_task", "sum_partials", "takes_decode", "takes_one_pass_soft",
    "takes_one_pass_task",
]  # fmt: skip
