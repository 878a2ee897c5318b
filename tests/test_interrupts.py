"""Ctrl-C: exit 130, one line, within a second, while the program starts, in a policy, in a prompt, with workers, and twice."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cacheroute import Llama, interrupts
from cacheroute.engine import load_progress
from cacheroute.engine.progress import PromptProgress
from cacheroute.install import patched_llama_cpp
from support.waiting import until

pytestmark = pytest.mark.engine

POLICY = """
import numpy as np, time
class Slow:
    def __init__(self, n_expert, n_used, n_layers): self.k = n_used
    def choose(self, layer, z, mass, resident):
        time.sleep(0.002)
        return np.argsort(-z, kind="stable")[: self.k]
"""

STARTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
module, sys.argv = sys.argv[1], ["cacheroute", "models"]
sys.meta_path.insert(0, Finder())
from cacheroute.__main__ import main
main()
"""

STUCK = """
import time
from cacheroute import interrupts
@interrupts.shield
def stuck():
    print("ready", flush=True)
    while True: time.sleep(0.01)
interrupts.install()
interrupts.command_begins()
with interrupts.repaired("repaired;"): stuck()
"""


def interrupted(
    folder: Path, *arguments: object, after: float | Callable[[], bool] | None, times: int = 1, said: bool = False
) -> tuple[list[str], float]:
    """(lines on stderr, seconds from Ctrl-C to the end); `after` seconds (of the first line on stderr where one is `said`), or
    once that is true, or None: after the first byte on stdout."""
    command = [sys.executable, "-m", "cacheroute", *map(str, arguments)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=folder, **pipes) as process:  # type: ignore[call-overload]
        first = b""
        while said and not first.endswith(b"\n"):
            byte = os.read(process.stderr.fileno(), 1)
            assert byte, "it ended without a line"
            first += byte
        if after is None:
            os.read(process.stdout.fileno(), 1)
        elif callable(after):
            until(lambda: after() or process.poll() is not None, 60, pause=0.01)
            assert process.poll() is None
        else:
            time.sleep(after)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors and b"ignored" not in errors, errors
    return (first + errors).decode().splitlines(), time.monotonic() - start


@pytest.mark.parametrize("module", ["cacheroute.cli", "typer", "cacheroute.cli.options", "numpy", "cacheroute.model.catalogue"])
def test_while_the_program_starts(tmp_path: Path, module: str) -> None:
    """Ctrl-C comes as the module is imported."""
    done = subprocess.run([sys.executable, "-c", STARTS, module], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"cacheroute: Stopped.\n")


def test_in_a_policy(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "slow.py").write_text(POLICY)
    lines, seconds = interrupted(
        tmp_path, "generate", "-p", "Write a story.", "-n", 200, "-c", 512, "-t", 1, "--routing", "python:slow:Slow", after=None
    )
    assert "tok/s" in lines[-1] or "1 token" in lines[-1]
    assert seconds < 5 * interrupts.GRACE  # on a busy machine


def test_in_a_prompt(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 3000)
    lines, seconds = interrupted(tmp_path, "generate", "-f", "long.txt", "-n", 2, "-c", 8192, "-t", 1, after=1, said=True)
    assert lines[-1] == "cacheroute: Stopped." and len(lines) == 2  # after what is in memory
    assert seconds < 5 * interrupts.GRACE


def test_in_a_prompt_that_waits_for_reads(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "long.txt").write_text("The cat that sat on the mat told a story. " * 150)
    moments = random.Random()
    for _ in range(3):
        after = moments.uniform(0, 3)
        words = ("generate", "-f", "long.txt", "-c", 4096, "--flash-mbps", 0.5)
        lines, seconds = interrupted(tmp_path, *words, after=after, said=True)
        assert lines[-1] == "cacheroute: Stopped.", after
        assert seconds < 5, after


