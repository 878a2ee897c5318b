"""--version: all parts, with and without an engine, and without loading llama.cpp."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile

import pytest

from cacheroute import files
from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build, engine_source, patched_llama_cpp, versions
from cacheroute.install.engine_build import EngineState

SDIST = files.cache_dir() / "sdist" / f"llama_cpp_python-{engine_source.VERSION}.tar.gz"


@pytest.mark.engine
def test_all_parts_are_told_and_llama_cpp_is_not_loaded() -> None:
    code = "import sys; from cacheroute import cli; cli._run(['--version']); assert 'llama_cpp' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    cacheroute, engine, llama_cpp, processor = done.stdout.splitlines()
    assert cacheroute == f"cacheroute {files.VERSION}"
    assert re.fullmatch(rf"engine: llama-cpp-python {re.escape(engine_build.LOCAL_VERSION)}, build [0-9a-f]{{20}}", engine)
    assert llama_cpp == f"llama.cpp {engine_source.LLAMA_CPP}, {len(engine_source.patch_files())} patches"
    assert re.fullmatch(r"processor: \w+, compiled for (\w+, )*\w+", processor)


@pytest.mark.parametrize(
    "state, said",
    [
        (EngineState("missing"), "engine: the engine is not installed yet: run `cacheroute setup`"),
        (EngineState("stock", "0.3.1"), "engine: llama-cpp-python 0.3.1 lacks the expert hook"),
        (EngineState("outdated", "0.3.36+cacheroute.1"), "engine: the engine 0.3.36+cacheroute.1 is not the"),
    ],
)
def test_without_the_engine_it_says_what_is_needed(state: EngineState, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "installed_state", lambda: state)
    found = versions.lines()
    assert len(found) == 3 and found[1].startswith(said)
    assert f"{engine_build.LOCAL_VERSION}, llama.cpp {engine_source.LLAMA_CPP}" in found[2]


def test_an_engine_that_cannot_be_loaded_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise CacherouteError("libggml-cpu is missing.")

    monkeypatch.setattr(engine_build, "installed_state", lambda: EngineState("patched", engine_build.LOCAL_VERSION))
    monkeypatch.setattr(patched_llama_cpp, "cpu_library", broken)
    assert versions.lines()[-1].endswith("compiled for unknown (libggml-cpu is missing)")


@pytest.mark.skipif(not SDIST.exists(), reason="the pinned sdist is not in the cache: build the engine first")
def test_the_commit_of_llama_cpp_is_that_of_the_sdist() -> None:
    with tarfile.open(SDIST, "r|gz") as tar:
        for member in tar:
            if member.name.partition("/")[2] == "CHANGELOG.md":
                text = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
                break
    _, _, own = text.partition(f"## [{engine_source.VERSION}]")
    assert re.search(r"llama\.cpp@(\w+)", own)[1] == engine_source.LLAMA_CPP  # type: ignore[index]
