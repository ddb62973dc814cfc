"""What came of a run, read from its ledger.

In:   the last shared arrays and the ledger's events.
Out:  an `Outcome`: final metrics, rejections, bytes.
Who:  `server.serve` returns it; users and studies read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        status: "finished", or "stopped" with everything up to the last round saved.
        reason: why it stopped.
        rounds: rounds completed.
        arrays: the shared arrays after the last of them.
        events: the whole ledger.
    """

    status: str
    reason: str | None
    rounds: int
    arrays: dict[str, NDArray] = field(repr=False)
    events: list[dict[str, Any]] = field(repr=False)

    @property
    def final(self) -> dict[str, dict[str, float]]:
        """Client -> metrics of the final shared arrays with its private half, on its own test data."""
        return {e["client"]: e["metrics"] for e in self._clients("evaluate") if e["accepted"]}

    @property
    def rejections(self) -> list[dict[str, Any]]:
        """The events of replies that were not used."""
        return [e for e in self._clients("train") if not e["accepted"]]

    @property
    def bytes_up(self) -> int:
        """Bytes of arrays that clients sent, in all training rounds."""
        return sum(e["bytes_up"] for e in self._clients("train"))

    @property
    def bytes_down(self) -> int:
        """Bytes of arrays that were sent to clients, in all training rounds."""
        return sum(e["bytes_down"] for e in self._clients("train"))

    def _clients(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "client" and e["kind"] == kind]
