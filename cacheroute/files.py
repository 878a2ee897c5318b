"""Files and units that every package needs: the cache folder, hashes, reading and writing JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import re
import select
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError, pip_install

MIB, GIB = 1024**2, 1024**3
UNITS = {
    "kib": 1024,
    "mib": MIB,
    "gib": GIB,
    "ki": 1024,
    "mi": MIB,
    "gi": GIB,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "k": 1024,
    "m": MIB,
    "g": GIB,
}
"""Bytes of each unit of a size, in small letters."""
PACKAGE = Path(__file__).resolve().parent
DEMO_TUNED = PACKAGE / "data" / "demo_tuned.json"
"""The demo model's routing at a budget of 50%: what `cacheroute tune --budget 50% --limit 10000 --price-tokens 512 --workers 2`
wrote."""
VERSION = importlib.metadata.version("cacheroute")


def packaged(name: str) -> Path | None:
    """A file that is beside this package in a checkout and inside it once installed; None if it is in neither."""
    return next((path for path in (PACKAGE / name, PACKAGE.parent / name) if path.exists()), None)


_MOST_DIGITS = 30  # of a size


def parse_size(text: str) -> int:
    """Bytes of a size as 8GiB, 8GB, 8G or 512MiB. Raises UsageError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)", text.strip().lower())
    if not match or match[2] not in UNITS or len(match[1]) > _MOST_DIGITS:
        raise UsageError(f"{text!r} is not a size; write it as 8GiB, 8GB or 512MiB.")
    return int(float(match[1]) * UNITS[match[2]])


def size(nbytes: float, *, decimal: bool = False) -> str:
    """In the unit that shows it: 3.9 GiB, 512 MiB, 18.2 MiB, 1.0 KiB or 7 bytes; `decimal`: 3.9 GB, as of downloads."""
    n, largest, *others = (1000, "GB", "MB", "kB") if decimal else (1024, "GiB", "MiB", "KiB")
    if nbytes >= n**3 - n**2 / 2:  # what would be rounded to 1024 of the unit below
        return f"{nbytes / n**3:.1f} {largest}"
    for name, unit in zip(others, (n**2, n), strict=True):
        if nbytes >= unit - unit / n / 2:
            value = nbytes / unit
            return f"{value:.1f} {name}" if value < 100 else f"{value:.0f} {name}"
    return f"{nbytes:.0f} bytes"


def is_text(text: str) -> bool:
    """Whether it has no bytes that were no UTF-8 (Python keeps those of arguments and file names as surrogates)."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def printable(text: str) -> str:
    """For a terminal: control characters, which could move its cursor or change its colours, and bytes that are no UTF-8 are
    written as escapes."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()


def decoded(data: bytes, name: str) -> str:
    """Text as every command takes it, from a file, a pipe or the command line: UTF-8, a byte order mark at the beginning left
    out, line ends as they are. Raises UsageError for other text."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text; convert it first.") from None


def expanded(path: str, name: str = "") -> Path:
    """A path whose ~ or ~user is filled in. Raises UsageError for "" and for no such user; `name`: of the variable it is from."""
    if not path:
        raise UsageError("The name of a file is empty; write one.")
    whole = os.path.expanduser(path)
    if whole.startswith("~") and not Path(whole).exists():
        user, _, _ = whole.partition("/")
        of = f"{name}={path}" if name else path
        what = f"there is no user {user[1:]}" if len(user) > 1 else "this user has no home folder and HOME is not set"
        raise UsageError(f"{of} cannot be found: {what}; write the whole path.")
    return Path(whole)


def home() -> Path | None:
    """The user's home folder; None for a user without one, such as a container's."""
    found = os.path.expanduser("~")
    return None if found.startswith("~") else Path(found)


def cache_dir() -> Path:
    """The user's cache for cacheroute; $CACHEROUTE_CACHE replaces it. Not made here.

    Raises UsageError for a folder of a user that does not exist, CacherouteError where there is no home to keep it in.
    """
    chosen = os.environ.get("CACHEROUTE_CACHE")
    if chosen:
        return expanded(chosen, "CACHEROUTE_CACHE").absolute()
    try:
        import platformdirs
    except ImportError:
        raise CacherouteError(f"platformdirs is missing: run {pip_install('platformdirs')} first") from None
    try:
        found = platformdirs.user_cache_path("cacheroute")
    except RuntimeError:  # versions differ in what they make of a user without a home
        found = None
    if found is None or not found.is_absolute():
        raise CacherouteError("There is no home folder to keep a cache in: set CACHEROUTE_CACHE to a folder of yours.")
    return found


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MOST_JSON = 256 * MIB


def broken_link(path: Path) -> str:
    """Why a symbolic link leads nowhere; "" for one that leads somewhere, and for what is no link."""
    try:
        target = os.readlink(path)
    except (OSError, ValueError):
        return ""
    try:
        path.stat()
    except OSError as e:
        if e.errno == errno.ELOOP:
            return f"it is a link to {target}, which leads back to it"
        return f"it is a link to {target}, where nothing is" if e.errno in (errno.ENOENT, errno.ENOTDIR) else ""
    return ""


def unreadable(path: Path, e: Exception) -> UsageError:
    """For a file that somebody has named, with the system's reason for this error, or what is wrong with the link."""
    return UsageError(f"{path} cannot be read ({broken_link(path) or getattr(e, 'strerror', None) or e}).")


