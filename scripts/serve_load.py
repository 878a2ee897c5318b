"""Load for `cacheroute serve` from another process: good clients among those that leave, crawl, or send what they may not.

Starts a server on the demo model (or what is given after --) with a key and asks it 1000 times, 20 at once. Every client must
hear what its request deserves: good ones, who come again after 429, the answer that the server gave before the load; bad ones,
their status; and in the second half the server's memory must not grow. Prints a table, and exits with 1 if not.

    .venv/bin/python scripts/serve_load.py [--requests 1000] [--at-once 20] [-- -m MODEL --budget 50%]
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, CHAT = "load", "/v1/chat/completions"
QUESTIONS = [
    "What is the capital of France?",
    "Count to five.",
    "Why is the sky blue?",
    "Name a colour.",
    "Say hello in Italian.",
]
GROWTH = 0.02  # of the server's memory, that passes for none
_BYTES = 2 * 2**20


def asked(i: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}], "max_tokens": 12, "temperature": 0} | more


@dataclass
class Load:
    """What the clients of one server have heard: kind -> status -> how often. `wrong`: what should not have been."""

    port: int
    answers: dict[int, str] = field(default_factory=dict)  # of a question, before the load
    heard: dict[str, collections.Counter[str]] = field(default_factory=lambda: collections.defaultdict(collections.Counter))
    wrong: list[str] = field(default_factory=list)
    came_again: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, body: bytes, path: str = CHAT, key: str = KEY, kind: str = "application/json") -> tuple[int, bytes, float]:
        """(status, body, seconds to wait before the next try)"""
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {key}"} if key else {})
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(), float(response.getheader("Retry-After") or 0)

    def good(self, i: int, **more: Any) -> tuple[int, bytes]:
        while True:
            status, body, wait = self.send(json.dumps(asked(i, **more)).encode())
            if status != 429:
                return status, body
            with self._lock:
                self.came_again += 1
            time.sleep(min(wait, 0.2))

    def connect(self, i: int, **more: Any) -> socket.socket:
        body = json.dumps(asked(i, **more)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(120)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def note(self, kind: str, status: object, right: bool, detail: object = "") -> None:
        with self._lock:
            self.heard[kind][str(status)] += 1
            if not right:
                self.wrong.append(f"{kind}: {status} {detail!r:.200}")

    # ---- the kinds of client

    def whole(self, i: int) -> None:
        status, body = self.good(i)
        text = json.loads(body)["choices"][0]["message"]["content"] if status == 200 else body
        self.note("whole answer", status, text == self.answers[i % len(QUESTIONS)], text)

    def stream(self, i: int) -> None:
        status, body = self.good(i, stream=True)
        events = [line[6:] for line in body.decode().split("\n\n") if line.startswith("data: ")]
        chunks = [json.loads(e) for e in events[:-1]]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if "choices" in c)
        right = status == 200 and events[-1] == "[DONE]" and text == self.answers[i % len(QUESTIONS)]
        self.note("streamed answer", status, right, text)

    def schema(self, i: int) -> None:
        wanted = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        status, body = self.good(
            i, max_tokens=40, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}
        )
        text = json.loads(body)["choices"][0]["message"]["content"] if status == 200 else ""
        self.note("JSON schema", status, re.fullmatch(r'\{\s*"ok"\s*:\s*(true|false)\s*\}\s*', text) is not None, text)

    def slow_reader(self, i: int) -> None:
        while True:
            got = b""
            with contextlib.closing(self.connect(i, stream=True, logprobs=True, top_logprobs=20)) as connection:
                while more := connection.recv(512):
                    got += more
                    if b"HTTP/1.1 200" not in got or b"[DONE]" in got:
                        break
                    time.sleep(0.01)
            if b"HTTP/1.1 429" not in got:
                break
            time.sleep(0.2)
        self.note("reads slowly", got[9:12].decode(), b"[DONE]" in got, got[-100:])

    def leaves(self, i: int) -> None:
        with contextlib.closing(self.connect(i, stream=True, max_tokens=400)) as connection:
            if i % 2:
                connection.recv(200)
        self.note("leaves", "no answer", True)

    def wrong_key(self, i: int) -> None:
        status, body, _ = self.send(json.dumps(asked(i)).encode(), key="" if i % 2 else "lod")
        self.note("no or a wrong key", status, status == 401, body)

    def oversize(self, _: int) -> None:
        status, body, _wait = self.send(b'{"messages": "' + b"x" * _BYTES + b'"}')
        self.note("2 MiB body", status, status == 413, body)

    def broken(self, i: int) -> None:
        bodies = [b"{", b"\xff\xfe", b"[[[[" * 2000, b'{"messages": 1}', b"null", b'{"messages": [], "max_tokens": 1e99}']
        status, body, _ = self.send(bodies[i % len(bodies)])
        self.note("broken JSON", status, status == 400 and b"Traceback" not in body, body)

    def unfit(self, i: int) -> None:
        long = json.dumps({"prompt": "word " * 5000}).encode()
        status = 429
        while status == 429:
            path, own = ("/v1/completions", long) if i % 2 else (CHAT, json.dumps(asked(i, model="other")).encode())
            status, body, wait = self.send(own, path)
            time.sleep(min(wait, 0.2))
        self.note("too long, other model", status, status == (400 if i % 2 else 404), body)

    def form(self, i: int) -> None:
        status, body, _ = self.send(json.dumps(asked(i)).encode(), kind="text/plain")
        self.note("another site's form", status, status == 415, body)

    def crawls(self, _: int) -> None:
        with contextlib.closing(socket.create_connection(("127.0.0.1", self.port), timeout=60)) as connection:
            for byte in b"POST /v1/chat":
                connection.sendall(bytes([byte]))
                time.sleep(0.01)
        self.note("half a request", "no answer", True)

    def clients(self) -> list[Callable[[int], None]]:
        """As often as each comes."""
        many = [self.whole] * 5 + [self.stream] * 5 + [self.schema, self.slow_reader, self.leaves, self.leaves]
        return [*many, self.wrong_key, self.oversize, self.broken, self.unfit, self.form, self.crawls]


def resident(pid: int) -> float:
    """MiB of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextlib.contextmanager
