"""CUDA graphs on a CPU: what a captured step may not do is refused, and a replay runs its operations again.

As on a GPU, a graph knows nothing but addresses. What it reads from outside is remembered by its storage, weakly: a
tensor that took the place of another is not read, and memory that was given back is a fault. What it makes lies in its
own memory, which holds junk as soon as the step is over. Whatever needs a number on the host, or a shape that depends
on numbers, is a fault. `.to("cpu")` cannot be told from `.to(x.device)` here and goes unseen.

Faults are kept, because an engine whose step raises repeats it another way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers.generation.continuous_batching import initialization, model_runner

from alora_kernels import routing
from alora_kernels.serving import attention, batching
from alora_kernels.serving.layer import SlotLinear

FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy}
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
SYNCS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
JUNK = 255  # in every byte: NaN, or -1


class GraphError(AssertionError):
    """A step that no CUDA graph can hold, or a replay that would read what is not there."""


@dataclass(frozen=True)
class Place:
    """Where a tensor from outside lies."""

    weak: int  # its storage
    address: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Place:
        storage = tensor.untyped_storage()
        layout = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return Place(storage._weak_ref(), storage.data_ptr(), tensor.dtype, *layout)

    def tensor(self) -> Tensor | None:
        """What lies there now; None if the memory was given back."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.weak)
        if storage is None or storage.data_ptr() != self.address:
            return None
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Call(NamedTuple):
    function: Any
    args: Any  # with `Place`s
    made: list[tuple[int, Tensor]]  # outputs in the graph's own memory, by their number


class Graph(TorchDispatchMode):
    """The operations of one captured step."""

    def __init__(self, fakes: FakeGraphs) -> None:
        super().__init__()
        self._fakes = fakes
        self._calls: list[Call] = []
        self._own: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if function.overloadpacket in INDEXED:  # tagged, but only masks are counted
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            waits = bool(SYNCS & set(function.tags))
        if waits:
            self._fakes.fault(f"{function} waits for the device")
        read = tree_map_only(Tensor, self._placed, (args, kwargs))
        outputs = function(*args, **kwargs)
        before = {t.untyped_storage()._cdata for t in inputs}
        made = []
        for i, value in enumerate(tree_flatten(outputs)[0]):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in before:
                made.append((i, value))
                self._own[value.untyped_storage()._cdata] = value.untyped_storage()
        self._calls.append(Call(function, read, made))
        return outputs

    def _placed(self, tensor: Tensor) -> Tensor | Place:
        return tensor if tensor.untyped_storage()._cdata in self._own else Place.of(tensor)

    def _found(self, call: Call, place: Place) -> Tensor:
        tensor = place.tensor()
        if tensor is None:
            self._fakes.fault(f"{call.function} reads {place.dtype} {list(place.size)}, whose memory was given back")
        return tensor

    def replay(self) -> None:
        self._fakes.replays += 1
        for call in self._calls:
            args, kwargs = tree_map_only(Place, lambda place, call=call: self._found(call, place), call.args)
            outputs = tree_flatten(call.function(*args, **kwargs))[0]
            for i, kept in call.made:
                kept.copy_(outputs[i])
        self.spoil()

    def spoil(self) -> None:
        for storage in self._own.values():
            storage.fill_(JUNK)

    def reset(self) -> None:
        self._calls.clear()
        self._own.clear()


class _NoHost(TorchFunctionMode):
    """Refuses what leaves no trace among a CPU's operations."""

    def __init__(self, fakes: FakeGraphs) -> None:
        super().__init__()
        self._fakes = fakes

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in TO_HOST or function in FROM_HOST:
            self._fakes.fault(f"{function.__name__} copies between host and device")
        return function(*args, **(kwargs or {}))


class FakeGraphs:
    """What was captured and replayed, and what went wrong."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.faults: list[str] = []
        self._thread = threading.local()

    def fault(self, what: str) -> None:
        self.faults.append(what)
        raise GraphError(what)

    def capturing(self, device: torch.device) -> bool:
        """As `alora_kernels.routing.capturing`."""
        return getattr(self._thread, "capturing", False)

    @contextmanager
    def capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.captures += 1
        self._thread.capturing = True
        try:
            with _NoHost(self), graph:
                yield
        finally:
            self._thread.capturing = False
        graph.spoil()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
        """Let transformers and the engine take a CPU for a GPU."""
        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (initialization, "get_accelerator_graph_name", lambda: "CUDAGraph"),
            (model_runner, "get_memory_pools", lambda: (None, 0)),
            (model_runner, "memory_pool_context", lambda pool: nullcontext()),
            (model_runner, "create_accelerator_graph", lambda: Graph(self)),
            (model_runner, "accelerator_graph_capture_context", self.capture),
            (routing, "capturing", self.capturing),
            (attention, "why_not", lambda model: "a GPU has faster kernels"),
            (SlotLinear, "_plain", lambda layer, x: False),
        ]
        for owner, name, value in replaced:
            monkeypatch.setattr(owner, name, value)
        monkeypatch.setattr(batching, "GRAPH_DEVICES", {"cuda", "cpu"})
        return self
