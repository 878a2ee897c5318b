"""A build of the engine that was interrupted or killed goes on where it stopped; another one does not use what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build, machine
from cacheroute.install.engine_build import BuildOptions
from support.fake_build import PATCH, Bench


def object_file(call: list[str]) -> Path:
    """Where the fake compiler of these tests keeps what it has compiled: in the build folder, which is beside the source."""
    return Path(call[-1]).parent.parent / "build" / "a.o"


class Stops:
    """Plays a `pip wheel` that compiles one file and then ends in some way."""

    def __init__(self, bench: Bench, end: BaseException | tuple[int, str]) -> None:
        self.bench, self.end = bench, end

    def __call__(self, call: list[str], **_: object) -> tuple[int, str]:
        at = object_file(call)
        at.parent.mkdir()
        at.write_text("compiled")
        if isinstance(self.end, tuple):
            return self.end
        raise self.end


class GoesOn(Stops):
    """Plays one that finds the compiled file, or not."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.found = bench, False

    def __call__(self, call: list[str], **_: object) -> tuple[int, str]:
        self.found = object_file(call).exists()
        return self.bench.pip(call)


ENDS = {
    "Ctrl-C": KeyboardInterrupt(),
    "gcc": (1, "c++: fatal error: Killed signal terminated program cc1plus\nninja: build stopped\n"),
    "clang": (1, "clang++: error: unable to execute command: Killed\n"),
    "make": (1, "make[2]: *** [a.o] Error 137\n"),
    "pip itself": (-9, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_it_goes_on(end: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine_build, "run", Stops(bench, ENDS[end]))
    with pytest.raises((KeyboardInterrupt, CacherouteError), match="goes on from there") as stopped:
        engine_build.build(BuildOptions(sdist=bench.sdist))
    assert "\n" not in str(stopped.value) and bench.left_behind() == [".build"]
    assert end == "Ctrl-C" or "--jobs 1" in str(stopped.value)
    second = GoesOn(bench)
    monkeypatch.setattr(engine_build, "run", second)
    assert engine_build.build(BuildOptions(sdist=bench.sdist)).read_text() == "one\nTWO\nthree\n"
    assert second.found and bench.left_behind() == [bench.key()], "and nothing else stays"
    assert "resuming the build" in capsys.readouterr().err


def test_another_key_starts_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "run", Stops(bench, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine_build.build(BuildOptions(sdist=bench.sdist))
    bench.patch.write_text(PATCH.replace("TWO", "2"))
    second = GoesOn(bench)
    monkeypatch.setattr(engine_build, "run", second)
    assert engine_build.build(BuildOptions(sdist=bench.sdist)).read_text() == "one\n2\nthree\n"
    assert not second.found and bench.left_behind() == [bench.key()]


def test_a_source_that_was_not_ready_is_made_anew(bench: Bench) -> None:
    half = bench.cache / "engine" / ".build" / "source" / "llama_cpp_python-1"
    half.mkdir(parents=True)
    (half / "half.txt").touch()
    assert engine_build.build(BuildOptions(sdist=bench.sdist)).exists()
    assert bench.left_behind() == [bench.key()]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no signals here")
def test_what_a_killed_process_leaves_is_still_there(own_cache: Path) -> None:
    """As when Android ends Termux: no code of ours runs any more."""
    code = (
        "import os, signal; from cacheroute.install.tools import *\n"
        "with workdir(PlainProgress(), resumable=True) as work:\n"
        "    (work / 'a.o').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL and (own_cache / "engine" / ".build" / "a.o").exists()


def test_a_phone_compiles_as_many_files_as_its_memory_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "cores", lambda: 8)
    for android, free, jobs in ((True, 4.0, 2), (True, 1.0, 1), (False, 4.0, 8), (True, 100.0, 8)):
        monkeypatch.setattr(machine, "is_android", lambda root=None, android=android: android)
        monkeypatch.setattr(engine_build, "available_memory", lambda free=free: int(free * 1e9))
        assert engine_build._jobs(BuildOptions()) == jobs
