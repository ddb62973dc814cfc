"""A file that is replaced as a whole, or not at all; a folder that one process writes into."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from alora_kernels.files import claimed, read, replacing, write


def test_the_draft_takes_the_files_place_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_equal_arrays_and_metadata_are_equal_bytes(tmp_path: Path) -> None:
    """safetensors draws an order of the metadata anew at each save."""
    arrays, metadata = {"w": np.ones((2, 3), "float32")}, {f"key {i}": str(i) for i in range(6)}
    for i in range(6):
        write(tmp_path / f"{i}.safetensors", arrays, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert read(tmp_path / "0.safetensors")[1] == metadata


def test_after_an_error_nothing_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), replacing(path) as draft:
        draft.write_text("half")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_one_process_s_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with claimed(tmp_path / "run"):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(ValueError, match=rf"^process {child} is writing into .*run: wait"), claimed(tmp_path / "run"):
        pytest.fail("both write")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claimed(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    with pytest.raises(KeyError), claimed(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with pytest.raises(KeyError), claimed(tmp_path / "run"):  # an error frees it too
        raise KeyError
    with claimed(tmp_path / "run"):
        pass
