"""The server's state after a round, in one file: arrays, the strategy's memory, random generators.

In:   the shared arrays and the strategy.
Out:  `<folder>/server.safetensors`; a `Checkpoint`; a strategy that continues as if nothing had happened.
Who:  the server saves after every round, before it sends the next one, and restores on resume.

What a strategy remembers is found, not listed: the attributes of its object and of the strategies it wraps. Those named
like a constructor parameter are settings: they are compared, not restored. The rest is state, as JSON and tensors,
never pickled. Flower samples nodes with `random` and draws the noise of differential privacy with NumPy's generator, so
both are saved; with their state in it the file is as secret as the arrays without noise (mode 600).
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from .. import files
from .strategies import FromRound

FORMAT = "alora-server-1"
FILE = "server.safetensors"
_SAMPLING = ("fraction_", "min_")  # settings that may change when a run goes on, say after a client has left
_NOT_STATE = ("_pending_events", "strategy")


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or applied; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """The server after a round.

    Attributes:
        round: the last finished round.
        arrays: the shared arrays, in the order they had.
        spec_hash: digest of the wire spec.
        run: token of the run.
        strategy: one entry for the strategy and each it wraps, for `restore`.
        python: state of `random`, for `restore`.
        numpy: state of NumPy's global generator, for `restore`.
    """

    round: int
    arrays: dict[str, NDArray]
    spec_hash: str
    run: str
    strategy: tuple[Mapping[str, Any], ...]
    python: Any
    numpy: Any


def save(
    folder: Path,
    *,
    round: int,
    arrays: ArrayRecord | Mapping[str, NDArray],
    spec_hash: str,
    run: str,
    strategy: Strategy,
) -> Path:
    """Put the server's state on the disk, replacing the checkpoint before.

    Args:
        folder: of the run.
        round: the round that has finished, counted from the start of the run.
        arrays: the shared arrays after it.
        spec_hash: digest of the wire spec.
        run: token of the run.
        strategy: as built, or in `FromRound`.

    Returns:
        The file.

    Raises:
        CheckpointError: the disk's reason (the checkpoint before is untouched), or state that cannot be saved.
    """
    tensors: dict[str, NDArray] = {}
    state = {
        "round": round,
        "spec_hash": spec_hash,
        "run": run,
        "arrays": _encode("arrays", dict(_numpy(arrays)), tensors),
        "strategy": [_describe(layer, tensors) for layer in _layers(strategy)],
        "python": random.getstate(),
        "numpy": _encode("NumPy's generator", list(np.random.get_state()), tensors),
    }
    path = Path(folder) / FILE
    try:
        files.write(path, tensors, {"format": FORMAT, "state": json.dumps(state)})
    except OSError as error:
        raise CheckpointError(
            f"could not write {path}: {error.strerror or error}; the checkpoint before it is untouched, make room or "
            "give access and resume"
        ) from error
    return path


def load(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: none there, a damaged one, or one of another format.
    """
    path = Path(folder) / FILE
    try:
        tensors, metadata = files.read(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no checkpoint {path}; give the folder of the run that was stopped, or start it without resuming"
        ) from None
    except (OSError, files.DamagedFileError) as error:
        raise CheckpointError(f"{error}; restore the file from a backup, or start the run anew") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!r}, this version reads {FORMAT!r}; resume with the version "
            "that wrote it, or start the run anew"
        )
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    state = json.loads(metadata["state"])
    version, words, gauss = state["python"]
    return Checkpoint(
        round=state["round"],
        arrays=_decode(state["arrays"], arrays),
        spec_hash=state["spec_hash"],
        run=state["run"],
        strategy=tuple(_decode_layer(layer, arrays) for layer in state["strategy"]),
        python=(version, tuple(words), gauss),
        numpy=tuple(_decode(state["numpy"], arrays)),
    )


