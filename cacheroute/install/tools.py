"""What a long build on a user's machine needs: a locked folder in the user's cache, child
processes that end with this one, pip, and failures as one sentence. Knows nothing of what is built."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from cacheroute.errors import CacherouteError
from cacheroute.files import cache_dir

NEEDED_BYTES = 1_500_000_000  # unpacked source 220 MB, objects 100 MB, and room for the compiler


class Progress(Protocol):
    """Receives the progress of a build."""

    def step(self, text: str) -> None: ...
    def fraction(self, done: int, total: int) -> None: ...


class PlainProgress:
    """One line on stderr per step, and one per quarter of a step that counts."""

    def __init__(self) -> None:
        self._quarter = 0

    def step(self, text: str) -> None:
        self._quarter = 0
        print(text, file=sys.stderr, flush=True)

    def fraction(self, done: int, total: int) -> None:
        if done * 4 // max(total, 1) > self._quarter:
            self._quarter = done * 4 // total
            print(f"  {done} of {total}", file=sys.stderr, flush=True)


class ResumableError(CacherouteError):
    """A build ended before its time, and what it has done so far is of use to the next."""


@contextmanager
def workdir(progress: Progress, *, resumable: bool = False) -> Iterator[Path]:
    """A folder in the cache, held under the cache's lock and removed afterwards.

    `resumable`: the same folder each time, so that it has what a killed process left there; an interruption or a ResumableError
    leaves it, too. It lies beside the finished wheels so that publishing one is a rename. OSErrors of the body become one
    sentence."""
    root = cache_dir() / "engine"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise _disk_error(error, cannot_write=True) from error
    try:
        with lock, _signals_interrupt():
            work = root / ".build"
            locked = _lock(lock, progress)
            if locked:
                for stale in root.glob(".build-*"):  # of a process that was killed: it held the lock
                    shutil.rmtree(stale, ignore_errors=True)
            if locked and resumable:
                work.mkdir(exist_ok=True)
            else:
                work = Path(tempfile.mkdtemp(prefix=".build-", dir=root))
            with _removed(work, unless=(KeyboardInterrupt, ResumableError) if locked and resumable else ()):
                yield work
    except OSError as error:
        raise _disk_error(error, cannot_write=isinstance(error, PermissionError)) from error


@contextmanager
def _removed(work: Path, unless: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Removes a folder when the context ends, `unless` it ends with one of these."""
    kept = False
    try:
        yield
    except unless:
        kept = True
        raise
    finally:
        if not kept:
            shutil.rmtree(work, ignore_errors=True)


def _disk_error(error: OSError, cannot_write: bool) -> CacherouteError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(cache_dir())
    if cannot_write or error.errno == errno.EROFS:
        return CacherouteError(
            f"cannot write to the cache {cache_dir()} ({error.strerror}): set CACHEROUTE_CACHE to a folder that you can write to"
        )
    return CacherouteError(f"building the engine failed: {error}")


def _lock(lock: IO[str], progress: Progress) -> bool:
    """Wait for the other builds of this cache; False where there are no file locks. A process that
    ends releases its lock."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.step("another build is running: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # some network filesystems
        return False
    return True


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let a closed terminal or a plain `kill` clean up as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup stays
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def run(call: list[str], env: Mapping[str, str] | None = None, on_line: Callable[[str], None] | None = None) -> tuple[int, str]:
    """Run a command to its end; exit code and output. Its children end with this process: they are in a
    session of their own, which an exception (Ctrl-C too) kills."""
    said: list[str] = []
    with subprocess.Popen(
        call,
        env={**_english(os.environ), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said.append(line)
                if on_line:
                    on_line(line)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, "".join(said)


def _english(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with messages in English, which we read, and characters as they were.

    With LC_ALL=C, Python 3.11 and 3.12 cannot start in a virtual environment whose .pth files name a folder with an accent.
    """
    env = {name: value for name, value in environment.items() if name not in ("LC_ALL", "LANGUAGE")}
    characters = environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG")
    return {**env, "LC_MESSAGES": "C", **({"LC_CTYPE": characters} if characters else {})}


