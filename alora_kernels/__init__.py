"""ALoRA for PyTorch: several low-rank A, one shared B, any number of tasks in one batch."""

from typing import TYPE_CHECKING

from ._lazy import names_later
from ._peft_hook import register_with_peft
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import reference
    from .adapters.export import export_lora
    from .adapters.import_lora import import_lora
    from .adapters.writer import save_adapter
    from .modules import FusedALoRALinear
    from .ops import alora_delta, alora_linear
    from .recompute import keep_routing
    from .routing import Routing, route
    from .training import ALoRATrainer
    from .tuner import ALoRAConfig, add_task, set_task, train_only
    from .tuner.accelerate import accelerate, restore

__all__ = [
    "ALoRAConfig",
    "ALoRATrainer",
    "FusedALoRALinear",
    "Routing",
    "accelerate",
    "add_task",
    "alora_delta",
    "alora_linear",
    "export_lora",
    "import_lora",
    "keep_routing",
    "reference",
    "restore",
    "route",
    "save_adapter",
    "set_task",
    "train_only",
]

_ROOMS = ("adapters", "analysis", "data", "federated", "modules", "ops", "serving", "training", "tuner")
_LATER = {  # torch, PEFT and transformers take seconds to import: only when asked for
    "ALoRAConfig": "tuner",
    "ALoRATrainer": "training",
    "FusedALoRALinear": "modules",
    "Routing": "routing",
    "accelerate": "tuner.accelerate",
    "add_task": "tuner",
    "alora_delta": "ops",
    "alora_linear": "ops",
    "export_lora": "adapters.export",
    "import_lora": "adapters.import_lora",
    "keep_routing": "recompute",
    "reference": "reference",
    "restore": "tuner.accelerate",
    "route": "routing",
    "save_adapter": "adapters.writer",
    "set_task": "tuner",
    "train_only": "tuner",
    **{room: room for room in _ROOMS},
}

__getattr__ = names_later(__name__, _LATER)


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_peft()
