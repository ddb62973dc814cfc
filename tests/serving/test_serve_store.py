"""The store: a lease's slot holds exactly its version's numbers, whatever is loaded, evicted and unloaded around it."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from alora_kernels import files, route
from alora_kernels.adapters.cards import FILE, TaskCard, write_task_cards
from alora_kernels.adapters.reader import AdapterFile, read_adapter
from alora_kernels.serving.request import (
    AdapterRefusedError,
    NotServingError,
    ServingError,
    StorageError,
    TaskLostError,
    UnknownTaskError,
)
from alora_kernels.serving.slots import Placement, Slots
from alora_kernels.serving.store import Lease, TaskStore
from alora_kernels.tensor_file import TensorFile
from tests.support.adapters import MLP, Mlp, alora_folder, change_config, change_weights, lora_folder, tiny_base

Rows = dict[str, torch.Tensor]


def mlp_folder(path: Path, *tasks: str, seed: int = 0, **settings: Any) -> Path:
    """Folders made here share one B, whatever the seed of their A."""
    return alora_folder(path, Mlp(), list(tasks), seed=seed, seed_b=0, **(MLP | settings))


def opened(path: Path, *tasks: str, **options: Any) -> TaskStore:
    return TaskStore.open(Mlp(), [mlp_folder(path / "first", *tasks)], **options)


def saved(folder: Path, task: str) -> Rows:
    return read_adapter(folder).matrices(task)


def assert_holds(store: TaskStore, slot: int, rows: Rows) -> None:
    held = store.slots.read(slot)
    assert held.keys() == rows.keys()
    assert all(torch.equal(held[m], rows[m]) for m in rows)


def places(store: TaskStore) -> dict[str, str]:
    return {info.name: info.where for info in store.tasks()}


def resident(store: TaskStore) -> int:
    """Versions on the device, replaced ones that still run included."""
    return len(store._placement._resident)


def use(store: TaskStore, name: str) -> Lease:
    lease = store.acquire(name)
    assert lease is not None
    return lease


def touch(store: TaskStore, name: str) -> None:
    store.release(use(store, name))


def test_open_loads_every_task_of_every_folder(tmp_path):
    folders = [mlp_folder(tmp_path / "a", "math", "code"), mlp_folder(tmp_path / "b", "law", seed=1)]
    store = TaskStore.open(Mlp(), folders, resident=8)
    assert store.names() == ["math", "code", "law"]
    assert [(i.name, i.where, i.in_use, i.folder) for i in store.tasks()] == [
        ("math", "device", 0, folders[0]), ("code", "device", 0, folders[0]), ("law", "device", 0, folders[1]),
    ]  # fmt: skip
    assert (store.slots.capacity, resident(store)) == (8, 3)
    assert store.bytes_per_task == store.slots.bytes_per_task == store.tasks()[0].bytes
    assert store.bytes_shared == store.slots.bytes_shared
    for folder, task in ((folders[0], "math"), (folders[0], "code"), (folders[1], "law")):
        lease = use(store, task)
        assert lease.name == task
        assert_holds(store, lease.slot, saved(folder, task))


def test_a_lease_routes_a_model_as_peft_does(tmp_path):
    base, _ = tiny_base()
    folder = alora_folder(tmp_path / "a", base, ["math", "code"])
    served = deepcopy(base)
    store = TaskStore.open(served, [folder], resident=1)  # each acquire evicts the other task
    peft = PeftModel.from_pretrained(deepcopy(base), folder).eval()
    ids = torch.randint(1, 250, (2, 6), generator=torch.Generator().manual_seed(3))
    for task in ("math", "code", "math"):
        lease = use(store, task)
        with torch.no_grad(), route(torch.tensor([lease.slot, lease.slot])):
            ours = served(input_ids=ids).logits
        store.release(lease)
        with torch.no_grad():
            assert torch.equal(ours, peft(input_ids=ids, adapter_names=[task] * 2).logits)


def test_one_task_under_a_name_of_choice(tmp_path):
    store = opened(tmp_path, "math")
    two, one = mlp_folder(tmp_path / "two", "code", "law", seed=1), mlp_folder(tmp_path / "one", "art", seed=2)
    assert [i.name for i in store.load(two, name="judge", task="law")] == ["judge"]  # the one called task
    assert [i.name for i in store.load(one, name="painter")] == ["painter"]  # the only one
    assert [i.name for i in store.load(two, name="code")] == ["code"]  # the one called name
    assert [i.name for i in store.load(two, task="law")] == ["law"]  # one task under its own name
    for name, folder, own in (("judge", two, "law"), ("painter", one, "art"), ("code", two, "code")):
        assert_holds(store, use(store, name).slot, saved(folder, own))


def test_a_stock_lora_with_the_shared_b(tmp_path):
    store = opened(tmp_path, "math")
    b = read_adapter(tmp_path / "first").b
    folder = lora_folder(tmp_path / "movie", Mlp(), **MLP)
    with pytest.raises(AdapterRefusedError, match="its B differs"):
        store.load(folder)
    change_weights(folder, lambda t: t.update({f"base_model.model.{m}.lora_B.weight": b[m] for m in b}))
    assert [i.name for i in store.load(folder)] == ["movie"]
    assert_holds(store, use(store, "movie").slot, saved(folder, "movie"))


def test_new_tasks_displace_nobody(tmp_path):
    store = opened(tmp_path, "a", "b", "c", resident=2)
    assert places(store) == {"a": "device", "b": "device", "c": "host"}
    store.unload("a")
    store.load(mlp_folder(tmp_path / "d", "d"))
    assert places(store) == {"b": "device", "c": "host", "d": "device"}


def test_the_least_recently_used_without_a_lease_makes_room(tmp_path):
    store = opened(tmp_path, "a", "b", "c", "d", resident=2)
    held = use(store, "a")
    touch(store, "b")
    touch(store, "c")  # b goes, although a was used longer ago
    assert places(store) == {"a": "device", "b": "host", "c": "device", "d": "host"}
    store.release(held)
    touch(store, "a")
    touch(store, "d")  # c goes: a was used later
    assert places(store) == {"a": "device", "b": "host", "c": "host", "d": "device"}


def test_no_slot_while_all_are_in_use(tmp_path):
    store = opened(tmp_path, "a", "b", "c", resident=2)
    first, again, second = use(store, "a"), use(store, "a"), use(store, "b")
    assert first.slot == again.slot != second.slot
    assert {i.name: i.in_use for i in store.tasks()} == {"a": 2, "b": 1, "c": 0}
    assert store.acquire("c") is None
    store.release(first)
    store.release(first)  # a second time changes nothing: a is still in use by the other
    assert store.acquire("c") is None
    store.release(again)
    assert use(store, "c").slot == first.slot


def test_eviction_to_host_and_disk_and_back_is_exact(tmp_path):
    names = [f"t{i}" for i in range(6)]
    spill = tmp_path / "spill"
    store = opened(tmp_path, *names, resident=2, host=1, spill=spill)
    assert list(places(store).values()) == ["device", "device", "disk", "disk", "disk", "host"]
    for name in [*names, *reversed(names), *names]:
        lease = use(store, name)
        assert_holds(store, lease.slot, saved(tmp_path / "first", name))
        store.release(lease)
        assert sorted(places(store).values()) == ["device"] * 2 + ["disk"] * 3 + ["host"]
    (folder,) = spill.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.glob("*.safetensors")} == {0o600}


def test_a_file_is_written_once_and_goes_with_its_task(tmp_path, monkeypatch):
    written: list[Path] = []
    write = files.write
    monkeypatch.setattr(files, "write", lambda path, *rest: (written.append(path), write(path, *rest)))
    store = opened(tmp_path, "a", "b", "c", resident=1, host=0, spill=tmp_path / "spill")
    for name in "abcabcabc":
        touch(store, name)
    assert len(written) == len(set(written)) == 3
    store.unload("b")
    assert sum(path.exists() for path in written) == 2


def test_nothing_is_spilled_without_a_limit(tmp_path):
    store = opened(tmp_path, *"abcdef", resident=1, spill=tmp_path / "spill")
    assert list(places(store).values()) == ["device"] + ["host"] * 5
    assert not (tmp_path / "spill").exists()


def test_the_spill_folder_goes_with_the_store(tmp_path):
    first = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill")
    other = TaskStore.open(Mlp(), [tmp_path / "first"], resident=1, host=0, spill=tmp_path / "spill")
    assert len(list((tmp_path / "spill").iterdir())) == 2
    first.close()
    assert len(list((tmp_path / "spill").iterdir())) == 1
    first.close()
    del other  # never closed: what happens at the end of the process too
    assert not list((tmp_path / "spill").iterdir())


def test_a_closed_store(tmp_path):
    with opened(tmp_path, "a", "b", resident=1) as store:
        lease = use(store, "a")
    assert store.names() == []
    assert_holds(store, lease.slot, saved(tmp_path / "first", "a"))
    store.release(lease)
    with pytest.raises(UnknownTaskError):
        store.acquire("a")
    with pytest.raises(NotServingError, match="closed"):
        store.load(tmp_path / "first")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGES = [flip, Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: shutil.rmtree(p.parent)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_task_whose_file_is_lost_is_read_again_from_its_folder(tmp_path, damage, caplog):
    """Small ranks too, whose rows in a slot are more than those in the folder."""
    store = opened(tmp_path, "a", resident=1, host=0, spill=tmp_path / "spill")
    small = mlp_folder(tmp_path / "small", "b", "c", r=2, lora_alpha=4)
    known = load_file(tmp_path / "first" / "adapter_model.safetensors")
    change_weights(small, lambda t: t.update({key: known[key][:, :2].clone() for key in t if "_B" in key}))
    store.load(small, name="d", task="c")
    damage(next((tmp_path / "spill").rglob("*.safetensors")))
    for _ in range(2):  # the second time from the file that was written anew
        lease = use(store, "d")
        held, wanted = store.slots.read(lease.slot), saved(small, "c")
        assert all(torch.equal(held[m][:2], wanted[m]) and not held[m][2:].any() for m in wanted)
        store.release(lease)
        touch(store, "a")
    assert caplog.text.count("'d' was lost on the disk and is read again") == 1


def test_a_folder_that_is_removed_again_and_again_leaves_no_file_open(tmp_path):
    store, opened_files = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill"), set()
    for turn in range(4):
        shutil.rmtree(next((tmp_path / "spill").iterdir()))
        touch(store, "ba"[turn % 2])
        opened_files.add(psutil.Process().num_fds())
    assert len(opened_files) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_task_that_is_lost_with_its_folder_is_refused_and_disturbs_no_other(tmp_path, damage):
    """Another version in the folder is not what was loaded, nor is none."""
    store = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill")
    mlp_folder(tmp_path / "first", "a", "b", seed=3)
    damage(next((tmp_path / "spill").rglob("*.safetensors")))
    before = store.tasks()
    with pytest.raises(TaskLostError, match="'b' was moved to the disk.*other numbers than were loaded.*replace=True"):
        store.acquire("b")
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(TaskLostError, match="no such folder.*replace=True"):
        store.acquire("b")
    mlp_folder(tmp_path / "first", "a", "b")
    assert store.tasks() == before
    assert_holds(store, use(store, "a").slot, saved(tmp_path / "first", "a"))
    folder = mlp_folder(tmp_path / "new", "b", seed=4)
    store.load(folder, replace=True)
    store.unload("a")
    assert store.acquire("b") is None  # a still runs


def test_another_tasks_file_is_noticed(tmp_path, caplog):
    store = opened(tmp_path, "a", "b", "c", resident=1, host=0, spill=tmp_path / "spill")
    one, two = sorted((tmp_path / "spill").rglob("*.safetensors"))
    one.write_bytes(two.read_bytes())
    assert_holds(store, use(store, "b").slot, saved(tmp_path / "first", "b"))
    assert "holds another task" in caplog.text


def test_a_file_that_was_removed_is_written_again_before_its_rows_are_given_up(tmp_path):
    store = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill")
    touch(store, "b")
    shutil.rmtree(tmp_path / "spill")
    shutil.rmtree(tmp_path / "first")
    rows = store.slots.read(0)
    lease = store.acquire("b")
    store.release(lease)
    with pytest.raises(TaskLostError):
        store.acquire("a")
    store.load(mlp_folder(tmp_path / "new", "a", seed=2), replace=True)
    touch(store, "a")
    assert_holds(store, use(store, "b").slot, rows)


def test_what_dead_processes_left_on_the_disk_is_swept_and_living_ones_keep_theirs(tmp_path):
    alive = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill")
    (dead := tmp_path / "spill" / "tasks-dead").mkdir()
    for name in (files.LOCK, "version-1.safetensors"):  # a lock ends with its process
        (dead / name).write_text("4711")
    assert len(list((tmp_path / "spill").iterdir())) == 2
    other = TaskStore.open(Mlp(), [tmp_path / "first"], resident=1, host=0, spill=tmp_path / "spill")
    assert len(list((tmp_path / "spill").iterdir())) == 2
    other.close()
    (left,) = (tmp_path / "spill").iterdir()
    alive.slots.write(0, {m: torch.zeros(at.r, at.k) for m, at in alive.slots.shapes.items()})
    assert list(left.glob("*.safetensors")) and not shutil.rmtree(tmp_path / "first")
    touch(alive, "b")


def test_nothing_is_swept_where_no_lock_says_whose_process_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_locked", lambda file: True)
    alive = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill")
    with TaskStore.open(Mlp(), [tmp_path / "first"], resident=1, host=0, spill=tmp_path / "spill"):
        assert len(list((tmp_path / "spill").iterdir())) == 2
    shutil.rmtree(tmp_path / "first")
    touch(alive, "b")


def test_a_folder_that_another_user_put_there_is_left_alone(tmp_path, monkeypatch):
    """A link in it would have its target emptied."""
    (own := tmp_path / "own").write_text("mine")
    (planted := tmp_path / "spill" / "tasks-planted").mkdir(parents=True)
    (planted / files.LOCK).symlink_to(own)
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: planted.lstat().st_uid + 1)
        opened(tmp_path, "a", spill=tmp_path / "spill", host=0).close()
    assert own.read_text() == "mine" and [*planted.iterdir()] == [planted / files.LOCK]


def test_the_folder_of_tasks_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with opened(tmp_path, "a", "b", resident=1, host=0):
        assert len(list((tmp_path / "state" / "alora-kernels" / "spill").rglob("*.safetensors"))) == 1
    (tmp_path / "file").touch()
    base = Mlp()
    with pytest.raises(StorageError, match="no folder for tasks on the disk.*--spill"):
        TaskStore.open(base, [tmp_path / "first"], host=0, spill=tmp_path / "file")
    assert type(base.up) is torch.nn.Linear


def test_a_version_stays_for_those_that_wait_for_it(tmp_path):
    """Replaced, unloaded, or moved to the disk meanwhile; and it goes with the last of them."""
    store = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill")
    waiting, more = store.reserve("b"), store.reserve("b")
    assert [info.in_use for info in store.tasks()] == [0, 0]
    store.load(mlp_folder(tmp_path / "new", "b", seed=2), replace=True)
    store.unload("b")
    for lease in (waiting, more):
        assert store.place(lease) and store.place(lease)
        assert_holds(store, lease.slot, saved(tmp_path / "first", "b"))
    store.release(waiting)
    assert store.acquire("a") is None and list((tmp_path / "spill").rglob("version-2*"))
    store.release(more)
    assert_holds(store, use(store, "a").slot, saved(tmp_path / "first", "a"))
    assert store.place(waiting) and not list((tmp_path / "spill").rglob("version-2*"))


def test_a_full_disk(tmp_path, monkeypatch, caplog):
    store = opened(tmp_path, "a", "b", "c", resident=2, host=1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(StorageError, match=r"no room for task 'c' in .*spill/tasks-.*No space left.*--spill"):
        store.load(mlp_folder(tmp_path / "d", "d", "e"))
    assert places(store) == {"a": "device", "b": "device", "c": "host"}
    store._placement.host = 0
    touch(store, "c")  # a request goes on: a stays in host memory, over the limit
    assert places(store) == {"a": "host", "b": "device", "c": "device"}
    assert "No space left" in caplog.text


def test_unload_keeps_the_rows_until_the_last_lease(tmp_path):
    store = opened(tmp_path, "a", "b", resident=1)
    first, second = use(store, "a"), use(store, "a")
    info = store.unload("a")
    assert (info.name, info.in_use, info.where) == ("a", 2, "device")
    assert store.names() == ["b"]
    for call in (store.acquire, store.unload):
        with pytest.raises(UnknownTaskError, match="'a': known are b"):
            call("a")
    for lease in (first, second):
        assert store.acquire("b") is None
        assert_holds(store, lease.slot, saved(tmp_path / "first", "a"))
        store.release(lease)
    assert use(store, "b").slot == first.slot


def test_a_replaced_task_goes_on_for_those_that_run(tmp_path):
    store = opened(tmp_path, "a", resident=2)
    old = use(store, "a")
    new_folder = mlp_folder(tmp_path / "new", "a", seed=7)
    (info,) = store.load(new_folder, replace=True)
    new = use(store, "a")
    assert info.version == new.version > old.version and new.slot != old.slot
    assert_holds(store, old.slot, saved(tmp_path / "first", "a"))
    assert_holds(store, new.slot, saved(new_folder, "a"))
    assert (resident(store), len(store.tasks()), store.tasks()[0].in_use) == (2, 1, 1)
    store.release(old)
    assert resident(store) == 1


def test_a_name_that_comes_back_has_another_version(tmp_path):
    store = opened(tmp_path, "a")
    version = store.unload("a").version
    (info,) = store.load(tmp_path / "first")
    assert info.version > version


def test_unknown_tasks_and_bad_arguments(tmp_path):
    store = opened(tmp_path, "a")
    for call in (store.acquire, store.unload):
        with pytest.raises(UnknownTaskError, match="'b': known are a"):
            call("b")
    for options, why in (({"resident": 0}, "resident must be >= 1"), ({"host": -1}, "host must be >= 0")):
        with pytest.raises(ValueError, match=why):
            TaskStore.open(Mlp(), [tmp_path / "first"], **options)
    with pytest.raises(ValueError, match="folders must name at least one"):
        TaskStore.open(Mlp(), [])


def test_refusals_of_the_reader_and_of_the_stack_are_servings_own(tmp_path):
    """One `except ServingError` is enough around everything of a store."""
    store = opened(tmp_path, "a")
    unfit = mlp_folder(tmp_path / "unfit", "b", r=8)
    for refuse in (
        lambda: store.load(tmp_path / "nowhere"),
        lambda: store.load(tmp_path / ("x" * 4000)),  # longer than the system allows
        lambda: store.load(unfit),
        lambda: store.load(unfit, name="../up"),
        lambda: TaskStore.open(Mlp(), [tmp_path / "nowhere"]),
        lambda: TaskStore.open(torch.nn.Linear(2, 2), [unfit]),
    ):
        with pytest.raises(ServingError) as caught:
            refuse()
        assert type(caught.value) is AdapterRefusedError


REFUSED: list[tuple[dict[str, Any], Callable[[Path], Any] | None, dict[str, Any], str]] = [
    ({}, None, {}, "called 'code' already: give name"),
    ({}, None, {"name": "math", "task": "art"}, "called 'math' already"),
    ({}, None, {"name": "other"}, "no task 'other': it has 'art', 'code'"),
    ({}, None, {"name": "other", "task": "law"}, "no task 'law'"),
    ({}, None, {"name": "../up", "task": "art"}, "cannot be called '../up'"),
    ({}, None, {"name": "x" * 129, "task": "art"}, "cannot be called 'xxx"),
    ({}, None, {"name": "", "task": "art"}, "cannot be called ''"),
    ({}, None, {"name": "__base__", "task": "art"}, "cannot be called '__base__'"),
    ({}, lambda f: change_config(f, tasks=["b c", "d"]), {}, "cannot be called 'b c'.*another name"),
    ({"seed_b": 3}, None, {"replace": True}, "its B differs"),
    ({"r": 8}, None, {"replace": True}, "rank 8 does not fit"),
    ({"target_modules": ["up"]}, None, {"replace": True}, "missing down"),
    ({"base_name": "another"}, None, {"replace": True}, "trained on 'another'"),
    ({}, lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), {"replace": True}, "damaged"),
    ({}, lambda f: change_weights(f, _nan), {"replace": True}, "not finite"),
    ({}, lambda f: change_weights(f, _huge), {"replace": True}, "too large for torch.float16"),
]


def _nan(tensors: Rows) -> None:
    tensors["base_model.model.up.asymlora_A.weight"][-1, 0, 0] = float("nan")


def _huge(tensors: Rows) -> None:
    tensors["base_model.model.up.asymlora_A.weight"][-1, 0, 0] = 1e9  # of the last task: the first is placed by then


@pytest.mark.parametrize(("settings", "spoil", "options", "why"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_a_refused_load_changes_nothing(tmp_path, settings, spoil, options, why):
    store = opened(tmp_path, "math", "code", resident=3, dtype=torch.float16)
    lease = use(store, "code")
    before, held = store.tasks(), [store.slots.read(slot) for slot in range(2)]
    folder = alora_folder(tmp_path / "new", Mlp(), ["art", "code"], **({"seed": 1, "seed_b": 0} | MLP | settings))
    if spoil:
        spoil(folder)
    with pytest.raises(AdapterRefusedError, match=why):
        store.load(folder, **options)
    assert store.tasks() == before
    for slot in range(2):
        assert_holds(store, slot, held[slot])
    assert resident(store) == 2
    store.release(lease)
    good = store.load(mlp_folder(tmp_path / "good", "art"))
    assert good[0].where == "device"  # no slot was lost


@pytest.mark.parametrize("second", ["clash", "b", "nowhere"])
def test_a_refused_open_gives_the_model_back(tmp_path, second):
    first = mlp_folder(tmp_path / "a", "math")
    mlp_folder(tmp_path / "clash", "math")
    alora_folder(tmp_path / "b", Mlp(), ["law"], seed_b=9, **MLP)
    base = Mlp()
    with pytest.raises(AdapterRefusedError):
        TaskStore.open(base, [first, tmp_path / second], host=0, resident=1)
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in Mlp().named_modules()]
    store = TaskStore.open(base, [first])
    assert store.names() == ["math"]


class Model:
    """What the store should be, said simply: names to folders, leases to the numbers they began with."""

    def __init__(self, store: TaskStore, folders: list[Path], names: list[str]) -> None:
        self.store, self.folders, self.names = store, folders, names
        self.numbers = [{task: saved(folder, task) for task in read_adapter(folder).tasks} for folder in folders]
        self.tasks: dict[str, Rows] = {}
        self.leases: list[tuple[Lease, Rows]] = []

    def load(self, chance: random.Random) -> None:
        i, name, task = chance.randrange(len(self.folders)), chance.choice(self.names), chance.choice("xy")
        replace = chance.random() < 0.5
        if name in self.tasks and not replace:
            with pytest.raises(AdapterRefusedError, match="already"):
                self.store.load(self.folders[i], name=name, task=task)
            return
        self.store.load(self.folders[i], name=name, task=task, replace=replace)
        self.tasks[name] = self.numbers[i][task]

    def unload(self, chance: random.Random) -> None:
        name = chance.choice(self.names)
        if name in self.tasks:
            self.store.unload(name)
            del self.tasks[name]
            return
        with pytest.raises(UnknownTaskError):
            self.store.unload(name)

    def acquire(self, chance: random.Random) -> None:
        name = chance.choice(self.names)
        if name not in self.tasks:
            with pytest.raises(UnknownTaskError):
                self.store.acquire(name)
            return
        lease = self.store.acquire(name)
        used = {held.slot for held, _ in self.leases}
        if lease is None:
            assert len(used) == self.store.slots.capacity
            return
        self.leases.append((lease, self.tasks[name]))

    def release(self, chance: random.Random) -> None:
        if self.leases:
            lease, _ = self.leases.pop(chance.randrange(len(self.leases)))
            self.store.release(lease)
            if chance.random() < 0.2:
                self.store.release(lease)

    def check(self) -> None:
        for lease, rows in self.leases:
            assert_holds(self.store, lease.slot, rows)
        infos = {info.name: info for info in self.store.tasks()}
        assert infos.keys() == self.tasks.keys()
        for name, info in infos.items():
            assert info.in_use == sum(held.version == info.version for held, _ in self.leases), name
        host = self.store._placement.host
        assert host is None or sum(i.where == "host" for i in infos.values()) <= host
        assert resident(self.store) <= self.store.slots.capacity


@pytest.mark.parametrize("host", [None, 1, 0])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls(tmp_path, host, seed):
    chance = random.Random(seed)
    folders = [mlp_folder(tmp_path / f"f{i}", "x", "y", seed=i) for i in range(3)]
    names = [f"n{i}" for i in range(5)]
    store = TaskStore.open(Mlp(), folders[:1], resident=2, host=host, spill=tmp_path / "spill")
    model = Model(store, folders, [*names, "x", "y"])
    model.tasks = dict(model.numbers[0])
    none = 0
    for _ in range(150):
        step = chance.choice([model.load, model.unload, model.acquire, model.acquire, model.acquire, model.release])
        step(chance)
        none += len({held.slot for held, _ in model.leases}) == 2
        model.check()
    assert none > 5  # the sequence did reach a store with every slot in use
    while model.leases:
        model.release(chance)
    for name, rows in model.tasks.items():  # in the end each task still has its numbers
        lease = use(store, name)
        assert_holds(store, lease.slot, rows)
        store.release(lease)


def test_threads(tmp_path):
    """Eight threads use tasks while one replaces them: a slot's rows are one version's, from acquire to release."""
    versions = [mlp_folder(tmp_path / f"v{i}", "x", "y", "z", seed=i) for i in range(3)]
    numbers = [{task: saved(folder, task) for task in "xyz"} for folder in versions]
    store = TaskStore.open(Mlp(), versions[:1], resident=2, host=1, spill=tmp_path / "spill")
    began = {info.version: numbers[0][info.name] for info in store.tasks()}
    lock, stop, seen = threading.Lock(), threading.Event(), []

    def reload() -> None:
        for i in range(20):
            with lock:  # users learn which numbers a version has before they compare
                began.update({n.version: numbers[i % 3][n.name] for n in store.load(versions[i % 3], replace=True)})
            wanted = len(seen) + 4  # two slots: some of these leases began after the load
            while len(seen) < wanted and not any(future.done() for future in futures):
                time.sleep(0.001)
        stop.set()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            lease = store.acquire(chance.choice("xyz"))
            if lease is None:
                continue
            with lock:
                rows = began[lease.version]
            for _ in range(3):
                assert_holds(store, lease.slot, rows)
            store.release(lease)
            seen.append(lease.version)

    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(work, seed) for seed in range(8)]
        try:
            reload()
        finally:
            stop.set()
        for future in futures:
            future.result()
    assert len(set(seen)) > 3
    assert [info.in_use for info in store.tasks()] == [0, 0, 0]
    assert resident(store) <= 2


def test_two_threads_load_one_name(tmp_path, monkeypatch):
    """Both pass the first look at the names; only one may win, and the other leaves nothing behind."""
    store = opened(tmp_path, "a", resident=8)
    folder, both = mlp_folder(tmp_path / "new", "b"), threading.Barrier(2)
    read = Slots.rows

    def together(*args: Any) -> Rows:
        both.wait(timeout=30)
        return read(*args)

    monkeypatch.setattr(Slots, "rows", together)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(store.load, folder) for _ in range(2)]
    errors = [future.exception() for future in futures]
    assert sorted(map(type, errors), key=str) == sorted([type(None), AdapterRefusedError], key=str)
    assert (store.names(), resident(store)) == (["a", "b"], 2)


def test_a_name_taken_at_the_last_moment(tmp_path, monkeypatch):
    """Another load of the same name comes in between the placing of the matrices and the naming."""
    store = opened(tmp_path, "a", resident=8)
    folder, other = mlp_folder(tmp_path / "new", "b"), mlp_folder(tmp_path / "other", "b", seed=5)
    add = Placement.add

    def interrupted(*args: Any) -> None:
        add(*args)
        monkeypatch.setattr(Placement, "add", add)
        store.load(other)

    monkeypatch.setattr(Placement, "add", interrupted)
    with pytest.raises(AdapterRefusedError, match="called 'b' already"):
        store.load(folder)
    assert (store.names(), resident(store)) == (["a", "b"], 2)
    assert_holds(store, use(store, "b").slot, saved(other, "b"))


def test_a_store_closed_during_a_load_leaves_no_file(tmp_path, monkeypatch):
    store = opened(tmp_path, "a", "b", resident=1, host=0, spill=tmp_path / "spill")
    lease = use(store, "a")  # so that a new task would go to the disk
    read = Slots.rows

    def closed(*args: Any) -> Rows:
        store.close()
        return read(*args)

    monkeypatch.setattr(Slots, "rows", closed)
    with pytest.raises(NotServingError, match="closed"):
        store.load(mlp_folder(tmp_path / "new", "c"))
    assert not list((tmp_path / "spill").iterdir())
    store.release(lease)
    assert (store.names(), resident(store)) == ([], 0)


def test_the_remedy_for_a_name_is_one_that_works(tmp_path):
    """Every error about a name gives names of tasks that are there, and a name that is allowed."""
    store = opened(tmp_path, "a")
    alora_folder(tmp_path / "more", Mlp(), ("movie reviews", "law"), **MLP)
    for asked in ({}, {"task": "movie reviews"}, {"task": "movie reviews", "name": "../up"}):
        with pytest.raises(AdapterRefusedError, match="cannot be called") as caught:
            store.load(tmp_path / "more", **asked)
        task, name = re.search(r"task='([^']+)'.*name='([^']+)'", str(caught.value)).groups()
        assert (task, name) == ("movie reviews", "movie-reviews")
    assert [info.name for info in store.load(tmp_path / "more", task=task, name=name)] == ["movie-reviews"]
    for asked in ({"name": "films"}, {"name": "/films/", "task": "films"}, {"task": "films"}):
        with pytest.raises(AdapterRefusedError, match="has no task .*: it has 'movie reviews', 'law'; say which"):
            store.load(tmp_path / "more", **asked)


MATH, CODE = TaskCard("Sum: {text}\nResult:"), TaskCard("{prompt}", ("yes", "no"))


@pytest.fixture
def carded(tmp_path: Path) -> Path:
    """A folder that says how its tasks were asked in training."""
    folder = alora_folder(tmp_path / "adapter", tiny_base()[0], ("math", "code"))
    write_task_cards(folder, {"math": MATH, "unknown": CODE})
    return folder


def cards(store: TaskStore) -> dict[str, TaskCard | None]:
    return {task.name: task.card for task in store.tasks()}


def test_cards_follow_their_tasks_under_other_names_and_in_new_versions(carded: Path):
    with TaskStore.open(tiny_base()[0], [carded]) as store:
        assert cards(store) == {"math": MATH, "code": None}
        store.load(carded, name="sums", task="math")
        write_task_cards(carded, {"math": MATH, "code": CODE})
        store.load(carded, name="code", replace=True)
        assert cards(store) == {"math": MATH, "code": CODE, "sums": MATH}
        assert store.unload("sums").card == MATH


def test_a_stock_lora_has_the_only_card_of_its_folder(tmp_path: Path):
    folder = lora_folder(tmp_path / "renamed", tiny_base()[0])
    write_task_cards(folder, {"before": MATH})
    with TaskStore.open(tiny_base()[0], [folder]) as store:
        assert cards(store) == {"renamed": MATH}


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b'{"version": 1, "tasks": {"math": {"template": 1}}}'])
def test_a_broken_card_file_is_a_warning_and_every_task_is_served(carded: Path, caplog, content: bytes):
    (carded / FILE).write_bytes(content)
    with TaskStore.open(tiny_base()[0], [carded]) as store:
        assert cards(store) == {"math": None, "code": None}
        assert FILE in caplog.text
        assert store.acquire("math") is not None


def test_a_folder_written_into_while_it_is_loaded_is_loaded_once_more(tmp_path, monkeypatch):
    """The rows are those of one version, whichever that is."""
    store = opened(tmp_path, "a")
    mlp_folder(tmp_path / "live", "b")
    weights = tmp_path / "live" / "adapter_model.safetensors"
    data, matrices, turns = weights.read_bytes(), AdapterFile.matrices, []

    def rewritten(file: AdapterFile, task: str) -> dict[str, torch.Tensor]:
        turns.append(task)
        if len(turns) < limit:
            time.sleep(0.03)
            weights.write_bytes(data)
        return matrices(file, task)

    monkeypatch.setattr(AdapterFile, "matrices", rewritten)
    limit = 2
    store.load(tmp_path / "live")
    assert turns == ["b", "b"]
    assert_holds(store, use(store, "b").slot, saved(tmp_path / "live", "b"))
    limit = 99
    with pytest.raises(AdapterRefusedError, match="changed while it was read"):
        store.load(tmp_path / "live", replace=True)


def test_what_the_base_has_not_is_refused_before_its_numbers_are_read(tmp_path, monkeypatch):
    store = opened(tmp_path, "a")
    mlp_folder(tmp_path / "wide", "b", r=64)
    monkeypatch.setattr(TensorFile, "pieces", lambda *_: pytest.fail("read"))
    with pytest.raises(AdapterRefusedError, match="rank 64 does not fit"):
        store.load(tmp_path / "wide")
    with pytest.raises(AdapterRefusedError, match="the base has no"):
        TaskStore.open(torch.nn.Sequential(torch.nn.Linear(2, 2)), [tmp_path / "wide"])


def test_a_b_that_was_compared_by_its_checksum_is_not_read_again(tmp_path, monkeypatch):
    """Of the folders that come after the first, unless their writer said no checksum, or it is another."""
    folders = [mlp_folder(tmp_path / name, name, seed=i) for i, name in enumerate("ab")]
    read = []
    real = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, key, row=None: (read.append(key), real(self, key, row))[1])
    store = TaskStore.open(Mlp(), folders)
    assert sum("asymlora_B" in key for key in read) == 2  # of the first
    store.load(mlp_folder(tmp_path / "c", "c", seed=4))
    assert sum("asymlora_B" in key for key in read) == 2
    change_weights(mlp_folder(tmp_path / "d", "d"), lambda tensors: None)  # without checksums
    store.load(tmp_path / "d")
    assert sum("asymlora_B" in key for key in read) == 4
    with pytest.raises(AdapterRefusedError, match="its B differs"):
        store.load(alora_folder(tmp_path / "e", Mlp(), ["e"], seed_b=9, **MLP))


def test_a_folder_that_changes_between_its_reading_and_its_loading_is_read_again(tmp_path, monkeypatch):
    first, live = mlp_folder(tmp_path / "first", "a"), mlp_folder(tmp_path / "live", "b")
    take = TaskStore._load

    def slow(self: TaskStore, file: AdapterFile, *rest: Any, **more: Any) -> Any:
        if file.folder == live and not done:
            done.append(mlp_folder(live, "b", seed=5))
        return take(self, file, *rest, **more)

    done: list[Path] = []
    monkeypatch.setattr(TaskStore, "_load", slow)
    store = TaskStore.open(Mlp(), [first, live])
    assert done and places(store) == {"a": "device", "b": "device"}
    assert_holds(store, use(store, "b").slot, saved(live, "b"))
