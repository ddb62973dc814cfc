"""`alora serve`: what it refuses before anything is loaded, what it says, and one real server from end to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from alora_kernels import data
from alora_kernels.adapters.cards import TaskCard, write_task_cards
from alora_kernels.cli import serve as serve_module
from alora_kernels.serving import EngineConfig, TaskInfo
from tests.support.adapters import alora_folder, tiny_base
from tests.support.cli import alora as command_line

alora = partial(command_line, "serve")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve_module.KEY_VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What passes for an adapter until the store looks into it."""
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list:
    """What would be opened, and the server's settings, after every check; nothing is loaded or served."""
    seen: list = []
    monkeypatch.setattr(serve_module, "_run", lambda opening, config: seen.append((opening, config)) or 0)
    return seen


def refused(*args: object) -> str:
    return " ".join(alora(*args, code=2).split())


def test_options_become_settings(started, folder):
    alora(
        "tiny-random", "--adapter", folder, "--port", 0, "--max-batch", 4, "--max-context", 99, "--cache-tokens", 500,
        "--resident", 7, "--host-tasks", 3, "--rate-limit", "5/second", "--max-body-mb", 0.5, "--adapter-root", folder,
        "--served-name", "tiny", "--drain-timeout", 3, "--dtype", "float32", "--request-timeout", 9,
        "--send-timeout", 8, "--max-connections", 70, "--max-connections-per-address", 7, "--wrong-key-limit", "1/hour",
        "--trusted-proxy", "10.0.0.0/8", "--trusted-proxy", "::1",
    )  # fmt: skip
    opening, config = started[0]
    model, adapters, sizes = opening.args
    assert (model, adapters) == ("tiny-random", [folder])
    assert sizes == EngineConfig(max_batch=4, max_context=99, cache_tokens=500)
    own = {"resident": 7, "host_tasks": 3, "spill": None, "device": "auto", "dtype": "float32", "chat_template": None}
    assert opening.keywords == own
    assert (config.base_model_id, config.port, config.max_body_bytes) == ("tiny", 0, 1 << 19)
    assert (config.rate_limit, config.drain_timeout, config.adapter_roots) == ("5/second", 3.0, (folder.resolve(),))
    assert "localhost" in config.allowed_hosts
    assert (config.request_timeout, config.send_timeout, config.wrong_key_limit) == (9, 8, "1/hour")
    assert (config.max_connections, config.max_connections_per_address) == (70, 7)
    assert config.trusted_proxies == ("10.0.0.0/8", "::1")


