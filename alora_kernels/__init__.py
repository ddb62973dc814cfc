"""ALoRA for PyTorch: several low-rank A, one shared B, any number of tasks in one batch."""

from typing import TYPE_CHECKING

from . import reference
from .integrations.lazy import register_with_peft
from .later import names_later
from .modules import FusedALoRALinear
from .ops import alora_delta, alora_linear, alora_linear_group
from .recompute import keep_routing
from .routing import Routing, route
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .integrations.export import export_lora
    from .integrations.import_lora import import_lora
    from .integrations.peft import ALoRAConfig, save_adapter, set_task
    from .integrations.peft.accelerate import accelerate, restore
    from .training import ALoRATrainer

__all__ = [
    "ALoRAConfig",
    "ALoRATrainer",
    "FusedALoRALinear",
    "Routing",
    "accelerate",
    "alora_delta",
    "alora_linear",
    "alora_linear_group",
    "export_lora",
    "import_lora",
    "keep_routing",
    "reference",
    "restore",
    "route",
    "save_adapter",
    "set_task",
]

_LATER = {  # they import PEFT or transformers, which takes seconds: only when asked for
    "ALoRAConfig": "integrations.peft",
    "ALoRATrainer": "training",
    "accelerate": "integrations.peft.accelerate",
    "export_lora": "integrations.export",
    "import_lora": "integrations.import_lora",
    "restore": "integrations.peft.accelerate",
    "save_adapter": "integrations.peft",
    "set_task": "integrations.peft",
}

__getattr__ = names_later(__name__, _LATER)


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_peft()
