"""The protocol of `kernels.sync` as a model: every interleaving of three programs over two groups of row blocks.

A program takes tickets and does what they number, step by step. A store may stay its program's own for as long as no
release makes it get out; a wait goes on when its flag has risen. In each state every program may go on, and one that
has not started may start where there is room. Wrong are: a state that nobody leaves, a load of what is not there, a
ticket taken twice, work left undone, counters that are not zero at the end. The model knows nothing of addresses,
warps and the semantics of single atomics: `test_concurrent.py` looks at those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from alora_kernels.kernels import sync
from alora_kernels.ops.dispatch import interpreting

from .test_concurrent import run
from .test_one_pass import ahead_of

Op = tuple[str | int, ...]
TAKE, READ, WRITE, DONE, RESET = (("take",), ("read",), ("write",), ("done",), ("reset",))
STALE, OUT = -1, -2  # what a cell holds, unless it is the number of the program whose store is on its way


class Program(NamedTuple):
    """The ticket whose steps a program is at, and which of them."""

    ticket: int
    step: int = 0
    held: int = 0  # what it read, where a ticket is no atomic


COMING, STARTS, RESETS, ENDED = (Program(ticket) for ticket in (-4, -3, -2, -1))


class State(NamedTuple):
    tickets: int
    done: int
    flags: tuple[int, ...]
    cells: tuple[int, ...]  # h, a cell for each piece that others wait for
    taken: int  # a bit for each ticket
    programs: tuple[Program, ...]


class Wrong(AssertionError):
    """What went wrong first, and the shortest way there."""


def put(values: tuple, index: int, value: object) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


@dataclass(frozen=True)
class Protocol:
    """What the tickets stand for, and how programs go about them."""

    work: tuple[tuple[Op, ...], ...]
    flags: int
    cells: int
    programs: int = 3
    room: int = 3  # how many run at once
    repeats: bool = True  # a program takes tickets until there are no more, not just one
    take: tuple[Op, ...] = (TAKE,)
    missing: int = 0  # programs that the counters are reset without
    resets: bool = True
    orders: bool = True  # a release makes the stores before it get out

    def start(self) -> State:
        return State(0, 0, (0,) * self.flags, (STALE,) * self.cells, 0, (COMING,) * self.programs)

    def following(self, state: State) -> Iterator[tuple[str, State]]:
        """Every step that can be made, and what it leads to."""
        for cell, owner in enumerate(state.cells):
            if owner >= 0:
                yield f"cell {cell} of program {owner} gets out", state._replace(cells=put(state.cells, cell, OUT))
        room = self.room > sum(p not in (COMING, ENDED) for p in state.programs)
        for me, program in enumerate(state.programs):
            if program == ENDED or (program == COMING and not room):
                continue
            op = self.op(program)
            after = self.do(state, me, op)
            if after is not None:
                yield f"program {me}: {' '.join(map(str, op))}", after

    def op(self, program: Program) -> Op:
        """What a program does next, unless it has ended."""
        return ("start",) if program == COMING else self.steps(program.ticket)[program.step]

    def steps(self, ticket: int) -> tuple[Op, ...]:
        if ticket == RESETS.ticket:
            return (RESET,)
        if ticket == STARTS.ticket:
            return self.take
        if ticket >= len(self.work):
            return (DONE,)
        return self.work[ticket] + (self.take if self.repeats else (DONE,))

    def do(self, state: State, me: int, op: Op) -> State | None:
        """One step of program `me`; None while it has to wait."""
        program, (what, *numbers) = state.programs[me], op
        following = program._replace(step=program.step + 1)
        match what:
            case "start":
                following = STARTS
            case "take" | "write":
                ticket = state.tickets if what == "take" else program.held
                if state.taken >> ticket & 1:
                    raise Wrong(f"ticket {ticket} taken twice")
                state = state._replace(tickets=ticket + 1, taken=state.taken | 1 << ticket)
                following = Program(ticket)
            case "read":
                following = following._replace(held=state.tickets)
            case "store":
                state = state._replace(cells=put(state.cells, numbers[0], me))
            case "raise":
                cells = tuple(OUT if owner == me and self.orders else owner for owner in state.cells)
                state = state._replace(cells=cells, flags=put(state.flags, numbers[0], state.flags[numbers[0]] + 1))
            case "wait":
                if state.flags[numbers[0]] < numbers[1]:
                    return None
            case "load":
                if state.cells[numbers[0]] not in (OUT, me):
                    raise Wrong(f"cell {numbers[0]} is not there")
            case "done":
                last = self.resets and state.done + 1 == self.programs - self.missing
                following, state = RESETS if last else ENDED, state._replace(done=state.done + 1)
            case "reset":
                following, state = ENDED, state._replace(tickets=0, done=0, flags=(0,) * self.flags)
        return state._replace(programs=put(state.programs, me, following))


def search(protocol: Protocol, start: State) -> tuple[int, set[State]]:
    """How many states there are, and those at the end; Wrong if one of them is."""
    before: dict[State, tuple[State, str] | None] = {start: None}
    ends, queue = set(), deque([start])
    while queue:
        state = queue.popleft()
        try:
            steps = list(protocol.following(state))
            if not steps:
                if any(program != ENDED for program in state.programs):
                    raise Wrong("no way on")
                if STALE in state.cells or state.taken % (1 << len(protocol.work)) != (1 << len(protocol.work)) - 1:
                    raise Wrong("work left undone")
                ends.add(state)
        except Wrong as wrong:
            way = []
            while (came := before[state]) is not None:
                state, step = came
                way.append(step)
            raise Wrong("\n  ".join([str(wrong), *reversed(way)])) from None
        for step, after in steps:
            if after not in before:
                before[after] = (state, step)
                queue.append(after)
    return len(before), ends


def check(protocol: Protocol) -> int:
    """Every interleaving of a launch; it must leave the counters as it found them, so the next launch goes as well."""
    states, ends = search(protocol, protocol.start())
    if {again(protocol, end) for end in ends} != {protocol.start()}:
        raise Wrong("counters not zero")
    return states


def again(protocol: Protocol, end: State) -> State:
    """The next launch on the same counters: new programs, tickets to take, cells that are stale."""
    return end._replace(**{f: getattr(protocol.start(), f) for f in ("cells", "taken", "programs")})


def one_pass(total: int, blocks: int, pieces: int, tiles: int, *, leads: bool) -> Protocol:
    """`total` pieces of h, `pieces` a row block and flag, `blocks` row blocks a group, `tiles` more work a row block.

    `leads`: whoever computes h goes on to a tile of its own, as under task routing.
    """
    ahead, rest = blocks * pieces, blocks * tiles
    groups = -(-total // ahead)
    work: list[tuple[Op, ...]] = []
    for ticket in range(sync.tickets_of(groups, ahead, rest)):
        group, index, produces = ahead_of(ticket, ahead, rest)
        piece = group * ahead + index
        block = piece // pieces if produces else group * blocks + index % blocks
        cells = range(block * pieces, min((block + 1) * pieces, total))
        tile: list[Op] = [("wait", block, len(cells)), *(("load", cell) for cell in cells)]
        if produces and piece < total:
            work.append((("store", piece), ("raise", block), *(tile if leads else [])))
        else:
            work.append(tuple(tile) if cells and not produces else ())
    return Protocol(tuple(work), flags=-(-total // pieces), cells=total)


def decoding(pieces: int, tiles: int) -> Protocol:
    """A program for each piece and each tile, all on one flag."""
    producers: list[tuple[Op, ...]] = [(("store", piece), ("raise", 0)) for piece in range(pieces)]
    tile: tuple[Op, ...] = (("wait", 0, pieces), *(("load", piece) for piece in range(pieces)))
    return Protocol((*producers, *(tile for _ in range(tiles))), 1, pieces, programs=pieces + tiles, repeats=False)


PROTOCOLS = {
    "task": one_pass(2, 1, 1, 1, leads=True),
    "task, two row blocks a group": one_pass(4, 2, 1, 1, leads=True),
    "soft": one_pass(4, 1, 2, 2, leads=False),
    "decode": decoding(2, 2),
}


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_interleaving_is_right(name: str, room: int) -> None:
    assert check(replace(PROTOCOLS[name], room=room)) > 20


def rework(protocol: Protocol, change: Callable[[list[Op]], list[Op]]) -> Protocol:
    """The protocol with the steps of each ticket changed."""
    return replace(protocol, work=tuple(tuple(change(list(steps))) for steps in protocol.work))


def published_first(steps: list[Op]) -> list[Op]:
    return [steps[1], steps[0], *steps[2:]] if steps and steps[0][0] == "store" else steps


def waits_for(more: int) -> Callable[[list[Op]], list[Op]]:
    """Every wait for so many more flags."""
    return lambda steps: [("wait", op[1], int(op[2]) + more) if op[0] == "wait" else op for op in steps]


TASK, SOFT, DECODE = (PROTOCOLS[name] for name in ("task", "soft", "decode"))
BROKEN = {
    "h is published first": (rework(SOFT, published_first), "is not there"),
    "a release that does not order": (replace(TASK, orders=False), "is not there"),
    "nobody waits": (rework(TASK, lambda steps: [op for op in steps if op[0] != "wait"]), "is not there"),
    "one flag fewer": (rework(SOFT, waits_for(-1)), "is not there"),
    "one flag more": (rework(DECODE, waits_for(1)), "no way on"),
    "consumers before producers": (replace(SOFT, work=SOFT.work[::-1]), "no way on"),
    "tickets by two steps": (replace(TASK, take=(READ, WRITE)), "ticket 0 taken twice"),
    "no clean-up": (replace(DECODE, resets=False), "counters not zero"),
    "clean-up by the last but one": (replace(SOFT, missing=1), "no way on|taken twice|not zero"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_protocol_is_found(name: str) -> None:
    protocol, what = BROKEN[name]
    with pytest.raises(Wrong, match=what):
        check(protocol)


def test_flags_left_over_mislead_the_next_launch() -> None:
    _, ends = search(TASK, TASK.start())
    (end,) = ends
    left = again(TASK, end)._replace(flags=(1,) * TASK.flags)
    with pytest.raises(Wrong, match="is not there"):
        search(TASK, left)


REAL = {
    "sync": one_pass(10, 1, 4, 3, leads=False),
    "task": one_pass(5, 2, 1, 1, leads=True),
    "soft": one_pass(5, 2, 2, 2, leads=False),
    "decode": decoding(8, 2),
}


@pytest.mark.skipif(not interpreting(), reason="Triton's interpreter is off on a machine with a GPU")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", REAL)
def test_the_kernels_follow_the_model(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every atomic of a launch is the model's next one: at the same counter, which holds the same number."""
    *_, launch = run(name, seed, monkeypatch)
    protocol = replace(REAL[name], programs=len(launch.steps))
    state = protocol.start()
    for made in launch.atomics:
        me = made.program
        while (op := protocol.op(state.programs[me]))[0] in ("start", "store", "load"):
            state = protocol.do(state, me, op)
        counters = (state.tickets, state.done, *state.flags)
        counter = {"take": 0, "done": 1}.get(str(op[0])) if len(op) == 1 else sync.HEADER + int(op[1])
        assert (made.address - launch.counters.data_ptr()) // 4 == counter, (op, made)
        assert made.old == [counters[counter]], (op, made)
        state = protocol.do(state, me, op) or state  # a poll in vain changes nothing
    assert {protocol.op(p)[0] if p != ENDED else "" for p in state.programs} == {"", "reset"}
