"""From the queue into the batch: one thread that leases slots, feeds the generation loop, and replaces it if it dies.

In:   the book's waiting requests, in their order; the store's slots.
Out:  requests running in a `TaskBatching`.
Who:  `Engine.start` makes one.

Copying a task's rows in may read a file, so it happens here and not in the loop. The order is strict: when the first
request's task finds no free slot, all wait until a request ends, so no task can be starved by the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from .batching import BASE_SLOT, TaskBatching
from .errors import ServingError
from .metrics import Metrics
from .request_table import Book, Run
from .store import Lease, TaskStore

CHECK = 0.5  # seconds between looks at the loop's health
MAX_DEATHS = 5  # in a row, with no request answered in between: the model itself is broken


class Admission:
    """Admits requests while the engine lives.

    Args:
        book: the requests.
        store: the tasks; None has the base alone.
        make_loop: starts a generation loop.
        max_batch: requests that run at once.
        eos: tokens that end a text.
        metrics: counts restarts.
    """

    def __init__(
        self,
        book: Book,
        store: TaskStore | None,
        make_loop: Callable[[], TaskBatching],
        max_batch: int,
        eos: Sequence[int],
        metrics: Metrics,
    ) -> None:
        self._book, self._store, self._make_loop = book, store, make_loop
        self._max_batch, self._eos, self._metrics = max_batch, list(eos), metrics
        self._deaths, self._finished_before = 0, 0
        self.loop = make_loop()
        self._thread = threading.Thread(target=self._run, name="alora-admission", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and the loop, once the book says "stopped"."""
        self._thread.join()
        self.loop.stop(block=True, hard_stop=True)
        self._book.release_all()

    def _run(self) -> None:
        while self._book.state != "stopped":
            run = self._next()
            if not self.loop.is_running() and self._book.state in ("ready", "draining"):
                self._replace_loop()
            elif run is not None and not self._admit(run):
                with self._book.changed:
                    self._book.changed.wait(CHECK)  # every slot is at work: one is free when a request ends

    def _next(self) -> Run | None:
        """The first request that waits, as soon as the batch has a place; None now and then, to look around."""
        book = self._book
        with book.changed:
            book.changed.wait_for(
                lambda: book.state == "stopped" or (book.waiting and len(book.running) < self._max_batch), CHECK
            )
            return book.waiting[0] if book.waiting and len(book.running) < self._max_batch else None

    def _admit(self, run: Run) -> bool:
        """Put a request into the batch, or end it if its task is gone. False if there is no slot for it now."""
        task, lease = run.generation.task, None
        try:
            if task is not None and self._store is not None:
                lease = self._store.acquire(task)
                if lease is None:
                    return False
        except ServingError as error:  # unloaded while it waited, or its rows cannot be read back
            self._book.end(run, "error", str(error))
            return True
        with self._book.changed:
            if not run.ended:
                self._book.waiting.remove(run)
                self._hand_over(run, lease)
            elif lease is not None and self._store is not None:  # cancelled meanwhile
                self._store.release(lease)
        return True

    def _hand_over(self, run: Run, lease: Lease | None) -> None:
        id = run.generation.id
        run.lease, run.slot = lease, BASE_SLOT if lease is None else lease.slot
        run.started = time.perf_counter()
        self._book.running[id] = run
        taken = self.loop.add_request(
            run.prompt,
            request_id=id,
            max_new_tokens=run.sampling.max_tokens,
            streaming=True,
            eos_token_id=-1 if run.sampling.ignore_eos else self._eos,
        )
        if taken is None:  # the loop has just died: the request waits for the next one
            self._book.release(id)
            self._book.waiting.appendleft(run)

    def _replace_loop(self) -> None:
        """The loop has died: fail what it had and start another."""
        cause = self.loop.background_thread_status.fatal_error
        self._book.end_all("error", f"the generation loop died: {cause}", waiting=False)
        self._book.release_all()
        self._metrics.restarts.inc()
        answered = self._metrics.answered > self._finished_before
        self._finished_before = self._metrics.answered
        self._deaths = 1 if answered else self._deaths + 1
        if self._deaths > MAX_DEATHS:
            with self._book.changed:
                self._book.state = "failed"
                self._book.end_all("error", f"the generation loop keeps dying: {cause}", waiting=True)
            return
        self.loop = self._make_loop()
