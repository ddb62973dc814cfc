"""Many tasks from one model in memory: task store, continuous batching, an OpenAI-compatible server."""

from typing import TYPE_CHECKING

from .._lazy import names_later
from ..text import install

if TYPE_CHECKING:
    from .batching import EngineConfig
    from .engine import Engine, Stats
    from .request import Completion, Generation, Piece, Sampling, ServingError
    from .store import TaskInfo, TaskStore

__all__ = [
    "Completion", "Engine", "EngineConfig", "Generation", "Piece", "Sampling", "ServingError", "Stats", "TaskInfo",
    "TaskStore",
]  # fmt: skip

_LATER = {  # the engine imports transformers, which takes seconds
    "Completion": "request", "Generation": "request", "Piece": "request", "Sampling": "request",
    "ServingError": "request", "Engine": "engine", "Stats": "engine", "EngineConfig": "batching",
    "TaskInfo": "store", "TaskStore": "store",
}  # fmt: skip

__getattr__ = names_later(
    __name__,
    _LATER,
    needs=("prometheus_client", "threadpoolctl"),
    remedy=f"serving needs prometheus-client and threadpoolctl: {install('serving')}",
)
