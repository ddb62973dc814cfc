"""Safetensors files read without mapping: as safetensors reads them, and refused where they lie or change."""

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alora_kernels import tensor_file
from alora_kernels.tensor_file import DTYPES, ChangedFileError, DamagedFileError, TensorFile, in_order, sums, verify

TENSORS = {
    **{name: torch.arange(12).reshape(3, 2, 2).to(dtype) for name, dtype in DTYPES.items()},
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "t.safetensors", metadata={"format": "pt"} | sums(TENSORS))
    return tmp_path / "t.safetensors"


def test_numbers_are_those_that_safetensors_reads(file, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 16)
    with TensorFile(file) as opened:
        assert set(opened.keys()) == set(TENSORS) and opened.metadata["format"] == "pt"
        for name, tensor in load_file(file).items():
            own = opened.read(name)
            assert own.dtype == tensor.dtype and opened.shape(name) == tuple(tensor.shape)
            assert torch.equal(own, tensor)
            assert torch.equal(torch.cat([*opened.pieces(name), tensor.flatten()[:0]]), tensor.flatten())
            if tensor.dim() == 3:
                assert torch.equal(opened.read(name, 1), tensor[1])
            assert opened.finite(name)


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(offsets=(0, 4))}, 4),  # not what two numbers take
        ({"a": entry(), "b": entry()}, 8),  # one over the other
        ({"a": entry(offsets=(8, 16))}, 16),  # a gap before
        ({"a": entry()}, 12),  # more behind
        ({"a": entry()}, 4),
        ({"a": entry(shape=(-2,), offsets=(0, -8))}, 0),
        ({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, 8),
        ({"a": entry(shape=(2.0,))}, 8),
        ({"a": entry(shape=(True, 2))}, 8),
        ({"a": entry(offsets=(0,))}, 8),
        ({"a": entry(dtype=None)}, 8),
        ({"a": 1}, 0),
        ([], 0),
        (b"[" * 4000, 0),
        (b"\xff\xfe{}", 0),
        ({"__metadata__": {"a": 1}}, 0),
        ({"__metadata__": []}, 0),
        ({"a": entry(dtype="F128", offsets=(8, 0))}, 8),
    ],
)
def test_headers_that_lie_are_refused_before_a_number_is_read(tmp_path, header, size):
    with pytest.raises(DamagedFileError):
        TensorFile(written(tmp_path / "t", header, bytes(size)))


@pytest.mark.parametrize("length", [0, 1, 9, 1 << 40, (1 << 64) - 1])
def test_a_header_must_lie_in_the_file(tmp_path, length):
    with pytest.raises(DamagedFileError, match="cut short, or no safetensors file"):
        TensorFile(written(tmp_path / "t", {}, length=length))


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_file_too_short_for_any_header(tmp_path, size):
    (tmp_path / "t").write_bytes(bytes(size))
    with pytest.raises(DamagedFileError, match="cut short, or no safetensors file") as caught:
        TensorFile(tmp_path / "t")
    assert not isinstance(caught.value, ChangedFileError)


def test_what_safetensors_refuses_is_refused_and_what_it_reads_is_the_same(file, tmp_path):
    drawn, whole, read = random.Random(0), file.read_bytes(), 0
    for number in range(400):
        data = bytearray(whole)
        for _ in range(drawn.randint(1, 3)):
            data[drawn.randrange(1500)] = drawn.choice([0, 32, 34, 44, 48, 57, 91, 123, drawn.randrange(256)])
        path = tmp_path / f"{number % 2}"
        path.write_bytes(data[: drawn.choice([len(data), drawn.randrange(len(data))])] if number % 5 == 0 else data)
        try:
            theirs = load_file(path)
        except (SafetensorError, ValueError):
            theirs = None
        try:
            with TensorFile(path) as opened:
                ours = {name: opened.read(name) for name in opened.keys()}  # noqa: SIM118
        except DamagedFileError:
            continue
        if theirs is not None:
            read += 1
            assert ours.keys() == theirs.keys()
            assert all(ours[name].isnan().any() or torch.equal(ours[name], theirs[name]) for name in ours)
    assert read > 20


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 1]))


def test_a_changed_bit_is_found_by_name(file):
    verify(file)
    flip(file, -1)
    with pytest.raises(DamagedFileError, match="does not have the SHA-256 it was written with"):
        verify(file)


def test_a_tensor_that_is_gone_is_damage(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    save_file({"a": tensors["a"]}, file := tmp_path / "file.safetensors", metadata=sums(tensors))
    with pytest.raises(DamagedFileError, match="b is gone, which it was written with"):
        verify(file)


def test_a_file_without_checksums_is_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "t", metadata={"sha256": "[not json"})
    with TensorFile(tmp_path / "t") as opened:
        assert opened.sums == {} and opened.finite("a")


CHANGES: list[Callable[[Path], object]] = [
    lambda path: flip(path, -1),
    lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: path.write_bytes(path.read_bytes()),
]


@pytest.mark.parametrize("change", CHANGES)
def test_who_writes_into_an_open_file_is_found_out(file, change):
    time.sleep(0.03)
    with pytest.raises(ChangedFileError), TensorFile(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            opened.read(name)
        change(file)


def test_a_file_that_is_cut_short_while_it_is_read_does_not_end_the_process(file):
    with pytest.raises(ChangedFileError, match="cut short"), TensorFile(file) as opened:
        os.truncate(file, 100)
        opened.read("F64")


def test_another_file_in_its_place_changes_nothing_for_who_has_opened_it(file):
    with TensorFile(file) as opened:
        other = file.with_name("other")
        save_file({"x": torch.zeros(1)}, other)
        os.replace(other, file)
        assert torch.equal(opened.read("F64"), TENSORS["F64"])


def test_equal_tensors_are_equal_bytes(tmp_path):
    """safetensors orders two keys of metadata anew at every save."""
    found = set()
    for turn in range(12):
        path = tmp_path / str(turn)
        save_file(TENSORS, path, metadata={"format": "pt"} | sums(TENSORS))
        in_order(path)
        verify(path)
        assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in TENSORS.items())
        found.add(path.read_bytes())
    assert len(found) == 1
