"""Files that every room writes: in one piece or not at all; folders of users without a home; what a terminal is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheroute import files
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals.results import ResultsFile

FULL = OSError(28, "No space left on device")


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with files.replaced(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f"]
    link = tmp_path / "link"
    link.symlink_to("f")
    with files.replaced(link) as part:
        part.write_text("newer")
    assert link.is_symlink() and path.read_text() == "newer" and sorted(os.listdir(tmp_path)) == ["f", "link"]


def test_a_size_has_the_unit_that_shows_it() -> None:
    sizes = (0, 1023, 1024, 1536 * 1024, 99 * files.MIB, 512 * files.MIB, 7 * files.GIB // 2)
    assert [files.size(n) for n in sizes] == ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 MiB", "99.0 MiB", "512 MiB", "3.5 GiB"]
    assert [files.size(n) for n in (2**20 - 512, 2**20 - 513, 2**30 - 2**19, 1023.5)] == [
        "1.0 MiB",
        "1023 KiB",
        "1.0 GiB",
        "1.0 KiB",
    ]
    assert [files.size(n, decimal=True) for n in (999, 2000, 18.6e9)] == ["999 bytes", "2.0 kB", "18.6 GB"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(CacherouteError if error is FULL else type(error)), files.replaced(path) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_kill_9_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    code = (
        "import os, pathlib, sys\nfrom cacheroute import files\n"
        "with files.replaced(pathlib.Path(sys.argv[1])) as part:\n    part.write_text('ne')\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old"


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultsFile(tmp_path / "r", {"format": "x"})
    results.append({"a": 1})
    before = (tmp_path / "r").read_bytes()

    def fsync(number: int) -> None:
        raise FULL

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", fsync)
        with pytest.raises(CacherouteError, match="No space left"):
            results.append({"a": 2})
    assert (tmp_path / "r").read_bytes() == before
    assert ResultsFile(tmp_path / "r", {"format": "x"}).lines == [{"a": 1}]


@given(st.text())
def test_what_is_shown_has_no_control_characters(text: str) -> None:
    shown = files.printable(text)
    assert all(c.isprintable() or c.isspace() for c in shown) and not set(shown) & set("\x1b\n\r\t\x07\u2028\u202e")


def test_letters_of_all_scripts_are_shown_as_they_are() -> None:
    text = "Größe — 模型 модель\u00a0\u3000x"
    assert files.printable(text) == text
    assert files.printable("a\udce9\x1b[1m\u202e") == r"a\xe9\x1b[1m\u202e"


def test_text_is_utf8_and_keeps_its_line_ends() -> None:
    assert files.decoded("\ufeffä\r\n".encode(), "x") == "ä\r\n"
    with pytest.raises(UsageError, match="x is not UTF-8"):
        files.decoded(b"\xff", "x")


def test_a_home_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("CACHEROUTE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.home() is None
    with pytest.raises(CacherouteError, match="CACHEROUTE_CACHE"):
        files.cache_dir()
    with pytest.raises(UsageError, match="no user nobody"):
        files.expanded("~nobody/x")
    monkeypatch.setenv("CACHEROUTE_CACHE", "/somewhere")
    assert files.cache_dir() == Path("/somewhere")
