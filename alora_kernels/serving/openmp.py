"""OpenMP in a server: workers that nobody needs end, and a step takes one thread while others want the cores.

Every thread that ever ran a parallel product in torch keeps workers of its own. GNU's OpenMP lets idle workers spin for
a moment, so that the next product finds them awake; with more workers in the process than cores they sleep at once, and
every product begins by waking them. The generation thread is then slowed by workers that nobody uses: a decode step of
SmolLM2 with 16 tasks takes 190 to 210 ms instead of 135 to 175 (two cores, LOG.md).

A product on several threads ends when its last thread has had a core, and meanwhile the others spin. Beside neighbours
that never wait, a step that takes .3 s alone takes ten seconds or more; on one thread it takes what one thread gets.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import threadpoolctl
import torch  # its OpenMP library must be loaded before it is looked for

SOFT = 1  # omp_pause_soft: keep settings
SHORTEST = 0.005  # seconds of a step that tell something
STARVED, ALONE = 1.5, 1.1  # of its own thread's CPU time: a step that waited for a core, and one that did not
FIRST, LONGEST = 2.0, 60.0  # seconds on one thread before several are tried again, doubled each time it fails


class Threads:
    """How many threads the products of a generation loop take: `most`, or one while the cores are wanted.

    The thread that computes is either at work or spins, so it has a core all the time unless somebody else has it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pause, self._until = FIRST, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, computed inside by this thread; sets the threads of the next."""
        start, own = time.perf_counter(), time.thread_time()
        yield
        now = time.perf_counter()
        self.told(now, now - start, time.thread_time() - own)

    def told(self, now: float, seconds: float, own: float) -> None:
        """A step ended `now`, which took so many seconds and so much of its thread's CPU time."""
        if self._most == 1 or seconds < SHORTEST:
            return
        if torch.get_num_threads() > 1:
            if seconds > STARVED * own:
                torch.set_num_threads(1)
                self._until, self._pause = now + self._pause, min(2 * self._pause, LONGEST)
            elif now > self._until + LONGEST:
                self._pause = FIRST
        elif now > self._until and seconds < ALONE * own:
            torch.set_num_threads(self._most)

    def stop(self) -> None:
        """Torch takes `most` again."""
        torch.set_num_threads(self._most)


@functools.cache
def _gnu_libraries() -> tuple[threadpoolctl.LibController, ...]:
    """GNU's OpenMP libraries in this process: none on macOS, with Intel's OpenMP, or before OpenMP 5."""
    found = threadpoolctl.ThreadpoolController().select(prefix="libgomp").lib_controllers
    return tuple(library for library in found if hasattr(library.dynlib, "omp_pause_resource_all"))


def release_workers() -> bool:
    """End the calling thread's workers, until its next parallel product; False if there is no GNU OpenMP."""
    libraries = _gnu_libraries()
    for library in libraries:
        library.dynlib.omp_pause_resource_all(SOFT)
    return bool(libraries)
