"""Custom ops: checks, backend choice and autograd around the kernels."""

from .functional import alora_delta, alora_linear, trusted_alora

__all__ = ["alora_delta", "alora_linear", "trusted_alora"]
