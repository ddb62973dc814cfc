"""The caller's end of a request: pieces of text as they come, in a thread or in asyncio; cancelling; the whole.

In:   the engine pushes pieces and, last, the completion.
Out:  `Generation`, which can be iterated over, awaited and cancelled, by several readers at once.
Who:  `Engine.submit` returns one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from .request import Completion, Piece


class Generation:
    """One running request.

    Args:
        id: unique in its engine.
        task: name of the task; None is the base model.
        prompt_tokens: length of the prompt.
        cancel: what the engine does to end it.

    Example:
        >>> generation = engine.submit("The film was", task="movie")
        >>> for piece in generation:
        ...     print(piece.text, end="")
    """

    def __init__(self, id: str, task: str | None, prompt_tokens: int, cancel: Callable[[str], None]) -> None:
        self.id, self.task, self.prompt_tokens = id, task, prompt_tokens
        self._cancel = cancel
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._completion: Completion | None = None
        self._wakers: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """End the request; its reader gets a last piece with finish_reason "cancelled". Harmless if it has ended."""
        self._cancel(self.id)

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._completion is not None

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it has not ended by then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.id} has not ended after {timeout} s")
            assert self._completion is not None
            return self._completion

    async def wait(self) -> Completion:
        """Wait for the end, in asyncio."""
        async for _ in self:
            pass
        assert self._completion is not None
        return self._completion

    def __iter__(self) -> Iterator[Piece]:
        read = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._pieces) > read)  # noqa: B023, called before read changes
                new = self._pieces[read:]
            read += len(new)
            yield from new
            if new[-1].finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, woken, read = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop may be closed already
                loop.call_soon_threadsafe(woken.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                woken.clear()
                with self._changed:
                    new = self._pieces[read:]
                read += len(new)
                for piece in new:
                    yield piece
                if new and new[-1].finish_reason is not None:
                    return
                if not new:
                    await woken.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def push(self, piece: Piece, completion: Completion | None = None) -> None:
        """For the engine: hand a piece to the readers; the last one with the completion."""
        with self._changed:
            if self.done:
                return
            self._pieces.append(piece)
            self._completion = completion
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()
