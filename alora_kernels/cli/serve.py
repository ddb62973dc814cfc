"""`alora serve`: a base model and its tasks behind OpenAI's HTTP interface, until SIGTERM or Ctrl-C.

What can be refused is refused, and the port bound, before the model is loaded. Keys come from a file or ALORA_API_KEY:
other users of a machine can read a command line. The exit code is 0 if every answer was finished.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..adapters.method import SETTINGS, read_method
from ..recipes import display
from ..text import install, listed, size
from . import WISHES, command, wish_of

if TYPE_CHECKING:
    from ..serving import Engine, EngineConfig, TaskInfo, TaskStore
    from ..serving.http import ServerConfig

KEY_VARIABLE = "ALORA_API_KEY"
EXTRA = ("fastapi", "limits", "prometheus_client", "threadpoolctl", "uvicorn")  # what the extra `serving` installs
SHOWN, WIDE = 8, 120  # tasks in the banner, and words of each; characters of a template


def serve(
    model: Annotated[str, typer.Argument(help="the base: a folder, a hub id, smollm2-135m or tiny-random")],
    adapter: Annotated[list[Path], typer.Option(help="a folder with tasks; again for more", show_default=False)],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"keys that open the server, one a line; or set {KEY_VARIABLE}, with commas between keys"),
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="the same, for trying: every user of this machine can read a command line")
    ] = None,
    allow_anonymous: Annotated[bool, typer.Option("--allow-anonymous", help="other machines need no key")] = False,
    adapter_root: Annotated[
        list[Path] | None, typer.Option(help="adapters below this folder may be loaded over HTTP; again for more")
    ] = None,
    rate_limit: Annotated[str | None, typer.Option(help="such as 60/minute, per key or address")] = None,
    max_body_mb: Annotated[float, typer.Option(help="longest request in MiB")] = 1.0,
    wrong_key_limit: Annotated[str, typer.Option(help="different wrong keys from one address")] = "20/minute",
    request_timeout: Annotated[float, typer.Option(help="seconds until a request must be there as a whole")] = 30.0,
    send_timeout: Annotated[float, typer.Option(help="seconds without taking anything of an answer")] = 60.0,
    max_connections: Annotated[int, typer.Option(help="open at once", min=1)] = 4096,
    max_connections_per_address: Annotated[int, typer.Option(help="of these, from one address", min=1)] = 2048,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="address or network whose X-Forwarded-For says who a client is; again for more"),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="requests that run at once", min=1)] = None,
    max_waiting: Annotated[int | None, typer.Option(help="requests that may wait", min=1)] = None,
    max_context: Annotated[int | None, typer.Option(help="tokens of prompt and answer together", min=2)] = None,
    cache_tokens: Annotated[int | None, typer.Option(help="tokens of the KV cache, all requests", min=1)] = None,
    cache_dtype: Annotated[
        str, typer.Option(help="of the KV cache: auto, as the base, or bfloat16, half of float32's memory")
    ] = "auto",
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="capture steps and replay them, on a GPU")] = False,
    resident: Annotated[int, typer.Option(help="tasks on the device at most", min=1)] = 64,
    host_tasks: Annotated[int | None, typer.Option(help="further tasks in memory; the rest on disk", min=0)] = None,
    spill: Annotated[
        Path | None, typer.Option(help="where tasks beyond --host-tasks are kept", show_default="the state folder")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"of the base: {', '.join(WISHES)}; alora doctor explains auto")] = "auto",
    drain_timeout: Annotated[float, typer.Option(help="seconds running requests have after SIGTERM", min=0)] = 60.0,
    served_name: Annotated[str | None, typer.Option(help="name of the base for clients; default MODEL")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="a file of Jinja, instead of the tokenizer's; tasks may bring their own")
    ] = None,
) -> None:
    """Serve a base model and all its tasks from one batch, as OpenAI's clients expect; a page to try it is at /."""
    with command(), _no_collections():
        if missing := [name.replace("_", "-") for name in EXTRA if find_spec(name) is None]:
            raise ImportError(f"serving needs {', '.join(missing)}: {install('serving')}")
        from ..serving import EngineConfig
        from ..serving.http.security import LOOPBACK_NAMES, ServerConfig, is_loopback

        keys = _keys(api_key, api_key_file)
        open_to_others = not is_loopback(host)
        if open_to_others and not keys and not allow_anonymous:
            raise ValueError(
                f"--host {host} can be reached from other machines: give --api-key-file FILE, set {KEY_VARIABLE}, or"
                " give --allow-anonymous to let everybody in"
            )
        if spill is not None and host_tasks is None:
            raise ValueError("--spill needs --host-tasks N: without a limit no task is kept on the disk")
        for folder in adapter:
            _check_adapter(folder)
        template = None if chat_template is None else _template(chat_template)
        sizes = {"max_batch": max_batch, "max_waiting": max_waiting}
        sizes |= {"max_context": max_context, "cache_tokens": cache_tokens}
        opening = partial(
            open_engine,
            model,
            adapter,
            EngineConfig(
                **{name: given for name, given in sizes.items() if given is not None},
                cache_dtype=cache_dtype,
                cuda_graphs=cuda_graphs,
            ),
            resident=resident,
            host_tasks=host_tasks,
            spill=spill,
            device=device,
            dtype=wish_of(dtype),
            chat_template=template,
        )
        config = ServerConfig(
            base_model_id=served_name or model,
            host=host,
            port=port,
            api_keys=keys,
            max_body_bytes=int(max_body_mb * (1 << 20)),
            rate_limit=rate_limit,
            adapter_roots=tuple(adapter_root or ()),
            allowed_hosts=tuple({*LOOPBACK_NAMES, host.lower()}) if not open_to_others and not keys else None,
            drain_timeout=drain_timeout,
            request_timeout=request_timeout,
            send_timeout=send_timeout,
            max_connections=max_connections,
            max_connections_per_address=max_connections_per_address,
            wrong_key_limit=wrong_key_limit,
            trusted_proxies=tuple(trusted_proxy or ()),
        )
        code = _run(opening, config)
    raise typer.Exit(code)


