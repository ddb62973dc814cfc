"""What survives a kill: a client's private half, and the server's arrays, strategy and random generators.

`PrivateStore` is the client's: it loads before it trains and commits before it replies. `save`, `load` and `restore`
are the server's, after every round and before the next. Files have mode 600; with the generators that sample nodes and
draw the noise of privacy in it, a checkpoint is as secret as arrays without noise.
"""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from .. import files
from ..tensor_file import DamagedFileError
from ..text import NAME

CLIENTS = "clients"  # folder of the private halves, of clients on this machine
CHECKPOINT = "server.safetensors"
FINAL = "final.safetensors"  # a client's finished adapter, private half included; on the server the shared half
PRIVATE_FORMAT, SERVER_FORMAT = "alora-private-1", "alora-server-1"
KEPT = 2  # rounds of a private half: the server writes its checkpoint after each
_FILE = re.compile(r"round-(\d{6,})\.safetensors")
_SAMPLING = ("fraction_", "min_")  # settings that may change when a run goes on, say after a client has left
_NOT_STATE = ("_pending_events", "strategy", "accountant")


class StoreError(OSError):
    """The private half could not be written or read back; the message names the file, the reason and the remedy."""


class BehindError(StoreError):
    """The server asks for a round from before what this client keeps."""


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or applied; the message says why and what to do."""


@contextmanager
def _disk(kind: type[OSError], what: str, remedy: str) -> Iterator[None]:
    """Errors of the disk as errors of ours."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}; {remedy}") from error


class PrivateStore:
    """The private arrays of clients, one file per round: `<folder>/<run>/<client>/round-000012.safetensors`.

    A server that was killed in round 7 asks for round 7 again, and a client that had committed 7 must begin from 6
    again: so two rounds stay on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def commit(self, run: str, client: str, round: int, arrays: Mapping[str, NDArray | Tensor], spec_hash: str) -> Path:
        """Put the private half on the disk, for good, before anyone is told that the round is done; gives the file.

        Rounds after this one are dropped: they belong to a course of events the server has left. `arrays` is empty for
        a method without private parts. StoreError: the disk's reason; what was committed before is untouched then.
        ValueError: a name that is no file name, or a negative round.
        """
        if round < 0:
            raise ValueError(f"round must be >= 0, got {round}")
        folder = self._folder(run, client)
        path = folder / f"round-{round:06d}.safetensors"
        remedy = f"make room or give access to {self.folder} and let the client take part again"
        with _disk(StoreError, f"could not commit {path}", f"earlier rounds are untouched, {remedy}"):
            files.write(path, arrays, _label(run, client, round, spec_hash))
        what = f"{path} is committed but other rounds could not be deleted"
        with _disk(StoreError, what, f"give access to {folder}"):
            rounds = _rounds(folder)
            for n in rounds.keys() - sorted(n for n in rounds if n <= round)[-KEPT:]:
                rounds[n].unlink(missing_ok=True)  # another process may have been faster
        return path

    def load(self, run: str, client: str, before: int, spec_hash: str) -> tuple[int, dict[str, Tensor]] | None:
        """The latest round committed below `before`, which the server asks for, and its arrays.

        None if nothing was committed before it: with fewer than two rounds on the disk none was ever dropped.
        BehindError if only later rounds are there, StoreError for a damaged file or one of another spec, run or client.
        """
        folder = self._folder(run, client)
        with _disk(StoreError, f"could not read {folder}", "give access to it"):
            rounds = _rounds(folder)
        latest = max((n for n in rounds if n < before), default=None)
        if latest is not None:
            return latest, self._read(rounds[latest], _label(run, client, latest, spec_hash), before)
        if len(rounds) < KEPT:
            return None  # nothing yet, or the client's first round is asked for again
        kept = ", ".join(map(str, sorted(rounds)))
        raise BehindError(
            f"client {client} has rounds {kept} but the server asks for round {before}: its checkpoint is older "
            f"than what this client keeps; resume from a later checkpoint, or delete {folder} "
            f"to begin the private half anew ({KEPT} rounds stay)"
        )

    def _read(self, path: Path, label: Mapping[str, str], before: int) -> dict[str, Tensor]:
        try:
            tensors, found = files.read(path)
        except (OSError, DamagedFileError) as error:
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


def _rounds(folder: Path) -> dict[int, Path]:
    if not folder.exists():
        return {}
    found = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def _label(run: str, client: str, round: int, spec_hash: str) -> dict[str, str]:
    return {"format": PRIVATE_FORMAT, "run": run, "client": client, "round": str(round), "spec": spec_hash}


@dataclass(frozen=True)
class Checkpoint:
    """The server after a round."""

    round: int  # the last finished one
    arrays: dict[str, NDArray]  # the shared ones, in the order they had
    spec_hash: str  # digest of the wire spec
    run: str  # token
    strategy: tuple[Mapping[str, Any], ...]  # one entry for the strategy and each it wraps
    python: Any  # the generator's state
    numpy: Any  # the generator's state


def save(
    folder: Path,
    *,
    round: int,
    arrays: ArrayRecord | Mapping[str, NDArray],
    spec_hash: str,
    run: str,
    strategy: Strategy,
) -> Path:
    """Put the server's state on the disk, replacing the checkpoint before; gives the file.

    Arguments as in `Checkpoint`; the strategy as built. CheckpointError: the disk's reason (the checkpoint before is
    untouched), or state that cannot be saved.
    """
    tensors: dict[str, NDArray] = {}
    state = {
        "round": round,
        "spec_hash": spec_hash,
        "run": run,
        "arrays": _encode("arrays", dict(arrays), tensors),
        "strategy": [_describe(layer, tensors) for layer in layers(strategy)],
        "python": random.getstate(),
        "numpy": _encode("NumPy's generator", np.random.get_state(), tensors),
    }
    path = Path(folder) / CHECKPOINT
    remedy = "the checkpoint before it is untouched, make room or give access and resume"
    with _disk(CheckpointError, f"could not write {path}", remedy):
        files.write(path, tensors, {"format": SERVER_FORMAT, "state": json.dumps(state)})
    return path


def load(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; CheckpointError if there is none, a damaged one, or one of another format."""
    path = Path(folder) / CHECKPOINT
    try:
        tensors, metadata = files.read(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no checkpoint {path}; give the folder of the run that was stopped, or start it without resuming"
        ) from None
    except (OSError, DamagedFileError) as error:
        raise CheckpointError(f"{error}; restore the file from a backup, or start the run anew") from error
    if metadata.get("format") != SERVER_FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!r}, this version reads {SERVER_FORMAT!r}; resume with the "
            "version that wrote it, or start the run anew"
        )
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    state = json.loads(metadata["state"])
    for layer in state["strategy"]:
        for part in ("settings", "state"):
            layer[part] = {name: _decode(value, arrays) for name, value in layer[part].items()}
    version, words, gauss = state["python"]
    return Checkpoint(
        round=state["round"],
        arrays=_decode(state["arrays"], arrays),
        spec_hash=state["spec_hash"],
        run=state["run"],
        strategy=tuple(state["strategy"]),
        python=(version, tuple(words), gauss),
        numpy=tuple(_decode(state["numpy"], arrays)),
    )


