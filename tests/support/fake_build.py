"""A build of the engine in which everything that can go wrong lies in a temporary folder.

A shell script plays the compiler, a tiny archive the sdist, a function pip.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cacheroute import files
from cacheroute.install import engine_build, engine_source, tools

PATCH = """\
Why:  a test.
What: one word.
Drop: never.

--- a/src/a.txt
+++ b/src/a.txt
@@ -1,3 +1,3 @@
 one
-two
+TWO
 three
"""


class Bench:
    """A build in which everything that can go wrong lies in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.cache = root / "cache"
        self.cpu = root / "cpu"  # the compiler's macros for this machine's CPU
        self.compiler = root / "compiler"
        self.patch = root / "patches" / "0001-a.patch"
        self.sdist = root / "sdist.tar.gz"
        self.builds = 0

    def pip(
        self,
        call: list[str],
        env: dict[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> tuple[int, str]:
        """Plays `pip wheel`."""
        self.builds += 1
        if on_line:
            on_line("  [1/2] Building CXX object")
        into = Path(call[call.index("--wheel-dir") + 1])
        into.mkdir()
        (into / "llama_cpp_python.whl").write_text((Path(call[-1]) / "src" / "a.txt").read_text())
        return 0, ""

    def left_behind(self) -> list[str]:
        return sorted(p.name for p in (self.cache / "engine").iterdir() if p.name != ".lock")

    def key(self, portable: bool = False) -> str:
        return engine_build.key_of(engine_build.recipe(portable))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    it = Bench(tmp_path)
    it.patch.parent.mkdir()
    it.patch.write_text(PATCH)
    it.cpu.write_text("avx2")
    it.compiler.write_text(
        f'#!/bin/sh\necho "#define VERSION 12"\ncase "$*" in *-march=native*) echo "#define $(cat {it.cpu})";; esac\n'
    )
    it.compiler.chmod(0o755)
    with tarfile.open(it.sdist, "w:gz") as tar:
        for name, text in {
            "src/a.txt": "one\ntwo\nthree\n",
            "llama_cpp/__init__.py": '__version__ = "1"\n',
        }.items():
            member = tarfile.TarInfo(f"llama_cpp_python-1/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    for name in engine_build.OBEYED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CACHEROUTE_CACHE", str(it.cache))
    monkeypatch.setenv("CC", str(it.compiler))
    monkeypatch.setenv("CXX", str(it.compiler))
    monkeypatch.setattr(engine_source, "SDIST_SHA256", files.sha256(it.sdist))
    monkeypatch.setattr(engine_source, "patch_files", lambda: sorted(it.patch.parent.glob("*.patch")))
    monkeypatch.setattr(engine_build, "run", it.pip)
    monkeypatch.setattr(tools, "NEEDED_BYTES", 0)
    return it