@contextmanager
def _no_collections() -> Iterator[None]:
    """A start makes a million objects and little garbage: looking for it takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _run(opening: Callable[[], AbstractContextManager[tuple[Engine, TaskStore]]], config: ServerConfig) -> int:
    from ..serving.http import bind, serve

    with closing(bind(config.host, config.port)) as bound, opening() as (engine, store):
        gc.freeze()  # what a start has made stays
        gc.enable()
        _show(store, config, bound.getsockname()[1])
        return serve(engine, config, bound)


@contextmanager
def open_engine(
    model: str,
    adapters: Sequence[Path],
    config: EngineConfig,
    *,
    resident: int,
    host_tasks: int | None,
    spill: Path | None = None,
    device: str,
    dtype: str,
    chat_template: str | None = None,
) -> Iterator[tuple[Engine, TaskStore]]:
    """Load the base, put the tasks in; the engine runs until the end of the block.

    The device "auto" is a GPU if there is one; the dtype is a wish as `precision.explain` takes it.
    """
    import torch

    from .. import data, precision
    from ..adapters.asking import chat_text
    from ..serving import Engine, TaskStore

    gpu = torch.cuda.is_available()
    try:
        place = torch.device(("cuda" if gpu else "cpu") if device == "auto" else device)
        if place.type == "cuda" and not gpu:
            raise RuntimeError("no CUDA or ROCm device here")
    except RuntimeError as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from None
    config.check_device(place)
    chosen = precision.explain(place, dtype)
    display.say(f"base in {chosen.name} ({chosen.reason})", "dim")
    with display.err.status(f"loading {model} and {len(adapters)} adapter folders ..."):
        base, tokenizer = data.load_model(model, dtype=chosen.dtype)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
            chat_text(tokenizer, [{"role": "user", "content": "Hello"}], ask=True)  # or an error before anyone asks
        base.to(place)  # type: ignore[arg-type]
        store = TaskStore.open(base, adapters, resident=resident, host=host_tasks, spill=spill)
    with closing(store), Engine(base, tokenizer, store, config) as engine:
        yield engine, store


def _keys(given: Sequence[str] | None, file: Path | None) -> tuple[str, ...]:
    """The keys, from one place only."""
    variable = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()]
    found = {"--api-key": given, "--api-key-file": file, f"{KEY_VARIABLE} in the environment": variable}
    if len(named := [name for name, value in found.items() if value]) > 1:
        raise ValueError(f"{' and '.join(named)} both say which keys open the server: give one of them")
    if file is None:
        return tuple(given or variable)
    try:
        with file.open(encoding="utf-8-sig") as opened:
            status = os.fstat(opened.fileno())
            if os.name == "posix" and status.st_mode & (0o077 if status.st_uid == os.getuid() else 0o007):
                raise ValueError(f"--api-key-file {file} can be read by other users: chmod 600 {file}")
            keys = tuple(line.strip() for line in opened if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {file} does not read: {error}") from None
    if not keys:
        raise ValueError(f"--api-key-file {file} holds no key: write one a line")
    if any(key.startswith("#") for key in keys):
        raise ValueError(f"--api-key-file {file} has a line that begins with #, which would be a key: leave it out")
    return keys


def _template(file: Path) -> str:
    """A chat template's text; a ValueError if there is none."""
    from ..adapters.cards import MAX_TEMPLATE

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--chat-template {file} does not read: {error}") from None
    if not text.strip() or len(text) > MAX_TEMPLATE:
        raise ValueError(f"--chat-template {file} must hold 1 to {MAX_TEMPLATE} characters, not {len(text)}")
    return text