def check_regular(path: Path, what: str, *, missing: str = "") -> None:
    """Raises UsageError where `path` is no file whose bytes lie on a disk: reading a pipe or a device may never end.

    `what` it should be, as in "a trace"; `missing`: what to do where nothing is there.
    """
    try:
        mode = path.stat().st_mode
    except OSError as e:
        if missing and e.errno in (errno.ENOENT, errno.ENOTDIR) and not broken_link(path):
            raise UsageError(f"There is no file {path}; {missing}") from None
        raise unreadable(path, e) from None
    except ValueError:  # a NUL in the name
        raise UsageError(f"{str(path)!r} cannot be the name of a file.") from None
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"{path} cannot be read: it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, and {what} has to be a file on a disk."
        )


def check_new(path: Path, *, force: bool) -> None:
    """Raises UsageError for a file that exists, unless `force`, and for what can be no file, as written()."""
    if os.path.isfile(written(path)) and not force:  # Path.exists() raises for names that are too long
        raise UsageError(f"{path} exists; --force replaces it.")


def written(path: Path) -> Path:
    """What is replaced where `path` is: of a link the file that it names, so that the link stays.

    Raises UsageError for a device, a pipe or a folder, in whose place no file may come, and for a link that leads back to it.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno == errno.ELOOP:
            raise UsageError(f"{path} cannot be written: {broken_link(path)}.") from None
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} cannot be written: it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; give the name of a file.")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_distinct(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raises UsageError where a file to be written is one of the inputs, or two of them are one file, links included."""
    for i, output in enumerate(outputs):
        for other in (*outputs[:i], *inputs):
            there = os.path.exists(output) and os.path.exists(other)
            same = output.samefile(other) if there else output.absolute() == other.absolute()
            if same:
                raise UsageError(f"{output} would replace {other}, which this command needs; write to another file.")


def read_text(path: Path) -> bytes:
    """All of a text: of a file, or of a pipe, as `<(command)` is one, which is waited for with a word.

    Raises UsageError for a folder, a device such as /dev/zero, which would not end, and what cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISFIFO(mode):
            if not (stat.S_ISCHR(mode) and (os.path.samefile(path, os.devnull) or _is_terminal(path))):
                check_regular(path, "a text")
            return path.read_bytes()
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(pipe, "rb") as file:
            if not select.select([file], [], [], 1.0)[0]:
                print(f"waiting for text from the pipe {path}", file=sys.stderr)
                select.select([file], [], [])
            os.set_blocking(pipe, True)
            return file.read()
    except OSError as e:
        raise unreadable(path, e) from None


def _is_terminal(path: Path) -> bool:
    with path.open("rb", buffering=0) as file:
        return file.isatty()


_FILES = {
    "cacheroute-frontier-files": ("results of `frontier --files`", "`cacheroute frontier --files`"),
    "cacheroute-frontier": ("results of `frontier`", "`cacheroute frontier`"),
    "cacheroute-trace": ("a trace", "`cacheroute trace`"),
    "cacheroute-task-profile": ("a task profile", "`cacheroute trace --save-profile`"),
    "cacheroute-routing-profile": ("a tuned routing", "`cacheroute tune`"),
    "cacheroute-prompt-routing": ("a tuned prompt routing", "`cacheroute tune --prompt`"),
}


def named(kind: object) -> str:
    """A kind of file in words, by its field `format`, with or without a version's number; "" for one that no command shows."""
    return next((words for name, (words, _) in _FILES.items() if str(kind).startswith(name)), "")


