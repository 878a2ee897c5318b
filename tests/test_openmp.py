"""Threads of llama.cpp that wait for each other do not spin for long, unless the user says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cacheroute.install import patched_llama_cpp

pytestmark = pytest.mark.engine

NAMES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
USE = {
    "the package": "from cacheroute import Llama",
    "numpy first": "import numpy; numpy.ones((9, 9)) @ numpy.ones((9, 9)); from cacheroute import Llama",
    "a library": "from cacheroute.install import patched_llama_cpp as p; p.cpu_library()",
}


def spins(code: str, **environment: str) -> str:
    """libgomp's count of spins in a process that runs `code`, as it says itself."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "OMP_DISPLAY_ENV": "verbose", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[-1]


@pytest.fixture(scope="module", autouse=True)
def gomp() -> None:
    patched_llama_cpp.module()
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libgomp" not in maps.read_text():
        pytest.skip("the engine has another OpenMP")


@pytest.mark.parametrize("how", USE)
def test_waiting_threads_sleep_soon(how: str) -> None:
    assert spins(USE[how]) == "3000"


def test_what_the_user_has_set_stays() -> None:
    assert spins(USE["the package"], GOMP_SPINCOUNT="77") == "77"
    assert int(spins(USE["the package"], OMP_WAIT_POLICY="active")) > 10**9


def test_the_other_librarys_variable_is_set_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KMP_BLOCKTIME", "7")
    patched_llama_cpp._limit_spinning()
    assert (os.environ["KMP_BLOCKTIME"], os.environ["GOMP_SPINCOUNT"]) == ("7", "3000")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    patched_llama_cpp._limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
