"""Custom ops: checks, backend choice and autograd around the kernels."""

from .functional import alora_delta, alora_linear
from .group import alora_linear_group

__all__ = ["alora_delta", "alora_linear", "alora_linear_group"]
