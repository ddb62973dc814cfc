"""ALoRA as a PEFT method; importing this registers the type `ASYMLORA` (`import alora_kernels` does so with PEFT)."""

from .config import ALoRAConfig
from .layer import ALoRALayer, ALoRALinear
from .model import ALoRAModel
from .register import register
from .router import CheckpointGuard, set_task
from .tasks import add_task, train_only

register(ALoRAConfig, ALoRAModel)

__all__ = [
    "ALoRAConfig",
    "ALoRALayer",
    "ALoRALinear",
    "ALoRAModel",
    "CheckpointGuard",
    "add_task",
    "set_task",
    "train_only",
]
