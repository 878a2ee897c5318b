"""The scripts for other platforms: what they name exists, and a machine that lacks something is told what to install."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import aarch64_tests
import check_platforms
import cross
import pytest

from cacheroute.errors import CacherouteError

ROOT = Path(__file__).resolve().parent.parent


def test_the_tests_that_run_emulated_exist() -> None:
    assert len({*aarch64_tests.ALL}) == len(aarch64_tests.ALL) and {*aarch64_tests.KERNELS} < {*aarch64_tests.ALL}
    missing = [name for name in aarch64_tests.ALL if not (ROOT / name).is_file()]
    assert missing == []
    for test, reason in aarch64_tests.DESELECT.items():
        file, _, name = test.partition("::")
        functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert file in aarch64_tests.ALL and name.partition("[")[0] in functions and reason, test


def test_a_machine_without_the_compilers_is_told_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if "aarch64" in name else f"/usr/bin/{name}")
    with pytest.raises(CacherouteError, match=r"apt-get install g\+\+-aarch64-linux-gnu gcc-aarch64-linux-gnu$"):
        cross.environment()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert cross.environment()["_PYTHON_HOST_PLATFORM"] == "linux-aarch64"


def test_functions_that_android_lacks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of objects that this machine's compiler makes: calls that no other object has, without those of the C++ library."""
    for name, text in {
        "a": "#include <string>\nint own();\nint a(const char * s) { return int(std::string(s).size()) + own(); }",
        "b": 'extern "C" int qsort_r(); extern "C" int fsync(int);\nint own() { return fsync(1) + qsort_r(); }',
    }.items():
        (tmp_path / f"{name}.cpp").write_text(text)
        subprocess.run(["c++", "-O1", "-c", tmp_path / f"{name}.cpp", "-o", tmp_path / f"{name}.o"], check=True)
    objects = sorted(tmp_path.glob("*.o"))
    assert {"qsort_r", "fsync"} <= check_platforms.undefined(objects)
    assert not [name for name in check_platforms.undefined(objects) if name.startswith("_Z")]
    monkeypatch.setattr(check_platforms, "objects", lambda *_: objects)
    monkeypatch.setattr(check_platforms, "BIONIC", dict.fromkeys(check_platforms.undefined(objects) - {"qsort_r"}, 21))
    with pytest.raises(CacherouteError, match=r"^Android's libc has not at API level 24: qsort_r$"):
        check_platforms.android(tmp_path)


@pytest.mark.parametrize("script", ["check_platforms", "aarch64"])
def test_a_wrong_word_is_an_error(script: str) -> None:
    words = {"check_platforms": ["windows"], "aarch64": ["--cpu", "z80"]}
    call = [sys.executable, ROOT / "scripts" / f"{script}.py", *words[script]]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words[script][-1] in done.stderr and "Traceback" not in done.stderr