def server(arguments: list[str]) -> Iterator[tuple[int, int]]:
    """(its process, its port)"""
    words = [sys.executable, "-m", "cacheroute", "serve", "--port", "0", "--api-key", KEY, *arguments]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if found := re.search(r"listening on \S+:(\d+) ", line):
                break
        else:
            sys.exit("serve_load: the server did not start.")
        threading.Thread(target=lambda: print(process.stderr.read(), end="", file=sys.stderr), daemon=True).start()  # type: ignore[union-attr]
        try:
            yield process.pid, int(found[1])
        finally:
            process.terminate()
            print(f"the server ended with {process.wait(20)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("arguments", nargs="*", help="of cacheroute serve, after --")
    given = parser.parse_args()
    with server(given.arguments or ["-c", "1024", "--budget", "50%"]) as (pid, port):
        load = Load(port)
        for i in range(len(QUESTIONS)):
            status, body = load.good(i)
            assert status == 200, body
            load.answers[i] = json.loads(body)["choices"][0]["message"]["content"]
        chosen = random.Random(1)
        kinds, start = load.clients(), time.monotonic()
        parts = [len(part) for part in _parts(given.requests, -(-given.requests // 100))]
        memory, files = [resident(pid)], [open_files(pid)]
        with concurrent.futures.ThreadPoolExecutor(given.at_once) as pool:
            for n in parts:
                for done in [pool.submit(chosen.choice(kinds), chosen.randrange(1000)) for _ in range(n)]:
                    done.result()
                time.sleep(1)  # those that have left are noticed
                memory.append(resident(pid))
                files.append(open_files(pid))
        seconds = time.monotonic() - start
        load.whole(0)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/health")
            health = json.loads(connection.getresponse().read())
    n = sum(sum(c.values()) for c in load.heard.values())
    print("\n| client | requests | heard |\n|---|---|---|")
    for kind, counts in sorted(load.heard.items()):
        print(f"| {kind} | {sum(counts.values())} | {', '.join(f'{s}: {k}' for s, k in sorted(counts.items()))} |")
    print(
        f"\n{n} requests, {given.at_once} at once, {seconds:.0f} s; {load.came_again} times 429, and asked again; then {health}"
    )
    print(f"resident MiB, every {parts[0]} requests: {', '.join(f'{m:.1f}' for m in memory)}; open files: {files}")
    half = memory[len(memory) // 2]
    if memory[-1] > half * (1 + GROWTH):
        load.wrong.append(f"memory grew from {half:.1f} to {memory[-1]:.1f} MiB")
    if (health["running"], health["waiting"]) != (0, 0):
        load.wrong.append(f"not idle: {health}")
    print("\n".join(load.wrong) or "every client heard what it should")
    sys.exit(bool(load.wrong))


def _parts(n: int, parts: int) -> list[range]:
    return [range(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


if __name__ == "__main__":
    main()