def unpack(sdist: Path, into: Path, only: set[str] | None = None) -> Path:
    """Unpack the sdist (or only the named files, relative to its top) and return its top folder."""
    # Python older than its security fix of 2023 has no filter; the pinned hash covers that.
    safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        with tarfile.open(sdist, "r|*") as tar:  # one pass: the file is decompressed once
            for member in tar:
                if only is None or member.name.partition("/")[2] in only:
                    tar.extract(member, into, **safe)
    except (tarfile.TarError, EOFError, FileNotFoundError, IsADirectoryError) as error:
        raise CacherouteError(f"{sdist} is not an sdist that can be unpacked: {error}") from error
    tops = [entry for entry in into.iterdir() if entry.is_dir()] if into.is_dir() else []
    if len(tops) != 1:
        raise CacherouteError(f"{sdist} does not hold what is expected of an sdist")
    return tops[0].resolve()


def pip() -> list[str]:
    """Start of a pip command for the running environment, which need not have pip itself: those of uv do not.

    In this order: its own; the one that Python brings for new environments, run as it lies there; one that uv runs; one of
    another environment. Nothing is installed for it here. Raises CacherouteError when there is none of them.
    """
    options = ["--disable-pip-version-check", "--no-input", "--retries", "2"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", *options]
    bundled = _bundled_pip()
    if bundled:
        return [sys.executable, str(bundled / "pip"), *options]
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        return [uv, "tool", "run", "pip", "--python", sys.executable, *options]
    other = shutil.which("pip") or shutil.which("pip3")
    if other:
        return [other, "--python", sys.executable, *options]
    raise CacherouteError(
        f"{sys.executable} has no pip, and neither ensurepip nor uv is there to help: install one of the three "
        "(Debian: apt install python3-venv)"
    )


def _bundled_pip() -> Path | None:
    """The wheel of pip that ensurepip would install, where this Python has it (Debian's is in a folder of its own)."""
    spec = importlib.util.find_spec("ensurepip")
    inside = Path(spec.origin).parent / "_bundled" if spec and spec.origin else None
    for folder in (inside, sysconfig.get_config_var("WHEEL_PKG_DIR")):
        found = sorted(Path(folder).glob("pip-*.whl")) if folder else []
        if found:
            return found[-1]
    return None


def pip_error(what: str, output: str) -> CacherouteError:
    """pip's failure, as `what` and one reason."""
    if "No space left on device" in output:
        return no_space(cache_dir())
    if "externally-managed-environment" in output:
        return CacherouteError(f"{what}: the system owns this Python, make a virtual environment first")
    if is_offline(output):
        return CacherouteError(f"{what}: the package index cannot be reached (offline? give the source with --sdist PATH)")
    said = re.findall(r"(?m)^ERROR: (.+?)(?: \(from versions.*)?$", output)
    return CacherouteError(f"{what}: {said[0] if said else last_line(output)}")


def is_offline(output: str) -> bool:
    """Whether pip failed because it reached no server."""
    said = r"connection broken|failed to establish|name resolution|max retries|timed out"
    return re.search(said, output, re.IGNORECASE) is not None


def no_space(where: Path) -> CacherouteError:
    """The error for a disk on which `where` does not find NEEDED_BYTES."""
    return CacherouteError(
        f"no space in {where}: building the engine needs {NEEDED_BYTES / 1e9:.1f} GB free (CACHEROUTE_CACHE moves the cache)"
    )


def check_space(where: Path) -> None:
    """Raise beforehand if the disk of the folder `where` has less than NEEDED_BYTES free."""
    if shutil.disk_usage(where).free < NEEDED_BYTES:
        raise no_space(cache_dir())


def last_line(text: str) -> str:
    """Last line that is not blank: where compilers and pip put the reason."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
