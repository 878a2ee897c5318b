"""The engine's source: llama-cpp-python's own sdist of one version, verified, unpacked and patched.

Knows nothing of compilers and of what is installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cacheroute.errors import CacherouteError
from cacheroute.files import cache_dir, packaged, sha256
from cacheroute.install.tools import PlainProgress, Progress, last_line, pip, pip_error, run, unpack, workdir

# The three change nowhere else.
VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP = "0c1e57098"  # the commit in that sdist, as its CHANGELOG has it


@dataclass(frozen=True)
class PatchResult:
    """Whether one patch applies; `where` is the file (and line) of the first hunk that does not."""

    patch: str
    applies: bool
    where: str | None = None

    def __str__(self) -> str:
        return f"{self.patch}: {'applies' if self.applies else f'does not apply at {self.where}'}"


def patch_files() -> list[Path]:
    """The patches in the order in which they apply."""
    folder = packaged("patches")
    if folder is None:
        raise CacherouteError("the patches are missing: this copy of cacheroute is incomplete")
    return sorted(folder.glob("*.patch"))


def patches() -> dict[str, str]:
    """sha256 of what each patch changes, by its name: an engine with the same ones serves this cacheroute."""
    return {p.name: hashlib.sha256(_diff(p).encode()).hexdigest() for p in patch_files()}


def _diff(patch: Path) -> str:
    """A patch without its header, which explains and changes nothing: editing it needs no rebuild."""
    head, start, diff = patch.read_text(encoding="utf-8").partition("\n--- ")
    return start + diff if start else head


def patched(sdist: Path | None, work: Path, progress: Progress) -> Path:
    """The patched source in a folder of `work`. `sdist`: None: from the cache or the package index.

    Raises CacherouteError where it is another sdist, or a patch does not apply.
    """
    if sdist:
        _check_sha256(sdist)
    sdist = sdist or fetch(VERSION, work, progress)
    progress.step("unpacking and patching")
    source = unpack(sdist, work / "source")
    for patch in patch_files():
        result = _apply(patch, source)
        if not result.applies:
            raise CacherouteError(
                f"{patch.name} does not apply to {result.where} of llama-cpp-python {VERSION}: "
                "the patch and the pinned version do not belong together"
            )
    return source


def check(version: str, sdist: Path | None = None, progress: Progress | None = None) -> list[PatchResult]:
    """Whether each patch applies to that version, in their order, building nothing."""
    say = progress or PlainProgress()
    patches = patch_files()
    with workdir(say) as work:
        sdist = sdist or fetch(version, work, say)
        say.step(f"trying the patches on {version}")
        source = unpack(sdist, work / "source", only=_touched(patches))
        return [_apply(patch, source) for patch in patches]


def fetch(version: str, work: Path, progress: Progress) -> Path:
    """The sdist of a version, from the cache or from the package index; the pinned one is verified."""
    kept = cache_dir() / "sdist" / f"llama_cpp_python-{version}.tar.gz"
    if kept.exists():
        if version != VERSION or sha256(kept) == SDIST_SHA256:
            return kept
        kept.unlink()  # damaged on disk: get it again
    progress.step(f"downloading llama-cpp-python {version} (about 80 MB)")
    into = work / "download"
    # Only this one package from source: with `:all:` pip would compile CMake itself.
    name = "llama-cpp-python"
    call = [*pip(), "download", "--no-deps", "--no-binary", name, "--dest", str(into), f"{name}=={version}"]
    code, output = run(call, env={"TMPDIR": str(work)})
    found = next(into.glob("*.tar.gz"), None)
    if code != 0 or found is None:
        raise pip_error(f"could not download llama-cpp-python {version}", output)
    if version == VERSION:
        _check_sha256(found)
    kept.parent.mkdir(parents=True, exist_ok=True)
    return found.replace(kept)


def _touched(patches: list[Path]) -> set[str]:
    return {name for p in patches for name in re.findall(r"(?m)^--- a/(.+)$", p.read_text(encoding="utf-8"))}


def _apply(patch: Path, source: Path) -> PatchResult:
    """Apply one patch, all of it or nothing. `source` must be free of symlinks."""
    git = shutil.which("git")
    if git is None:
        raise CacherouteError("git is missing, which applies the patches: install it (Debian: apt install git)")
    # Inside another repository `git apply` takes paths as that repository's and skips them in
    # silence, so git must find no repository, neither in a folder above nor in its environment (as in a commit hook).
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CEILING_DIRECTORIES": str(source.parent), "LC_ALL": "C"}
    call = [git, "apply", "--whitespace=nowarn", str(patch)]
    done = subprocess.run(call, cwd=source, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return PatchResult(patch.name, True)
    hunk = re.search(r"patch failed: (.+):(\d+)", done.stderr)
    where = f"{hunk[1]} (line {hunk[2]})" if hunk else last_line(done.stderr).removeprefix("error: ")
    return PatchResult(patch.name, False, where)


def _check_sha256(sdist: Path) -> None:
    try:
        found = sha256(sdist)
    except OSError as error:
        raise CacherouteError(f"cannot read the sdist {sdist}: {error.strerror}") from error
    if found != SDIST_SHA256:
        raise CacherouteError(f"{sdist} is not llama-cpp-python {VERSION}: its sha256 is {found}, expected {SDIST_SHA256}")
