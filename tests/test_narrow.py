"""In a phone's window of 45 columns: lines break between words, a row that is too wide gets its own lines, nothing is lost."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest

from cacheroute.cli import report, table, terminal
from cacheroute.install.check import Check
from faults.runner import in_process
from support import phone
from support.cli import cacheroute
from support.expert_file import on_a_disk

CELLS = [
    ["", "budget", "routing", "tok/s", "vs LRU", "miss %", "MiB/token"],
    ["", "50%", "original", "56.1 ± 5.9", "base", "31.0", "3.34"],
    ["!", "50%", "cache-prior:lambda=0.2", "72.5 ± 5.1", "1.29", "12.3", ""],
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_row_of_a_wide_table_gets_its_own_lines() -> None:
    assert table.fitted(CELLS, 80)[0].split()[:2] == ["budget", "routing"] and len(table.fitted(CELLS, 80)) == 3
    assert table.fitted(CELLS, 45) == [
        "50%",
        "  routing original, tok/s 56.1 ± 5.9,",
        "  vs LRU base, miss % 31.0, MiB/token 3.34",
        "! 50%",
        "  routing cache-prior:lambda=0.2,",
        "  tok/s 72.5 ± 5.1, vs LRU 1.29, miss % 12.3",
    ]
    assert table.fitted(CELLS, None) == table.as_text(CELLS).splitlines(), "a pipe has no width"


def test_lines_break_between_words() -> None:
    said = "llama.cpp will be compiled, once: about 5 minutes of a well-known processor"
    assert terminal.folded(said, 20, 6) == [
        "llama.cpp will be",
        "  compiled, once:",
        "  about 5 minutes of",
        "  a well-known",
        "  processor",
    ]
    assert terminal.folded("/a/very/long/path/of/somebody here", 20) == ["/a/very/long/path/of/somebody", "here"]
    assert terminal.folded(said, None) == [said] and terminal.folded("", 20) == [""]


def test_the_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.columns(io.StringIO()) is None and terminal.columns(None) is None
    assert terminal.columns(Terminal()) == 80, "not known"
    monkeypatch.setenv("COLUMNS", "45")
    assert terminal.columns(Terminal()) == 45 and terminal.columns(io.StringIO()) is None
    monkeypatch.setenv("COLUMNS", "3")
    assert terminal.columns(Terminal()) == 20


def test_inspect_and_models(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for command in (["inspect", str(tiny)], ["models"], ["routing"]):
        wide = in_process(command).stdout
        narrow = phone.on_a_terminal(*command)
        phone.check(narrow)
        steady = re.sub(r"(?m) \d+$|^free: .*", "", wide)  # without free memory and the budgets that fit it: they change
        figures = {word for word in phone.words(steady) if re.fullmatch(r"[a-z.\d-]+", word)}
        assert figures - phone.words(narrow) <= {"free", "budget", "tensors"}, "nothing is lost but a name of the first column"


@pytest.mark.engine
def test_answers_and_benches(tiny: Path, tmp_path: Path) -> None:
    path = shutil.copy(tiny, on_a_disk(tmp_path) / "m.gguf")
    answer = ["generate", "-m", path, "-p", "the", "-n", "4", "--raw", "--temp", "0", "--budget", "50%", "-t", "1"]
    bench = ["bench", "-m", path, "-p", "8", "-n", "4"]
    for command in ([*answer, "-v"], [*answer, "--routing", "cache-prior:lambda=0.2"], [*bench, "-r", "1"]):
        phone.check(phone.on_a_terminal(*command))
    narrow = phone.on_a_terminal(*bench, "-r", "2")
    assert {"routing", "tok/s", "MiB/token", "cache-prior:lambda=0.2", "base"} <= phone.words(narrow)


@pytest.mark.engine
def test_doctor(tiny: Path) -> None:
    wide, narrow = cacheroute("doctor", "-m", tiny).stdout, phone.on_a_terminal("doctor", "-m", tiny)
    phone.check(narrow)
    names = set(re.findall(r"(?m)^(?:ok|warn|fail) +([\w ]+):", wide))
    assert names and names == set(re.findall(r"(?m)^(?:ok|warn|fail) +([\w ]+):", narrow))


def test_help_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["--help"], ["generate", "--help"], ["bench", "--help"], ["eval", "--help"]):
        help = phone.on_a_terminal(*command)
        phone.check(help)
        assert "..." not in help.replace("ARGS]...", ""), "no sentence is cut"
    assert "Runs of every combination," in phone.on_a_terminal("bench", "--help"), "below the name of the option, not beside it"


# --- what is sent with a question


@pytest.mark.engine
def test_a_report_has_no_paths_and_a_bench(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "Jane Doe"
    private.mkdir()
    path = shutil.copy(tiny, private / "my-secret.gguf")
    done = cacheroute("doctor", "--report", "-m", path, env={"CACHEROUTE_CACHE": str(private / "cache")})
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert all(len(line) <= report.COLUMNS for line in lines), done.stdout
    assert not re.search(r"Jane|Doe|secret|tmp|settings", done.stdout), done.stdout
    for word in ("engine", "processor", "memory", "buffered", "bench:", "tok/s", "MiB/token"):
        assert word in done.stdout, word


def test_what_is_private_is_left_out() -> None:
    model = Path("/home/jane/my.gguf")
    kept = report.shared(Check("cache", "ok", "/home/jane/.cache/x, 3.0 GiB free", "~/a and 0.3 GB/s; my.gguf"), model)
    assert kept == Check("cache", "ok", "(path), 3.0 GiB free", "(path) and 0.3 GB/s; the model")
    assert report.shared(Check("settings", "ok", "file"), model) is None


def test_a_report_without_an_engine_says_so(tmp_path: Path) -> None:
    info = tmp_path / "llama_cpp_python-0.3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.1\n")
    done = cacheroute("doctor", "--report", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "fail  bench: not run: " in done.stdout and done.stderr == ""


def test_a_report_is_for_people() -> None:
    done = cacheroute("doctor", "--report", "-o", "json")
    assert done.returncode == 2 and "--report is a text for people" in done.stderr
