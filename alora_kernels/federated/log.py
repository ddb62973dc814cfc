"""The ledger: everything that happened in a run, one JSON object a line, written by the server alone.

In:   events: the guard's ("client", "round"), the server's ("run", "privacy", "end").
Out:  a JSONL file that `live`, `plot` and `summary` read, in this process or in another.
Who:  `server` writes it; the command line and the examples read it.

A reader may come at any time: each line goes out in one write, a failed write is taken back, and a resumed run cuts the
file by an atomic rename. Numbers that are not finite become null: strict JSON has no NaN.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from .summary import Event, measured, scores

FIELDS = {"train": ("before", "after"), "evaluate": ("metrics",)}  # what a kind of round measures


class Ledger:
    """Appends events to one file.

    "round" events get the scores of the accepted clients' main metric, as `summary.scores`: under "before" and "after"
    for training, under "metrics" for an evaluation. The baseline is "before" of the first training round, the untuned
    model. Without a "run" event, which names the metric, there are no scores.

    Args:
        path: the file; its folder is made.
        resume_from: None for a new file; k to keep what an earlier process wrote up to round k and drop the rest.

    Raises:
        FileExistsError: the file is there and resume_from is None.
        FileNotFoundError: it is not there and resume_from is a round.
        ValueError: resume_from is negative or beyond the file's last round, or the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_from: int | None = None) -> None:
        self.path = Path(path)
        self._metric: str | None = None
        self._higher = True
        self._first: int | None = None  # the first training round, whose "before" is the baseline
        self._baseline: dict[str, float] = {}
        self._clients: list[Event] = []  # of the round in progress
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_from is None:
            try:
                self.path.touch(exist_ok=False)
            except FileExistsError:
                why = (
                    f"{self.path} is the ledger of an earlier run: continue it with --resume, or choose another output"
                )
                raise FileExistsError(why) from None
        else:
            for event in _cut(self.path, resume_from):
                self._see(event)
        # "a": after a failed write is cut off, the next goes to the new end; unbuffered: one write call per line
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, event: Event) -> None:
        """Append one event as a line, with the time.

        Args:
            event: JSON values and NumPy scalars under "event" and other names.

        Raises:
            ValueError: the event has no name under "event".
            OSError: the line could not be written, for instance because the disk is full; the file is as before.
        """
        if not isinstance(event.get("event"), str):
            raise ValueError(f"an event needs its name under 'event', got {sorted(map(str, event))}")
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line |= {k: v for k, v in _plain({**event, **self._scores(event)}).items() if k != "time"}
        self._append(_encode(line), sync=event["event"] != "client")
        self._see(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _scores(self, event: Event) -> dict[str, Any]:
        if event["event"] != "round" or self._metric is None:
            return {}
        of_round = [e for e in self._clients if (e["kind"], e["round"]) == (event["kind"], event["round"])]
        return {
            name: scores(measured(of_round, name, self._metric), self._baseline, self._higher)
            for name in FIELDS[event["kind"]]
        }

    def _see(self, event: Event) -> None:
        """What later scores need of an event that is in the file."""
        if event["event"] == "run":
            self._metric, self._higher = event.get("metric"), event.get("higher_is_better", True)
        elif event["event"] == "round":
            self._clients = []
        elif event["event"] == "client":
            self._clients.append(event)
            if event["kind"] == "train" and self._metric is not None:
                self._first = event["round"] if self._first is None else self._first
                if event["round"] == self._first:
                    self._baseline |= measured([event], "before", self._metric)

    def _append(self, line: bytes, *, sync: bool) -> None:
        start = os.fstat(self._file.fileno()).st_size
        try:
            if (written := self._file.write(line)) != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes fitted")
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            try:
                self._file.truncate(start)
            except OSError:
                self._file.close()  # no whole line may follow half a one
            why = f"the ledger could not be written ({error.strerror}): make room, then continue with --resume"
            raise OSError(error.errno, why, str(self.path)) from error


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a ledger, of a run in progress too.

    Args:
        path: the file.

    Returns:
        Events in the order of their writing; half a last line, which a running or killed process leaves, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is no event; the message has its number.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_decode(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no event of a ledger: {error}") from None
    try:
        return [*events, _decode(rest)]  # whole but for its line end
    except ValueError:
        return events


def _decode(line: bytes) -> dict[str, Any]:
    event = json.loads(line.decode("ascii"), parse_constant=_refuse)
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("an object with a name under 'event' is expected")
    return event


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _encode(event: Event) -> bytes:
    return json.dumps(event, allow_nan=False).encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    """JSON values only: NumPy scalars unpacked, null for what is not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, last: int) -> list[dict[str, Any]]:
    """Drop what came after a round, by an atomic rename, and return the rest."""
    events = read(path)
    reached = max((e["round"] for e in events if e["event"] == "round"), default=0)
    if not 0 <= last <= reached:
        raise ValueError(f"resume_from={last}, but {path} has rounds 1 to {reached}: resume with the run's own ledger")
    kept = [e for e in events if _stays(e, last)]
    while kept and kept[-1]["event"] == "client":
        kept.pop()  # their round never got its closing line, so it is played again
    with files.replacing(path) as draft, open(draft, "wb") as file:
        file.writelines(map(_encode, kept))
        file.flush()
        os.fsync(file.fileno())
    return kept


def _stays(event: Event, last: int) -> bool:
    """Whether an event came before the checkpoint of that round; an evaluation of the round comes after it."""
    number = event.get("round") or event.get("resumed_at") or 0
    return event["event"] != "end" and number + (event.get("kind") == "evaluate") <= last
