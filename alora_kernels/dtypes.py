"""How recipes and options spell the dtype of a base; the command line lists these, so nothing here needs torch."""

AUTO = "auto"  # `precision` chooses
DTYPE_NAMES = ("float32", "bfloat16", "float16")  # as torch calls them
