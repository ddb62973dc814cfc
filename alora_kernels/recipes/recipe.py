"""What to train, on what, and how: the YAML file of `alora train`, as frozen data.

Unknown keys and wrong values are refused, all at once, before anything is loaded. `alora eval` reads the copy that was
saved with the adapter; the demo has a recipe of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from jinja2 import Environment, TemplateSyntaxError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ..adapters.method import METHODS, OF_EXPERTS, Method
from ..data import MODELS, TASKS, TaskSpec, as_source
from ..dtypes import TRAINED, check_dtype
from ..settings import mistakes, read_mapping, write_yaml
from ..text import did_you_mean

FILE = "recipe.yaml"
#: what Axolotl, TRL, PEFT or Unsloth call a key
ELSEWHERE = {
    "lr": "learning_rate", "lora_r": "r", "sequence_len": "max_length", "max_seq_length": "max_length",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps", "micro_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "gradient_accumulation",
    "base_model": "model", "model_name_or_path": "model", "output_dir": "output", "datasets": "tasks",
    "lora_target_modules": "target_modules", "lora_target_linear": "target_modules", "load_in_4bit": "load_in",
    "load_in_8bit": "load_in", "val_set_size": "validation_size", "lr_scheduler": "scheduler",
    "lr_scheduler_type": "scheduler", "sample_packing": "packing", "optim": "optimizer", "output_folder": "output",
}  # fmt: skip
ALTERNATIVES = (("epochs", "steps", 3), ("warmup_ratio", "warmup_steps", 0.03))  # two ways, and the first's default
JINJA = (".jinja", ".jinja2")
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # tags of transformers' own around what is answered
ROUTING_OF = {"alora": "task", "alora-soft": "soft"}


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says which key and what it may be."""