def restore(checkpoint: Checkpoint, strategy: Strategy) -> None:
    """Give a fresh strategy the memory of the saved one, and set the random generators.

    Args:
        checkpoint: from `load`; may be restored more than once.
        strategy: built with the same name and options; inside `FromRound` or not.

    Raises:
        CheckpointError: another strategy or other settings than saved; nothing has been changed then.
    """
    layers = list(_layers(strategy))
    here, there = [type(layer).__name__ for layer in layers], [saved["class"] for saved in checkpoint.strategy]
    if here != there:
        raise CheckpointError(
            f"the checkpoint was written with {' around '.join(there)}, the strategy now is {' around '.join(here)}; "
            "resume with the settings of the run, or start a new one"
        )
    for layer, saved in zip(layers, checkpoint.strategy):
        _compare(layer, saved)
    for layer, saved in zip(layers, checkpoint.strategy):
        for name, value in saved["state"].items():
            setattr(layer, name, _copy(value))
        if saved["accountant"] is not None:
            layer.accountant.load_state_dict(saved["accountant"])
    random.setstate(checkpoint.python)
    np.random.set_state(checkpoint.numpy)


def _layers(strategy: Any) -> Iterator[Any]:
    """The strategy and those inside it, from the outside; `FromRound` holds no state but the offset of its own run."""
    while strategy is not None:
        if not isinstance(strategy, FromRound):
            yield strategy
        strategy = getattr(strategy, "strategy", None)


def _describe(layer: Any, tensors: dict[str, NDArray]) -> dict[str, Any]:
    accountant = getattr(layer, "accountant", None)
    if getattr(layer, "_pending_events", None):
        raise CheckpointError(
            "the strategy waits for the replies of a round; save after aggregate_train, before the next configure_train"
        )
    name = type(layer).__name__
    settings, state = _attributes(layer)
    return {
        "class": name,
        "settings": {key: _encode(f"{name}.{key}", value, tensors) for key, value in settings.items()},
        "state": {key: _encode(f"{name}.{key}", value, tensors) for key, value in state.items()},
        "accountant": accountant.state_dict() if accountant is not None else None,
    }


def _attributes(layer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes that are (settings, state), without functions, the accountant and what it is about to count."""
    parameters = set(inspect.signature(type(layer)).parameters)
    values = {
        name: value
        for name, value in vars(layer).items()
        if name not in (*_NOT_STATE, "accountant") and not callable(value)
    }
    return (
        {name: value for name, value in values.items() if name in parameters},
        {name: value for name, value in values.items() if name not in parameters},
    )


def _compare(layer: Any, saved: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings: the result would belong to neither."""
    name = saved["class"]
    settings, _ = _attributes(layer)
    for key, was in saved["settings"].items():
        if not key.startswith(_SAMPLING) and settings.get(key) != was:
            raise CheckpointError(
                f"{name}.{key} was {was!r} when the checkpoint was written and is {settings.get(key)!r} now; resume "
                "with the settings of the run, or start a new one"
            )
    accountant = getattr(layer, "accountant", None)
    was, now = saved["accountant"], accountant.state_dict() if accountant is not None else None
    if (was or {}).get("config") != (now or {}).get("config"):
        raise CheckpointError(
            f"the privacy accounting was {(was or {}).get('config')} when the checkpoint was written and is "
            f"{(now or {}).get('config')} now; resume with the settings of the run, or start a new one"
        )


def _encode(what: str, value: Any, tensors: dict[str, NDArray]) -> Any:
    """JSON for a value, with its arrays put into `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        name = f"{len(tensors)}"
        tensors[name] = np.asarray(value)
        return {"array": name}
    if isinstance(value, ArrayRecord):
        return {"record": _encode(what, dict(_numpy(value)), tensors)}
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


def _decode_layer(layer: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> dict[str, Any]:
    decoded = {
        part: {name: _decode(value, arrays) for name, value in layer[part].items()} for part in ("settings", "state")
    }
    return {"class": layer["class"], "accountant": layer["accountant"], **decoded}


def _numpy(arrays: ArrayRecord | Mapping[str, Any]) -> Iterator[tuple[str, NDArray]]:
    for key, value in arrays.items():
        yield key, value.numpy() if isinstance(value, Array) else np.asarray(value)


def _copy(value: Any) -> Any:
    """A value of its own for the strategy, which may write into it: a checkpoint is restored as often as one likes."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, ArrayRecord):
        return ArrayRecord(dict(value))
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
