"""Many tasks from one model in memory: task store, continuous batching, an OpenAI-compatible server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine, EngineConfig, Stats
    from .errors import ServingError
    from .generation import Generation
    from .request import Completion, Piece, Sampling
    from .store import TaskInfo, TaskStore

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Generation",
    "Piece",
    "Sampling",
    "ServingError",
    "Stats",
    "TaskInfo",
    "TaskStore",
]

_LATER = {  # the engine imports transformers, which takes seconds
    "Completion": "request",
    "Engine": "engine",
    "EngineConfig": "engine",
    "Generation": "generation",
    "Piece": "request",
    "Sampling": "request",
    "ServingError": "errors",
    "Stats": "engine",
    "TaskInfo": "store",
    "TaskStore": "store",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        import importlib

        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
