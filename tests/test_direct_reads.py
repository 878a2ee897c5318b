"""Direct reads are compared with what is in the file before a model relies on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from cacheroute.engine import direct_reads
from cacheroute.errors import CacherouteError
from support.cli import cacheroute, sentence
from support.expert_file import on_a_disk

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads here")
WRONG = """\
import os, sys
real = os.preadv
def wrong(file, buffers, offset):
    n = real(file, buffers, offset)
    if offset:
        buffers[0][0] ^= 1
    return n
os.preadv = wrong
from cacheroute import cli
sys.exit(cli._run(sys.argv[1:]))
"""


def wrong_preadv(file: int, buffers: Sequence[object], offset: int) -> int:
    buffers[0][:5] = b"wrong"  # type: ignore[index]
    return 65536


def test_right_reads_say_nothing(tmp_path: Path, tiny: Path) -> None:
    direct_reads.check([str(shutil.copy(tiny, on_a_disk(tmp_path) / "m.gguf")), str(tmp_path / "gone.gguf")])


def test_wrong_bytes_are_refused(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shutil.copy(tiny, on_a_disk(tmp_path) / "m.gguf")
    monkeypatch.setattr(os, "preadv", wrong_preadv)
    with pytest.raises(CacherouteError, match=r"m\.gguf give other bytes than are in it"):
        direct_reads.check([str(path)])


def test_a_filesystem_that_refuses_them_is_left_to_the_store(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    direct_reads.check([str(tiny)])


@pytest.mark.engine
def test_a_model_is_read_buffered_then(tmp_path: Path, tiny: Path, own_cache: Path) -> None:
    """As on Android's shared storage: the answer is right, and the reason is said once."""
    import subprocess
    import sys

    path = shutil.copy(tiny, on_a_disk(tmp_path) / "m.gguf")
    words = ["generate", "-m", str(path), "-p", "the", "-n", "4", "--temp", "0", "--raw", "--budget", "50%", "-q", "--no-stdin"]
    right = cacheroute(*words)
    done = subprocess.run([sys.executable, "-c", WRONG, *words], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0 and done.stdout == right.stdout
    assert done.stderr.count("reads through the page cache: direct reads of") == 1
    asked = subprocess.run(
        [sys.executable, "-c", WRONG, *words, "--io", "direct"], capture_output=True, text=True, env=os.environ, check=False
    )
    assert "give other bytes than are in it" in sentence(
        subprocess.CompletedProcess(asked.args, asked.returncode, asked.stdout, asked.stderr), 1
    )