def restore(checkpoint: Checkpoint, strategy: Strategy) -> None:
    """Give a fresh strategy the memory of the saved one, and set the random generators; may be done more than once.

    CheckpointError if the strategy, or its settings, are others than saved; nothing has been changed then.
    """
    own = list(layers(strategy))
    here, there = [type(layer).__name__ for layer in own], [saved["class"] for saved in checkpoint.strategy]
    if here != there:
        raise CheckpointError(
            f"the checkpoint was written with {' around '.join(there)}, the strategy now is {' around '.join(here)}; "
            "resume with the settings of the run, or start a new one"
        )
    for layer, saved in zip(own, checkpoint.strategy):
        _compare(layer, saved)
    for layer, saved in zip(own, checkpoint.strategy):
        for name, value in saved["state"].items():
            setattr(layer, name, deepcopy(value))  # the strategy may write into it
        if saved["accountant"] is not None:
            layer.accountant.load_state_dict(saved["accountant"])
    random.setstate(checkpoint.python)
    np.random.set_state(checkpoint.numpy)


def layers(strategy: Any) -> Iterator[Any]:
    """The strategy and those inside it, from the outside."""
    while strategy is not None:
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def _describe(layer: Any, tensors: dict[str, NDArray]) -> dict[str, Any]:
    name = type(layer).__name__
    encoded = {
        part: {key: _encode(f"{name}.{key}", value, tensors) for key, value in values.items()}
        for part, values in _attributes(layer).items()
    }
    return {"class": name, **encoded, "accountant": _accounting(layer)}


def _accounting(layer: Any) -> Any:
    accountant = getattr(layer, "accountant", None)
    return accountant.state_dict() if accountant is not None else None


def _attributes(layer: Any) -> dict[str, dict[str, Any]]:
    """What a strategy remembers is found, not listed: attributes named like a constructor parameter are settings."""
    parameters = inspect.signature(type(layer)).parameters
    found: dict[str, dict[str, Any]] = {"settings": {}, "state": {}}
    for name, value in vars(layer).items():
        if name not in _NOT_STATE and not callable(value):
            found["settings" if name in parameters else "state"][name] = value
    return found


def _compare(layer: Any, saved: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings: the result would belong to neither."""
    mine = _attributes(layer)["settings"]
    fixed = {key: was for key, was in saved["settings"].items() if not key.startswith(_SAMPLING)}
    pairs = {f"{saved['class']}.{key}": (was, mine.get(key)) for key, was in fixed.items()}
    configs = [(accounting or {}).get("config") for accounting in (saved["accountant"], _accounting(layer))]
    for what, (was, now) in {**pairs, "the privacy accounting": configs}.items():
        if was != now:
            raise CheckpointError(
                f"{what} was {was!r} when the checkpoint was written and is {now!r} now; resume with the settings of "
                "the run, or start a new one"
            )


def _encode(what: str, value: Any, tensors: dict[str, NDArray]) -> Any:
    """JSON for a value, with its arrays put into `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Array):
        value = value.numpy()
    if isinstance(value, np.ndarray | np.generic):
        name = f"{len(tensors)}"
        tensors[name] = np.asarray(value)
        return {"array": name}
    if isinstance(value, ArrayRecord):
        return {"record": _encode(what, dict(value), tensors)}
    if isinstance(value, list | tuple):
        return [_encode(what, item, tensors) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _encode(f"{what}[{key!r}]", item, tensors)] for key, item in value.items()]}
    raise CheckpointError(
        f"{what} is a {type(value).__name__}, which a checkpoint cannot hold; keep numbers, strings, arrays, or lists "
        "and dictionaries of them in the strategy"
    )


def _decode(saved: Any, arrays: Mapping[str, NDArray]) -> Any:
    """The value that `_encode` was given; tuples come back as lists, scalars of NumPy as arrays of shape []."""
    if isinstance(saved, list):
        return [_decode(item, arrays) for item in saved]
    if not isinstance(saved, dict):
        return saved
    ((kind, content),) = saved.items()
    if kind == "array":
        return arrays[content]
    if kind == "record":
        return ArrayRecord({key: Array(value) for key, value in _decode(content, arrays).items()})
    return {key: _decode(value, arrays) for key, value in content}
