"""Kernels with their programs side by side: no fault under any seed, and where they wait each broken copy has one.

`tests/support/interleave.py` says what a fault is. A new kernel is one entry of `KERNELS`: the module that names it, a
layer, the call, the check of what it returns. What it relies on goes into `MUTANTS`, with the kind of fault that the
lack of it must be. `ALORA_RACE_SEEDS=200` tries as many schedules of each kernel, not four, and longer cases.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.kernels import one_pass, sync
from alora_kernels.kernels.launch import launch as launch_kernel
from alora_kernels.kernels.sync import (
    HEADER,
    ahead_of,
    clean_up,
    counters,
    publish,
    take_ticket,
    tickets_of,
    wait_for,
)  # fmt: skip
from alora_kernels.ops.dispatch import interpreting
from tests.support.interleave import Fault, Launch, interleaved

from .cases import Case, Layer, S, assert_close
from .test_one_pass import CASES as ONE_PASS_CASES

pytestmark = pytest.mark.skipif(not interpreting(), reason="Triton's interpreter is off on a machine with a GPU")
SEEDS = range(int(os.environ.get("ALORA_RACE_SEEDS", "4")))
ATTEMPTS = 8  # seeds within which a broken kernel must be caught; all but one or two are with the first
HERE = sys.modules[__name__]
EXPAND = importlib.import_module("alora_kernels.kernels.expand")
DECODE = importlib.import_module("alora_kernels.kernels.decode")  # the package's `decode` is the function


@triton.jit
def _relay_kernel(x_ptr, cells_ptr, sums_ptr, counters_ptr, M, tickets, AHEAD: tl.constexpr, REST: tl.constexpr):
    ticket = take_ticket(counters_ptr)
    while ticket < tickets:
        group, index, produces = ahead_of(ticket, AHEAD, REST)
        if produces:
            row = group * AHEAD + index
            if row < M:
                tl.store(cells_ptr + row, 2 * tl.load(x_ptr + row))
                publish(counters_ptr, group)
        else:
            wait_for(counters_ptr, group, tl.minimum(AHEAD, M - group * AHEAD))
            rows = group * AHEAD + tl.arange(0, AHEAD)
            total = tl.sum(tl.load(cells_ptr + rows, mask=rows < M, other=0.0), axis=0)
            tl.store(sums_ptr + group * REST + index, total)
        ticket = take_ticket(counters_ptr)
    clean_up(counters_ptr, tl.cdiv(M, AHEAD), 4)


def relay(x: Tensor, programs: int) -> tuple[Tensor]:
    """All that `sync` offers and nothing else: sums [groups, 3] of 2 x, four entries a group."""
    groups = triton.cdiv(len(x), 4)
    cells, sums = torch.full_like(x, torch.nan), torch.full((groups, 3), torch.nan)
    shared, tickets = counters(x.device, HEADER + groups), tickets_of(groups, 4, 3)
    launch_kernel(_relay_kernel, (programs,), x, cells, sums, shared, len(x), tickets, AHEAD=4, REST=3)
    return (sums,)


def check_relay(t: Layer, sums: Tensor) -> None:
    doubled = torch.nn.functional.pad(2 * t.x[:, 0], (0, -len(t.x) % 4)).reshape(-1, 4).sum(1)
    torch.testing.assert_close(sums, doubled[:, None].expand(-1, 3))


def check_task(t: Layer, y: Tensor, h: Tensor) -> None:
    def layer(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w, bias) + t.task_h(x, a) @ b.T

    assert_close(h, t.task_h, t.dtype, t.x, t.a)
    assert_close(y, layer, t.dtype, t.x, t.w, t.bias, t.a, t.b)


def check_soft(t: Layer, y: Tensor, h: Tensor, p: Tensor) -> None:
    def layer(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w, bias) + t.soft_h(x, a, router) @ b.T

    assert_close(p, t.soft_p, t.dtype, t.x, t.a, t.router)
    assert_close(h, t.soft_h, t.dtype, t.x, t.a, t.router)
    assert_close(y, layer, t.dtype, t.x, t.w, t.bias, t.a, t.b, t.router)


def one_task(t: Layer) -> tuple[Tensor, ...]:
    return ak.one_pass_task(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S, dropout=t.drop)


def one_soft(t: Layer) -> tuple[Tensor, ...]:
    return ak.one_pass_soft(t.x, t.w, t.bias, t.a, t.b, t.router, scaling=S, dropout=t.drop)


def one_decode(t: Layer) -> tuple[Tensor, ...]:
    return ak.decode(t.x, t.w, t.bias, t.a, t.b, t.groups.ids, scaling=S)


def pair_task(t: Layer) -> tuple[Tensor, ...]:
    with ak.overlapping():
        h = ak.shrink_task(t.x, t.a, t.groups, scaling=S, dropout=t.drop)
        return ak.expand(t.x, t.w, t.bias, h, t.b), h


def pair_soft(t: Layer) -> tuple[Tensor, ...]:
    with ak.overlapping():
        h, p = ak.shrink_soft(t.x, t.a, t.router, scaling=S, dropout=t.drop)
        return ak.expand(t.x, t.w, t.bias, h, t.b), h, p


@dataclass(frozen=True)
class Kernel:
    module: ModuleType  # whose names the kernel and its launcher see
    case: Case
    call: Callable[[Layer], tuple[Tensor, ...]]
    check: Callable[..., None]  # of the layer and the outputs


KERNELS = {
    "sync": Kernel(HERE, Case(m=10, k=1), lambda t: relay(t.x[:, 0].contiguous(), 5), check_relay),
    "task": Kernel(one_pass, Case(m=72, k=32, n=64, r=4, e=3, ids="sorted"), one_task, check_task),
    "task, dropout": Kernel(one_pass, Case(m=64, k=32, n=32, r=4, e=2, p=0.25), one_task, check_task),
    "task, one row": Kernel(one_pass, Case(m=1, k=16, n=48, r=1, e=1), one_task, check_task),
    "task, no task": Kernel(one_pass, Case(m=40, k=16, n=48, r=4, e=3, ids="out of range"), one_task, check_task),
    "soft": Kernel(one_pass, Case(m=80, k=32, n=64, r=4, e=3), one_soft, check_soft),
    "soft, dropout": Kernel(one_pass, Case(m=96, k=32, n=32, r=4, e=2, p=0.25), one_soft, check_soft),
    "soft, one row": Kernel(one_pass, Case(m=1, k=16, n=48, r=4, e=1), one_soft, check_soft),
    "decode": Kernel(DECODE, Case(m=4, k=160, n=64, r=4, e=3), one_decode, check_task),
    "decode, one row": Kernel(DECODE, Case(m=1, k=300, n=40, r=4, e=3), one_decode, check_task),
    "decode, no task": Kernel(DECODE, Case(m=7, k=40, n=70, r=4, e=3, ids="out of range"), one_decode, check_task),
    # the shrink, and the GEMM that begins beside it
    "pair, task": Kernel(EXPAND, Case(m=50, k=32, n=48, r=4, e=3, ids="sorted"), pair_task, check_task),
    "pair, task, dropout": Kernel(EXPAND, Case(m=33, k=40, n=35, r=4, e=3, p=0.25), pair_task, check_task),
    "pair, no task": Kernel(EXPAND, Case(m=20, k=32, n=48, r=4, e=3, ids="base"), pair_task, check_task),
    "pair, soft": Kernel(EXPAND, Case(m=50, k=32, n=48, r=4, e=3), pair_soft, check_soft),
}


def run(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch, case: Case | None = None
) -> tuple[Layer, tuple[Tensor, ...], Launch]:
    """A kernel with its programs side by side: several groups of row blocks, three, five or all programs."""
    monkeypatch.setattr(one_pass, "GROUP_M", 2)
    monkeypatch.setattr(one_pass, "persistent_programs", lambda *_: (3, 5, 132)[seed % 3])
    layer = Layer(case or KERNELS[name].case, torch.float32)
    with interleaved(seed) as launches:
        outputs = KERNELS[name].call(layer)
    (launch,) = launches
    return layer, outputs, launch


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KERNELS)
def test_no_program_disturbs_another(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, outputs, _ = run(name, seed, monkeypatch)
    KERNELS[name].check(layer, *outputs)


@pytest.mark.parametrize("case", [c for c in ONE_PASS_CASES if c.m and (c.m < 100 or len(SEEDS) > 4)], ids=str)
@pytest.mark.parametrize("name", ["task", "soft"])
def test_every_case_of_one_pass(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "task" or case.e <= 8:  # soft routing takes no more experts in one pass
        layer, outputs, _ = run(name, case.m + case.r, monkeypatch, case)
        KERNELS[name].check(layer, *outputs)


# programs of these never wait: none may touch what another stores, nor anything beyond its arguments
OTHERS = {
    "shrink_task": lambda t: ak.shrink_task(t.x, t.a, t.groups, scaling=S, dropout=t.drop),
    "shrink_soft": lambda t: ak.shrink_soft(t.x, t.a, t.router, scaling=S, dropout=t.drop),
    "expand": lambda t: ak.expand(t.x, t.w, t.bias, t.h, t.b),
    "expand_backward": lambda t: ak.expand_backward(t.dy, t.b, t.h, scaling=S),
    "gate_backward": lambda t: ak.gate_backward(t.dh, t.p, t.case.e, dtype=t.dtype),
    "dx_task": lambda t: ak.dx_task(t.dy, t.w, t.dh, t.a, t.groups, dtype=t.dtype, dropout=t.drop),
    "dx_soft": lambda t: ak.dx_soft(t.dy, t.w, t.dp, t.a, t.router, dtype=t.dtype, dropout=t.drop),
    "da_task": lambda t: ak.da_task(t.dh, t.x, t.groups, t.case.e, dtype=t.dtype, dropout=t.drop),
    "da_soft": lambda t: ak.da_soft(t.dp, t.x, t.case.e, dtype=t.dtype, dropout=t.drop),
}
OTHER_CASES = [
    Case(p=0.25, strided=True),
    Case(m=20, k=40, n=48, r=33, e=5, ids="out of range"),  # ranks in two blocks, more experts than one pass takes
    Case(m=40, k=64, n=48, r=16, e=4, p=0.25),  # all through descriptors
]


@pytest.mark.parametrize("case", OTHER_CASES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_stay_apart(name: str, case: Case) -> None:
    layer = Layer(case, torch.float32)
    # known: every block of ranks stores the same logits; `if pid_r == 0` around the store costs spills on sm_80, sm_100
    same = name == "shrink_soft" and case.r > 32
    with pytest.raises(Fault, match=r"store race: p_ptr\[") if same else nullcontext(), interleaved(seed=1) as launches:
        OTHERS[name](layer)
    assert launches


@dataclass(frozen=True)
class Mutant:
    """A function with text replaced, and the kinds of fault that this may be called."""

    name: str
    kernels: tuple[str, ...]
    function: str
    swaps: dict[str, str]
    kinds: tuple[str, ...]


EVERY = ("sync", "task", "soft", "decode")
READ, HANGS, TWICE = ("unordered read",), ("no progress",), ("ticket taken twice",)
LEFT, MIXED = ("counters not zero",), ("unordered atomic",)
PLAIN = "ticket = tl.load(counters_ptr + TICKETS)\n    tl.store(counters_ptr + TICKETS, ticket + 1)\n    return ticket"
TWO_STEPS = (
    'ticket = tl.atomic_add(counters_ptr + TICKETS, 0, sem="relaxed")\n'
    '    tl.atomic_xchg(counters_ptr + TICKETS, ticket + 1, sem="relaxed")\n    return ticket'
)
TICKET = 'return tl.atomic_add(counters_ptr + TICKETS, 1, sem="relaxed")'
LOOP = '        seen = tl.atomic_add(counters_ptr + FLAGS + flag, 0, sem="acquire")'
SHARE = "tl.minimum(SHARE, tl.cdiv(M - row, BLOCK_P))"
LAST = '(counters_ptr + DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1'
MASK = "mask=offs < FLAGS + num_flags"
PUBLISH, STORE = "                publish(counters_ptr, pid_m)\n", "                tl.store(h_rows"
TASK, SOFT, RELAY, DECODING = "_one_pass_task_kernel", "_one_pass_soft_kernel", "_relay_kernel", "_decode_kernel"
PAIRS, EXPANDING, WAITS = ("pair, task", "pair, soft"), "_expand_kernel", "        wait_for_predecessor()\n"
REVERSED = {"ahead_of(ticket,": "ahead_of(tickets - 1 - ticket,"}
MUTANTS = [
    Mutant("a relaxed release", EVERY, "publish", {'"release"': '"relaxed"'}, READ),
    Mutant("a release for its own block", EVERY, "publish", {'"release"': '"release", scope="cta"'}, READ),
    Mutant("a release beside its warps' stores", EVERY, "publish", {"tl.debug_barrier()": "pass"}, READ),
    Mutant("a relaxed acquire", EVERY, "wait_for", {'"acquire"': '"relaxed"'}, READ),
    Mutant("a relaxed acquire after the first", EVERY, "wait_for", {LOOP: LOOP.replace("acquire", "relaxed")}, READ),
    Mutant("one flag fewer", EVERY, "wait_for", {"seen < count": "seen < count - 1"}, READ),
    Mutant("one flag more", EVERY, "wait_for", {"seen < count": "seen < count + 1"}, HANGS),
    Mutant("tickets without atomics", EVERY, "take_ticket", {TICKET: PLAIN}, (*TWICE, *READ)),
    Mutant("tickets by two atomics", EVERY, "take_ticket", {TICKET: TWO_STEPS}, TWICE),
    Mutant("no clean-up", EVERY, "clean_up", {LAST: LAST.replace("tl.num_programs(0)", "0")}, LEFT),
    Mutant("a clean-up short of a flag", EVERY, "clean_up", {MASK: f"{MASK} - 1"}, LEFT),
    Mutant("an early clean-up", EVERY, "clean_up", {LAST: LAST.replace("- 1", "- 2")}, (*LEFT, *MIXED, *TWICE)),
    Mutant("a clean-up that nothing orders", EVERY, "clean_up", {'"acq_rel"': '"relaxed"'}, MIXED),
    Mutant("consumers before producers", ("sync",), RELAY, REVERSED, HANGS),
    Mutant("consumers before producers", ("task",), TASK, REVERSED, HANGS),
    Mutant("consumers before producers", ("soft",), SOFT, REVERSED, HANGS),
    Mutant("h published before it is stored", ("task",), TASK, {PUBLISH: "", STORE: PUBLISH + STORE}, READ),
    Mutant("nobody waits", ("task",), TASK, {"wait_for(counters_ptr, pid_m, 1)": "pass"}, READ),
    Mutant("nobody cleans up", ("task",), TASK, {"clean_up(counters_ptr, tl.cdiv(M, BLOCK_M), 1024)": "pass"}, LEFT),
    Mutant("nobody waits", ("soft",), SOFT, {f"wait_for(counters_ptr, pid_m, {SHARE})": "pass"}, READ),
    Mutant("a piece too few", ("soft",), SOFT, {SHARE: f"{SHARE} - 1"}, READ),
    Mutant("pieces beyond the last row", ("soft",), SOFT, {SHARE: "SHARE"}, HANGS),
    Mutant("the flag of a neighbour", ("soft",), SOFT, {"piece // SHARE)": "piece % SHARE)"}, (*READ, *HANGS)),
    Mutant("nobody waits", PAIRS, EXPANDING, {WAITS: ""}, READ),
    Mutant("one column waits", PAIRS, EXPANDING, {WAITS: f"        if pid_n == 0:\n    {WAITS}"}, READ),
    Mutant("a wait behind h", PAIRS, EXPANDING, {WAITS: "", "    finish_gemm(": WAITS[4:] + "    finish_gemm("}, READ),
    Mutant("nobody waits", ("decode",), DECODING, {"wait_for(counters_ptr, 0, pieces)": "pass"}, READ),
    Mutant("slices share a plane", ("decode",), DECODING, {"(part * M + m) * R": "m * R"}, ("store race",)),
    Mutant("every tile stores h", ("decode",), DECODING, {"if pid_n == 0:": "if pid_n >= 0:"}, ("store race",)),
    Mutant("a plane too far", ("decode",), DECODING, {"part * M * R": "(part + 1) * M * R"}, ("out of bounds",)),
]  # fmt: skip


def mutate(module: ModuleType, name: str, swaps: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give `module` a copy of one of its kernels with other text, from a file of its own."""
    original: Any = getattr(module, name).fn
    text = inspect.getsource(original)
    for old, new in swaps.items():
        assert old in text, f"{name} reads otherwise now: {old!r} is not in it"
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text)
    names = {**original.__globals__, "__name__": "mutant"}
    exec(compile(text, str(folder / f"{name}.py"), "exec"), names)
    monkeypatch.setattr(module, name, names[name])


