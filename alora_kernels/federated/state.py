"""The private half of an adapter on the client's own disk, committed round by round.

In:   the private arrays after a round of local training.
Out:  `<folder>/<run>/<client>/round-000012.safetensors`; the arrays of the round to go on from.
Who:  `client` loads before it trains and commits before it replies.

A server that was killed in round 7 asks for round 7 again, and a client that had committed 7 must begin from 6 again:
hence `load(before=7)`, and hence at least two rounds are kept. A commit of round n also drops the rounds after n: they
belong to a course of events the server has left. Keep more than two if the server writes its checkpoint less often
than every round. The files never leave the machine and have mode 600.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from numpy.typing import NDArray
from torch import Tensor

from .. import files
from .names import NAME

FORMAT = "alora-private-1"
_FILE = re.compile(r"round-(\d{6,})\.safetensors")


class StoreError(OSError):
    """The private half could not be written or read back; the message names the file, the reason and the remedy."""


class BehindError(StoreError):
    """The server asks for a round from before what this client keeps."""


class PrivateStore:
    """The private arrays of clients, one file per round.

    Args:
        folder: made when the first round is committed.
        keep: how many rounds stay on the disk, at least 2.

    Raises:
        ValueError: keep below 2.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep must be >= 2, got {keep}: a server that is restarted asks for its last round again")
        self.folder = Path(folder)
        self.keep = keep

    def commit(self, run: str, client: str, round: int, arrays: Mapping[str, NDArray | Tensor], spec_hash: str) -> Path:
        """Put the private half on the disk, for good, before anyone is told that the round is done.

        Args:
            run: token of the run.
            client: the participant's name.
            round: the round that was trained.
            arrays: of any dtype and shape; empty for a method without private parts.
            spec_hash: digest of the wire spec.

        Returns:
            The file.

        Raises:
            StoreError: the disk's reason; what was committed before is untouched.
            ValueError: a name that is no file name, or a negative round.
        """
        if round < 0:
            raise ValueError(f"round must be >= 0, got {round}")
        path = self._folder(run, client) / f"round-{round:06d}.safetensors"
        try:
            files.write(path, arrays, _label(run, client, round, spec_hash))
        except OSError as error:
            raise StoreError(
                f"could not commit {path}: {_reason(error)}; earlier rounds are untouched, make room or give access "
                f"to {self.folder} and let the client take part again"
            ) from error
        try:
            self._prune(run, client, round)
        except OSError as error:
            raise StoreError(
                f"{path} is committed but other rounds could not be deleted: {_reason(error)}; give access to "
                f"{path.parent}"
            ) from error
        return path

    def load(self, run: str, client: str, before: int, spec_hash: str) -> tuple[int, dict[str, Tensor]] | None:
        """The private half to go on from when the server asks for round `before`.

        Returns:
            The latest committed round below `before` and its arrays; None if nothing was committed before it: with
            fewer than `keep` rounds on the disk none was ever dropped.

        Raises:
            StoreError: only later rounds are there; a damaged file; a file of another spec, run or client.
            ValueError: a name that is no file name.
        """
        try:
            rounds = self._rounds(run, client)
        except OSError as error:
            raise StoreError(
                f"could not read {self._folder(run, client)}: {_reason(error)}; give access to it"
            ) from error
        if not rounds:
            return None
        earlier = [n for n in rounds if n < before]
        if not earlier and len(rounds) < self.keep:
            return None  # the client's first round is asked for again
        if not earlier:
            kept = ", ".join(map(str, sorted(rounds)))
            raise BehindError(
                f"client {client} has rounds {kept} but the server asks for round {before}: its checkpoint is older "
                f"than what this client keeps; resume from a later checkpoint, or delete {self._folder(run, client)} "
                f"to begin the private half anew (keep={self.keep} rounds stay; raise it above the rounds between "
                "two checkpoints)"
            )
        path = rounds[max(earlier)]
        return max(earlier), self._read(path, _label(run, client, max(earlier), spec_hash), before)

    def _read(self, path: Path, label: Mapping[str, str], before: int) -> dict[str, Tensor]:
        try:
            tensors, found = files.read(path)
        except (OSError, files.DamagedFileError) as error:
            raise StoreError(
                f"{error}; restore {path} from a backup, or delete it to go into round {before} from the round before "
                "it, or from a fresh private half if there is none"
            ) from error
        for key, wanted in label.items():
            if found.get(key) != wanted:
                raise StoreError(
                    f"{path} was written with {key} {found.get(key)!r}, asked for is {wanted!r}; private halves do not "
                    "move between runs, clients or settings: use another folder or start a new run"
                )
        return tensors

    def _folder(self, run: str, client: str) -> Path:
        for what, name in (("run", run), ("client", client)):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{what} must be 1 to 64 letters, digits, '.', '_' or '-' and begin with a letter or digit, "
                    f"got {name!r}"
                )
        return self.folder / run / client

    def _rounds(self, run: str, client: str) -> dict[int, Path]:
        folder = self._folder(run, client)
        if not folder.exists():
            return {}
        found = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def _prune(self, run: str, client: str, newest: int) -> None:
        rounds = self._rounds(run, client)
        kept = sorted((n for n in rounds if n <= newest), reverse=True)[: self.keep]
        for n, path in rounds.items():
            if n not in kept:
                path.unlink(missing_ok=True)  # another process may have been faster


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _label(run: str, client: str, round: int, spec_hash: str) -> dict[str, str]:
    return {"format": FORMAT, "run": run, "client": client, "round": str(round), "spec": spec_hash}
