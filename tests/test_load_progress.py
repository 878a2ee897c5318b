"""The progress of a model's load: whom it is told, how it is shown, and how Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheroute import CacherouteError, Llama
from cacheroute.cli import progress
from cacheroute.engine import load_progress

# every call takes a while, and is shown at once
SLOW = """
import time
from cacheroute.cli import progress
progress.SECONDS_BEFORE_THE_FIRST = 0
show = progress.LoadLine.__call__
def slowly(self, share):
    show(self, share)
    time.sleep(0.2)
progress.LoadLine.__call__ = slowly
from cacheroute.__main__ import main
main()
"""


@pytest.fixture(autouse=True)
def told() -> Iterator[list[float]]:
    shares: list[float] = []
    load_progress.report_to(shares.append)
    yield shares
    load_progress.report_to(None)


def load(path: Path, **settings: object) -> None:
    with contextlib.closing(Llama(str(path), n_ctx=64, verbose=False, **settings)):  # type: ignore[arg-type]
        pass


@pytest.mark.engine
@pytest.mark.parametrize("budget", ["50%", "all"])
def test_a_load_tells_how_far_it_is_and_its_end(tiny: Path, told: list[float], budget: str) -> None:
    load(tiny, budget=budget)
    assert len(told) > 3 and told == sorted(told) and told[0] < 0.5 and told.count(1.0) == 1 and told[-1] == 1.0


@pytest.mark.engine
def test_a_load_that_fails_tells_its_end_once(tiny: Path, tmp_path: Path, told: list[float]) -> None:
    broken = tmp_path / "broken.gguf"  # cacheroute takes its header, llama.cpp does not
    broken.write_bytes(tiny.read_bytes().replace(b"output_norm.weight", b"output_nurm.weight"))
    with pytest.raises(CacherouteError, match="cannot load"):
        load(broken)
    assert told.count(1.0) == 1 and told[-1] == 1.0


@pytest.mark.engine
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_the_callback_raises_ends_the_load(tiny: Path, error: type[BaseException]) -> None:
    told = []

    def tell(share: float) -> None:
        told.append(share)
        if len(told) == 2:
            if error is KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            raise error("in the callback")

    load_progress.report_to(tell)
    with pytest.raises(error):
        load(tiny)
    assert told[2:] == [1.0]
    load_progress.report_to(None)
    load(tiny)


def on_a_terminal(tiny: Path, *, until: bytes) -> tuple[bytes, int, float]:
    """What is on the terminal, the exit code, and the seconds after Ctrl-C, which comes when `until` has been shown."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SLOW, "generate", "-m", str(tiny), "--raw", "-p", "the", "-n", "1", "-t", "1"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    text, asked = b"", 0.0
    try:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                text += part
                if until and not asked and until in text:
                    process.send_signal(signal.SIGINT)
                    asked = time.monotonic()
        return text, process.wait(timeout=60), time.monotonic() - asked
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.engine
def test_a_terminal_has_a_line_which_is_cleared(tiny: Path) -> None:
    text, code, _ = on_a_terminal(tiny, until=b"")
    assert code == 0 and text.count(b"\rloading the model: ") > 3 and b" left\x1b[K" in text
    *_, rest = text.split(b"loading the model: ")
    assert rest.startswith(b"99%") and b" left\x1b[K\r\x1b[Ktiny" in rest


@pytest.mark.engine
def test_ctrl_c_ends_it_within_seconds(tiny: Path) -> None:
    text, code, seconds = on_a_terminal(tiny, until=b"loading the model: ")
    assert code == 130 and text.endswith(b"\r\x1b[Kcacheroute: Stopped.\r\n") and text.count(b"\n") == 1
    assert seconds < 5


def test_the_text_leaves_out_what_is_not_known() -> None:
    assert progress.load_text(0.0, 3.0) == "loading the model: 0%"
    assert progress.load_text(0.25, 100.0) == "loading the model: 25%, about 5 min 0 s left"
    assert progress.load_text(0.01, 100.0) == "loading the model: 1%, about 2 h 45 min left"
