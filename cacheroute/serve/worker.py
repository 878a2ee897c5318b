"""The queue of answers and the one thread that computes them, in the order in which they were asked for.

A model computes for one at a time, so the thread that calls run() does, and all others ask it: submit() and close() are for the
thread of the event loop. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheroute.engine.completion import Completion
from cacheroute.engine.json_schema import SchemaError
from cacheroute.engine.stats import Stats
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.serve.failures import ApiError, failed, stopping
from cacheroute.serve.logprobs import Logprobs, TokenLogprob
from cacheroute.serve.prompts import Task

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_MOST_UNREAD = 64  # answers that are computed, and wait for their clients to read them
_MAX_RETRY_AFTER = 60  # seconds; clients that are told more give up


@dataclass(frozen=True)
class Piece:
    """Text as it comes, with the probabilities of the tokens that it ends."""

    text: str
    logprobs: list[TokenLogprob]


@dataclass(frozen=True)
class Report:
    """An answer that is over. `before`, `after`: the model's counters; `waited`: seconds in the queue.

    `finish_reason`: "stop", "length", "cancelled" or "failed".
    """

    run: Completion
    before: Stats
    after: Stats
    waited: float
    finish_reason: str


Event = Piece | Report | ApiError
"""What comes of a job: pieces, then a report, or an error in its place."""


class Job:
    """An answer that a client waits for. Made in the event loop; `events` come there."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.cancelled = False  # the client has left
        self._loop = asyncio.get_running_loop()

    def post(self, event: Event) -> None:
        """Any thread. A loop that is closed has nobody who waits."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class _EndedError(Exception):
    """Ends an answer between two tokens."""


class Worker:
    """`most_waiting`: jobs that may wait while one is computed. `on_report` is told of every job that was begun, in the computing
    thread; `on_fault` of what nobody has foreseen."""

    def __init__(
        self,
        llm: Llama,
        most_waiting: int,
        on_report: Callable[[Report], None] = lambda _: None,
        on_fault: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.llm = llm
        self.most_waiting = most_waiting
        self.stopping = False
        self._on_report, self._on_fault = on_report, on_fault
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may call stop() within it
        self._waiting: set[Job] = set()
        self._open: set[Job] = set()
        self._running: Job | None = None
        self._in_prompt = False
        self._mean_seconds = 2.0

    # ---- the event loop's side

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether an answer is computed."""
        return self._running is not None

    def check_room(self) -> None:
        """Raises ApiError when a job would be refused now."""
        with self._lock:
            if self.stopping:
                raise stopping()
            ahead = len(self._waiting) + self.running
            if ahead > self.most_waiting or len(self._open) > self.most_waiting + _MOST_UNREAD:
                raise ApiError(
                    429,
                    f"{ahead} requests are before this one, and more may not wait; ask again later.",
                    kind="rate_limit_error",
                    code="queue_full",
                    retry_after=min(max(math.ceil(self._mean_seconds * ahead), 1), _MAX_RETRY_AFTER),
                )

    def submit(self, job: Job) -> None:
        """Puts the job at the end of the queue. Raises ApiError as check_room(). close() must follow."""
        with self._lock:
            self.check_room()
            self._waiting.add(job)
            self._open.add(job)
            self._jobs.put(job)

    def close(self, job: Job) -> None:
        """The client has the answer, or has left: what is computed for it ends within a token, or within its prompt."""
        with self._lock:
            self._open.discard(job)
            self._waiting.discard(job)
            job.cancelled = True
            if self._running is job and self._in_prompt:
                self.llm.interrupt()

    # ---- the computing thread's side

    def run(self) -> None:
        """Computes until stop(). KeyboardInterrupt ends it, too."""
        try:
            while (job := self._jobs.get()) is not None:
                if self._begin(job):
                    self._compute(job)
        finally:
            self.end()

    def end(self) -> None:
        """As stop(), and jobs that are left get an error, whatever Ctrl-C has broken off: nobody will compute them."""
        self.stop()
        with self._lock:
            for left in self._open:  # one whose answer is complete reads no further
                left.post(stopping())

    def stop(self) -> None:
        """Ends run(), and the running answer within a token. Any thread, and a signal handler."""
        with self._lock:
            self.stopping = True
            if self._running and self._in_prompt:
                self.llm.interrupt()
            self._jobs.put(None)

    def _begin(self, job: Job) -> bool:
        with self._lock:
            self._waiting.discard(job)
            if job.cancelled or self.stopping:
                job.post(stopping())
                return False
            self._running, self._in_prompt = job, True
            return True

    def _compute(self, job: Job) -> None:
        task, begun, before = job.task, time.monotonic(), self.llm.stats()
        probabilities = Logprobs(self.llm, task.n_logprobs) if task.n_logprobs is not None else None

        def each_token(token: int) -> None:
            with self._lock:
                self._in_prompt = False
            if job.cancelled or self.stopping:
                raise _EndedError
            if probabilities:
                probabilities.add(token)

        sampling = dict(task.sampling)
        run = Completion(self.llm, task.prompt, task.max_tokens, task.seed, sampling, each_token=each_token)
        end: Event = stopping()
        finish_reason = "cancelled"
        try:
            sampling |= task.constraints.sampling(self.llm)  # here, since parsing a grammar turns llama.cpp's log over
            for text in run.pieces():
                job.post(Piece(text, probabilities.released(text) if probabilities else []))
            finish_reason = run.finish_reason
        except _EndedError:
            pass
        except KeyboardInterrupt:
            if not job.cancelled and not self.stopping:
                raise  # Ctrl-C
        except UsageError as e:
            param = "response_format" if isinstance(e, SchemaError) else None
            finish_reason, end = "failed", ApiError(400, str(e), param=param)
        except CacherouteError as e:
            finish_reason, end = "failed", ApiError(500, str(e), kind="server_error")
        except Exception as e:
            finish_reason, end = "failed", failed()
            self._on_fault(e)
        finally:
            with self._lock:
                self._running, self._in_prompt = None, False
                self.llm.interrupt(False)
            if finish_reason in ("cancelled", "failed"):
                job.post(end)
        self._mean_seconds += 0.2 * (time.monotonic() - begun - self._mean_seconds)
        report = Report(run, before, self.llm.stats(), begun - job.arrived, finish_reason)
        self._on_report(report)
        if finish_reason in ("stop", "length"):
            if probabilities and (rest := probabilities.rest(stopped=finish_reason == "stop")):
                job.post(Piece("", rest))
            job.post(report)
