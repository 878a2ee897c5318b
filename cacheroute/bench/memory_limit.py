"""Runs a process with a memory limit that includes its page cache: cgroup v2, cgroup v1 or a systemd scope.

Knows Linux's files; knows no model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cacheroute.errors import CacherouteError


@dataclass(frozen=True)
class _Place:
    """Where a group can be made: the folder it goes into, and what is written into its files (bytes for `{}`)."""

    folder: Path
    settings: tuple[tuple[str, str], ...]
    optional: tuple[tuple[str, str], ...] = field(default=())  # swap: not every kernel counts it


class MemoryLimit:
    """A way to limit processes to `nbytes` that works on this machine. Raises CacherouteError if there is none."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._place: _Place | None = None
        self._scope: list[str] = []
        reasons = []
        for place in _places():
            try:
                with _group(place, nbytes):
                    self._place = place
                    return
            except OSError as e:
                reasons.append(f"{place.folder}: {e.strerror}")
        try:
            self._scope = _systemd_scope(nbytes)
        except CacherouteError as e:
            reasons.append(str(e))
            raise CacherouteError("; ".join(reasons)) from None

    @contextlib.contextmanager
    def process(self, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        """Runs a command under the limit, with pipes for stdin and stdout; when the block ends, it has ended.

        The command must wait for a line on stdin before it uses memory: what it used before is counted in the caller's group.
        """
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(_group(self._place, self.nbytes)) if self._place else None
            child = subprocess.Popen(
                [*self._scope, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is handled here: the group can be removed only after the child has ended
            )
            stack.callback(_end, child)
            if group:
                (group / "cgroup.procs").write_text(str(child.pid))
            yield child


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        _close(pipe)


def _close(pipe: IO[str] | None) -> None:
    with contextlib.suppress(BrokenPipeError):
        if pipe:
            pipe.close()


def _places() -> list[_Place]:
    """Folders in which a group with a memory limit could be made."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return []
    places = []
    for _, mount, kind, options, *_ in mounts:
        if kind == "cgroup2":
            path = next((p for number, _, p in own if number == "0"), "/")
            folder = _below(Path(mount), path)
            # A sibling of this process's group: a group that holds processes cannot have groups with controllers below it.
            folder = folder if folder == Path(mount) else folder.parent
            if "memory" in _words(folder / "cgroup.subtree_control"):
                places.append(_Place(folder, (("memory.max", "{}"),), (("memory.swap.max", "0"),)))
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((p for _, controllers, p in own if "memory" in controllers.split(",")), "/")
            swap = (("memory.memsw.limit_in_bytes", "{}"),)
            places.append(_Place(_below(Path(mount), path), (("memory.limit_in_bytes", "{}"),), swap))
    return places


def _below(mount: Path, path: str) -> Path:
    """The folder of this process's group; in a container the path may be the host's, and then it is the mount itself."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


@contextlib.contextmanager
def _group(place: _Place, nbytes: int) -> Iterator[Path]:
    """A new group, removed at the end. Raises OSError where it cannot be made."""
    folder = place.folder / f"cacheroute-{os.getpid()}"
    folder.mkdir()
    try:
        for name, value in place.settings:
            (folder / name).write_text(value.format(nbytes))
        for name, value in place.optional:
            with contextlib.suppress(OSError):
                (folder / name).write_text(value.format(nbytes))
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """A group stays busy for a moment after its last process has ended."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.02)


def _systemd_scope(nbytes: int) -> list[str]:
    """The words before a command that make systemd limit it. Raises CacherouteError where it does not."""
    systemd_run = shutil.which("systemd-run")
    if not systemd_run:
        raise CacherouteError("there is no cgroup to write to and no systemd-run")
    user = [] if os.geteuid() == 0 else ["--user"]
    scope = [systemd_run, *user, "--scope", "--quiet", "-p", f"MemoryMax={nbytes}", "-p", "MemorySwapMax=0", "--"]
    tried = subprocess.run([*scope, "true"], capture_output=True, text=True)
    if tried.returncode:
        raise CacherouteError("systemd-run: " + (tried.stderr.strip().splitlines() or ["failed"])[0].rstrip("."))
    return scope
