"""The core on systems that lack a call, as macOS does: built without it, it does the same work and says what it cannot.

What fails at run time, although it was compiled in, is in tests/faults.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cacheroute.engine import stores
from cacheroute.files import PACKAGE
from cacheroute.native import bindings
from support.expert_file import on_a_disk
from support.systems import LINUX

NATIVE = PACKAGE / "native"
CALLS = ("DIRECT", "FADVISE", "MADVISE", "MINCORE")

# Prints as JSON what the system can do, and for each way to read what it did, or why it refused.
WORK = """
import json, sys
from pathlib import Path
import numpy as np
from cacheroute.errors import CacherouteError
from cacheroute.native import bindings
from support.expert_file import model, pages_in_memory

told = {"system": bindings.lib.cr_system()}
for io in ("direct", "buffered"):
    rng = np.random.default_rng(7)
    try:
        with model(Path(sys.argv[1]), n_layers=2, n_tensors=2, n_expert=9, io=io) as m:
            counted, same = [], True
            for step in range(24):
                there = sorted(m.resident[step % 2])
                load = rng.permutation([e for e in range(9) if e not in there])[:3].tolist()
                m.exchange(step % 2, load, rng.permutation(there)[:2].tolist())
                counted.append([*m.counted(), m.expected_bytes()])
                same = same and all(m.touch(step % 2, e) == m.in_file(step % 2, e) for e in m.resident[step % 2])
            cached = len(pages_in_memory(m.path))
            bindings.lib.cr_store_clear(m.store)
            told[io] = {"same": same, "counted": counted, "cached": cached, "left": m.counted()}
    except CacherouteError as e:
        told[io] = str(e)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of the core compiled, but for what depends on the system."""
    folder = tmp_path_factory.mktemp("core")
    sources = [path for path in NATIVE.glob("*.cpp") if path.name != "system.cpp"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: compiled(source, folder / f"{source.stem}.o"), sources))
    return folder


def compiled(source: Path, out: Path, *flags: str) -> None:
    call = ["c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *flags, "-c", source, "-o", out]
    subprocess.run(call, check=True)


@pytest.fixture(scope="module")
def core(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builds libcacheroute without some calls; returns its path."""

    def build(*without: str) -> Path:
        folder = tmp_path_factory.mktemp("without")
        compiled(NATIVE / "system.cpp", folder / "system.o", *(f"-DCR_NO_{call}" for call in without))
        library = folder / "libcacheroute.so"
        subprocess.run(["c++", "-shared", "-pthread", "-o", library, folder / "system.o", *objects.glob("*.o")], check=True)
        return library

    return build


def work(library: Path, folder: Path) -> dict[str, Any]:
    env = {**os.environ, "CACHEROUTE_LIBRARY": str(library), "PYTHONPATH": str(Path(__file__).parent)}
    call = [sys.executable, "-c", WORK, str(on_a_disk(folder))]
    told: dict[str, Any] = json.loads(subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout)
    return told


@pytest.mark.skipif(not LINUX, reason="what is left out is there on Linux alone")
@pytest.mark.parametrize("without", [(), *((call,) for call in CALLS), CALLS], ids=lambda names: "+".join(names) or "nothing")
def test_without_a_call_the_same_bytes_are_read_and_counted(without: tuple[str, ...], core: Any, tmp_path: Path) -> None:
    told = work(core(*without), tmp_path)
    can = {
        bindings.DIRECT_READS: "DIRECT" not in without,
        bindings.DROPS_CACHED: not {"FADVISE", "MADVISE"} & {*without},
        bindings.MINCORE: "MINCORE" not in without,
    }
    assert told["system"] == sum(bit for bit, there in can.items() if there)
    if not can[bindings.DIRECT_READS]:
        assert re.fullmatch(r"the filesystem of \S+ has no direct reads\.", told.pop("direct"))
    elif isinstance(told["direct"], str):  # this disk's own limit
        assert told.pop("direct").endswith("has no direct reads.")
    for io, did in told.items():
        if io == "system":
            continue
        assert did["same"]
        ours, kernels, expected = zip(*did["counted"], strict=True)
        assert ours == expected
        if not can[bindings.MINCORE]:
            assert {*kernels} == {bindings.UNKNOWN_BYTES} and did["left"] == [0, bindings.UNKNOWN_BYTES]
        elif can[bindings.DROPS_CACHED]:
            assert kernels == expected and did["left"] == [0, 0]
        else:  # what was given back has left memory; what was read through the page cache has not
            assert all(kernel >= own for kernel, own in zip(kernels, expected, strict=True))
        if "FADVISE" in without and io == "buffered":
            assert did["cached"] > 0
        elif can[bindings.DROPS_CACHED]:
            assert did["cached"] == 0


@pytest.mark.engine
@pytest.mark.skipif(not LINUX, reason="what is left out is there on Linux alone")
def test_a_model_answers_the_same_and_the_command_says_what_the_system_cannot(core: Any, own_cache: Path, tiny: Path) -> None:
    call = [sys.executable, "-m", "cacheroute", "generate", "-m", tiny, "-p", "the", "-n", "12", "--temp", "0", "-c", "256"]
    call += ["-t", "1", "--budget", "50%", "--raw", "--no-stdin"]

    def answer(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(call, env={**os.environ, **env}, capture_output=True, text=True, check=True)

    usual, poor = answer(), answer(CACHEROUTE_LIBRARY=str(core(*CALLS)))
    assert usual.stdout and usual.stdout == poor.stdout
    assert stores.NOT_DROPPED not in usual.stderr and f"cacheroute: {stores.NOT_DROPPED}.\n" in poor.stderr
    assert "reads through the page cache: the filesystem of" in poor.stderr


def test_direct_reads_need_no_measurement_where_the_cache_would_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(stores, "drops_cached", lambda: False)
    monkeypatch.setattr(stores, "store_arguments", lambda *_: ())
    monkeypatch.setattr(stores, "new_store", lambda io, *_: opened.append(io) or 1)
    monkeypatch.setattr(stores, "_choose", lambda *_: pytest.fail("measured the page cache"))
    monkeypatch.setattr(stores, "_said", set())

    class Layout:
        paths = ()

    layout: Any = Layout()
    assert stores.open_store("auto", layout, lambda name: None) == (1, "direct") and opened == ["direct"]
    assert capsys.readouterr().err == ""
    assert stores.open_store("buffered", layout, lambda name: None) == (1, "buffered")
    assert capsys.readouterr().err == f"cacheroute: {stores.NOT_DROPPED}.\n"


def test_no_other_part_asks_for_the_name_of_the_system() -> None:
    """Python 3.13 calls Android "android": what depends on a call asks for it, as hasattr() does. But for what installs."""
    named = re.compile(r"sys\.platform|platform\.system\(|os\.name\b|os\.uname\(")
    asks = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if named.search(path.read_text(encoding="utf-8"))}
    assert asks <= {"install/android.py", "install/engine_wheel.py", "install/machine.py"}
    headers = [p.name for p in NATIVE.glob("*.*") if p.suffix in (".h", ".cpp") and "__linux__" in p.read_text(encoding="utf-8")]
    assert headers == ["system.cpp"]
