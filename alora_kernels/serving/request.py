"""One request as its caller sees it, and what refuses it: the HTTP server gives each error a status of its own.

`Engine.submit` takes a `Sampling`, checked here, and gives a `Generation`. The engine pushes `Piece`s of text into it,
and at the end a `Completion`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..text import listed

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_STOPS, MAX_LOGPROBS = 4, 20
INT64 = range(-(2**63), 2**63)


class ServingError(ValueError):
    """A request or an adapter that is refused; everything that runs goes on."""


class RequestError(ServingError):
    """A request whose contents cannot be served: `param` names the setting at fault as the user knows it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownTaskError(ServingError):
    """No such task among the names that exist."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"no model or task is called {name!r}: known are {listed(known, 20) or 'none'}")
        self.name, self.known = name, tuple(known)


class AdapterRefusedError(ServingError):
    """An adapter folder that does not fit or cannot be trusted; the message says why."""


class TaskReplacedError(ServingError):
    """A prompt that was made for a version of its task which is no more, and would be asked in another way now."""


class TaskLostError(ServingError):
    """A task whose numbers are nowhere any more as they were loaded; the message says how to bring it back."""


class StorageError(ServingError, OSError):
    """The disk does not take what has to move there; nothing has changed."""


class QueueFullError(ServingError):
    """More requests wait than the engine may hold; a place is likely after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in about {retry_after:.0f} s")
        self.retry_after = retry_after


class NotServingError(ServingError):
    """The engine is starting, finishing what runs, or stopped: it takes no new request."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen and when they end; a RequestError names a setting out of its range."""

    max_tokens: int = 128  # new ones at most
    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely token
    top_p: float = 1.0  # the smallest set of tokens with at least this probability, in (0, 1]
    top_k: int = 0  # only the k most likely tokens; 0 is no limit
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    seed: int | None = None  # the same gives the same answer in any batch
    ignore_eos: bool = False  # go on after the end-of-text token, for measurements
    logprobs: int | None = None  # tell each token's log probability, and those of so many that were the most likely

    def __post_init__(self) -> None:
        seed, logprobs = self.seed, self.logprobs
        for name, fine, must in (
            ("max_tokens", _whole(self.max_tokens) and self.max_tokens >= 1, "be a whole number >= 1"),
            ("temperature", 0 <= self.temperature <= 100, "be a number in 0 .. 100"),
            ("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1"),
            ("top_k", _whole(self.top_k) and self.top_k >= 0, "be a whole number >= 0 (0: no limit)"),
            ("seed", seed is None or (_whole(seed) and seed in INT64), "be a whole number of 64 bits"),
            ("logprobs", logprobs is None or (_whole(logprobs) and 0 <= logprobs <= MAX_LOGPROBS),
             f"be a whole number in 0 .. {MAX_LOGPROBS}"),
            ("stop", not isinstance(self.stop, str) and len(self.stop) <= MAX_STOPS, f"be at most {MAX_STOPS} texts"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "hold texts that are not empty"),
        ):  # fmt: skip
            if not fine:
                raise RequestError(f"{name} must {must}, got {getattr(self, name)!r}", name)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature == 0


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Logprob(NamedTuple):
    """A token, and the log of its probability before temperature and cuts; a token of an answer has more."""

    text: str  # what it adds, a special one by its name; U+FFFD where it is a part of a character
    value: float
    offset: int = 0  # where its text begins, counted over those of the answer's tokens
    top: tuple[Logprob, ...] = ()  # the most likely ones in its place, as many as were asked for


@dataclass(frozen=True)
class Piece:
    """What one or several steps added to an answer."""

    text: str  # may be empty, when a character is not complete yet or on the last piece
    tokens: int  # generated so far
    finish_reason: FinishReason | None = None  # of the last piece
    logprobs: tuple[Logprob, ...] = ()  # of the tokens since the last piece, if asked for


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
    refusal: ServingError | None = None  # what `error` was said by, if the request was refused after it had waited
    queued: float | None = None  # seconds from submission to its first step
    first_token: float | None = None  # seconds from submission to the first token, if there was one
    seconds: float = 0.0  # from submission to the end
    logprobs: tuple[Logprob, ...] = ()  # of its tokens, if asked for; the end of text is left out

    @property
    def completion_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)


class Generation:
    """One request for its readers, made by `Engine.submit`; its `task` is None for the base model.

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
        """Wait for the end, or raise a TimeoutError after so many seconds; None waits as long as it takes."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.id} has not ended after {timeout} s")
            assert self._completion is not None
            return self._completion

    async def wait(self) -> Completion:
        """Wait for the end, in asyncio."""
        async for _ in self:
            pass
        return self.result()

    def __iter__(self) -> Iterator[Piece]:
        for read in itertools.count():
            with self._changed:
                self._changed.wait_for(lambda: len(self._pieces) > read)  # noqa: B023, called before read changes
            yield self._pieces[read]
            if self._pieces[read].finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop may be closed already
                loop.call_soon_threadsafe(woken.set)

        self._wakers.append(wake)
        try:
            for read in itertools.count():
                while len(self._pieces) <= read:
                    woken.clear()  # a piece that comes now sets it only after this thread waits
                    await woken.wait()
                yield self._pieces[read]
                if self._pieces[read].finish_reason is not None:
                    return
        finally:
            self._wakers.remove(wake)

    def push(self, piece: Piece, completion: Completion | None = None) -> None:
        """For the engine: hand a piece to the readers; the last one with the completion."""
        with self._changed:
            if self.done:
                return
            self._completion = completion
            self._pieces.append(piece)
            self._changed.notify_all()
        for wake in list(self._wakers):
            wake()
