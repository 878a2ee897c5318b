"""The queue of `cacheroute serve`: order, limits, clients that leave or do not read, and answers that fail."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cacheroute import CacherouteError, Llama
from cacheroute.engine import completion
from support import served
from support.served import Served

pytestmark = pytest.mark.engine

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 1.0, "logit_bias": {}, "seed": 1}
SETTINGS: dict[str, Any] = dict(budget="50%", n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[Llama]:
    with contextlib.closing(Llama(str(demo_model), **SETTINGS)) as loaded:
        yield loaded


@pytest.fixture
def server(llm: Llama) -> Iterator[Served]:
    with served.serving(llm) as running:
        yield running


@pytest.fixture
def slow(llm: Llama) -> Iterator[Llama]:
    """Its experts come so slowly that a prompt takes minutes."""
    llm.reset()
    llm.flash_mbps = 0.05
    yield llm
    llm.flash_mbps = None


def endless(llm: Llama) -> dict[str, Any]:
    """A request whose answer ends with the context only."""
    ends = {str(t): -100 for t in range(llm.n_vocab()) if completion.is_end(llm, t)}
    return {"prompt": "Once upon a time", "max_tokens": 900, "temperature": 0, "logit_bias": ends}


def at_close(server: Served, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of decoded tokens at the time when the server hears that a client has left."""
    counts: list[int] = []
    close = server.worker.close

    def counting(job: Any) -> None:
        close(job)
        counts.append(llm.stats().decode.tokens)

    monkeypatch.setattr(server.worker, "close", counting)
    return counts


# ---- clients that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer_within_a_token(
    server: Served, llm: Llama, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = at_close(server, llm, monkeypatch)
    before = llm.stats().decode.tokens
    connection = server.begin("/v1/completions", endless(llm) | {"stream": stream})
    if stream:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    server.until(lambda: llm.stats().decode.tokens > before + 5)
    connection.close()
    server.until(lambda: bool(counts))
    server.until(server.idle)
    time.sleep(0.05)
    assert llm.stats().decode.tokens - counts[0] <= 1
    assert llm.stats().decode.tokens - before < 800, "not all of it"
    assert server.text(max_tokens=3, temperature=0).status == 200


def test_a_client_that_leaves_stops_its_prompt(server: Served, slow: Llama) -> None:
    connection = server.begin("/v1/completions", {"prompt": "word " * 400, "stream": True})
    server.until(lambda: server.worker.running)
    time.sleep(0.3)
    connection.close()
    assert server.until(server.idle) < 5
    slow.flash_mbps = None
    answers = [server.text(max_tokens=5, temperature=0).json["choices"] for _ in range(2)]
    slow.reset()
    assert answers == [server.text(max_tokens=5, temperature=0).json["choices"]] * 2


def test_a_client_that_leaves_the_queue_gives_its_place_up(llm: Llama) -> None:
    with served.serving(llm, waiting=1) as server:
        running = server.begin("/v1/completions", endless(llm))
        server.until(lambda: server.worker.running)
        waiting = server.begin("/v1/completions", endless(llm))
        server.until(lambda: server.worker.waiting == 1)
        assert server.text(max_tokens=1).status == 429
        waiting.close()
        server.until(lambda: server.worker.waiting == 0)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(server.text, max_tokens=1)
            server.until(lambda: server.worker.waiting == 1)
            running.close()
            assert asked.result().status == 200
        server.until(server.idle)


# ---- order and limits -----------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_questions(llm: Llama) -> None:
    ended: list[int] = []
    with served.serving(llm) as server, ThreadPoolExecutor(8) as pool:
        blocker = server.begin("/v1/completions", endless(llm))
        server.until(lambda: server.worker.running)

        def ask(i: int) -> int:
            status = server.text(f"Number {i} is", max_tokens=3).status
            ended.append(i)
            return status

        asked = []
        for i in range(8):
            asked.append(pool.submit(ask, i))
            server.until(lambda i=i: server.worker.waiting == i + 1)  # type: ignore[misc]
        blocker.close()
        assert [a.result() for a in asked] == [200] * 8
    assert ended == list(range(8))


