"""From the queue into the batch: one thread that leases slots, feeds the generation loop, and replaces it if it dies.

Copying a task's rows in may read a file, so it happens here and not in the loop. Requests are taken strictly in order:
when the first one's task finds no free slot, all wait until a request ends, so no task can be starved by the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .batching import TaskBatching
from .errors import ServingError
from .request_table import BASE_SLOT, RequestTable, Run
from .store import Lease

CHECK = 0.5  # seconds between looks at the loop's health
MAX_DEATHS = 5  # in a row, with no request answered in between: the model itself is broken


class Admission:
    """Admits requests of the table until the engine stops; `make_loop` starts a generation loop."""

    def __init__(self, table: RequestTable, make_loop: Callable[[], TaskBatching]) -> None:
        self._table, self._make_loop = table, make_loop
        self._deaths, self._answered_before = 0, 0
        self.loop = make_loop()
        self._thread = threading.Thread(target=self._run, name="alora-admission", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and the loop, once the table says "stopped"."""
        self._thread.join()
        self.loop.stop(block=True, hard_stop=True)
        self._table.release_all()

    def _run(self) -> None:
        table = self._table
        while table.state != "stopped":
            run = self._next()
            if not self.loop.is_running() and table.state in ("ready", "draining"):
                self._replace_loop()
            elif run is not None and not self._admit(run):
                with table.changed:
                    table.changed.wait(CHECK)  # every slot is at work: one is free when a request ends

    def _next(self) -> Run | None:
        """The first request that waits, as soon as the batch has a place; None after `CHECK` seconds without one."""
        table = self._table

        def room() -> bool:
            return bool(table.waiting) and len(table.running) < table.max_batch

        with table.changed:
            table.changed.wait_for(lambda: table.state == "stopped" or room(), CHECK)
            return table.waiting[0] if room() else None

    def _admit(self, run: Run) -> bool:
        """Put a request into the batch, or end it if its task is gone; False if there is no slot for it now."""
        table, task, lease = self._table, run.generation.task, None
        try:
            if task is not None and table.store is not None:
                lease = table.store.acquire(task)
                if lease is None:
                    return False
        except ServingError as error:  # unloaded while it waited, or its rows cannot be read back
            table.end(run, "error", str(error))
            return True
        with table.changed:
            if not run.ended:
                table.waiting.remove(run)
                self._hand_over(run, lease)
            elif lease is not None and table.store is not None:  # cancelled meanwhile
                table.store.release(lease)
        return True

    def _hand_over(self, run: Run, lease: Lease | None) -> None:
        run.lease, run.slot = lease, BASE_SLOT if lease is None else lease.slot
        run.started = time.perf_counter()
        self._table.running[run.generation.id] = run
        if not self.loop.add(run):  # it has just died: the request waits for the next one
            self._table.release(run.generation.id)
            self._table.waiting.appendleft(run)

    def _replace_loop(self) -> None:
        """The loop has died: fail what it had and start another."""
        table, cause = self._table, self.loop.cause
        table.end_all("error", f"the generation loop died: {cause}", waiting=False)
        table.release_all()
        table.metrics.restarts.inc()
        answered = table.metrics.answered > self._answered_before
        self._answered_before = table.metrics.answered
        self._deaths = 1 if answered else self._deaths + 1
        if self._deaths > MAX_DEATHS:
            with table.changed:
                table.state = "failed"
                table.end_all("error", f"the generation loop keeps dying: {cause}", waiting=True)
            return
        self.loop = self._make_loop()
