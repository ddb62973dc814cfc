"""A file of texts that tell their label by their letters, so that a random encoder can learn them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """One JSON object a line."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def letters(path: Path, count: int = 200, answers: Sequence[str] = ("cold", "hot"), draw: random.Random | None = None):
    """`count` texts of y and z, or of a and b."""
    draw = draw or random.Random(0)
    texts = ["".join(draw.choices("ab" if i % 2 else "yz", k=draw.randint(3, 9))) for i in range(count)]
    return write(path, ({"prompt": text, "answer": answers[i % 2]} for i, text in enumerate(texts)))
