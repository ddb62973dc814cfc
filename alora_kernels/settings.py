"""Settings files: YAML read as people mean it, and every mistake in it said at once.

For recipes and federated configurations, which are pydantic models: a mistake is one line with the key's path, the
value and the remedy. PyYAML follows YAML 1.1, in which `1e-3` is a string, `no` is false, `12:30` is 750, and the
second of two equal keys wins without a word; here scalars follow YAML 1.2, and a key that is given twice is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .text import did_you_mean

TAG = "tag:yaml.org,2002:"
EXPONENT = r"[eE][-+]?[0-9]+"
FLOAT = re.compile(
    rf"^[-+]?((\.[0-9]+|[0-9][0-9_]*\.[0-9]*)({EXPONENT})?|[0-9]+{EXPONENT}|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
)
SCALARS = {
    "null": re.compile(r"^(~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"),
    "float": FLOAT,
    "merge": re.compile(r"^<<$"),
}
SHOWN = 60  # characters of a wrong value
PLAIN = {  # pydantic's words -> ours
    "Input should be": "must be",
    "a valid integer": "a whole number",
    "a valid string": "text",
    "a valid tuple": "a list",
    "a valid dictionary": "a mapping",
    "a valid number": "a number",
    "a valid boolean, unable to interpret input": "true or false",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars; keys differ."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # none of YAML 1.1's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's, which would keep the last of several equal keys."""
        given: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge":
                name = self.construct_object(key)
                if name in given:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name!r} is given twice in one mapping", key.start_mark
                    )
                given.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML takes for something else than text."""


for _name, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(TAG + _name, _pattern, None)
_Dumper.add_implicit_resolver(f"{TAG}float", FLOAT, None)


def read_yaml(text: str | bytes) -> Any:
    """What a YAML text holds (bytes: UTF-8 or UTF-16); a ValueError, with line and column, if not or for equal keys."""
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"not valid YAML: {error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None


def write_yaml(values: Any) -> str:
    """Text that `read_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per mistake: the key's path, what is wrong with the value, and what the setting is for.

    Tags of the model's unions begin with "as ", so that they are not taken for keys.
    """
    found = error.errors(include_url=False)
    within = {each["loc"][:i] for each in found for i in range(len(each["loc"]))}
    # a list all of whose items are wrong is not empty
    return [_mistake(each, model) for each in found if each["type"] != "too_short" or each["loc"] not in within]


def _mistake(error: Any, model: type[BaseModel]) -> str:
    path = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("as "))]
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    prefix, fields = f"{shown}: " if shown else "", _fields(model, path)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        ours = getattr(model, "elsewhere", {}).get(path[-1]) if len(path) == 1 else None
        return f"{prefix}unknown setting; {f'here it is {ours}' if ours else did_you_mean(str(path[-1]), fields)}"
    if error["type"] == "missing":
        return f"{prefix}must be given"
    if error["type"] == "value_error":
        return prefix + str(error["msg"]).removeprefix("Value error, ")
    message = "must not be empty" if error["type"] in ("too_short", "string_too_short") else str(error["msg"])
    message = "must be a name or a mapping of settings" if error["type"] == "dataclass_type" else message
    for theirs, ours in PLAIN.items():
        message = message.replace(theirs, ours)
    value, purpose = repr(error["input"]), fields.get(path[-1]) if path else None
    shortened = value if len(value) <= SHOWN else value[:SHOWN] + "..."
    return f"{prefix}{message}, got {shortened}" + (f" ({purpose})" if purpose else "")


def _fields(model: Any, path: Sequence[Any]) -> dict[str, str]:
    """Settings that stand beside the last part of a path, with their descriptions."""
    for part in path[:-1]:
        known = getattr(model, "model_fields", {})
        if isinstance(part, str) and part in known:
            model = next(_records(known[part].annotation), model)
    if dataclasses.is_dataclass(model):
        return {field.name: "" for field in dataclasses.fields(model)}
    return {name: field.description or "" for name, field in model.model_fields.items()}


def _records(annotation: Any) -> Iterator[Any]:
    """Models and dataclasses that a type mentions."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        yield annotation
    for part in get_args(annotation):
        yield from _records(part)


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """The mapping of a settings file, with names for keys; a ValueError shows `example`, a line that would do."""
    try:
        values = read_yaml(path.read_bytes())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise ValueError(f"no such file: {path}" if missing else f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold a mapping of settings, for example `{example}`")
    return values
