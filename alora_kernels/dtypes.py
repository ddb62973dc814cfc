"""How recipes and options spell the dtype of a base; the command line lists these, so nothing here needs torch."""

from collections.abc import Collection

AUTO = "auto"  # `precision` chooses
DTYPE_NAMES = ("float32", "bfloat16", "float16")  # as torch calls them
TRAINED = (AUTO, "float32", "bfloat16")  # float16 has no room for gradients without a loss scale
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}


def not_a_dtype(name: object, names: Collection[str], what: str = "dtype", others: str = "") -> ValueError:
    """The refusal of what is none of the names (nor of `others`); `bf16` and its like are told their long names."""
    plain = str(name).lower().removeprefix("torch.")
    meant = SHORT.get(plain, plain)
    hint = f"; did you mean {meant}?" if meant in names else "; float16 is for serving" if meant == "float16" else ""
    return ValueError(f"{what} must be one of {', '.join(names)}{others}, got {name!r}{hint}".lstrip())


def check_dtype(name: object, names: Collection[str], what: str = "dtype") -> None:
    """Refuse what is none of the names."""
    if name not in names:
        raise not_a_dtype(name, names, what)
