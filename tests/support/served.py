"""A server in this process, with a thread that computes, and a client that shows what HTTP shows."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cacheroute import Llama
from cacheroute.serve import server
from cacheroute.serve.api import Limits
from cacheroute.serve.worker import Worker
from support.waiting import until

MODEL = "small"
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of a failure in OpenAI's form; no other form has one."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and b"Traceback" not in self.body
        assert error["message"].endswith(".") and "\n" not in error["message"], error
        return str(error["message"])

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, which must end as OpenAI's do."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]", lines[-3:]
        return [json.loads(line[6:]) for line in lines[:-1]]


@dataclass
class Served:
    llm: Llama
    worker: Worker
    port: int
    faults: list[Exception] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def ask(self, path: str, body: Any = None, *, method: str = "", timeout: float = 60, **headers: str) -> Answer:
        """One request; `body`: JSON, or bytes as they are."""
        own = {"Content-Type": "application/json"} if body is not None else {}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            sent = own | {k.replace("_", "-"): v for k, v in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def chat(self, messages: Any = None, **more: Any) -> Answer:
        return self.ask("/v1/chat/completions", {"messages": HELLO if messages is None else messages} | more)

    def text(self, prompt: Any = "Once upon a time", **more: Any) -> Answer:
        return self.ask("/v1/completions", {"prompt": prompt} | more)

    def begin(self, path: str, body: Any, *, buffer: int = 0) -> socket.socket:
        """A request of which the answer is not read; `buffer`: bytes that the kernel keeps of it, about, 0: its own choice."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection = socket.socket()
        connection.settimeout(60)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(head.encode() + data)
        return connection

    def until(self, what: Callable[[], bool], seconds: float = 20) -> float:
        """As support.waiting.until()."""
        return until(what, seconds)

    def idle(self) -> bool:
        return not self.worker.running and not self.worker.waiting


@contextlib.contextmanager
def serving(
    llm: Llama, *, waiting: int = 16, seconds: float = 60, body: int = 2**20, key: str = "", compute: bool = True
) -> Iterator[Served]:
    """`compute` False: nobody computes, so that what is asked stays in the queue."""
    faults: list[Exception] = []
    lines: list[str] = []
    with contextlib.closing(server.bind("127.0.0.1", 0, seconds)) as bound:
        limits = Limits(body, seconds, waiting)
        with server.serving(llm, MODEL, bound, limits, key=key, fault=faults.append, line=lines.append) as worker:
            computing = threading.Thread(target=worker.run)
            if compute:
                computing.start()
            try:
                yield Served(llm, worker, bound.getsockname()[1], faults, lines)
            finally:
                worker.stop()
                if compute:
                    computing.join(30)
                    assert not computing.is_alive()
    assert not faults, faults