@pytest.mark.parametrize("routing", ["original", "cache-prior:lambda=0.3"])
def test_a_model_is_as_good_as_new_after_an_interruption(tiny: Path, routing: str) -> None:
    settings: dict[str, Any] = dict(budget="25%", routing=routing, n_ctx=512, n_batch=128, n_threads=2, verbose=False)
    tokens = [5 + i * 7 % 90 for i in range(400)]

    def answer(llm: Llama) -> list[int]:
        return list(itertools.islice(llm.generate(tokens, temp=0), 12))

    def interrupt(progress: PromptProgress) -> None:
        nonlocal asked
        if progress.tokens_done >= least:
            asked = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)

    expected = answer(Llama(str(tiny), **settings))
    llm = Llama(str(tiny), **settings)
    asked = 0.0
    for least, llm.flash_mbps in ((0, 0.01), (128, 0.5)):  # in the first batch, which takes minutes, and in a later one
        llm.reset()
        llm.prompt_progress = interrupt
        with pytest.raises(KeyboardInterrupt):
            answer(llm)
        assert time.monotonic() - asked < 20
        llm.prompt_progress = None
        assert least <= llm.n_tokens < 400 and (least or not llm.n_tokens)
        llm.flash_mbps = None
        assert answer(llm) == expected


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("verbose", [True, False])
def test_while_a_program_loads_a_model(tiny: Path, verbose: bool, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while llama.cpp calls Python, where what is raised would be dropped. A handler of the program's `own`, such as
    asyncio's, may let it go on."""
    api = patched_llama_cpp.module()
    before, told = api._logger.llama_log_callback, []

    def log(level: int, text: bytes, data: Any) -> None:
        told.append(text)
        if len(told) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    callback = api.llama_log_callback(log)
    monkeypatch.setattr(api._logger, "llama_log_callback", callback)
    monkeypatch.setattr(load_progress, "_callback", None if verbose else lambda share: log(0, b"", None))
    heard: list[int] = []
    handler = (lambda number, frame: heard.append(len(told))) if own else signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    try:
        with contextlib.nullcontext() if own else pytest.raises(KeyboardInterrupt):
            Llama(str(tiny), n_ctx=64, verbose=verbose).close()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        api.llama_log_set(before, None)
    assert len(told) >= 5 and not interrupts.pending()
    assert len(heard) == own and all(n > 5 for n in heard), "when the model is loaded"


def test_an_answer_that_was_interrupted_can_be_continued(tiny: Path) -> None:
    settings: dict[str, Any] = dict(budget="25%", n_ctx=512, n_threads=2, verbose=False)
    tokens = [5 + i * 7 % 90 for i in range(40)]
    expected = list(itertools.islice(Llama(str(tiny), **settings).generate(tokens, temp=0), 12))
    llm = Llama(str(tiny), **settings)
    run = llm.generate(tokens, temp=0)
    got = [next(run) for _ in range(4)]
    llm.flash_mbps = 0.001
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for token in run:
            got.append(token)
    llm.flash_mbps = None
    assert len(got) < 12
    assert got + list(itertools.islice(llm.generate([*tokens, *got], temp=0), 12 - len(got))) == expected


def test_the_terminal_is_repaired_when_the_program_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    with subprocess.Popen([sys.executable, "stuck.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"repaired;cacheroute: Stopped.\n")


def test_twice(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 3000)
    lines, _ = interrupted(tmp_path, "generate", "-f", "long.txt", "-n", 2, "-c", 8192, "-t", 1, after=3, times=2)
    assert lines[-1] == "cacheroute: Stopped."


def test_with_workers(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "cache"))
    words = ("eval", "perplexity", "-m", tiny, "--workers", 2, "-t", 2, "--routing", "cache-prior:lambda=0.1")

    def scored() -> bool:
        return any(file.read_bytes().count(b"\n") > 1 for file in (tmp_path / "cache/scores").glob("*.jsonl"))

    lines, _ = interrupted(tmp_path, *words, after=scored)
    assert lines[-1] == "cacheroute: Stopped; run the same command to resume."


def test_shielded_code_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_running", True)
    monkeypatch.setattr(interrupts, "_asked", False)

    @interrupts.shield
    def called_from_c() -> bool:
        interrupts._handle(signal.SIGINT, sys._getframe())
        return interrupts.pending()

    assert called_from_c()
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()


def test_ctrl_c_in_what_shielded_code_calls_ends_the_computation(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_running", True)
    monkeypatch.setattr(interrupts, "_asked", False)
    llm = Llama(str(tiny), budget="25%", n_ctx=64, n_threads=1, verbose=False)
    logged = patched_llama_cpp.module()._logger.llama_log_callback

    def seen() -> bool:
        interrupts._handle(signal.SIGINT, sys._getframe())
        return True

    with monkeypatch.context() as patch:
        patch.setattr(llm._interrupt, "seen", seen)
        logged(2, b"a line", None)
    with pytest.raises(KeyboardInterrupt):
        llm.eval([5, 6, 7])
    llm.eval([5, 6, 7])
    interrupts.check()


def test_another_thread_ends_a_computation_or_calls_that_off(tiny: Path) -> None:
    llm = Llama(str(tiny), budget="25%", n_ctx=512, n_threads=1, verbose=False)
    llm.flash_mbps = 0.01
    timer = threading.Timer(0.3, llm.interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.eval([5 + i * 7 % 90 for i in range(300)])
    llm.flash_mbps = None
    llm.interrupt()
    llm.interrupt(False)
    llm.eval([5, 6, 7])
