"""ALoRA as a PEFT method: importing this registers the type `ASYMLORA`.

In:   stock PEFT and transformers calls with an `ALoRAConfig`.
Out:  PEFT models whose layers run the fused op.
Who:  users; `import alora_kernels` brings it in together with PEFT.

    >>> model = get_peft_model(base, ALoRAConfig(r=16, tasks=["math", "code"], target_modules="all-linear"))
    >>> model(**batch, adapter_names=["math", "code"])
"""

from .config import ALoRAConfig
from .layer import ALoRALayer, ALoRALinear
from .model import ALoRAModel
from .register import register
from .router import CheckpointGuard, set_task

register(ALoRAConfig, ALoRAModel)

__all__ = ["ALoRAConfig", "ALoRALayer", "ALoRALinear", "ALoRAModel", "CheckpointGuard", "set_task"]