def _check_adapter(folder: Path) -> None:
    """Refuse a folder that is no adapter's before the model is loaded; the store looks at the rest."""
    from ..tuner.config import CONFIG

    if not folder.is_dir():
        raise ValueError(f"--adapter {folder} is not a folder")
    if (folder / CONFIG).is_file():
        return
    if (folder / SETTINGS).is_file() and (method := read_method(folder)) is not None:
        raise ValueError(f"--adapter {folder} is of the method {method.name}, which is not served: train it as alora")
    if (folder / "config.json").is_file():
        raise ValueError(
            f"--adapter {folder} is a model's folder, not an adapter's: give it as MODEL, and as --adapter the folder"
            f" that `alora train` wrote, with {CONFIG}"
        )
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))[:5]
    hint = f"give one of its subfolders: {', '.join(inside)}" if inside else "give the folder that `alora train` wrote"
    raise ValueError(f"--adapter {folder} has no {CONFIG}, so it is no adapter's folder: {hint}")


def _show(store: TaskStore, config: ServerConfig, port: int) -> None:
    """The banner: addresses, tasks and their memory, how they were asked, an example."""
    from rich.markup import escape
    from rich.panel import Panel

    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{port}"
    tasks = store.tasks()
    names = listed((task.name for task in tasks), SHOWN)
    each, shared = store.bytes_per_task, store.bytes_shared
    lines = [
        f"[bold]{escape(address)}[/bold]   page at /, OpenAI's interface at /v1, /metrics",
        escape(f"base: {config.base_model_id}; tasks: {names}"),
        f"{size(each)} a task and {size(shared)} shared B; as separate LoRAs {size(each + shared)} a task",
    ]
    display.console.print(Panel.fit("\n".join(lines)))
    for line in [*how_asked(tasks), example(address, config.base_model_id, tasks, bool(config.api_keys))]:
        display.say(line)


def how_asked(tasks: Sequence[TaskInfo]) -> list[str]:
    """A line per task that says how it was asked in training, and one for those that do not."""
    from ..adapters.cards import described

    shown = [(task.name, described(task.card, SHOWN, WIDE)) for task in tasks[:SHOWN]]
    lines = [f"{name} answers {said}" for name, said in shown if said]
    if silent := [name for name, said in shown if not said]:
        lines.append(f"no prompt template is known of {', '.join(silent)}: ask as in training")
    return lines


def example(address: str, base: str, tasks: Sequence[TaskInfo], keyed: bool) -> str:
    """A command that asks a task as it was asked in training, where that is known."""
    from ..adapters.cards import described

    known = [task for task in tasks if described(task.card) or (task.card and task.card.sample)]
    known.sort(key=lambda task: task.card is None or task.card.sample is None)  # a whole prompt before a template
    first = next(iter(known or tasks), None)
    card = None if first is None else first.card
    asked = {"model": base if first is None else first.name, "max_tokens": 8, "temperature": 0}
    path = "chat/completions" if card and card.chat else "completions"
    if card and card.chat:
        asked |= {"messages": [{"role": "user", "content": card.sample or "Hello"}], "max_tokens": 64}
    else:
        asked["prompt"] = (card.sample or card.template if card else None) or "The film was"
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    return f"curl {address}/v1/{path}{key} -H 'Content-Type: application/json' \\\n  -d {body}"
