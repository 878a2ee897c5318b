"""One fault of the table, and how it is run: in this process where that is enough, through a shell where streams matter."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest


class Place:
    """Where a case runs: a folder of its own, the models that are shared, and the environment it may change."""

    def __init__(self, folder: Path, tiny: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.tiny, self.demo, self.monkeypatch = folder, tiny, demo, monkeypatch

    def file(self, name: str, content: str | bytes) -> Path:
        """A file in the folder of the case."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Case:
    """A fault -> exit code -> sentence.

    name: says the fault; the id of the test.
    command: the words after `cacheroute`, with {tiny}, {demo} and {dir} filled in; or a function of the Place that returns those
        words, which makes what the case needs first; or one that returns an Outcome, for what is no single command.
    code: the exit code.
    sentence: a regular expression, found in the one line on stderr that is the sentence; "" where nothing is to be said.
    shell: a line for bash with {cacheroute} for the command, where streams or signals matter; then `command` is what it runs.
    stdout: whether anything is on stdout: False for every failure.
    more: whether stderr may hold other lines beside the sentence (statistics, hints).
    env: variables that are set for it; None unsets one.
    stdin: what is piped in.
    leaves: names that are in the folder afterwards, of those that the command could have made; None: not looked at.
    """

    name: str
    command: str | Callable[[Place], list[str] | Outcome] = ""
    code: int = 2
    sentence: str = ""
    shell: str = ""
    stdout: bool = False
    more: bool = False
    env: dict[str, str | None] = field(default_factory=dict)
    stdin: bytes = b""
    leaves: tuple[str, ...] | None = None


def run(case: Case, place: Place) -> Outcome:
    """Runs a case."""
    for name, value in case.env.items():
        if value is None:
            place.monkeypatch.delenv(name, raising=False)
        else:
            place.monkeypatch.setenv(name, value.format(dir=place.folder))
    words = case.command(place) if callable(case.command) else _words(case.command, place)
    if isinstance(words, Outcome):
        return words
    return _in_shell(case, words, place) if case.shell else in_process(words, case.stdin)


def check(case: Case, outcome: Outcome, place: Place) -> None:
    """The exit code, the one sentence, no traceback, and what is on stdout and in the folder."""
    said = [line for line in outcome.stderr.splitlines() if line.strip()]
    told = f"exit {outcome.code}\nstdout: {outcome.stdout[:500]}\nstderr: {outcome.stderr[:2000]}"
    assert "Traceback" not in outcome.stderr + outcome.stdout, told
    assert outcome.code == case.code, told
    assert bool(outcome.stdout) == case.stdout, told
    matching = [line for line in said if re.search(case.sentence, line)]
    if case.sentence:
        assert len(matching) == 1, told
        assert case.more or len(said) == 1, told
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", matching[0]), f"control characters\n{told}"
    else:
        assert case.more or not said, told
    if case.leaves is not None:
        assert sorted(p.name for p in place.folder.iterdir()) == sorted(case.leaves), told


def in_process(words: list[str], stdin: bytes = b"") -> Outcome:
    """Runs the program's main() here: no imports, no start of a process."""
    from cacheroute import cli

    out, err = _Text(), _Text()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["cacheroute", *words], io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    finally:
        sys.argv, sys.stdin = before
    return Outcome(code, out.text(), err.text())


class _Text(io.TextIOWrapper):
    """A stream of text in memory, with the `buffer` that programs write bytes to."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding="utf-8", write_through=True)

    def text(self) -> str:
        self.flush()
        return self._bytes.getvalue().decode("utf-8", "replace")


def _words(command: str, place: Place) -> list[str]:
    return [w.format(tiny=place.tiny, demo=place.demo, dir=place.folder) for w in shlex.split(command)]


def _in_shell(case: Case, words: list[str], place: Place) -> Outcome:
    command = shlex.join([sys.executable, "-m", "cacheroute", *words])
    line = case.shell.replace("{cacheroute}", command).replace("{dir}", str(place.folder))
    done = subprocess.run(["bash", "-c", line], input=case.stdin, capture_output=True, cwd=place.folder, timeout=60)
    return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))
