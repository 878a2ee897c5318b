"""A prebuilt engine: a wheel from a disk or a URL, checked in every way that needs no compiler, then installed.

Nothing of the environment is changed before all checks have passed. Knows nothing of how a wheel is built (scripts/build_wheels).
"""

from __future__ import annotations

import contextlib
import email.parser
import http.client
import json
import platform
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import MIB, cache_dir, check_regular, expanded, sha256
from cacheroute.install import engine_build, engine_source, processor
from cacheroute.install.engine_build import LOCAL_VERSION, EngineState
from cacheroute.install.machine import is_android
from cacheroute.install.tools import PlainProgress, Progress

_PLATFORM = r"(any|win.*|linux|musllinux_\d+_\d+|manylinux(?:_\d+_\d+|\d+)|macosx_\d+_\d+|android_\d+)(?:_(\w+))?"
_URL = re.compile(r"https?://", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_MOST_BYTES = 512 * MIB  # of a wheel; one of ours has some 10 MB
_SECONDS = 60  # without a byte
_FOLDER, _STALE = ".wheel-", 24 * 3600.0
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "arm64_v8a": "aarch64"}


@dataclass(frozen=True)
class Wheel:
    """What a wheel says of itself. `record`: what its engine was made of, as the build wrote it."""

    name: str
    version: str
    tags: tuple[str, ...]
    record: dict[str, Any]

    @property
    def file_name(self) -> str:
        """The one that pip goes by, whatever the file is called."""
        parts = [tag.split("-") for tag in self.tags]
        tag = "-".join(".".join(dict.fromkeys(part[i] for part in parts)) for i in range(3))
        return f"{self.name}-{self.version}-{tag}.whl"


def ensure(
    source: str, *, sha256_hex: str | None = None, replace: bool = False, progress: Progress | None = None
) -> tuple[EngineState, str]:
    """Makes sure that this environment has the engine of a wheel: (what is installed, a sentence on what was compared).

    `source`: a path or a URL. `sha256_hex`: what its sha256 has to be; without it, what a file beside it says, whose name is the
    wheel's with .sha256 behind it. A URL needs one of the two; a file on this disk is installed without, which the sentence says.

    Raises UsageError for what is no such wheel, or one for something else than this machine and this cacheroute; and where it
    would replace what is not ours, without `replace`. Then nothing has changed.
    """
    say = progress or PlainProgress()
    if sha256_hex is not None and not _SHA256.fullmatch(sha256_hex):
        raise UsageError(f"--sha256 is 64 hexadecimal digits, not {sha256_hex!r}.")
    if not replace:
        engine_build.check_replaces_nothing()
    with _folder() as work:
        part = work / "wheel.part"
        expected = _fetch(source, part, sha256_hex, say)
        found = sha256(part)
        if expected and found != expected.lower():
            raise UsageError(
                f"{source} is damaged, or not the file that was meant: its sha256 is {found}, not {expected.lower()}."
            )
        wheel = _read(part, source)
        _check(wheel, source)
        compared = f"sha256 {found}" + ("" if expected else ", which nothing was there to compare with")
        if engine_build.installed_record() != wheel.record:
            ready = work / wheel.file_name
            part.rename(ready)
            engine_build.install(ready, say)
    return engine_build.installed_state(), compared


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """For the wheel until it is installed, in the cache: not that of a build, which may take minutes more."""
    root = cache_dir() / "engine"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"{_FOLDER}*"):  # of a process that was killed
            if time.time() - stale.stat().st_mtime > _STALE:
                shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=root) as folder:
            yield Path(folder)
    except OSError as e:
        raise CacherouteError(f"the wheel cannot be kept in the cache {root} ({e.strerror or e}).") from None


# --- how it gets here


def _fetch(source: str, part: Path, given: str | None, progress: Progress) -> str | None:
    """Copies the wheel to `part`, whole; the sha256 that it has to have, None if there is none for a file on this disk."""
    if _URL.match(source):
        said = given or _beside(source)
        progress.step(f"downloading {source.rpartition('/')[2]}")
        with _opened(source) as answer, part.open("wb") as file:
            _copy(answer, file, source, progress)
        return said
    path = _on_this_disk(source)
    check_regular(path, "a wheel", missing="give the path or the URL of a wheel.")
    beside = path.with_name(path.name + ".sha256")
    if given is None and beside.is_file():
        given = _first_word(beside.read_text("utf-8", "replace"), str(beside))
    try:
        shutil.copyfile(path, part)
    except OSError as e:
        raise CacherouteError(f"{path} cannot be copied into the cache ({e.strerror}).") from None
    return given


def _on_this_disk(source: str) -> Path:
    """The path that is named, as one or as a file: URL. Raises UsageError for nothing, and for other URLs."""
    if not source.strip():
        raise UsageError("--wheel is empty; give the path or the URL of a wheel.")
    if not (match := _SCHEME.match(source)):
        return expanded(source)
    if match[1].lower() != "file":
        raise UsageError(f"{source} cannot be downloaded from here: only https:// and http:// can; fetch it, and give its path.")
    host, slash, path = source[match.end() :].partition("/")
    if not slash or host not in ("", "localhost"):
        raise UsageError(f"{source} names no file on this disk; give its path, or file:///PATH with three slashes.")
    return Path(urllib.parse.unquote(slash + path))


