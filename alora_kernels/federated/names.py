"""What a client or a run may be called: a file name everywhere, and a value in Flower's node configuration."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
