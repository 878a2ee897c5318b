"""The engine's build: its key, its patches, and one sentence for everything that can go wrong.

Nothing here compiles or reaches the network (support/fake_build.py). Only the patches are tried on the real sdist, where the
cache has it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from cacheroute import files
from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build, engine_source, tools
from cacheroute.install.engine_build import BuildOptions
from support.fake_build import PATCH, Bench
from support.systems import LINUX

REAL_SDIST = files.cache_dir() / "sdist" / f"llama_cpp_python-{engine_source.VERSION}.tar.gz"
REAL_PATCHES = engine_source.patch_files()


def fails(bench: Bench, *, leaves: list[str] | None = None) -> str:
    """The message of a build that must fail with one sentence and leave nothing in the cache."""
    with pytest.raises(CacherouteError) as failure:
        engine_build.build(BuildOptions(sdist=bench.sdist))
    assert "\n" not in str(failure.value)
    if bench.cache.is_dir() and (bench.cache / "engine").is_dir():
        assert bench.left_behind() == (leaves or [])
    return str(failure.value)


# --- the key


CHANGES: dict[str, Callable[[Bench, pytest.MonkeyPatch], object]] = {
    "a patch": lambda b, m: b.patch.write_text(PATCH.replace("TWO", "2")),
    "another patch": lambda b, m: (b.patch.parent / "0002-b.patch").write_text(PATCH),
    "the sdist": lambda b, m: m.setattr(engine_source, "SDIST_SHA256", "0" * 64),
    "the version": lambda b, m: m.setattr(engine_build, "LOCAL_VERSION", "9+cacheroute.9"),
    "the compiler": lambda b, m: b.compiler.write_text('#!/bin/sh\necho "#define VERSION 13"\n'),
    "CPU flags": lambda b, m: b.cpu.write_text("avx512f"),
    "CFLAGS": lambda b, m: m.setenv("CFLAGS", "-O1"),
    "CMAKE_ARGS": lambda b, m: m.setenv("CMAKE_ARGS", "-DGGML_CUDA=on"),
    "a setting": lambda b, m: m.setitem(engine_build._DEFINES, "GGML_OPENMP", "OFF"),
    "the platform": lambda b, m: m.setattr("sysconfig.get_platform", lambda: "linux-riscv64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_key_changes_with(change: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.key()
    assert bench.key() == before
    CHANGES[change](bench, monkeypatch)
    assert bench.key() != before


def test_key_stays_when_only_the_header_of_a_patch_changes(bench: Bench) -> None:
    before = bench.key()
    bench.patch.write_text(PATCH.replace("a test", "a better reason"))
    assert bench.key() == before


def test_a_portable_build_has_its_own_key_without_the_cpu(bench: Bench) -> None:
    native, portable = bench.key(), bench.key(portable=True)
    assert native != portable
    bench.cpu.write_text("avx512f")
    assert bench.key(portable=True) == portable


# --- the cache


def test_build_once_then_cached(bench: Bench) -> None:
    wheel = engine_build.build(BuildOptions(sdist=bench.sdist))
    assert wheel == engine_build.build(BuildOptions(sdist=bench.sdist))
    assert bench.builds == 1
    assert wheel.parent == bench.cache / "engine" / bench.key()
    assert bench.left_behind() == [bench.key()]
    assert wheel.read_text() == "one\nTWO\nthree\n"


def test_two_builds_at_once_compile_once(bench: Bench) -> None:
    wheels: list[Path] = []
    threads = [
        threading.Thread(target=lambda: wheels.append(engine_build.build(BuildOptions(sdist=bench.sdist)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wheels) == 4
    assert len(set(wheels)) == 1
    assert bench.builds == 1


def test_ensure_does_nothing_when_the_same_key_is_installed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "installed_key", bench.key)
    engine_build.ensure(BuildOptions(sdist=bench.sdist))
    assert bench.builds == 0
    assert not bench.cache.exists()


def test_a_build_that_fails_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(call: list[str], **_: object) -> tuple[int, str]:
        bench.pip(call)  # the wheel is there, but not yet published
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine_build, "run", full)
    with pytest.raises(CacherouteError):
        engine_build.build(BuildOptions(sdist=bench.sdist))
    assert bench.left_behind() == []
    monkeypatch.setattr(engine_build, "run", bench.pip)
    assert engine_build.build(BuildOptions(sdist=bench.sdist)).exists()


def test_leftovers_of_a_killed_build_are_removed(bench: Bench) -> None:
    stale = bench.cache / "engine" / ".build-killed"
    stale.mkdir(parents=True)
    (stale / "half.o").write_text("")
    engine_build.build(BuildOptions(sdist=bench.sdist))
    assert bench.left_behind() == [bench.key()]


@pytest.mark.skipif(not LINUX, reason="looks into /proc")
def test_child_processes_end_with_the_build(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        (tmp_path / "pid").write_text(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tools.run(["sh", "-c", "sleep 60 & echo $!; wait"], on_line=interrupt)
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    deadline = time.monotonic() + 5
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no signals here")
def test_sigterm_cleans_up(bench: Bench, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from cacheroute.install.tools import *\n"
        "with workdir(PlainProgress()) as work:\n"
        "    print(work, flush=True); os.kill(os.getpid(), signal.SIGTERM); sys.exit('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert not Path(done.stdout.strip()).exists()


# --- one sentence each


def test_failing_hunk(bench: Bench) -> None:
    bench.patch.write_text(PATCH.replace("-two", "-zwei"))
    said = fails(bench)
    assert bench.patch.name in said
    assert "src/a.txt (line 1)" in said


def test_a_patched_file_that_no_longer_exists(bench: Bench) -> None:
    bench.patch.write_text(PATCH.replace("a.txt", "b.txt"))
    assert "src/b.txt: No such file" in fails(bench)


def test_patches_apply_inside_another_repository(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a commit hook
    assert engine_build.build(BuildOptions(sdist=bench.sdist)).read_text() == "one\nTWO\nthree\n"


def test_wrong_sha256(bench: Bench) -> None:
    with bench.sdist.open("ab") as file:
        file.write(b"x")
    assert "sha256" in fails(bench)


def test_no_such_sdist(bench: Bench) -> None:
    bench.sdist.unlink()
    assert "No such file" in fails(bench)


def test_not_an_archive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.sdist.write_text("not a tar")
    monkeypatch.setattr(engine_source, "SDIST_SHA256", files.sha256(bench.sdist))
    assert "not an sdist that can be unpacked" in fails(bench)


def test_missing_compiler(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "CXX names no-such-compiler" in fails(bench)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler found" in fails(bench)


def test_broken_compiler(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.compiler.write_text("#!/bin/sh\necho 'no license found' >&2; exit 1\n")
    assert "no license found" in fails(bench)


def test_missing_git(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert fails(bench).startswith("git is missing")


def test_too_little_space_is_detected_before_the_build(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "NEEDED_BYTES", 10**18)
    assert fails(bench).startswith("no space in")
    assert bench.builds == 0


def test_a_disk_that_fills_during_the_build(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "cc1plus: fatal error: error writing to a.s: No space left on device\n"
    monkeypatch.setattr(engine_build, "run", lambda *a, **k: (1, said))
    assert fails(bench).startswith("no space in")


def test_unwritable_cache(bench: Bench) -> None:
    bench.cache.write_text("a file where the folder should be")
    assert fails(bench).startswith(f"cannot write to the cache {bench.cache}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_cache_without_permission(bench: Bench) -> None:
    bench.cache.mkdir(mode=0o500)
    assert "Permission denied" in fails(bench)


def test_failed_build_names_the_reason_and_keeps_the_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    output = "[1/2] Building\n  a.cpp:7:1: error: no such thing\nninja: build stopped\nERROR: Failed\n"
    monkeypatch.setattr(engine_build, "run", lambda *a, **k: (1, output))
    log = bench.cache / "engine" / f"failed-{bench.key()}.log"
    said = fails(bench, leaves=[log.name])
    assert str(log) in said
    assert said.endswith("a.cpp:7:1: error: no such thing")
    assert log.read_text() == output


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "WARNING: Retrying ... Temporary failure in name resolution\nERROR: No matching\n",
            "cannot be reached",
        ),
        ("ERROR: Could not find a version (from versions: 1, 2)\nERROR: No\n", "Could not find a version$"),
    ],
)
def test_download_that_fails(output: str, reason: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_source, "run", lambda *a, **k: (1, output))
    with pytest.raises(CacherouteError, match=reason):
        engine_build.build()
    assert bench.left_behind() == []


def test_no_pip(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name, which=shutil.which: None if name[:2] in ("uv", "pi") else which(name))
    monkeypatch.delenv("UV", raising=False)
    assert "has no pip" in fails(bench)


# --- what is installed


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        (None, "missing"),
        (engine_source.VERSION, "stock"),
        (engine_source.VERSION + "+cacheroute.0", "outdated"),
        (engine_build.LOCAL_VERSION, "patched"),
    ],
)
def test_installed_state(version: str | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if version:
        info = tmp_path / f"llama_cpp_python-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    state = engine_build.installed_state()
    assert (state.kind, state.version) == (kind, version)
    assert (state.advice is None) == (kind == "patched")
    assert state.advice is None or "cacheroute setup" in state.advice


# --- the patches


@pytest.mark.parametrize("patch", REAL_PATCHES, ids=lambda p: p.stem)
def test_each_patch_has_its_reason_and_when_to_drop_it(patch: Path) -> None:
    head = patch.read_text(encoding="utf-8").split("\n--- a/")[0]
    assert re.findall(r"(?m)^(Why|What|Drop): +\S", head) == ["Why", "What", "Drop"]


def test_patches_are_numbered_without_gaps() -> None:
    assert [int(p.name[:4]) for p in REAL_PATCHES] == list(range(1, len(REAL_PATCHES) + 1))


@pytest.mark.skipif(not REAL_SDIST.exists(), reason="the pinned sdist is not in the cache: build the engine first")
@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_patches_apply_to_the_pinned_sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path))
    results = engine_source.check(engine_source.VERSION, REAL_SDIST)
    assert [r.patch for r in results] == [p.name for p in REAL_PATCHES]
    assert [str(r) for r in results if not r.applies] == []


def test_children_speak_english_and_keep_the_characters_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LC_ALL=C, Python 3.11 ends in its site module where a .pth file names a folder with an accent."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    folder = tmp_path / "Jos\u00e9"
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    (site / "editable.pth").write_text(f"{folder}\n", encoding="utf-8")
    assert tools.run([str(python), "-c", "print('starts')"]) == (0, "starts\n")
    monkeypatch.setenv("LANGUAGE", "de")
    code, said = tools.run(
        [sys.executable, "-c", "import os; print(*sorted(k for k in os.environ if k[:2] == 'LA' or k[:3] == 'LC_'))"]
    )
    assert code == 0 and "LC_MESSAGES" in said and "LC_ALL" not in said and "LANGUAGE" not in said