def _texts(task: Any) -> Any:
    """A mapping's `words` with numbers as the text they are written as: `words: {0: bad, 1: good}`."""
    words = task.get("words") if isinstance(task, dict) else None
    if not isinstance(words, dict):
        return task

    def text(value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    return {**task, "words": {text(key): text(value) for key, value in words.items()}}


def _known(name: str) -> str:
    as_source(name)
    return name


def _tagged(text: str, other: str) -> Discriminator:
    """Which of two forms a value has: text, or something else."""
    return Discriminator(lambda value: text if isinstance(value, str) else other)


# a bool is no number, and "3" is a text
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
Entry = Annotated[
    Annotated[str, BeforeValidator(_known), Tag("as name")]
    | Annotated[TaskSpec, BeforeValidator(_texts), Tag("as mapping")],
    _tagged("as name", "as mapping"),
]
Targets = Annotated[
    Annotated[Name, Tag("as text")] | Annotated[tuple[Name, ...], Field(min_length=1), Tag("as list")],
    _tagged("as text", "as list"),
]
Stacked = Annotated[
    Annotated[Literal["all-experts"], Tag("as text")]
    | Annotated[tuple[Name, ...], Field(min_length=1), Tag("as list")],
    _tagged("as text", "as list"),
]

Reporter = Literal["tensorboard", "wandb", "mlflow"]
Packing = Annotated[
    Annotated[Literal["auto"], Tag("as text")] | Annotated[bool, Tag("as bool")], _tagged("as text", "as bool")
]


def _says(text: str, default: Any = ..., **limits: Any) -> Any:
    """A setting with its description, which errors repeat."""
    return Field(default, description=text, **limits)


class Recipe(BaseModel):
    """One training run; a ValidationError has all wrong values, which `load_recipe` says in plain words."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    elsewhere: ClassVar[Mapping[str, str]] = ELSEWHERE

    tasks: tuple[Entry, ...] = _says("a list of built-in tasks, files, hub ids, or mappings with name and source")
    model: Name = _says("smollm2-135m, tiny-random, a folder, or a hub id", "smollm2-135m")
    dtype: Literal["auto", "float32", "bfloat16"] = _says(
        "of the frozen base; auto is bfloat16 where the chip multiplies it faster; adapters are float32", "auto"
    )
    load_in: Literal["4bit", "8bit"] | None = _says(
        "weights of the frozen base in 4 bits (nf4) or 8, by bitsandbytes, which multiplies in dtype; null keeps dtype",
        None,
    )
    chat_template: Name | None = _says(
        "how messages become text, in Jinja, or the path of a .jinja file; null takes the model's own", None
    )
    output: Name = _says("folder for checkpoints and the adapter", "runs/alora")
    adapter: Name | None = _says("an adapter folder that training goes on from; null begins anew", None)
    train_tasks: tuple[Name, ...] | None = _says(
        "names of tasks that learn, the others stay as they are; null: all that have rows", None, min_length=1
    )
    train_b: bool | None = _says(
        "whether the B that tasks share learns; null: yes, unless train_tasks leaves tasks as they are", None
    )
    method: str = _says(", ".join(METHODS), "alora")
    budget: Literal["rank", "parameters"] = _says(
        "rank: r as given; parameters: the rank with which the method trains about as many parameters as alora with r,"
        " s unchanged",
        "rank",
    )
    routing: Literal["task", "soft"] | None = _says("older: task is the method alora, soft is alora-soft", None)
    num_experts: Whole = _says("of alora-soft and hydralora", 4, ge=1)
    r: Whole = _says("rank", 8, ge=1)
    lora_alpha: Number = _says("the scaling is lora_alpha / r", 16.0, gt=0)
    lora_dropout: Number = _says("a share", 0.0, ge=0, lt=1)
    use_rslora: bool = _says("the scaling is lora_alpha / sqrt(r)", False)
    target_modules: Targets | None = _says(
        "all-linear, a list of names, or a regular expression; null: target_parameters alone", "all-linear"
    )
    target_parameters: Stacked | None = _says(
        "all-experts, or a list of ends of names such as mlp.experts.down_proj: a mixture's experts, by alora", None
    )
    experts_A: Literal["shared", "each"] = _says(  # noqa: N815, the letters of the formula
        "A of a task for all experts, or one for each", "shared"
    )
    experts_B: Literal["shared", "each"] = _says("B of all tasks for all experts, or one for each", "each")  # noqa: N815
    epochs: Number | None = _says("passes over the training rows; 3 where no steps are given", None, gt=0)
    steps: Whole | None = _says("optimiser steps, instead of epochs", None, ge=1)
    batch_size: Whole = _says("rows in an optimiser step, of all processes together", 32, ge=1)
    gradient_accumulation: Whole = _says(
        "forward passes that a step's rows are split in, which must divide batch_size: less memory, same step", 1, ge=1
    )
    gradient_checkpointing: bool = _says(
        "compute activations again in backward: far less memory, a third slower", False
    )
    packing: Packing = _says(
        "rows of a batch side by side, without padding, where that is proven to be the same; auto: on CPUs", "auto"
    )
    group_by_length: bool = _says("batches of rows of similar length, tasks mixed as ever: less padding", False)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = _says(
        "8-bit ones keep their state in a quarter of the memory, by bitsandbytes", "adamw"
    )
    learning_rate: Number = _says("at its highest; adapters take ten times that of full fine-tuning", 2e-4, gt=0)
    scheduler: Literal["linear", "cosine", "constant", "inverse_sqrt"] = _says(
        "how the learning rate falls after it rose", "linear"
    )
    warmup_steps: Whole | None = _says("steps in which the learning rate rises", None, ge=0)
    warmup_ratio: Number | None = _says(
        "the same as a share of all steps; 0.03 where no warmup_steps are given", None, ge=0, lt=1
    )
    weight_decay: Number = _says("a share of each weight, times the learning rate, in each step", 0.0, ge=0)
    max_grad_norm: Number = _says("longer gradients are shortened to it; 0 leaves them as they are", 1.0, ge=0)
    temperature: Annotated[float, Strict()] = _says(
        "1 draws every row once an epoch; larger values, .inf too, bring small tasks more often", 1.0, ge=1
    )
    weights: dict[Name, Annotated[Number, Field(gt=0)]] = _says(
        "task: how many times as often its rows are drawn, beside temperature", {}
    )
    train_size: Whole | None = _says("at most so many training rows of each entry of tasks; null takes all", None, ge=1)
    validation_size: Number = _says(
        "rows of each entry of tasks that judge while training, or a share below 1 of them; those of test_size judge at"
        " the end",
        0,
        ge=0,
    )
    streaming: bool = _says(
        "read rows while training instead of all before: for steps, each entry of tasks as often as weights say", False
    )
    test_size: Whole = _says("test rows of each entry of tasks, never more than half of its rows", 100, ge=1)
    label_score: Literal["sum", "mean"] = _says(
        "label words are compared by the sum of their tokens' log-probabilities, or by the mean", "sum"
    )
    max_length: Whole | None = _says("tokens per row; null takes the model's context", None, ge=2)
    logging_steps: Whole | None = _says(
        "losses are logged every so many steps; null: every 10, in a short run a dozen times", None, ge=1
    )
    eval_steps: Whole | None = _says(
        "validation rows are judged every so many steps; null: ten times in a run, where there are any", None, ge=1
    )
    early_stopping: Whole | None = _says(
        "evaluations after which a run ends that did not become better; null: never", None, ge=1
    )
    keep_best: bool = _says(
        "where there are validation rows, save the model whose losses on them, averaged over tasks, are lowest, instead"
        " of the last one",
        True,
    )
    save_steps: Whole | None = _says(
        "a checkpoint every so many steps; null: at evaluations, without them ten times in a run; 0 saves the final"
        " adapter alone",
        None,
        ge=0,
    )
    save_total_limit: Whole | None = _says("checkpoints that stay, the best one among them; null: all", 2, ge=1)
    report_to: tuple[Reporter, ...] = _says(
        "who else gets what is logged: a list of tensorboard, wandb, mlflow; none", ()
    )
    overwrite: bool = _says("replace an earlier run in the output folder", False)
    conflict_steps: Whole = _says(
        "gradient conflicts between tasks go to conflicts.csv every so many steps, for alora analyze; 0 measures none",
        0,
        ge=0,
    )
    parallel: Literal["ddp", "fsdp"] = _says(
        "of several processes (torchrun, accelerate launch): ddp has the base on each, fsdp a part of it", "ddp"
    )
    seed: Whole = _says("of data order, adapter and dropout", 0, ge=0, lt=2**32)

    @field_validator("tasks")
    @classmethod
    def _different(cls, tasks: tuple[str | TaskSpec, ...]) -> tuple[str | TaskSpec, ...]:
        names = [as_source(task).name for task in tasks]
        if not names:
            raise ValueError(f"give at least one, for example {', '.join(TASKS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"names must differ, got {', '.join(names)}")
        return tasks

    @field_validator("dtype", mode="before")
    @classmethod
    def _is_dtype(cls, dtype: Any) -> Any:
        check_dtype(dtype, TRAINED, "")
        return dtype

    @field_validator("validation_size")
    @classmethod
    def _rows_or_share(cls, size: float) -> float:
        if size >= 1 and size != int(size):
            raise ValueError(f"must be a whole number of rows, or a share below 1, got {size}")
        return size if 0 < size < 1 else int(size)

    @field_validator("chat_template")
    @classmethod
    def _is_jinja(cls, template: str | None) -> str | None:
        if template is not None and not template.endswith(JINJA) and "{" not in template:
            raise ValueError(f"{template[:60]!r} is neither Jinja nor the path of a .jinja file")
        try:
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template or ""))
        except TemplateSyntaxError as error:
            raise ValueError(f"is no Jinja template: {error.message} (line {error.lineno})") from None
        return template

    @field_validator("method")
    @classmethod
    def _is_method(cls, method: str) -> str:
        if method not in METHODS:
            close = did_you_mean(method, METHODS)
            hint = f"; {close}" if "?" in close else ""
            raise ValueError(f"must be one of {', '.join(METHODS)}, got {method!r}{hint}")
        return method

    @model_validator(mode="before")
    @classmethod
    def _said_in_two_ways(cls, values: Any) -> Any:
        """How long a run is and warms up; `method`, of which `routing` is an older spelling: pydantic judges others."""
        if not isinstance(values, Mapping):
            return values
        for one, other, default in ALTERNATIVES:
            if values.get(one) is None and values.get(other) is None:
                values = {**values, one: default}
        method, routing = values.get("method", "alora"), values.get("routing")
        if method == "alora" and routing == "soft":
            method = "alora-soft"
        if isinstance(method, str) and method in METHODS and routing in ("task", "soft", None):
            own = ROUTING_OF.get(method)
            if routing not in (None, own):
                raise ValueError(f"routing: {routing} is not how {method} works: leave routing out")
            routing = own
        return {**values, "method": method, "routing": routing}

    @field_validator(
        "report_to", mode="before", json_schema_input_type=tuple[Reporter, ...] | Reporter | Literal["none"]
    )
    @classmethod
    def _reporters(cls, names: Any) -> Any:
        """A list, one name, or none."""
        return () if names in ("none", None, ["none"]) else [names] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """What does not go together, all of it at once."""
        if said := list(_clashes(self)):
            raise ValueError("\n  ".join(said))
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "recipe") -> Self:
        """A recipe from settings; a RecipeError, headed by `source`, says each unknown key and wrong value."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError("\n  ".join([f"{source}:", *mistakes(error, cls)])) from None

    @classmethod
    def schema_document(cls) -> dict[str, Any]:
        """What a recipe may hold, for editors: JSON Schema, draft 2020-12."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}

    @classmethod
    def key_table(cls) -> str:
        """Every key with its default and what it is, in Markdown."""
        rows = ["| key | default | |", "|---|---|---|"]
        for name, key in cls.model_fields.items():
            default = "" if key.is_required() else f"`{json.dumps(key.default)}`"
            rows.append(f"| `{name}` | {default} | {(key.description or '').replace('|', chr(92) + '|')} |")
        return "\n".join(rows)

    def instead(self, **changes: Any) -> Self:
        """The same run with other settings; None keeps the recipe's."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes.keys() & {"method", "routing"}:
            changes = {"method": "alora", "routing": None} | changes
        for one, other, _ in ALTERNATIVES:
            if changes.keys() & {one, other}:
                changes = {one: None, other: None} | changes
        return self.of(dict(self) | changes)

    def adapters(self, tasks: tuple[str, ...]) -> Method:
        """The method of this recipe for tasks with these names in the order of their ids, at the recipe's rank."""
        same = {"r", "lora_alpha", "lora_dropout", "use_rslora", "num_experts", "target_modules", *OF_EXPERTS}
        return Method(self.method, tasks=tasks, task_type="CAUSAL_LM", **self.model_dump(include=same))

    def rows_at_once(self, processes: int) -> int:
        """Rows of a forward pass of each process; a ValueError if a step's cannot be dealt evenly."""
        parts = processes * self.gradient_accumulation
        if self.batch_size % parts:
            times = f", {self.gradient_accumulation} times each" if parts > processes else ""
            raise ValueError(
                f"batch_size: {self.batch_size} rows of a step cannot be dealt evenly to {processes} processes{times}:"
                f" choose a multiple of {parts}"
            )
        return self.batch_size // parts

    def located(self, root: Path) -> Self:
        """The same run with absolute paths: of its files from `root`; the output folder starts from the current one."""

        def found(task: str | TaskSpec) -> str | TaskSpec:
            if isinstance(task, str):
                return task if task in TASKS else _path(root, task)
            return task.located(partial(_path, root))

        model = root / Path(self.model).expanduser()
        adapter = self.adapter and str((root / Path(self.adapter).expanduser()).resolve())
        return self.instead(
            adapter=adapter,
            chat_template=_template(root, self.chat_template),
            tasks=tuple(found(task) for task in self.tasks),
            model=str(model.resolve()) if self.model not in MODELS and model.is_dir() else self.model,
            output=str(Path(self.output).expanduser()),
        )

    def save(self, folder: Path) -> None:
        """Write the recipe beside the adapter."""
        (folder / FILE).write_text(write_yaml(self.model_dump(mode="json")), encoding="utf-8")


def _clashes(recipe: Recipe) -> Iterator[str]:
    """A line for each two settings that do not go together."""
    for one, other, _ in ALTERNATIVES:
        if None not in (getattr(recipe, one), getattr(recipe, other)):
            yield f"{one}: give {one} or {other}, not both"
    if recipe.batch_size % recipe.gradient_accumulation:
        yield (
            f"gradient_accumulation: {recipe.batch_size} rows of a step cannot be split evenly in"
            f" {recipe.gradient_accumulation} passes: choose a divisor of batch_size"
        )
    if recipe.target_parameters and recipe.method != "alora":
        yield f"target_parameters: {recipe.method} does not adapt experts: leave it out, or use alora"
    if not recipe.target_parameters:
        asked = [key for key in OF_EXPERTS[1:] if getattr(recipe, key) != Recipe.model_fields[key].default]
        yield from (f"{key}: of adapted experts: say which, target_parameters: all-experts" for key in asked)
        if recipe.target_modules is None:
            yield "target_modules: nothing is adapted: give it, or target_parameters: all-experts"
    if recipe.parallel == "fsdp" and recipe.conflict_steps:
        yield "conflict_steps: gradients of a sharded model are not measured: 0 under parallel: fsdp"
    if recipe.parallel == "fsdp" and recipe.load_in:
        yield "load_in: a base in a few bits is not sharded: parallel: ddp, or leave load_in out"
    if recipe.load_in and recipe.method in ("lora-per-task", "hydralora"):
        yield f"load_in: {recipe.method} replaces plain linear layers: leave load_in out, or use alora"
    if recipe.streaming and recipe.steps is None:
        yield "streaming: a stream has no end, nor epochs: give steps"
    if recipe.streaming and (recipe.temperature != 1 or recipe.group_by_length):
        yield "streaming: rows come as weights say, not by number or length: leave out temperature, group_by_length"
    if recipe.early_stopping and not recipe.keep_best:
        yield "early_stopping: the best model is kept then: leave keep_best out"
    if recipe.keep_best and recipe.eval_steps and recipe.save_steps not in (None, recipe.eval_steps):
        yield (
            f"save_steps: the best model is one that was judged and saved: leave it out, give {recipe.eval_steps} as"
            " eval_steps has it, or say keep_best: false"
        )


def _path(root: Path, source: str) -> str:
    """A file's absolute path; what is neither a file nor a folder there, a hub id, stays as it is."""
    path = root / Path(source).expanduser()
    return str(path.resolve()) if TaskSpec("", source).is_file or path.exists() else source


def _template(root: Path, template: str | None) -> str | None:
    """The text of a `.jinja` file, so that what is saved with an adapter says all; other templates are text already."""
    if template is None or not template.endswith(JINJA):
        return template
    try:
        return (root / Path(template).expanduser()).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"chat_template: cannot read {root / template} ({error}): give a file, or the text") from None


def load_recipe(path: Path, root: Path | None = None) -> Recipe:
    """Read a recipe from a YAML file; relative paths of data start from `root`, or else the file's own folder.

    A RecipeError has all that is wrong: no such file, no YAML mapping, unknown keys and bad values.
    """
    try:
        values = read_mapping(path, "tasks: [trec, spam]")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return Recipe.of(values, str(path)).located(path.parent if root is None else root)
