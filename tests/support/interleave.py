"""The programs of a launch side by side in Triton's interpreter, and a fault with its trace where they race.

The interpreter runs one program after another: it checks values, never order. Inside `interleaved(seed)` every program
is a thread, one of which runs at a time; at each load, store and atomic the seed decides who goes on. It also decides
in which order programs start and how many are resident at once, since a GPU promises neither. Vector clocks see a
missing order even in a run whose values happen to be right:

    def test_my_kernel() -> None:
        with interleaved(seed=3):
            y = my_kernel(x)  # raises Fault

What orders two programs: a release atomic hands on what its program did before its last `tl.debug_barrier` (loads and
stores are made by many warps, the atomic by one thread), and an acquire atomic on the same location takes it over. The
barrier itself orders the warps of one program and nobody else; scope "cta" orders nobody. So a program that loads what
it stored itself needs a barrier between, too.

Two launches that overlap (`kernels.overlapping`) are one here: programs of the second may begin as soon as those of the
first have all called `sync.start_dependents`, or ended, and only `sync.wait_for_predecessor` orders them.

An argument named `counters_ptr` is a block of `kernels.sync`: tickets first, and all zero when the launch ends.
`tl.atomic_load` and its kin (triton 3.9) count as plain accesses. Memory outside all arguments is a fault.
"""

from __future__ import annotations

import inspect
import linecache
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from alora_kernels.kernels import sync

