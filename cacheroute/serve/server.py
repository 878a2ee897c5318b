"""Runs the server: HTTP in a thread of its own, the model in the thread that calls, where Ctrl-C reaches what it computes."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cacheroute import interrupts
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.serve.api import Access, Api, Limits
from cacheroute.serve.metrics import Metrics
from cacheroute.serve.worker import Worker

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SECONDS_TO_ASK = 30.0  # for a connection to send the head of its first request
_SECONDS_TO_START = 10.0
_SECONDS_TO_STOP = 2.0
_SECONDS_TO_END = 5.0  # after SIGTERM, where an answer cannot be stopped


def bind(host: str, port: int, seconds: float) -> socket.socket:
    """A socket at that address that nobody can connect to yet. A peer that takes nothing for so many seconds is dropped, where
    the system can do that. Raises UsageError for an address that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(int(seconds * 1000), 2**31 - 1))
        bound.bind(address)
    except (OSError, UnicodeError) as e:  # no host has a name of empty or long labels
        reason = "no name of a host" if isinstance(e, UnicodeError) else e.strerror or str(e)
        raise UsageError(f"Port {port} of {host} cannot be used ({reason}); give another with --port or --host.") from None
    return bound


def url(bound: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    host = str(bound.getsockname()[0])
    return host == "::1" or host.startswith("127.")


def serve(
    llm: Llama,
    model: str,
    bound: socket.socket,
    limits: Limits,
    *,
    key: str = "",
    started: Callable[[], None] = lambda: None,
    fault: Callable[[Exception], None] = lambda _: None,
    line: Callable[[str], None] = lambda _: None,
) -> None:
    """Answers until SIGTERM, or KeyboardInterrupt, which is raised again when all is closed. In the main thread of a process.

    model: the name of the model for its clients. key: "" for none. started() when the first client can come; fault() and line()
    as Api's.
    """
    with serving(llm, model, bound, limits, key=key, fault=fault, line=line) as worker, _terminable(worker):
        started()
        worker.run()


@contextlib.contextmanager
def serving(llm: Llama, model: str, bound: socket.socket, limits: Limits, *, key: str = "", **told: Any) -> Iterator[Worker]:
    """Within it clients are heard; their answers are computed by whoever calls run() of the worker. As serve()."""
    counted = Metrics(llm.stats())
    quiet: dict[str, Any] = {"fault": lambda _: None, "line": lambda _: None} | told
    worker = Worker(llm, limits.waiting, counted.answered, quiet["fault"])
    hosts = (*_LOOPBACK, bound.getsockname()[0]) if is_loopback(bound) else None
    api = Api(llm, worker, counted, model, limits, Access(key, hosts), **quiet)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)  # of what clients do wrong, they are told
    config = uvicorn.Config(
        api.app(),
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=1,
        backlog=128,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="cacheroute-http", daemon=True)
    try:
        thread.start()
        until = time.monotonic() + _SECONDS_TO_START
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise CacherouteError("The server could not be started; try another --host or --port.")
            time.sleep(0.01)
        yield worker
    finally:
        worker.end()  # Ctrl-C may come before run() has begun
        server.should_exit = True
        if thread.ident is not None:
            thread.join(_SECONDS_TO_STOP)
        bound.close()


@contextlib.contextmanager
def _terminable(worker: Worker) -> Iterator[None]:
    """Within it SIGTERM ends the worker's run()."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    try:
        with interrupts.ends(signal.SIGTERM, _SECONDS_TO_END, 0):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Protocol(H11Protocol):
    """Drops a connection that asks nothing."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_SECONDS_TO_ASK, self._drop)

    def _drop(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
