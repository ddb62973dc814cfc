"""ALoRA for PyTorch: several low-rank A, one shared B, any number of tasks in one batch."""

from . import reference
from .modules import FusedALoRALinear
from .ops import alora_delta, alora_linear
from .routing import Routing, route
from .version import __version__ as __version__


__all__ = ["FusedALoRALinear", "Routing", "alora_delta", "alora_linear", "reference", "route"]