PATIENCE = 1000  # steps of a launch in a row that store nothing new: nobody gets on any more
TRACE = 6  # steps of each program that a fault shows
LIBRARY = str(Path(triton.__file__).parent)
NATIVE = interpreter._interpreter  # its load, store, atomic_rmw and atomic_cas touch memory for all operations
BUILDER = interpreter.interpreter_builder
ACQUIRES = (NATIVE.MEM_SEMANTIC.ACQUIRE, NATIVE.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (NATIVE.MEM_SEMANTIC.RELEASE, NATIVE.MEM_SEMANTIC.ACQUIRE_RELEASE)


class Fault(AssertionError):
    """What programs of one launch do to each other; `kind` is the name of the rule."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class _Stop(BaseException):
    """Ends the other programs of a launch that has failed; no Exception, which the interpreter would wrap."""


class Step(NamedTuple):
    """One operation of a program."""

    program: int
    what: str  # "load", "store", "barrier", or an atomic with its semantics
    address: int
    elements: int
    old: Any  # what an atomic found
    file: str
    line: int


class _Memory:
    """Who touched each byte of the arguments last, and what each program knows of the others.

    Times are steps of a program. `clock[p]` has two entries for each program q: up to which of q's plain accesses, and
    up to which of its atomics, all that p does from now on comes later.
    """

    def __init__(self, programs: int, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.programs = tensors, programs
        merged: list[list[int]] = []
        for start, end in sorted(map(_extent, tensors.values())):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.starts, self.ends = np.array(merged, np.int64).reshape(-1, 2).T
        self.shift = np.cumsum(self.ends - self.starts) - (self.ends - self.starts)
        size = int((self.ends - self.starts).sum())
        self.writer, self.written = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.loads, self.atomics = (np.zeros((programs, size), np.int32) for _ in range(2))
        self.is_atomic = np.zeros(size, bool)
        self.clock = np.zeros((programs, 2 * programs), np.int64)
        self.released: dict[int, np.ndarray] = {}  # by the first byte of a location

    def places(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Numbers of the bytes `[elements, itemsize]`; those outside of every argument are -1."""
        region = np.searchsorted(self.starts, addresses, side="right") - 1
        known = (region >= 0) & (addresses + itemsize <= self.ends[region])
        first = np.where(known, self.shift[region] + addresses - self.starts[region], -1)
        return np.where(known[:, None], first[:, None] + np.arange(itemsize), -1)

    def unordered_store(self, me: int, places: np.ndarray, *, own: bool) -> tuple[int, int, int] | None:
        """A place whose last store does not come before what `me` does now: (place, program, its step)."""
        late = self.written[places] > self.clock[me, self.writer[places]]
        if not own:
            late &= self.writer[places] != me
        if not late.any():
            return None
        place = places[late][0]
        return place, self.writer[place], self.written[place]

    def unordered(self, me: int, places: np.ndarray, *, atomics: bool) -> tuple[int, int, int] | None:
        """The same for the loads, or the atomics, of other programs."""
        if atomics:
            places = places[self.is_atomic[places]]
        if not places.size:
            return None
        times, first = (self.atomics, self.programs) if atomics else (self.loads, 0)
        late = times[:, places] > self.clock[me, first : first + self.programs, None]
        late[me] = False
        if not late.any():
            return None
        program, index = np.argwhere(late)[0]
        return places[index], program, times[program, places[index]]

    def store(self, me: int, now: int, places: np.ndarray) -> None:
        self.writer[places], self.written[places] = me, now
        for location in [one for one in self.released if (places == one).any()]:
            del self.released[location]

    def atomic(self, me: int, now: int, places: np.ndarray, *, acquires: bool, releases: bool) -> None:
        """Others see a release with the plain accesses before this program's last barrier and all of its atomics."""
        self.atomics[me, places], self.is_atomic[places] = now, True
        self.clock[me, self.programs + me] = now
        for location in places[:, 0].tolist():
            if acquires and location in self.released:
                self.clock[me] = np.maximum(self.clock[me], self.released[location])
            if releases:  # relaxed atomics between leave what was released before
                self.released[location] = np.maximum(self.released.get(location, 0), self.clock[me])

    def barrier(self, me: int, now: int) -> None:
        self.clock[me, me] = now

    def name(self, address: int) -> str:
        """An address as an entry of an argument."""
        for name, tensor in self.tensors.items():
            start, end = _extent(tensor)
            if start <= address < end:
                entry = (address - start) // tensor.element_size()
                if tensor.is_contiguous():
                    return f"{name}{[int(i) for i in np.unravel_index(entry, tensor.shape)]}"
                return f"{name} + {entry}"
        return f"address {address:#x}"


def _extent(tensor: Tensor) -> tuple[int, int]:
    entries = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + entries * tensor.element_size() * bool(tensor.numel())


class _Schedule:
    """Threads of which one runs; `switch` lets the seed decide which. A program is a place in one of the `grids`."""

    def __init__(self, grids: list[tuple[int, ...]], rng: random.Random) -> None:
        programs = self.programs = [(grid, place) for grid in grids for place in np.ndindex(grid)]
        self.rng = rng
        self.first = math.prod(grids[0])  # programs of the launch that a second one may follow early
        self.let_next_start: set[int] = set()
        self.ended = 0  # of the first launch
        self.coming = list(range(len(programs)))
        rng.shuffle(self.coming)
        self.slots = min(rng.choice([1, 2, 3, 6, 99]), len(programs))
        self.restless = rng.choice([0.02, 0.3, 1.0])  # how often a program that gets on is interrupted
        # some sleep before one of their first stores or atomics until nobody else gets on: what others need is late
        sleepers = rng.sample(range(len(programs)), min(rng.choice([0, 1, 2, 4]), len(programs)))
        self.naps = {program: rng.randrange(2, 6) for program in sleepers}
        self.made = [0] * len(programs)  # stores and atomics
        self.resident: list[int] = []
        self.current = -1
        self.polled: dict[int, tuple[int, int]] = {}  # program -> address it polls, how often in vain
        self.fault: BaseException | None = None
        self.turns = [threading.Semaphore(0) for _ in programs]
        self.over = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []

    def run(self, bodies: list[Callable[[], None]]) -> None:
        """Run each launch's body once as each of its programs, to the end of all or the first fault."""
        self.bodies = bodies
        self._admit()
        self._go(self.rng.choice(self.resident))
        self.over.acquire()
        for thread in self.threads:
            thread.join()
        if self.fault is not None:
            raise self.fault

    def switch(self, loads: bool) -> None:
        """Called by the program that runs, before each of its steps."""
        me = self.current
        self.made[me] += not loads
        if me in self.polled or self._sleeps(me) or self.rng.random() < self.restless:
            self._yield(me)

    def _yield(self, me: int) -> None:
        following = self._choose()
        if following != me:
            self._go(following)
            self.turns[me].acquire()
            if self.fault is not None:
                raise _Stop

    def start_dependents(self) -> None:
        self.let_next_start.add(self.current)
        self._admit()

    def wait_for_first(self) -> None:
        """Called by a program of the second launch: others run until the first one has ended."""
        me = self.current
        while self.ended < self.first:
            self.polled[me] = (-1, 2)
            self._yield(me)
        self.polled.pop(me, None)

    def stored(self, addresses: np.ndarray) -> None:
        """Whoever polls one of these has news."""
        for program, (address, _) in list(self.polled.items()):
            if (addresses == address).any():
                del self.polled[program]

    def _sleeps(self, program: int) -> bool:
        return self.made[program] >= self.naps.get(program, sys.maxsize)

    def _choose(self) -> int:
        awake = [p for p in self.resident if not self._sleeps(p)]
        hopeful = [p for p in awake if self.polled.get(p, (0, 0))[1] < 2]
        if not hopeful and len(awake) < len(self.resident):
            sleeper = self.rng.choice([p for p in self.resident if p not in awake])
            del self.naps[sleeper]
            return sleeper
        return self.rng.choice(hopeful if hopeful and self.rng.random() < 0.95 else awake)

    def _go(self, program: int) -> None:
        self.current = program
        grid, place = self.programs[program]
        BUILDER.set_grid_dim(*grid)
        BUILDER.set_grid_idx(*place)
        self.turns[program].release()

    def _admit(self) -> None:
        while self.fault is None and len(self.resident) < self.slots:
            both = len(self.let_next_start) == self.first
            if not (ready := [program for program in self.coming if both or program < self.first]):
                return
            program = ready[-1]
            self.coming.remove(program)
            self.resident.append(program)
            self.threads.append(threading.Thread(target=self._live, args=(program,), daemon=True))
            self.threads[-1].start()

    def _live(self, me: int) -> None:
        self.turns[me].acquire()
        try:
            if self.fault is None:
                self.bodies[me >= self.first]()
        except _Stop:
            pass
        except BaseException as error:
            self.fault = self.fault or error
        self.resident.remove(me)
        self.polled.pop(me, None)
        if me < self.first:
            self.ended += 1
            self.let_next_start.add(me)
        self._admit()
        if self.resident:
            self._go(self._choose())
        else:
            self.over.release()


class Launch:
    """One launch: in place of the interpreter's access to memory it asks the schedule, the memory and the rules."""

    MEM_SEMANTIC, RMW_OP = NATIVE.MEM_SEMANTIC, NATIVE.RMW_OP

    def __init__(self, kernel: str, grids: list[tuple[int, ...]], tensors: dict[str, Tensor], seed: int) -> None:
        self.kernel, self.seed, self.counters = kernel, seed, tensors.get("counters_ptr")
        self.schedule = _Schedule(grids, random.Random(f"{seed} {kernel}"))
        programs = self.schedule.programs
        self.memory = _Memory(len(programs), tensors)
        self.steps: list[list[Step]] = [[] for _ in programs]
        self.atomics: list[Step] = []
        self.stale = 0
        self.scope = ir.MEM_SYNC_SCOPE.GPU
        self.tickets: dict[int, int] = {}

    def run(self, *bodies: Callable[[], None]) -> None:
        try:
            self.schedule.run(list(bodies))
            if self.counters is not None and self.counters.any():
                raise Fault("counters not zero", f"{self._where()} leaves {self.counters.tolist()}")
        except BaseException:
            if self.counters is not None:
                self.counters.zero_()  # other launches share them
            raise

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        me, places, step = self._begin("load", pointers, mask, np.dtype(dtype).itemsize)
        value = NATIVE.load(pointers, mask, other, dtype)
        self._ticket(step, value)
        self._rule("unordered read", step, self.memory.unordered_store(me, places.ravel(), own=True))
        self._rule("unordered atomic", step, self.memory.unordered(me, places.ravel(), atomics=True))
        self.memory.loads[me, places] = len(self.steps[me])
        self._end(step, changed=False)
        return value

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        me, places, step = self._begin("store", pointers, mask, value.dtype.itemsize)
        NATIVE.store(pointers, value, mask)
        self._rule("store race", step, self.memory.unordered_store(me, places.ravel(), own=False))
        self._rule("unordered read", step, self.memory.unordered(me, places.ravel(), atomics=False))
        self._rule("unordered atomic", step, self.memory.unordered(me, places.ravel(), atomics=True))
        self.memory.store(me, len(self.steps[me]), places)
        self._end(step, changed=places.size > 0, addresses=pointers)

    def atomic_rmw(self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, sem: Any) -> np.ndarray:
        return self._atomic(lambda: NATIVE.atomic_rmw(op, pointers, value, mask, sem), pointers, mask, value.dtype, sem)

    def atomic_cas(self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, sem: Any) -> np.ndarray:
        everywhere = np.ones(pointers.shape, bool)
        return self._atomic(
            lambda: NATIVE.atomic_cas(pointers, expected, value, sem), pointers, everywhere, value.dtype, sem
        )

    def wait_for_first(self) -> None:
        """The first of two launches is finished: all that its programs did comes before what this one does now."""
        me, first, clock = self.schedule.current, self.schedule.first, self.memory.clock
        if me >= first:
            self.schedule.wait_for_first()
            clock[me, :first] = clock[me, self.memory.programs :][:first] = sys.maxsize

    def barrier(self) -> None:
        """`tl.debug_barrier`: nobody else can tell, so nobody else gets on."""
        me = self.schedule.current
        self._record(me, "barrier", 0, 0)
        self.memory.barrier(me, len(self.steps[me]))

    def _atomic(
        self, act: Callable[[], np.ndarray], pointers: np.ndarray, mask: np.ndarray, dtype: np.dtype, sem: Any
    ) -> np.ndarray:
        in_block = self.scope == ir.MEM_SYNC_SCOPE.CTA
        what = f"atomic {sem.name.lower()}" + " within the block" * in_block
        me, places, step = self._begin(what, pointers, mask, dtype.itemsize)
        old = act()
        step = self.steps[me][-1] = step._replace(old=old[mask].tolist())
        self.atomics.append(step)
        self._ticket(step, old)
        self._rule("unordered atomic", step, self.memory.unordered_store(me, places.ravel(), own=True))
        self._rule("unordered atomic", step, self.memory.unordered(me, places.ravel(), atomics=False))
        acquires, releases = sem in ACQUIRES and not in_block, sem in RELEASES and not in_block
        self.memory.atomic(me, len(self.steps[me]), places, acquires=acquires, releases=releases)
        changed = bool((NATIVE.load(pointers, mask, np.zeros_like(old), old.dtype) != old)[mask].any())
        if not changed:
            self.schedule.polled[me] = (step.address, self.schedule.polled.get(me, (0, 0))[1] + 1)
        self._end(step, changed=changed, addresses=pointers, polls=not changed)
        return old

    def _begin(self, what: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> tuple[int, np.ndarray, Step]:
        self.schedule.switch(what == "load")
        me = self.schedule.current
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        step = self._record(me, what, int(addresses[0]) if addresses.size else 0, addresses.size)
        places = self.memory.places(addresses, itemsize)
        if (places < 0).any():
            step = step._replace(address=int(addresses[places[:, 0] < 0][0]))
            self._fail("out of bounds", f"{self._said(step)}, in no argument")
        return me, places, step

    def _end(self, step: Step, *, changed: bool, addresses: np.ndarray | None = None, polls: bool = False) -> None:
        if not polls:
            self.schedule.polled.pop(step.program, None)
        self.stale = 0 if changed else self.stale + 1
        if changed and addresses is not None:
            self.schedule.stored(addresses)
        if self.stale > PATIENCE:
            schedule = self.schedule
            text = f"{PATIENCE} steps store nothing; {len(schedule.coming)} programs have not started, resident are"
            self._fail("no progress", text, *schedule.resident)

    def _record(self, me: int, what: str, address: int, elements: int) -> Step:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((__file__, LIBRARY)):
            frame = frame.f_back
        step = Step(me, what, address, elements, None, frame.f_code.co_filename, frame.f_lineno)
        self.steps[me].append(step)
        return step

    def _ticket(self, step: Step, value: np.ndarray) -> None:
        if self.counters is None or step.address != self.counters.data_ptr() or not step.elements:
            return
        ticket = int(value.ravel()[0])
        owner = self.tickets.setdefault(ticket, step.program)
        if owner != step.program:
            self._fail("ticket taken twice", f"programs {owner} and {step.program} hold {ticket}", owner, step.program)

    def _rule(self, kind: str, step: Step, found: tuple[int, int, int] | None) -> None:
        if found is None:
            return
        place, program, time = (int(number) for number in found)
        region = np.searchsorted(self.memory.shift, place, side="right") - 1
        name = self.memory.name(int(self.memory.starts[region] + place - self.memory.shift[region]))
        earlier = self.steps[program][time - 1]
        text = f"{name} is touched by two steps that nothing orders:\n  {self._said(earlier)}\n  {self._said(step)}"
        self._fail(kind, text, *dict.fromkeys((program, step.program)))

    def _fail(self, kind: str, text: str, *programs: int) -> None:
        lines = [f"{text}", f"in {self._where()}"]
        for program in programs:
            lines += [
                f"last steps of program {program}:",
                *(f"  {self._said(s)}" for s in self.steps[program][-TRACE:]),
            ]
        self.schedule.fault = Fault(kind, "\n".join(lines))
        raise _Stop

    def _said(self, step: Step) -> str:
        code = linecache.getline(step.file, step.line).strip()
        of = f" of {step.elements} from {self.memory.name(step.address)}" if step.elements else ""
        found = "" if step.old is None else f", found {step.old}"
        return f"program {step.program}: {step.what}{of}{found}, {Path(step.file).name}:{step.line}: {code}"

    def _where(self) -> str:
        return f"{self.kernel}, seed {self.seed}, {self.schedule.slots} of {len(self.steps)} programs at once"


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    bases = {n: a.base if isinstance(a, TensorDescriptor) else a for n, a in arguments.items()}
    return {n: a for n, a in bases.items() if isinstance(a, Tensor) and a.numel()}


@contextmanager
def interleaved(seed: int) -> Iterator[list[Launch]]:
    """Launches inside the block run their programs side by side; a race is a Fault. Yields the launches so far."""
    launches: list[Launch] = []
    early: list[tuple[str, tuple[int, ...], dict[str, Tensor], Callable[[], None]]] = []  # waits for its dependent
    patch_language, scopes, patched = interpreter._patch_lang, [], set()

    def patch_once(fn: Any) -> None:  # the interpreter does it at every call of a device function
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            scopes.append(patch_language(fn))

    class Executor(interpreter.GridExecutor):
        def __call__(self, *args: Any, **options: Any) -> None:
            known = inspect.signature(self.fn).parameters
            given = inspect.getcallargs(self.fn, *args, **{n: v for n, v in options.items() if n in known})
            patch_once(self.fn)
            converted = {n: v if n in self.constexprs else interpreter._implicit_cvt(v) for n, v in given.items()}
            early.append((self.fn.__name__, (*self.grid, 1, 1)[:3], _tensors(given), lambda: self.fn(**converted)))
            if options.get("PDL") and not options.get("launch_pdl"):
                return
            names, grids, tensors, bodies = zip(*early, strict=True)
            early.clear()
            together = {name: tensor for given in tensors for name, tensor in given.items()}
            launches.append(Launch(" and ".join(names), list(grids), together, seed))
            with watched(launches[-1]):
                launches[-1].run(*bodies)

    @contextmanager
    def watched(launch: Launch) -> Iterator[None]:
        def scoped(act: Callable[..., Any]) -> Callable[..., Any]:
            def atomic(*args: Any) -> Any:
                launch.scope = args[-1]
                return act(*args)

            return atomic

        with (
            patch.object(interpreter, "_interpreter", launch),
            patch.object(BUILDER, "create_barrier", launch.barrier),
            patch.object(sync, "INTERPRETED", tl.constexpr(False)),
            patch.object(tl.extra.cuda, "gdc_launch_dependents", launch.schedule.start_dependents),
            patch.object(tl.extra.cuda, "gdc_wait", launch.wait_for_first),
            patch.object(BUILDER, "create_atomic_rmw", scoped(BUILDER.create_atomic_rmw)),
            patch.object(BUILDER, "create_atomic_cas", scoped(BUILDER.create_atomic_cas)),
        ):
            yield

    try:
        with (
            patch.object(interpreter, "GridExecutor", Executor),
            patch.object(interpreter, "_patch_lang", patch_once),
        ):
            yield launches
            assert not early, "a launch that lets the next one start, and none comes"
    finally:
        for scope in reversed(scopes):
            scope.restore()