def test_keys_come_from_one_place_and_open_every_host_name(started, folder, monkeypatch, tmp_path):
    serve, file = ("m", "--adapter", folder, "--host", "0.0.0.0"), tmp_path / "keys"
    file.write_text("\ufeffe f\n\n  g \r\n", encoding="utf-8")
    file.chmod(0o600)
    alora(*serve, "--allow-anonymous")
    alora(*serve, "--api-key", "a", "--api-key", "b")
    alora(*serve, "--api-key-file", file)
    monkeypatch.setenv(serve_module.KEY_VARIABLE, "c, d")
    alora(*serve)
    assert [config.api_keys for _, config in started] == [(), ("a", "b"), ("e f", "g"), ("c", "d")]
    assert all(config.allowed_hosts is None for _, config in started)
    variable = "ALORA_API_KEY in the environment"
    for more, named in (
        (("--api-key", "a"), f"--api-key and {variable} both say"),
        (("--api-key-file", file), f"--api-key-file and {variable} both say"),
        (("--api-key", "a", "--api-key-file", file), f"--api-key and --api-key-file and {variable} both say"),
    ):
        assert named in refused(*serve, *more) and len(started) == 4


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("key", 0o644, "can be read by other users: chmod 600"), ("key", 0o640, "can be read by other users"),
        ("", 0o600, "holds no key"), (" \n\n", 0o600, "holds no key"), (b"\xff", 0o600, "does not read"),
        ("key\n# of ann\n", 0o600, "has a line that begins with #"),
        (None, 0, "does not read"),
    ],
)  # fmt: skip
def test_a_file_of_keys_that_others_read_or_that_holds_none_is_refused(started, folder, tmp_path, content, mode, said):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        file.chmod(mode)
    assert f"--api-key-file {file} {said}" in refused("m", "--adapter", folder, "--api-key-file", file) and not started


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--allow-anonymous"),
        (["--host", "::"], "give --api-key-file FILE, set ALORA_API_KEY"),
        (["--trusted-proxy", "*"], "trusted_proxies: '*' does not appear to be an IPv4 or IPv6 network"),
        (["--request-timeout", "0"], "request_timeout must be at least 0.01, got 0.0"),
        (["--dtype", "int8"], "--dtype must be one of auto, float32"),
        (["--adapter", "/no/such"], "/no/such is not a folder"),
        (["--adapter-root", "/no/such"], "/no/such is not a folder"),
        (["--rate-limit", "often"], "60/minute"),
        (["--max-body-mb", "0"], "max_body_bytes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(started, folder, options, said):
    assert said in refused("m", "--adapter", folder, *options)
    assert not started


def test_a_taken_port_is_refused_before_the_model_is_loaded(loads_nothing, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused("m", "--adapter", folder, "--port", port)
        assert f"127.0.0.1:{port}" in said and "--port" in said


def test_a_device_that_is_not_there_and_a_refused_adapter_are_one_line(folder):
    serve = ("tiny-random", "--adapter", folder, "--port", 0)
    assert "--device abacus" in refused(*serve, "--device", "abacus")
    assert "adapter_config.json" in refused(*serve)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = alora_folder(tmp_path_factory.mktemp("serve") / "adapter", tiny_base()[0], ("math", "code"))
    write_task_cards(folder, {"code": TaskCard("Code: {text}\nIt's:", ("good", "bad"), "Code: x = 1\nIt's:")})
    return folder


def test_a_real_server_answers_every_task_drains_and_tidies_up(adapter, tmp_path):
    options = ["tiny-random", "--adapter", str(adapter), "--port", "0", "--max-context", "64", "--max-batch", "4"]
    child = subprocess.Popen(
        [sys.executable, "-m", "alora_kernels", "serve", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "160", "ALORA_API_KEY": "key", "TMPDIR": str(tmp_path)},
    )
    try:
        said = ""
        while "curl" not in said:
            line = child.stdout.readline()
            assert line, f"it ended: {said}"
            said += line
        url = re.search(r"http://127\.0\.0\.1:\d+", said).group()
        assert 'code answers "Code: {text}\\nIt\'s:" with good, bad' in said
        assert "no prompt template is known of math" in said
        assert "math, code" in said and "as separate LoRAs" in said and "Bearer KEY" in said
        for _ in range(2400):
            try:
                urllib.request.urlopen(url + "/health").close()
                break
            except OSError:
                time.sleep(0.05)
        answers = {model: ask(url, model) for model in ("tiny-random", "math", "code")}
        assert len(set(answers.values())) == 3, "different tasks gave the same answer"
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0
    finally:
        child.kill()
        child.communicate()
    assert not list(tmp_path.glob("alora*")), "files were left behind"


def ask(url: str, model: str) -> str:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        reply = json.load(response)
    assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    return reply["choices"][0]["text"]


def test_without_the_extra_it_is_named(started, monkeypatch, tmp_path):
    real = serve_module.find_spec
    monkeypatch.setattr(serve_module, "find_spec", lambda name: None if name in ("limits", "uvicorn") else real(name))
    said = refused("m", "--adapter", tmp_path)
    assert (
        "serving needs limits, uvicorn: pip install 'alora-kernels[serving]' (in a clone: pip install -e '.[serving]')"
        in said
    )
    assert not started


def test_the_extra_that_is_looked_for_is_the_one_that_is_installed():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[^\w-]", need)[0].replace("-", "_") for need in project["optional-dependencies"]["serving"]}
    assert named - {"transformers"} == set(serve_module.EXTRA)  # the base installs it; the extra narrows its versions


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no adapter_config.json, so it is no adapter's folder: give the folder that `alora train` wrote"),
        ({"math/adapter_config.json": "{}"}, "give one of its subfolders: math"),
        ({"config.json": "{}", "model.safetensors": ""}, "is a model's folder, not an adapter's: give it as MODEL"),
        (
            {"method.json": '{"settings": {"name": "hydralora", "num_experts": 2}}'},
            "is of the method hydralora, which is not served",
        ),
    ],
)
def test_an_adapter_that_is_none_is_refused_before_the_model_is_loaded(loads_nothing, tmp_path, files, said):
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    assert re.search(rf"--adapter {tmp_path} .*{said}", refused("tiny-random", "--adapter", tmp_path, "--port", 0))


def test_an_adapter_given_as_the_model_is_named(adapter):
    said = refused(adapter, "--adapter", adapter, "--port", 0)
    assert f"{adapter} is an adapter's folder, not a base model: give its base, 'tiny-random'," in said