def first_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> Fault | None:
    for seed in range(ATTEMPTS):
        try:
            run(name, seed, monkeypatch)
        except Fault as fault:
            return fault
    return None


@pytest.mark.filterwarnings("ignore:overflow")  # of products with what was never stored
@pytest.mark.parametrize(
    ("mutant", "name"), [(m, k) for m in MUTANTS for k in m.kernels], ids=lambda v: getattr(v, "name", v)
)
def test_a_broken_kernel_is_caught(mutant: Mutant, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(KERNELS[name].module, mutant.function, mutant.swaps, tmp_path, monkeypatch)
    fault = first_fault(name, monkeypatch)
    assert fault is not None, f"{ATTEMPTS} schedules and no fault"
    assert fault.kind in mutant.kinds, fault
    assert not any(block.any() for block in sync._blocks.values())  # the next test begins as after a good launch


def test_a_trace_names_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(one_pass, TASK, {"wait_for(counters_ptr, pid_m, 1)": "pass"}, tmp_path, monkeypatch)
    said = str(first_fault("task", monkeypatch))
    for part in (
        "h_ptr[",
        ": store of ",
        "tl.store(h_rows",
        ": load of ",
        "gemm.py:",
        f"in {TASK}, seed ",
        "last steps",
    ):
        assert part in said, said


def test_a_seed_repeats_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[tuple[int, str, int]]:
        return [(step.program, step.what, step.line) for step in run("sync", seed, monkeypatch)[2].atomics]

    assert order(5) == order(5) != order(8)
