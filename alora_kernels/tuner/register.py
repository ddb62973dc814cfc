"""Make PEFT know the type `ASYMLORA`: one more member of its enum, one entry in each of its tables.

PEFT has no plugin hook, and its "aLoRA" is IBM's *Activated* LoRA: hence the name. The import changes no function of
PEFT; `adjust_peft` wraps five when the first ALoRA model of a process is made, and other types go through untouched.
"""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.peft_types import PeftType, register_peft_method

from ..files import written_whole
from ..ops.checks import check_whole
from ..tensor_file import in_order, sums, verify

NAME = "ASYMLORA"
GATHER = (
    "a file holds whole matrices: on every process make state_dict=get_model_state_dict(model,"
    " options=StateDictOptions(full_state_dict=True)), of torch.distributed.checkpoint.state_dict, and give it to"
    " save_pretrained"
)


def extend_str_enum(cls: type[enum.Enum], name: str) -> Any:
    """The member `name` (value = name) of a `class X(str, Enum)`, added as if written there (Python 3.11 to 3.13)."""
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


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT, once; a RuntimeError if another package registered the same name."""
    member = extend_str_enum(PeftType, NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is config_cls:
        return
    if known is not None:
        raise RuntimeError(f"PEFT knows {NAME} already, as {known.__module__}.{known.__qualname__}: import only one")
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)


class Source(NamedTuple):
    """What an adapter is loaded from: a path or a name on the Hub, with what PEFT was told about the Hub."""

    folder: str
    adapter: str
    download: dict[str, Any]
    new: bool  # whether the adapter was made for it

    def __str__(self) -> str:
        return f"{self.folder} and adapter {self.adapter!r}"

    @property
    def remedy(self) -> str:
        """What gives the file's adapter as it was saved."""
        return "leave config= out, so that the file's own is taken" if self.new else "load it under a name of its own"


source_read: ContextVar[Source | None] = ContextVar("source of the adapter that is loaded", default=None)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Say where the tensors come from that are loaded inside the block."""
    token = source_read.set(source)
    try:
        yield
    finally:
        source_read.reset(token)


def _search_adapter_names(search: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's search for its own aLoRA in `adapter_names`, which asks a tensor of ids for its truth value and fails."""
    ours = any(config.peft_type == NAME for config in model.peft_config.values())
    if ours and isinstance(kwargs.get("adapter_names"), torch.Tensor):
        return kwargs  # a tensor holds no adapter name
    return search(model, *args, **kwargs)


def _save_file(save: Callable[..., None], tensors: Any, filename: str, *, metadata: Any = None) -> None:
    """PEFT's writer of weights, which writes into the final file: ALoRA's replace it by one rename, with checksums."""
    if not any(".asymlora_" in name for name in tensors):
        save(tensors, filename, metadata=metadata)
        return
    path = Path(filename)
    with written_whole(path.parent) as folder:
        draft = Path(folder, path.name)
        save(tensors, str(draft), metadata={**(metadata or {}), **sums(tensors)})
        if draft.is_file():
            in_order(draft)


def _save_pretrained(save: Callable[..., None], self: PeftModel, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`, which gathers under tensor parallelism, and elsewhere fails without a name."""
    if kwargs.get("state_dict") is None and not getattr(self, "_tp_size", None):
        check_whole({name: p for name, p in self.named_parameters() if ".asymlora_" in name}, remedy=GATHER)
    save(self, *args, **kwargs)


def _load_adapter(
    load: Callable[..., Any], self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter`, for ALoRA's tuner to know the folder; files with checksums are compared with them."""
    # `PeftModel.from_pretrained` makes the adapter just before, and it alone passes a key_mapping
    new = adapter_name not in self.peft_config or "key_mapping" in kwargs
    if (weights := Path(model_id, kwargs.get("subfolder") or "", SAFETENSORS_WEIGHTS_NAME)).is_file():
        verify(weights)
    with reading(Source(str(model_id), adapter_name, kwargs, new)):
        return load(self, model_id, adapter_name, *args, **kwargs)


def _upload(upload: Callable[..., Any], self: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
    """The end of `push_to_hub`, where transformers' card has just taken the place of ours, and paths would leave."""
    for name, config in self.peft_config.items():
        if config.peft_type == NAME:
            config.for_hub(folder if name == "default" else os.path.join(folder, name))
    return upload(self, folder, *args, **kwargs)


def _wrapped(function: Callable[..., Any], ours: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return ours(function, *args, **kwargs)

    return wrapped


def adjust_peft() -> None:
    """Wrap the functions of PEFT that ALoRA needs changed; those that are wrapped already are left alone."""
    for owner, name, ours in (
        (peft_model, "get_alora_offsets_for_forward", _search_adapter_names),
        (peft_model, "get_alora_offsets_for_generate", _search_adapter_names),
        (peft_model, "safe_save_file", _save_file),
        (PeftModel, "save_pretrained", _save_pretrained),
        (PeftModel, "load_adapter", _load_adapter),
        (PeftModel, "_upload_modified_files", _upload),  # transformers', private: without it cards are plain
    ):
        function = getattr(owner, name, None)
        if function is not None and not hasattr(function, "adjusted_for"):
            wrapped = _wrapped(function, ours)
            wrapped.adjusted_for = NAME
            setattr(owner, name, wrapped)
