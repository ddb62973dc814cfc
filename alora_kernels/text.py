"""Text that people read: strangers' words made harmless, counts, sizes, percentiles, and what a thing may be called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

#: A client, a run, an exported task: a file name everywhere, and a value in Flower's node configuration.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def install(extra: str) -> str:
    """What installs an extra of this package."""
    return f"pip install 'alora-kernels[{extra}]' (in a clone: pip install -e '.[{extra}]')"


def printable(text: str, longest: int | None = None) -> str:
    """A stranger's text on one line, of `longest` characters at most: nothing in it moves a cursor or starts a line."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def clipped(text: str, width: int) -> str:
    """At most `width` characters, beginning and end kept: names of tasks differ at either."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def listed(names: Iterable[str], most: int) -> str:
    """The names, `most` of them: "a, b and 3 more"."""
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def some(names: Sequence[str], most: int) -> str:
    """The same without the count: "a, b, ..."."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def size(count: float) -> str:
    """12345678 bytes as "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, what: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def percent(share: float) -> str:
    """0.873 as "87.3 %"."""
    return f"{100 * share:.1f} %"


def percentile(values: Iterable[float], q: float) -> float:
    """The measured value nearest to the share q of the way from the smallest to the largest: never one in between."""
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest of the known names, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
