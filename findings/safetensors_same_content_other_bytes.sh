#!/usr/bin/env bash
# safetensors: the same tensors with the same metadata are saved twelve times.
# Guess: equal content gives equal bytes, so a file's hash tells whether an adapter has changed (caches, registries,
# reproducible builds). It holds for PEFT's `{"format": "pt"}`.
# Seen: from two keys of metadata on the bytes differ from save to save, in one process too; tensors and metadata read back
# equal. The order of the keys is drawn anew each time. Compare tensors and metadata, never the file's hash.
# Guard: our writer orders its metadata, equal adapters are equal bytes
# (tests/test_tensor_file.py::test_equal_tensors_are_equal_bytes).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
import hashlib

import numpy
import safetensors
from safetensors.numpy import load, save

tensors = {"a": numpy.arange(4, dtype=numpy.float32), "b": numpy.ones((2, 2), numpy.float32)}
distinct = {}
for count in (1, 4):
    metadata = {f"key{i}": str(i) for i in range(count)}
    files = [save(tensors, metadata) for _ in range(12)]
    assert all((load(file)[name] == tensors[name]).all() for file in files for name in tensors)
    distinct[count] = len({hashlib.sha256(file).hexdigest() for file in files})
    print(f"safetensors {safetensors.__version__}, {count} keys of metadata: {distinct[count]} different files of 12")
raise SystemExit(not (distinct[1] == 1 and distinct[4] > 1))
PYTHON
