"""One request as its caller sees it: `Engine.submit` takes a `Sampling`, checked here, and gives a `Generation`.

The engine pushes `Piece`s of text into the generation, and at the end a `Completion`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from .errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_STOPS = 4


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen and when they end.

    Attributes:
        max_tokens: at most so many new tokens, >= 1.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: the smallest set of tokens with at least this probability, in (0, 1].
        top_k: only the k most likely tokens; 0 is no limit.
        stop: texts that end the answer; they are not part of it.
        seed: of this request's own random numbers; the same seed gives the same answer in any batch.
        ignore_eos: go on after the end-of-text token, for measurements.

    Raises:
        RequestError: a setting outside its range, named.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not _whole(self.max_tokens) or self.max_tokens < 1:
            raise RequestError(f"max_tokens must be a whole number >= 1, got {self.max_tokens!r}", "max_tokens")
        if not math.isfinite(self.temperature) or not 0 <= self.temperature <= 100:
            raise RequestError(f"temperature must be a number in 0 .. 100, got {self.temperature!r}", "temperature")
        if not math.isfinite(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1, got {self.top_p!r}", "top_p")
        if not _whole(self.top_k) or self.top_k < 0:
            raise RequestError(f"top_k must be a whole number >= 0 (0: no limit), got {self.top_k!r}", "top_k")
        if self.seed is not None and (not _whole(self.seed) or not -(2**63) <= self.seed < 2**63):
            raise RequestError(f"seed must be a whole number of 64 bits, got {self.seed!r}", "seed")
        if isinstance(self.stop, str) or len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop must be at most {MAX_STOPS} texts, got {self.stop!r}", "stop")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError(f"stop must hold texts that are not empty, got {self.stop!r}", "stop")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature == 0


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Piece:
    """What one or several steps added to an answer."""

    text: str  # may be empty, when a character is not complete yet or on the last piece
    tokens: int  # generated so far
    finish_reason: FinishReason | None = None  # of the last piece


@dataclass(frozen=True)
class Completion:
    """A request that has ended: by an end-of-text or a stop text ("stop"), its "length", an "error", or "cancelled".

    It was cancelled by its reader or, as `error` then says, because the engine was stopped.
    """

    id: str
    task: str | None  # None is the base model
    text: str  # the whole answer, without a stop text
    token_ids: tuple[int, ...]  # as generated
    finish_reason: FinishReason
    prompt_tokens: int
    error: str | None = None
    queued: float | None = None  # seconds from submission to its first step
    first_token: float | None = None  # seconds from submission to the first token, if there was one
    seconds: float = 0.0  # from submission to the end

    @property
    def completion_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)


class Generation:
    """One request for its readers.

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
