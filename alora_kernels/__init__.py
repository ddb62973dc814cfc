"""ALoRA for PyTorch: several low-rank A, one shared B, any number of tasks in one batch."""

from typing import TYPE_CHECKING

from ._lazy import names_later
from ._peft_hook import register_with_peft
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import reference as reference
    from .adapters.export import export_lora as export_lora
    from .adapters.import_lora import import_lora as import_lora
    from .adapters.writer import save_adapter as save_adapter
    from .modules import FusedALoRALinear as FusedALoRALinear
    from .ops import alora_delta as alora_delta
    from .ops import alora_linear as alora_linear
    from .recompute import keep_routing as keep_routing
    from .routing import Routing as Routing
    from .routing import route as route
    from .training import ALoRATrainer as ALoRATrainer
    from .tuner import ALoRAConfig as ALoRAConfig
    from .tuner import add_task as add_task
    from .tuner import set_task as set_task
    from .tuner import train_only as train_only
    from .tuner.accelerate import accelerate as accelerate
    from .tuner.accelerate import restore as restore

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
}

__all__ = sorted(_LATER)
__getattr__ = names_later(__name__, _LATER | {room: room for room in _ROOMS})


def __dir__() -> list[str]:
    return __all__


register_with_peft()
