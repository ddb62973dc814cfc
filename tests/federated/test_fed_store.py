"""The private store: bit-exact, whole or absent, and back to the round the server asks for."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as as_safetensors

from alora_kernels import files as atomic
from alora_kernels.federated.state import PrivateStore, StoreError
from alora_kernels.tensor_file import DamagedFileError

SPEC = "c0ffee"


@pytest.fixture
def store(tmp_path: Path) -> PrivateStore:
    return PrivateStore(tmp_path / "private")


def files(store: PrivateStore, run: str = "run", client: str = "ada") -> list[str]:
    return sorted(path.name for path in (store.folder / run / client).iterdir())


def commit(store: PrivateStore, round_: int, value: float | None = None) -> Path:
    arrays = {"A": np.full((2, 3), round_ if value is None else value, np.float32)}
    return store.commit("run", "ada", round_, arrays, SPEC)


def loaded(store: PrivateStore, before: int) -> tuple[int, float]:
    found = store.load("run", "ada", before, SPEC)
    assert found is not None
    return found[0], found[1]["A"][0, 0].item()


def test_every_dtype_and_layout_comes_back_bit_for_bit(store: PrivateStore) -> None:
    rng = np.random.default_rng(0)
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    special = np.array([np.nan, -np.nan, np.inf, -0.0, 5e-324, 1e-45])
    given_ = {
        "f32": rng.normal(size=(3, 5)).astype(np.float32),
        "f64": special,
        "bf16": base.bfloat16(),
        "f16": base.half(),
        "transposed": base.T,
        "shared memory": base,  # safetensors refuses two tensors over one storage
        "numpy transposed": rng.normal(size=(3, 5)).T,
        "scalar": np.float32(3.5),
        "numpy scalar array": np.asarray(2.5),
        "empty": torch.empty(0, 7, dtype=torch.bfloat16),
        "bits": torch.tensor([True, False]),
        "count": np.array([2**40], dtype=np.int64),
        "trained": torch.nn.Parameter(base.clone()),
    }
    store.commit("run", "ada", 1, given_, SPEC)
    found = store.load("run", "ada", 2, SPEC)
    assert found is not None and found[0] == 1
    assert set(found[1]) == set(given_)
    for key, value in given_.items():
        wanted = torch.as_tensor(np.array(value)) if not isinstance(value, torch.Tensor) else value.detach()
        got = found[1][key]
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), key
        assert got.flatten().view(torch.uint8).tolist() == wanted.contiguous().flatten().view(torch.uint8).tolist(), key


def test_a_method_without_private_parts_commits_and_loads(store: PrivateStore) -> None:
    store.commit("run", "ada", 3, {}, SPEC)
    assert store.load("run", "ada", 4, SPEC) == (3, {})


def test_nothing_committed_is_none_also_for_a_neighbour(store: PrivateStore) -> None:
    assert store.load("run", "ada", 1, SPEC) is None
    commit(store, 1)
    assert store.load("run", "bob", 2, SPEC) is None
    assert store.load("other", "ada", 2, SPEC) is None


def test_the_latest_rounds_stay_and_a_round_asked_for_again_begins_from_the_one_before(store: PrivateStore) -> None:
    for n in range(1, 8):
        path = commit(store, n)
    assert files(store) == ["round-000006.safetensors", "round-000007.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # for its owner only
    assert loaded(store, 8) == (7, 7)
    assert loaded(store, 7) == (6, 6)
    commit(store, 7, value=70)
    assert loaded(store, 8) == (7, 70)
    assert loaded(store, 7) == (6, 6)


def test_a_commit_drops_the_rounds_the_server_has_left(store: PrivateStore) -> None:
    commit(store, 5)
    assert loaded(store, 9) == (5, 5)  # a client that missed rounds goes on from its last
    commit(store, 7)
    assert loaded(store, 6) == (5, 5)
    commit(store, 6)
    assert files(store) == ["round-000005.safetensors", "round-000006.safetensors"]
    assert loaded(store, 8) == (6, 6)  # not the 7 of another course of events


def test_only_later_rounds_is_an_error_that_names_them(store: PrivateStore) -> None:
    commit(store, 7)
    commit(store, 8)
    with pytest.raises(StoreError, match=r"client ada has rounds 7, 8 but the server asks for round 5.*resume from"):
        store.load("run", "ada", 5, SPEC)
    assert len(files(store)) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "garbage", "foreign", "header"])
def test_a_damaged_file_is_named_and_left_alone(store: PrivateStore, damage: str) -> None:
    commit(store, 6)
    path = commit(store, 7)
    data = path.read_bytes()
    damaged = {
        "cut": data[:-5],
        "bit": data[:-1] + bytes([data[-1] ^ 1]),
        "empty": b"",
        "garbage": os.urandom(300),
        "foreign": as_safetensors({"A": torch.zeros(2, 3)}),
        "header": data.replace(b'"round":"7"', b'"round":"9"'),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(StoreError, match=r"round-000007.*delete it to go into round 8 from the round before"):
        store.load("run", "ada", 8, SPEC)
    assert path.exists()
    path.unlink()
    assert loaded(store, 8) == (6, 6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_single_changed_byte_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    atomic.write(path, {"A": torch.arange(6.0), "B": torch.zeros(2, 2)}, {"round": "7"})
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        tensors, metadata = atomic.read(path)
    except DamagedFileError:
        return
    assert metadata == {"round": "7"}  # white space in the header may change without changing anything
    assert tensors["A"].tolist() == [0, 1, 2, 3, 4, 5] and tensors["B"].tolist() == [[0, 0], [0, 0]]


def test_other_spec_run_or_client_is_refused(store: PrivateStore) -> None:
    path = commit(store, 1)
    with pytest.raises(StoreError, match="written with spec 'c0ffee', asked for is 'decade'"):
        store.load("run", "ada", 2, "decade")
    other = store.folder / "run" / "bob" / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="written with client 'ada', asked for is 'bob'"):
        store.load("run", "bob", 2, SPEC)
    renamed = path.with_name("round-000003.safetensors")
    path.rename(renamed)
    with pytest.raises(StoreError, match="written with round '1', asked for is '3'"):
        store.load("run", "ada", 4, SPEC)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "-rf", "a b", "ä", "a\n", "x" * 65, ".hidden", "a\0b"])
def test_names_that_are_no_file_names(store: PrivateStore, name: str) -> None:
    for run, client, what in ((name, "ada", "run"), ("run", name, "client")):
        with pytest.raises(ValueError, match=f"{what} must be 1 to 64"):
            store.commit(run, client, 1, {}, SPEC)
        with pytest.raises(ValueError, match=f"{what} must be 1 to 64"):
            store.load(run, client, 1, SPEC)
    assert not store.folder.exists()


def test_arguments_out_of_range(store: PrivateStore) -> None:
    with pytest.raises(ValueError, match="round must be >= 0"):
        commit(store, -1)
    with pytest.raises(TypeError, match="names has dtype"):
        store.commit("run", "ada", 1, {"names": np.array(["x"])}, SPEC)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_rounds_and_no_litter(
    store: PrivateStore, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    commit(store, 1)
    commit(store, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(StoreError, match=r"could not commit .*round-000003.*No space left on device.*make room"):
            commit(store, 3)
    assert files(store) == ["round-000001.safetensors", "round-000002.safetensors"]
    assert loaded(store, 3) == (2, 2)


def test_a_write_that_really_stops_half_way(store: PrivateStore) -> None:
    """The kernel refuses bytes beyond 64 kB per file: the round before survives and the half file is gone."""
    commit(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(StoreError, match="could not commit .*File too large"):
            store.commit("run", "ada", 2, {"A": np.ones(100_000)}, SPEC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(store) == ["round-000001.safetensors"]
    assert loaded(store, 2) == (1, 1)


def test_a_folder_that_cannot_be_made_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = PrivateStore(tmp_path / "file")
    with pytest.raises(StoreError, match="could not commit"):
        commit(store, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ada").write_text("in the way")
    with pytest.raises(StoreError, match="could not read"):
        PrivateStore(tmp_path).load("run", "ada", 1, SPEC)


def test_what_killed_writers_left_is_swept_after_an_hour(store: PrivateStore) -> None:
    folder = commit(store, 1).parent
    old, new = folder / ".round-000001.safetensors.x.tmp", folder / ".round-000002.safetensors.y.tmp"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    commit(store, 2)
    assert not old.exists() and new.exists()


LOOP = """
import sys, numpy as np
from pathlib import Path
from alora_kernels.federated.state import PrivateStore
store = PrivateStore(Path(sys.argv[1]))
for n in range(*map(int, sys.argv[2:])):
    store.commit("run", "ada", n, {"A": np.full((200, 200), n, np.float32)}, "s")
    print(n, flush=True)
"""


def test_a_client_killed_at_any_moment_has_whole_rounds(tmp_path: Path) -> None:
    for attempt in range(3):
        worker = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path), "1", "1000000"], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        last = [int(worker.stdout.readline()) for _ in range(5 + 7 * attempt)][-1]
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        found = PrivateStore(tmp_path).load("run", "ada", 10**6, "s")
        assert found is not None and found[0] >= last
        assert (found[1]["A"] == found[0]).all()


def test_two_processes_do_not_corrupt_each_other(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path), *bounds], stdout=subprocess.DEVNULL)
        for bounds in (("1", "120", "2"), ("2", "120", "2"))
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    store = PrivateStore(tmp_path)
    assert all(name.endswith(".safetensors") for name in files(store))
    for before in [int(name[6:12]) + 1 for name in files(store)]:
        found = store.load("run", "ada", before, "s")
        assert found is not None and found[0] == before - 1
        assert (found[1]["A"] == found[0]).all()
