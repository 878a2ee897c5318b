"""Texts from files and pipes, and what is none."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cacheroute import files
from cacheroute.errors import UsageError
from cacheroute.evals import text


def test_a_pipe_is_read_to_its_end_and_waited_for_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        time.sleep(1.5)
        with path.open("wb") as pipe:
            pipe.write(b"the cat\n")
            pipe.flush()
            time.sleep(0.1)
            pipe.write(b"sat")

    writer = threading.Thread(target=write)
    writer.start()
    assert files.read_text(path) == b"the cat\nsat"
    writer.join()
    assert capsys.readouterr().err == f"waiting for text from the pipe {path}\n"


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes("\ufeffthe cat".encode())
    rows.write_bytes('\ufeff{"text": "the cat"}\n'.encode())
    assert text.read(plain) == text.read(rows) == "the cat"
    rows.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        text.read(rows)


def test_what_is_no_text_is_called_what_it_is(tmp_path: Path) -> None:
    assert files.read_text(Path(os.devnull)) == b""
    for path, kind in ((tmp_path, "a directory"), (Path("/dev/zero"), "a device")):
        with pytest.raises(UsageError, match=f"it is {kind}"):
            files.read_text(path)
    with pytest.raises(UsageError, match="cannot be read"):
        files.read_text(tmp_path / "missing")
