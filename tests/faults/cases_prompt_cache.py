"""Faults of `generate --prompt-cache`: files that are none, damaged, of other settings, or cannot be written."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from faults.runner import Case, Outcome, Place, in_process

_ASKED = ("generate", "--raw", "-n", "4", "-c", "256", "-t", "1", "-s", "5", "--temp", "0", "--budget", "50%", "--prompt-cache")
_LOSSY = ("--routing", "cache-prior:lambda=0.5")
_TEXT, _LONGER = "the cat that was on", "the cat that was on the mat"


def _words(place: Place, *more: str, text: str = _TEXT, model: Path | None = None) -> list[str]:
    return [*_ASKED, str(place.folder / "p"), "-m", str(model or place.tiny), "-p", text, *more]


def _made(place: Place, *more: str, text: str = _TEXT) -> bytes:
    """p, made by a first run."""
    outcome = in_process(_words(place, *more, text=text))
    assert outcome.code == 0, outcome
    return (place.folder / "p").read_bytes()


def _again(name: str, sentence: str, *more: str, made: tuple[str, ...] = ()) -> Case:
    def command(place: Place) -> Outcome:
        before = _made(place, *made)
        outcome = in_process(_words(place, *made, *more))
        assert (place.folder / "p").read_bytes() == before
        return outcome

    return Case(name, command, 2, sentence, more=True, leaves=("p",))


def _damaged(name: str, change: Callable[[bytes], bytes], sentence: str) -> Case:
    def command(place: Place) -> Outcome:
        content = change(_made(place))
        place.file("p", content)
        outcome = in_process(_words(place))
        assert (place.folder / "p").read_bytes() == content
        return outcome

    return Case(name, command, 2, sentence, leaves=("p",))


def _flipped(share: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = int(share * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(share * len(data))]


def _other_model(place: Place) -> Outcome:
    from support import tiny_models

    _made(place)
    other = tiny_models.write("qwen3moe", place.folder / "m.gguf", seed=9)
    return in_process(_words(place, model=other))


def _smaller(place: Place) -> Outcome:
    """Continues with fewer experts, and gives the same answer."""
    _made(place)
    whole, again = (in_process(_words(place, *more)) for more in ((), ("--budget", "8")))
    assert again.stdout == whole.stdout and "from " in again.stderr
    return again


def _directory(place: Place) -> list[str]:
    (place.folder / "p").mkdir()
    return _words(place)


def _own_model(place: Place) -> Outcome:
    content = place.tiny.read_bytes()
    place.file("p", content)
    outcome = in_process(_words(place, model=place.folder / "p"))
    assert (place.folder / "p").read_bytes() == content
    return outcome


def _without_rights(place: Place) -> list[str]:
    """As for a user who may not write there; root may."""
    make = os.open

    def refuse(path: object, *arguments: int) -> int:
        if str(path).endswith(".part"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        return make(path, *arguments)  # type: ignore[arg-type]

    place.monkeypatch.setattr(os, "open", refuse)
    return _words(place)


def _unreadable(place: Place) -> Outcome:
    """A page of the file cannot be read."""
    from cacheroute.engine import prompt_cache

    _made(place)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    place.monkeypatch.setattr(prompt_cache, "_header", fail)
    return in_process(_words(place))


def _full(place: Place) -> Outcome:
    """A disk that is full once the prompt is evaluated: the answer is given, and the old file stays."""
    expected = in_process(_words(place, text=_LONGER))
    (place.folder / "p").unlink()
    before = _made(place)

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place.monkeypatch.setattr(os, "fsync", fsync)
    outcome = in_process(_words(place, text=_LONGER))
    assert outcome.stdout == expected.stdout and (place.folder / "p").read_bytes() == before
    return outcome


def _interrupted(place: Place) -> Outcome:
    """Ctrl-C while the file is written: the old one stays, nothing is left beside it."""
    before = _made(place)

    def fsync(_: int) -> None:
        signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    place.monkeypatch.setattr(os, "fsync", fsync)
    outcome = in_process(_words(place, text=_LONGER))
    assert (place.folder / "p").read_bytes() == before
    return outcome


_SENTENCE = r"/p was made with the {}; use that one, name another file, or remove this one\.$"
_NONE = r"/p is not a prompt cache, and is left as it is; name another file\.$"
_HURT = r"/p is a damaged prompt cache \({}.*\); name another file, or remove this one\.$"

CASES: list[Case] = [
    _again("a prompt cache of another budget", _SENTENCE.format("budget 16, and here it is 8"), "--budget", "8", made=_LOSSY),
    Case("a lossless prompt cache of another budget", _smaller, 0, stdout=True, more=True),
    _again("a prompt cache of another eviction", _SENTENCE.format("eviction soft-lfu, and here it is lru"), "--eviction", "lru"),
    _again("a prompt cache of a lossless routing", _SENTENCE.format("routing original, and here it is cache-prior.*"), *_LOSSY),
    _again(
        "a prompt cache of another lambda",
        _SENTENCE.format("routing cache-prior:lambda=0.5, and here it is cache-prior:lambda=1"),
        "--routing",
        "cache-prior:lambda=1",
        made=_LOSSY,
    ),
    Case(
        "a prompt cache of another model",
        _other_model,
        2,
        r"/p was made with the model tiny qwen3moe \(\w{16}\), and here it is tiny qwen3moe \(\w{16}\);",
    ),
    *(
        _damaged(f"a prompt cache cut to {share:.1%}", _cut(share), _HURT.format(""))
        for share in (0.002, 0.006, 0.02, 0.2, 0.5, 0.9, 0.9999)
    ),
    _damaged("a prompt cache cut in its first word", lambda data: data[:5], _NONE),
    _damaged("a prompt cache with a byte too many", lambda data: data + b"x", _HURT.format("")),
    *(
        _damaged(f"a prompt cache with a changed byte at {share:.1%}", _flipped(share), _HURT.format("(?:the|its) checksum"))
        for share in (0.003, 0.01, 0.1, 0.3, 0.6, 0.99, 1)
    ),
    _damaged("a prompt cache of a later version", lambda data: data[:8] + b"\7" + data[9:], r"of version 7, and this .* reads 2"),
    Case("a prompt cache that cannot be read", _unreadable, 2, r"/p cannot be read \(Input/output error\); name another file"),
    Case("a folder as a prompt cache", _directory, 2, r"/p cannot be read: it is a directory, and a prompt cache has to be a"),
    Case("a pipe as a prompt cache", lambda p: (os.mkfifo(p.folder / "p"), _words(p))[1], 2, r"it is a pipe"),
    Case("an empty file as a prompt cache", lambda p: (p.file("p", ""), _words(p))[1], 2, _NONE, leaves=("p",)),
    Case("a text as a prompt cache", lambda p: (p.file("p", "CRPROM my notes"), _words(p))[1], 2, _NONE, leaves=("p",)),
    Case("its own model as a prompt cache", _own_model, 2, _NONE, leaves=("p",)),
    Case(
        "a prompt cache where no folder is",
        lambda p: [*_ASKED, "no/p", "-m", str(p.tiny), "-p", _TEXT],
        2,
        r"no/p cannot be written: there is no folder no; make it, or write to another one\.$",
    ),
    Case("a prompt cache in a folder that is read only", _without_rights, 1, r"/p cannot be written \(Permission denied\)\.$"),
    Case(
        "a prompt cache on a filesystem that has no new files",
        lambda p: [*_ASKED, "/proc/p", "-m", str(p.tiny), "-p", _TEXT],
        1,
        r"/proc/p cannot be written \(",
    ),
    Case(
        "a prompt cache on a full disk",
        _full,
        1,
        r"/p cannot be written \(No space left on device\)\.$",
        stdout=True,
        more=True,
        leaves=("p",),
    ),
    Case("Ctrl-C while a prompt cache is written", _interrupted, 130, r"^0 tokens$|tok/s|Stopped", more=True, leaves=("p",)),
    Case(
        "a prompt cache longer than the context",
        lambda p: (_made(p, text="the " * 40), _words(p, "-c", "20"))[1],
        2,
        r"/p keeps \d+ tokens, which do not fit the context of 20; give a larger one",
    ),
]