def test_a_full_queue_says_when_to_come_again(llm: Llama) -> None:
    with served.serving(llm, waiting=2, compute=False) as server:
        waiting = [server.begin("/v1/completions", LONG) for _ in range(3)]
        server.until(lambda: server.worker.waiting == 3)
        answer = server.text()
        assert answer.status == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.error == "3 requests are before this one, and more may not wait; ask again later."
        assert answer.json["error"]["code"] == "queue_full"
        assert server.ask("/health").json["waiting"] == 3
        for connection in waiting:
            connection.close()


def test_a_request_that_takes_too_long_ends(llm: Llama) -> None:
    with served.serving(llm, seconds=0.3, compute=False) as server:
        whole, stream = server.text(), server.text(stream=True)
        assert whole.status == 504 and whole.error == "The answer was not ready within 1 s; ask for fewer tokens."
        assert stream.status == 200 and b'"code":"timeout"' in stream.body
        server.until(lambda: server.worker.waiting == 0)
        slow_body = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        with contextlib.closing(slow_body):
            slow_body.sendall(head)
            assert slow_body.recv(12) == b"HTTP/1.1 408"


def test_an_answer_beyond_the_time_is_stopped(llm: Llama) -> None:
    with served.serving(llm, seconds=1) as server:
        before = llm.stats().decode.tokens
        assert server.ask("/v1/completions", endless(llm)).status == 504
        server.until(server.idle)
        assert 0 < llm.stats().decode.tokens - before < 800, "not all of it"


def test_a_reader_that_stands_still_holds_nobody_up(server: Served, llm: Llama) -> None:
    still = server.begin("/v1/completions", endless(llm) | {"max_tokens": 200, "stream": True, "logprobs": 20}, buffer=4096)
    with contextlib.closing(still):
        server.until(lambda: server.worker.running)
        assert server.text(max_tokens=2, temperature=0).status == 200
        got = b""
        while b"[DONE]" not in got:
            got += still.recv(65536)
    assert got.count(b'"finish_reason":null') >= 150


# ---- answers that fail ----------------------------------------------------------------------------


def test_a_failure_is_an_answer_and_the_next_one_works(server: Served, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise CacherouteError("An expert cannot be read.")
        yield 0

    with monkeypatch.context() as patch:
        patch.setattr(llm, "generate", broken)
        whole, stream = server.text(), server.text(stream=True)
        assert (whole.status, whole.error) == (500, "An expert cannot be read.")
        assert stream.status == 200 and b"An expert cannot be read." in stream.body and b"[DONE]" not in stream.body
    assert server.text(max_tokens=2).status == 200


def test_what_nobody_has_foreseen_is_told_to_the_owner_alone(server: Served, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    for name in ("generate", "tokenize"):
        with monkeypatch.context() as patch:
            patch.setattr(llm, name, broken)
            answer = server.text()
            assert answer.status == 500 and answer.error.startswith("The server failed at this request;")
            assert b"secret" not in answer.body
            server.until(lambda: [str(e) for e in server.faults] == ["secret"])  # told when the answer is out
        server.faults.clear()
    assert server.text(max_tokens=2).status == 200


def test_a_server_that_ends_answers_all_that_wait(llm: Llama) -> None:
    with served.serving(llm) as server, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.ask, "/v1/completions", endless(llm)) for _ in range(6)]
        server.until(lambda: server.worker.waiting == 5)
        server.worker.stop()
        answers = [a.result() for a in asked]
        assert {(a.status, a.error, a.headers["retry-after"]) for a in answers} == {(503, "The server is stopping.", "10")}
        assert server.text().status == 503
        health = server.ask("/health")
        assert (health.status, health.json["status"]) == (503, "stopping")


def test_ctrl_c_in_the_computing_thread_ends_all(llm: Llama) -> None:
    with served.serving(llm, compute=False) as server, ThreadPoolExecutor() as pool:
        asked = [pool.submit(server.ask, "/v1/completions", endless(llm)) for _ in range(2)]
        server.until(lambda: server.worker.waiting == 2)

        def interrupt() -> None:
            server.until(lambda: server.worker.running)
            llm.interrupt()  # as a signal's, while the first one is computed

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            server.worker.run()
        assert [a.result().status for a in asked] == [503, 503]


def test_who_waits_hears_of_the_end_even_if_nobody_computes(llm: Llama) -> None:
    with ThreadPoolExecutor() as pool:
        with served.serving(llm, compute=False) as server:
            asked = pool.submit(server.text)
            server.until(lambda: server.worker.waiting == 1)
        assert asked.result().status == 503
