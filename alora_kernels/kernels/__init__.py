"""Triton kernels of the layer, one idea per file; needs `triton`.

In:   two-dimensional tensors on one device, ids already grouped (`alora_kernels.routing.RowGroups`).
Out:  the pieces of forward and backward that `alora_kernels.ops` puts together.
Who:  `alora_kernels.ops`, which checks arguments; launchers take them as they come.

See README.md in this folder for the derivations and for what each launch reads and writes.
"""

from alora_kernels.records import Dropout

from .da import soft_da, task_da
from .decode import linear_decode, takes_decode
from .dropout import dropout_mask
from .dx_soft import linear_dx_soft
from .dx_task import linear_dx_task
from .expand import linear_expand, plain_gemm
from .expand_backward import expand_backward
from .gate_backward import gate_backward
from .launch import Launch, recording
from .one_pass_soft import linear_one_pass_soft, takes_one_pass_soft
from .one_pass_task import linear_one_pass_task, takes_one_pass_task
from .partial_sums import sum_planes
from .shrink_soft import soft_shrink
from .shrink_task import task_shrink
from .tiles import chip_of

__all__ = [
    "Dropout",
    "Launch",
    "chip_of",
    "dropout_mask",
    "expand_backward",
    "gate_backward",
    "linear_decode",
    "linear_dx_soft",
    "linear_dx_task",
    "linear_expand",
    "linear_one_pass_soft",
    "linear_one_pass_task",
    "plain_gemm",
    "recording",
    "soft_da",
    "soft_shrink",
    "sum_planes",
    "takes_decode",
    "takes_one_pass_soft",
    "takes_one_pass_task",
    "task_da",
    "task_shrink",
]
