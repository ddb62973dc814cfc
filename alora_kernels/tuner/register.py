"""Make PEFT know the type `ASYMLORA`: one more member of its enum, one entry in each of its tables.

In:   the config and tuner classes.
Out:  `PeftType.ASYMLORA`; stock `get_peft_model`, `PeftModel.from_pretrained` and
      `inject_adapter_in_model` that work with `ALoRAConfig`.
Who:  `alora_kernels.tuner` when it is imported; calling it again changes nothing.

PEFT has no plugin hook: `register_peft_method` refuses a name that its enum lacks. Its "aLoRA" is another
method (IBM's *Activated* LoRA), so the type is called ASYMLORA, for Asymmetric LoRA.
"""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import Source, reading, written_whole

NAME = "ASYMLORA"


def extend_str_enum(cls: type[enum.Enum], name: str) -> Any:
    """The member `name` (value = name) of a string enum, added if it is missing.

    The new member pickles, copies, iterates and compares as those written in the class body (Python 3.11 to 3.13).

    Args:
        cls: a `class X(str, Enum)`.
        name: the member's name and value.
    """
    if name in cls.__members__:
        return cls[name]
    member = str.__new__(cls, name)  # type: ignore[type-var]
    member._name_ = name  # type: ignore[attr-defined]
    member._value_ = name  # type: ignore[attr-defined]
    member._sort_order_ = len(cls._member_names_)  # type: ignore[attr-defined]
    member.__objclass__ = cls  # type: ignore[attr-defined]
    cls._member_names_.append(name)
    cls._member_map_[name] = member  # type: ignore[assignment]
    cls._value2member_map_[name] = member  # type: ignore[assignment]
    hashable = getattr(cls, "_hashable_values_", None)  # Python 3.12.3 and later
    if hashable is not None:
        hashable.append(name)
    type.__setattr__(cls, name, member)  # EnumType refuses; `PeftType.ASYMLORA` needs it
    return member


def accept_id_tensors() -> None:
    """Let `adapter_names` be an integer tensor for causal language models too.

    PEFT looks through `adapter_names` for its own aLoRA and, doing so, asks a tensor for its truth value, which
    raises. A tensor holds no adapter name, so the search is skipped for it in models with an ALoRA adapter.
    """
    import torch
    from peft import peft_model

    def skip_tensors(search: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(search)
        def searched(model: Any, *args: Any, **kwargs: Any) -> Any:
            ours = any(config.peft_type == NAME for config in model.peft_config.values())
            if ours and isinstance(kwargs.get("adapter_names"), torch.Tensor):
                return kwargs
            return search(model, *args, **kwargs)

        return searched

    for name in ("get_alora_offsets_for_forward", "get_alora_offsets_for_generate"):
        search = getattr(peft_model, name, None)
        if search is not None and not hasattr(search, "__wrapped__"):
            setattr(peft_model, name, skip_tensors(search))


def replace_weights_at_once() -> None:
    """Let stock `save_pretrained` replace a weights file by one rename, so that an interruption leaves the old one.

    PEFT writes into the final file. Files without an ALoRA adapter are still written as PEFT writes them.
    """
    from peft import peft_model

    def whole(save: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(save)
        def saved(tensors: Any, filename: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
            if not any(".asymlora_" in name for name in tensors):
                save(tensors, filename, *args, **kwargs)
                return
            path = Path(filename)
            with written_whole(path.parent) as folder:
                save(tensors, os.path.join(folder, path.name), *args, **kwargs)

        return saved

    if not hasattr(peft_model.safe_save_file, "__wrapped__"):
        peft_model.safe_save_file = whole(peft_model.safe_save_file)


def say_what_is_read() -> None:
    """Let `PeftModel.load_adapter` say which folder it reads; see `loading`. Only ALoRA's tuner listens."""
    from peft import PeftModel

    def saying(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            # `PeftModel.from_pretrained` makes the adapter just before, and it alone passes a key_mapping
            new = adapter_name not in self.peft_config or "key_mapping" in kwargs
            with reading(Source(str(model_id), kwargs, new)):
                return load(self, model_id, adapter_name, *args, **kwargs)

        return load_adapter

    PeftModel.load_adapter = saying(PeftModel.load_adapter)  # type: ignore[method-assign]


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT.

    Args:
        config_cls: `ALoRAConfig`.
        model_cls: `ALoRAModel`.

    Raises:
        RuntimeError: another package registered the same name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    member = extend_str_enum(PeftType, NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is config_cls:
        return
    if known is not None:
        raise RuntimeError(f"PEFT knows {NAME} already, as {known.__module__}.{known.__qualname__}: import only one")
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    accept_id_tensors()
    replace_weights_at_once()
    say_what_is_read()
