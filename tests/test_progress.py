"""The progress of a prompt: what is estimated, whom it is told, how it is shown, and how it is counted."""

from __future__ import annotations

import io
import json
import mmap
import os
import pty
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cacheroute import Llama, interrupts
from cacheroute.cli.progress import PromptLine, bar, prompt_text, seconds_left
from cacheroute.engine import progress
from cacheroute.engine.progress import Prompt, PromptProgress, estimate
from cacheroute.errors import CacherouteError
from cacheroute.files import MIB
from cacheroute.model import experts, gguf_file
from cacheroute.native.bindings import Progress
from support.cli import cacheroute

TOKENS = [5 + i * 7 % 90 for i in range(300)]
PROMPT = "the quick brown fox jumps over the lazy dog " * 6
SIZES: dict[str, Any] = {"n_ctx": 512, "n_batch": 128, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


def now(begun: int, done: int, needed: float, read: float, layer: float) -> Progress:
    return Progress(begun, done, int(needed * MIB), int(read * MIB), int(layer * MIB))


WHOLE = Prompt((100,), 4, 2, 8)


def test_nothing_is_estimated_before_a_layer_is_done() -> None:
    assert estimate(now(0, 0, 0, 0, 0), WHOLE, 0.5) == PromptProgress(0, 100, 0, 0, 0.5, None)
    assert estimate(now(100, 0, 10, 3, 10), WHOLE, 3) == PromptProgress(0, 100, 3, 40, 3, None)


def test_the_rest_takes_as_long_as_the_layers_so_far() -> None:
    assert estimate(now(200, 100, 20, 10, 10), WHOLE, 3) == PromptProgress(25, 100, 10, 40, 3, 9)
    assert estimate(now(200, 100, 20, 15, 10), WHOLE, 3).seconds_left == pytest.approx(3 * 250 / 150)  # half of the second
    assert estimate(now(400, 400, 44, 44, 11), WHOLE, 8) == PromptProgress(100, 100, 44, 44, 8, 0)


def test_a_short_micro_batch_reads_almost_as_much_as_a_long_one() -> None:
    prompt = Prompt((100, 3), 4, 4, 8)
    told = estimate(now(400, 400, 40, 40, 10), prompt, 8)
    assert told.needed_mib == pytest.approx(40 * (1 + 7 / 8)) and told.seconds_left == pytest.approx(8 * 7 / 8)
    assert estimate(now(400, 400, 0, 0, 0), prompt, 8).seconds_left == pytest.approx(8 * 3 / 100)


def test_a_prompt_is_split_as_llama_cpp_does(tiny: Path) -> None:
    layout = experts.layout(gguf_file.read(tiny))
    assert Prompt.of([300], 128, 50, layout).micro_batches == (50, 50, 28, 50, 50, 28, 44)
    assert Prompt.of([0], 128, 50, layout).tokens == 0


def test_a_model_that_reads_nothing_has_a_time_left() -> None:
    assert estimate(now(300, 200, 0, 0, 0), WHOLE, 4) == PromptProgress(50, 100, 0, 0, 4, 4)


def test_the_text_leaves_out_what_is_not_known() -> None:
    assert prompt_text(PromptProgress(0, 9, 0, 0, 3, None)) == "prompt: 0 of 9 tokens"
    assert (
        prompt_text(PromptProgress(1, 9, 2, 30.26, 3, 7.4)) == "prompt: 1 of 9 tokens, read 2.0 of about 30.3 MiB, about 7 s left"
    )
    assert prompt_text(PromptProgress(1, 9, 0, 0, 3, 125)).endswith(", about 2 min 5 s left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, verbose: bool) -> str:
    """What is written for a prompt of 12 seconds that is asked about twice a second, and for one of a second."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with PromptLine(verbose=verbose) as line:
        for n in (24, 2):
            for i in range(n + 1):
                line(PromptProgress(i, n, i, n, i / 2, (n - i) / 2))
        stderr.write("answer")
    return stderr.getvalue()


def test_a_terminal_has_one_line_which_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch, verbose=False)
    *drawn, last = text.split("\x1b[K")
    assert len(drawn) == 21 and last == "answer" and "\n" not in text
    assert drawn[0] == "\rprompt: 4 of 24 tokens, read 4.0 of about 24.0 MiB, about 10 s left"
    assert all(part.startswith("\rprompt: ") for part in drawn[:-1]) and drawn[-1] == "\r"
    assert interrupts._repair == b""


def test_a_pipe_has_nothing_or_a_line_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch, verbose=False) == "answer"
    *lines, last = shown(io.StringIO(), monkeypatch, verbose=True).split("\n")
    assert last == "answer"
    assert [line.partition(",")[0] for line in lines] == [f"prompt: {i} of 24 tokens" for i in (4, 14)]
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)


BAR = """
import sys, time
from cacheroute.cli import progress
progress.SECONDS_BEFORE_THE_FIRST = float(sys.argv[1])
with progress.steps("bench", 4) as begin:
    for i in range(4):
        begin(f"arm {i}")
        time.sleep(0.3)
print("done")
"""


def drawn(seconds: float) -> str:
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "100"], stdin=theirs, check=True)
    env = os.environ | {"TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", BAR, str(seconds)], stdout=subprocess.PIPE, stderr=theirs, env=env, timeout=60)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert done.returncode == 0 and done.stdout == b"done\n", text
    return text.decode()


def test_a_bar_appears_after_a_while_with_the_time_left() -> None:
    text = drawn(0.1)
    assert "arm 3" in text and "75%" in text and re.search(r"about \d s left", text)
    assert drawn(30) == ""
    piped = subprocess.run([sys.executable, "-c", BAR, "0"], capture_output=True, timeout=60)
    assert (piped.stdout, piped.stderr) == (b"done\n", b"")


def test_elsewhere_a_bar_is_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("cacheroute.cli.progress.time.monotonic", lambda: now[0])
    with bar("answering", 200) as advance:
        for _ in range(200):
            now[0] += 0.5
            advance(1, "original 8 experts")
    out, err = capsys.readouterr()
    parts = ("30%, about 1 min 10 s left", "60%, about 40 s left", "90%, about 10 s left")
    assert (out, err.splitlines()) == ("", [f"answering: {part}" for part in parts])


def test_the_time_left_goes_by_the_whole_time_so_far() -> None:
    assert seconds_left(1, 4, start=10, at=20, now=20) == 30
    assert seconds_left(1, 4, start=10, at=20, now=25) == 25 and seconds_left(1, 4, start=10, at=20, now=99) == 0
    assert seconds_left(0, 4, 10, 20, 20) is seconds_left(1, 0, 10, 20, 20) is seconds_left(1, 4, 10, None, 20) is None


@pytest.fixture(scope="module")
def slow_mbps(tiny: Path) -> float:
    """A flash that reads the tiny model's experts once in three seconds."""
    with_layout = Llama(str(tiny), io="none", **SIZES)
    layout = with_layout.layout
    with_layout.close()
    return len(layout.layers) * layout.n_expert * layout.layers[0].expert_bytes / 3e6


@pytest.mark.engine
def test_a_callback_is_told_while_the_prompt_is_computed(tiny: Path, slow_mbps: float) -> None:
    told: list[PromptProgress] = []
    llm = Llama(str(tiny), budget="all", flash_mbps=slow_mbps, prompt_progress=told.append, **SIZES)
    llm.eval(TOKENS)
    assert len(told) >= 3
    assert all(p.tokens == len(TOKENS) and p.read_mib <= p.needed_mib for p in told)
    for name in ("tokens_done", "read_mib", "seconds"):
        assert [getattr(p, name) for p in told] == sorted(getattr(p, name) for p in told)
    read = llm.stats().prefill.read_mib
    assert told[-1] == PromptProgress(len(TOKENS), len(TOKENS), read, read, told[-1].seconds, 0)
    del told[:]
    with llm.decoding():
        llm.eval([7])
    assert not told


@pytest.mark.engine
def test_what_a_callback_raises_comes_after_the_prompt(tiny: Path, slow_mbps: float) -> None:
    calls = []

    def fail(progress: PromptProgress) -> None:
        calls.append(progress)
        raise ValueError("in the callback")

    llm = Llama(str(tiny), flash_mbps=slow_mbps, prompt_progress=fail, **SIZES)
    with pytest.raises(ValueError, match="in the callback"):
        llm.eval(TOKENS)
    assert len(calls) == 1 and llm.n_tokens == len(TOKENS)


@pytest.mark.engine
@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_distinct_bytes_are_what_a_prompt_reads_when_each_expert_is_read_once(alone: Path, io: str) -> None:
    llm = Llama(str(alone), budget="all", io=io, **SIZES)
    llm.eval(TOKENS)
    all_resident = llm.stats().prefill
    # neighbouring tensors share a page, which is read once
    shared = mmap.PAGESIZE * sum(len(layer.tensors) for layer in llm.layout.layers) * (io == "buffered")
    assert 0 <= all_resident.distinct_bytes - all_resident.read_bytes <= shared < all_resident.read_bytes
    llm.configure(budget=llm.layout.n_used, io=io)
    llm.eval(TOKENS)
    few = llm.stats().prefill
    assert few.distinct_bytes == all_resident.distinct_bytes < few.read_bytes
    llm.eval(TOKENS[:100])  # the same sequence, another prompt
    assert few.distinct_bytes < llm.stats().prefill.distinct_bytes <= 2 * few.distinct_bytes
    with llm.decoding():
        llm.eval([7])
    assert llm.stats().decode.distinct_bytes == 0


@pytest.mark.engine
def test_the_command_shows_it_where_asked(tiny: Path, slow_mbps: float) -> None:
    arguments = ("generate", "-m", tiny, "--raw", "-p", PROMPT, "-n", 1, "-c", 512, "-t", 1, "-s", 1, "--budget", "50%")
    slow = (*arguments, "--flash-mbps", slow_mbps / 2)
    with ThreadPoolExecutor(2) as pool:  # each waits for its reads
        silent, told = pool.map(lambda more: cacheroute(*slow, *more), ((), ("-v",)))
    assert "prompt" not in silent.stderr and len(silent.stderr.splitlines()) == 2
    _, plan, *lines, summary = told.stderr.splitlines()
    assert re.fullmatch(r"prompt of \d+ tokens: 1 pass of \d+, about [\d.]+ MiB .*", plan)
    assert lines and all(line.startswith("prompt: ") and "\x1b" not in line for line in lines)
    answer = json.loads(cacheroute(*arguments, "-o", "json").stdout)
    assert 0 < answer["prompt_distinct_mib"] == answer["stats"]["prefill"]["distinct_bytes"] / MIB
    assert 0 < answer["prompt_read_mib"] == answer["stats"]["prefill"]["read_bytes"] / MIB
    assert f", read {answer['prompt_read_mib']:.1f} of {answer['prompt_distinct_mib']:.1f} MiB | " in summary


@pytest.mark.engine
def test_an_interruption_clears_the_line(tiny: Path, slow_mbps: float) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cacheroute", "generate", "-q", "-m", str(tiny), "--raw", "-p", PROMPT, "-c", "512"]
    process = subprocess.Popen(
        [*command, "--flash-mbps", str(slow_mbps / 20)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    text = b""
    try:
        while b"\rprompt: " not in text:
            text += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        while True:
            try:
                text += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert time.monotonic() - start < 5
    assert text.endswith(b"\x1b[K\r\x1b[Kcacheroute: Stopped.\r\n") and text.count(b"\n") == 1


CALLS = ["close", "reset", "rewind", "checkpoint", "save_state", "configure", "force", "warm", "load_experts", "generate", "eval"]


@pytest.mark.engine
def test_a_callback_that_calls_into_the_model_is_refused(tiny: Path, slow_mbps: float) -> None:
    """At every call, the last one included: the model computes, and the callback is in another thread."""
    arguments: dict[str, tuple[Any, ...]] = {
        "force": (None,), "warm": (None,), "load_experts": (0, [1, 2]), "generate": ([5, 6, 7],), "eval": ([5],),
    }  # fmt: skip
    rounds: list[dict[str, str]] = []

    def call(_: PromptProgress) -> None:
        refused = {}
        for name in CALLS:
            try:
                result = getattr(llm, name)(*arguments.get(name, ()))
                list(result) if name == "generate" else None
            except CacherouteError as e:
                refused[name] = str(e)
        rounds.append(refused)

    llm = Llama(str(tiny), budget=4, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, flash_mbps=slow_mbps)
    tokens = [3 + i % 50 for i in range(200)]
    llm.prompt_progress = call
    llm.eval(tokens)
    assert rounds and all([*refused] == CALLS for refused in rounds)
    assert all("in use by another thread" in text for refused in rounds for text in refused.values())
    assert llm.n_tokens == 200 and llm.measure_resident() == llm.stats().resident_bytes
    llm.close()


def test_a_callback_is_not_called_after_what_was_broken_off() -> None:
    seen: list[float] = []
    with pytest.raises(KeyboardInterrupt), progress.reported(seen.append, lambda seconds: seconds):  # type: ignore[arg-type]
        time.sleep(0.7)
        raise KeyboardInterrupt
    n = len(seen)
    time.sleep(1.2)
    assert n >= 1 and len(seen) == n
