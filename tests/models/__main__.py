"""`python -m tests.models`: print the table; `--write-docs` writes docs/models.md."""

from __future__ import annotations

import sys
import warnings

from .table import PAGE, page

warnings.simplefilter("ignore")
text = page()
print(text)
if "--write-docs" in sys.argv[1:]:
    PAGE.write_text(text, encoding="utf-8")
