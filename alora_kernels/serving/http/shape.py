"""What OpenAI's replies look like, apart from their text.

In:   choices without their index; numbers of tokens.
Out:  the dictionaries that leave as JSON.
Who:  `completions` and `chat` write a `Shape`; `replies` and `stream` fill a `Head`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..request import Completion, Piece

Json = dict[str, Any]


class Shape(Protocol):
    """How one kind of reply looks."""

    prefix: str
    object: str
    chunk_object: str

    def whole(self, completion: Completion) -> Json:
        """The choice of a finished answer."""
        ...

    def opening(self) -> list[Json]:
        """Choices that a stream begins with."""
        ...

    def parts(self, piece: Piece) -> list[Json]:
        """Choices that a stream has for a piece."""
        ...


@dataclass(frozen=True)
class Head:
    """What every part of a reply repeats.

    Attributes:
        shape: of the choices.
        model: as asked.
        created: unix time.
        with_usage: whether a stream's events have the key `usage`.
        id: of the reply.
    """

    shape: Shape
    model: str
    created: int
    with_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def reply(self, choices: Sequence[Json], usage: dict[str, int]) -> Json:
        """The whole reply; the choices in order."""
        indexed = [{"index": index, **choice} for index, choice in enumerate(choices)]
        return {**self._start(self.shape.object), "choices": indexed, "usage": usage}

    def chunk(self, index: int, choice: Json) -> Json:
        """One event of a stream."""
        chunk = {**self._start(self.shape.chunk_object), "choices": [{"index": index, **choice}]}
        return chunk | {"usage": None} if self.with_usage else chunk

    def last(self, usage: dict[str, int]) -> Json:
        """The event with the numbers, which has no choice."""
        return {**self._start(self.shape.chunk_object), "choices": [], "usage": usage}

    def _start(self, kind: str) -> Json:
        return {"id": f"{self.shape.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