SPAM = TaskCard("Message: {text}\nSpam or ham:", ("spam", "ham"), "Message: You've won!\nSpam or ham:")


def task(name: str, card: TaskCard | None = None) -> TaskInfo:
    return TaskInfo(name, 1, Path("/x"), "device", 0, 1, 0.0, card)


def test_the_example_asks_as_in_training_and_survives_a_shell():
    tasks = [task("law"), task("movie", TaskCard("Review: {text}\nSentiment:")), task("spam", SPAM)]
    words = shlex.split(serve_module.example("http://h:1", "base", tasks, keyed=True).replace("\\\n", " "))
    assert words[:2] == ["curl", "http://h:1/v1/completions"] and "Authorization: Bearer KEY" in words
    assert json.loads(words[-1]) == {"model": "spam", "prompt": SPAM.sample, "max_tokens": 8, "temperature": 0}
    for known, model, prompt in ((tasks[:2], "movie", "Review: {text}\nSentiment:"), (tasks[:1], "law", "The film was"),
                                 ([], "base", "The film was")):  # fmt: skip
        body = json.loads(shlex.split(serve_module.example("http://h:1", "base", known, keyed=False))[-1])
        assert (body["model"], body["prompt"]) == (model, prompt)


def test_the_banner_says_how_each_task_was_asked_and_of_which_nothing_is_known():
    many = TaskCard("x" * 500, tuple(f"word\n{n}" for n in range(20)))
    chat = TaskCard(chat=True, chat_template="{{ messages }}", system="Be short.", answers=("yes", "no"))
    lines = serve_module.how_asked([task("spam", SPAM), task("law"), task("many", many), task("help", chat)])
    assert lines[0] == 'spam answers "Message: {text}\\nSpam or ham:" with spam, ham'
    assert lines[1].startswith('many answers "xxx') and lines[1].endswith("word 7, ...") and len(lines[1]) < 250
    assert (
        lines[2]
        == 'help answers chats (in a chat template of its own) after the system prompt "Be short." with yes, no'
    )
    assert lines[3:] == ["no prompt template is known of law: ask as in training"]


def test_the_example_of_a_chat_task_is_a_chat():
    words = shlex.split(serve_module.example("http://h:1", "base", [task("help", TaskCard(chat=True))], keyed=False))
    assert words[1] == "http://h:1/v1/chat/completions"
    assert json.loads(words[-1])["messages"] == [{"role": "user", "content": "Hello"}]


def test_a_chat_template_takes_the_place_of_the_tokenizers_and_is_tried_at_once(started, adapter, tmp_path):
    file = tmp_path / "chat.jinja"
    for text, said in ((" ", "must hold 1 to"), ("x" * 65537, "not 65537"), (None, "does not read")):
        file.unlink(missing_ok=True)
        if text:
            file.write_text(text)
        assert said in refused("m", "--adapter", adapter, "--chat-template", file) and not started
    for text, said in (("{% if %}", "refuses these turns"), ("{{ messages[0].content }}!", None)):
        file.write_text(text)
        alora("tiny-random", "--adapter", adapter, "--chat-template", file, "--max-context", 64)
        with pytest.raises(ValueError, match=said) if said else nullcontext(), started[-1][0]() as (engine, _):
            assert said is None, "a template that fails was served"
            assert engine.prompt("hi").text == "hi!"


def test_the_prompts_of_the_guide_are_those_the_tasks_were_trained_on():
    """What docs/serving.md asks of a task begins and ends as the task's template does."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    curl = [json.loads(body) for body in re.findall(r"-d '(\{.*?\})'", text)]
    asked = {(body["model"], body["prompt"]) for body in curl if "prompt" in body}
    prompt = json.loads('"' + re.search(r'^prompt = "(.*?)"', text, re.M)[1] + '"')
    asked |= {(model, prompt) for model in re.findall(r'completions\.create\(model="(\w+)", prompt=prompt', text)}
    found = re.findall(r'submit\("(.*?)", task="(\w+)"', text)
    asked |= {(model, json.loads(f'"{prompt}"')) for prompt, model in found}
    assert {model for model, _ in asked} == {"movie", "spam"} and len(asked) == 3
    for model, prompt in asked:
        head, tail = data.TASKS[model].template.split("{text}")
        assert prompt.startswith(head) and prompt.endswith(tail) and len(prompt) > len(head + tail), (model, prompt)
