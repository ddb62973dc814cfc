"""Loading and unloading over HTTP: only below the operator's folders, whatever a path looks like."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx
import pytest
from test_serve_http import ASK, call, refused

from alora_kernels.serving.http import ServerConfig, create_app

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("")
    return folder


@pytest.fixture
def root(tmp_path):
    adapter(tmp_path / "root" / "law")
    adapter(tmp_path / "outside" / "law")
    return tmp_path / "root"


def ask(engine, root: Path | None, path: str, **fields) -> httpx.Response:
    return call(engine, "POST", path, ServerConfig("tiny", adapter_roots=(root,) if root else ()), json=fields)


def test_load_use_replace_unload(engine, root):
    done = ask(engine, root, LOAD, lora_name="law", lora_path=str(root / "law"))
    assert done.text == "Success: LoRA adapter 'law' added successfully."
    assert done.headers["content-type"].startswith("text/plain")
    assert call(engine, "POST", "/v1/completions", json=ASK | {"model": "law"}).json()["model"] == "law"
    refused(ask(engine, root, LOAD, lora_name="law", lora_path="law"), 400, "already")
    ask(engine, root, LOAD, lora_name="law", lora_path="law", load_inplace=True, task="civil")
    expected = {"folder": root / "law", "name": "law", "task": "civil", "replace": True}
    assert engine.store.loads[-1] == expected
    gone = ask(engine, root, UNLOAD, lora_name="law", lora_int_id=3)
    assert gone.text == "Success: LoRA adapter 'law' removed successfully."
    error = refused(ask(engine, root, UNLOAD, lora_name="law"), 404, "law", "known are movie, spam")
    assert error["param"] == "lora_name" and "tiny" not in error["message"]  # the base is none that could be unloaded
    refused(ask(engine, root, UNLOAD, lora_name="tiny"), 400, "'tiny' is the base model")


def test_without_folders_nothing_is_loaded_or_unloaded(engine, root):
    for path, fields in ((LOAD, {"lora_name": "x", "lora_path": str(root / "law")}), (UNLOAD, {"lora_name": "movie"})):
        refused(ask(engine, None, path, **fields), 403, "--adapter-root DIR")
    assert engine.store.names() == ["movie", "spam"] and not engine.store.loads


def test_a_folder_that_is_no_adapter_is_400(engine, root):
    (root / "empty").mkdir()
    for path in ("empty", "absent"):
        refused(ask(engine, root, LOAD, lora_name="x", lora_path=path), 400, "adapter_config.json")


def test_the_bases_name_is_not_for_tasks(engine, root):
    refused(ask(engine, root, LOAD, lora_name="tiny", lora_path="law"), 400, "base")


@pytest.mark.parametrize(
    "path",
    ["../outside/law", "../outside/nothing", "law/../../outside/law", "/etc", "/etc/nothing", "~", "~root/law", "~/x",
     "law\0/../..", "\0", "link", "circle", "sneaky", "x" * 4000, "a/" * 2000, "/", "..", "/proc/self/root/etc"],
)  # fmt: skip
def test_what_lies_outside_is_refused_in_the_same_words_whether_it_exists(engine, root, path):
    (root / "link").symlink_to(root.parent / "outside" / "law")
    (root / "circle").symlink_to(root / "circle")
    sneaky = root / "sneaky"
    sneaky.mkdir()
    (sneaky / "adapter_config.json").write_text("{}")
    (sneaky / "adapter_model.safetensors").symlink_to("/etc/passwd")
    answer = ask(engine, root, LOAD, lora_name="x", lora_path=path)
    if path.startswith("~") or path.startswith(("x", "a/")):  # names like any other, of folders that are not there
        assert answer.status_code in (400, 403)
    else:
        assert refused(answer, 403)["message"] == "lora_path must lie below a folder given with --adapter-root"
        assert not engine.store.loads
    assert engine.store.names() == ["movie", "spam"]


def test_a_link_inside_and_a_root_that_is_a_link_are_fine(engine, root, tmp_path):
    (root / "alias").symlink_to(root / "law")
    (tmp_path / "shortcut").symlink_to(root)
    assert ask(engine, tmp_path / "shortcut", LOAD, lora_name="x", lora_path="alias").status_code == 200
    assert engine.store.loads[-1]["folder"] == root / "law"


def test_others_are_served_while_a_folder_is_read(engine, root):
    app = create_app(engine, ServerConfig("tiny", adapter_roots=(root,)))
    engine.store.reading.clear()

    async def both() -> tuple[int, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://here") as client:
            load = asyncio.create_task(client.post(LOAD, json={"lora_name": "law", "lora_path": "law"}))
            while not engine.store.loads:
                await asyncio.sleep(0.01)
            answer = await client.post("/v1/completions", json=ASK)
            assert not load.done()
            engine.store.reading.set()
            return answer.status_code, (await load).status_code

    timer = threading.Timer(20, engine.store.reading.set)  # a server that blocks must not hang the tests
    timer.start()
    assert asyncio.run(both()) == (200, 200)
    timer.cancel()