def _ascii(url: str) -> str:
    """A URL as it may be sent, with %XX for what is not ASCII. Raises ValueError for one that cannot be."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (urllib.parse.quote(part, safe="%/:@!$&'()*+,;=?~") for part in (parts.path, parts.query))
    return parts._replace(netloc=host, path=path, query=query, fragment="").geturl()


def _beside(url: str) -> str:
    """The sha256 in the file beside the wheel of a URL. Raises UsageError where there is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        with _opened(parts._replace(path=parts.path + ".sha256").geturl()) as answer:
            text = answer.read(4096).decode("utf-8", "replace")
    except CacherouteError as e:
        raise UsageError(f"There is no checksum for {url}: give it with --sha256 ({e})") from None
    except ValueError as e:
        raise UsageError(f"{url} is no URL: {e}.") from None
    return _first_word(text, f"{url}.sha256")


def _first_word(text: str, name: str) -> str:
    """Of a file as sha256sum writes it."""
    word = (text.split() or [""])[0].lstrip("\\")
    if not _SHA256.fullmatch(word):
        raise UsageError(f"{name} does not begin with a sha256; give it with --sha256.")
    return word


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    """The answer of a web server. Raises CacherouteError with its reason for having none."""
    try:
        request = urllib.request.Request(_ascii(url), headers={"User-Agent": "cacheroute"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as e:
        raise CacherouteError(f"{url} cannot be downloaded: the server answers {e.code} {e.reason}.") from None
    except urllib.error.URLError as e:
        raise CacherouteError(f"{url} cannot be downloaded: {e.reason}.") from None
    except (TimeoutError, ConnectionError, ValueError, http.client.HTTPException) as e:
        raise CacherouteError(f"{url} cannot be downloaded: {e}.") from None


def _copy(answer: Any, file: IO[bytes], url: str, progress: Progress) -> None:
    """All that the server has announced, or an error: a part of a file is no file."""
    announced = int(answer.headers.get("Content-Length") or 0)
    done = 0
    while chunk := answer.read(1 << 16):
        done += len(chunk)
        if done > _MOST_BYTES:
            raise CacherouteError(f"{url} is larger than any wheel of the engine.")
        file.write(chunk)
        if announced:
            progress.fraction(min(done, announced), announced)
    if announced and done != announced:
        raise CacherouteError(f"{url} came only in part, {done} of {announced} bytes: run it again.")


# --- what it is


def _read(path: Path, source: str) -> Wheel:
    """Its metadata. Raises UsageError for a file that is no whole wheel of a patched engine."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
            names = file.namelist()
            info = next((n.partition("/")[0] for n in names if re.fullmatch(r"[^/]+\.dist-info/WHEEL", n)), None)
            if broken or info is None:
                raise UsageError(f"{source} is no whole wheel{f': {broken} is damaged' if broken else ''}.")
            said = email.parser.Parser().parsestr(file.read(f"{info}/WHEEL").decode("utf-8", "replace"))
            name, _, version = info.removesuffix(".dist-info").partition("-")
            record = f"llama_cpp/{engine_build.RECORD}"
            made_of = json.loads(file.read(record)) if record in names else {}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError):
        raise UsageError(f"{source} is no whole wheel.") from None
    except OSError as e:
        raise CacherouteError(f"{source} cannot be read ({e.strerror}).") from None
    tags = tuple(said.get_all("Tag") or [])
    if not tags or any(tag.count("-") != 2 for tag in tags):
        raise UsageError(f"{source} is no whole wheel: it does not say for which platform it is.")
    return Wheel(name, version, tags, made_of if isinstance(made_of, dict) else {})


def _check(wheel: Wheel, source: str) -> None:
    """Raises UsageError where it is not the engine that this cacheroute needs, or not for this machine."""
    if wheel.name.lower().replace("-", "_") != "llama_cpp_python":
        raise UsageError(f"{source} is a wheel of {wheel.name}, not of the engine, llama-cpp-python.")
    if not wheel.record:
        raise UsageError(f"{source} is a stock llama-cpp-python {wheel.version}, without the expert hook.")
    needed = f"the {LOCAL_VERSION} that this cacheroute needs"
    if wheel.version != LOCAL_VERSION:
        raise UsageError(f"{source} is the engine {wheel.version}, not {needed}.")
    if wheel.record.get("patches") != engine_source.patches() or wheel.record.get("sdist") != engine_source.SDIST_SHA256:
        raise UsageError(f"{source} was built with other patches than {needed}.")
    platforms = [tag.split("-")[2] for tag in wheel.tags]
    if not any(runs_here(p) for p in platforms):
        raise UsageError(f"{source} is for {', '.join(platforms)}, and this is {_here()}.")
    lacking = processor.missing(wheel.record)
    if lacking:
        raise UsageError(f"{source} was compiled for a processor with {', '.join(lacking)}, which this one lacks.")


def runs_here(tag: str) -> bool:
    """Whether the platform of a wheel's tag, as manylinux_2_35_x86_64, is this machine's, as far as can be told without pip."""
    match = re.fullmatch(_PLATFORM, tag)
    if not match:
        return False
    system, machine = match.groups()
    if system == "any":
        return True
    if _machine(machine or "") != _machine(platform.machine()) and machine != "universal2":
        return False
    if is_android():
        return system == "linux" or system.startswith("android")
    if sys.platform == "darwin":
        return system.startswith("macosx")
    if not sys.platform.startswith("linux"):
        return False
    library, version = platform.libc_ver()
    if system.startswith("manylinux"):
        needed = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}.get(system) or _numbers(system)
        return library == "glibc" and needed <= _numbers(version)
    return system == "linux" or (system.startswith("musllinux") and library != "glibc")


def _machine(name: str) -> str:
    return _MACHINES.get(name.lower(), name.lower())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _here() -> str:
    if is_android():
        return f"Android on {platform.machine()}"
    library, version = platform.libc_ver()
    return f"{platform.system()} on {platform.machine()}" + (f" with {library} {version}" if library else "")