def short_routing(routing: str) -> str:
    """A routing for a table or a figure: `tuned` where its file is one that `--routing tuned` finds (routing.tuned.path),
    tuned:NAME for another file, without its folder and its ending; any other as it is."""
    name, _, file = routing.partition(":")
    if name != "tuned":
        return routing
    stem = Path(file).stem
    return name if not file or stem == DEMO_TUNED.stem or re.fullmatch(r"[0-9a-f]{16}-\d+", stem) else f"{name}:{stem}"


def as_json(content: Any, **how: Any) -> str:
    """`content` as JSON text, which has no NaN and no infinity: null stands in their place. `how`: of json.dumps()."""
    try:
        return json.dumps(content, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False, **how)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {_finite(name): _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


class TwiceError(ValueError):
    """An object of JSON that has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:60]!r} is there twice")
        self.key = key[:60]


def one_of_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads(object_pairs_hook=), which would keep the last of keys that are alike. Raises TwiceError for such keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise TwiceError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def is_count(*values: object) -> bool:
    """Whether each is a whole number of things, as JSON has it."""
    return all(type(v) is int and v >= 0 for v in values)


def is_number(*values: object) -> bool:
    """Whether each is a number, and not NaN or infinity."""
    return all(type(v) in (int, float) and math.isfinite(v) for v in values)  # type: ignore[arg-type]


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The object in a JSON file whose `format` is `kind`. Raises UsageError for any other file or version."""
    what, command = _FILES[kind]
    check_regular(path, what)
    content = None
    try:
        if path.stat().st_size <= _MOST_JSON:
            content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise unreadable(path, e) from None
    except (ValueError, RecursionError):
        pass
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or found != kind:
        raise UsageError(f"{path} is {named(found) + ', ' if named(found) else ''}not {what}; {command} writes one.")
    if content.get("version") != version:
        raise UsageError(f"{path} is of version {content.get('version')}; this cacheroute reads version {version}.")
    return content


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives the name of a new file beside `path`, which becomes `path` when the context ends without an error. Of a symbolic
    link, the file that it names is replaced.

    Until then, and when the process is killed at any time, what was at `path` stays. Raises what unwritable() gives when it
    cannot be written, with nothing left behind.
    """
    target = written(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as e:
        raise unwritable(path, e) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def unwritable(path: Path, e: OSError) -> CacherouteError:
    """For a file that cannot be written: a UsageError where its folder is not there, which another name mends."""
    if e.errno in (errno.ENOENT, errno.ENOTDIR) and not path.parent.is_dir():
        return UsageError(f"{path} cannot be written: there is no folder {path.parent}; make it, or write to another one.")
    return CacherouteError(f"{path} cannot be written ({e.strerror or e}).")


def recalled(file: Path) -> dict[str, Any]:
    """What remember() has kept; {} where nothing is, or it cannot be read."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(file: Path, known: dict[str, Any]) -> bool:
    """Keeps what was measured for the next run. Whether it is written; if not, that run measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known, force=True)
    except (OSError, CacherouteError):
        return False
    return True


def write_json(path: Path, content: dict[str, Any], *, force: bool) -> None:
    """Writes a JSON file whole or not at all. Raises UsageError when it exists unless `force`, CacherouteError when it cannot."""
    check_new(path, force=force)
    with replaced(path) as part:
        part.write_text(as_json(content, indent=1) + "\n", encoding="utf-8")
