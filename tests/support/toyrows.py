"""Rows for tests: files of texts that tell their label by their letters, and data sets that may not be installed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from alora_kernels import data


def need_data(*tasks: str) -> None:
    """Skip the test where a package with the rows of these tasks is missing."""
    try:
        for task in tasks:
            data.load_task(task, test_size=2)
    except data.MissingPackageError as error:
        pytest.skip(str(error))


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """One JSON object a line."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def letters(path: Path, count: int = 200, answers: Sequence[str] = ("cold", "hot"), draw: random.Random | None = None):
    """`count` texts of y and z, or of a and b."""
    draw = draw or random.Random(0)
    texts = ["".join(draw.choices("ab" if i % 2 else "yz", k=draw.randint(3, 9))) for i in range(count)]
    return write(path, ({"prompt": text, "answer": answers[i % 2]} for i, text in enumerate(texts)))
