"""Faults of files: what is no file, damaged side files, traces, results, and caches of others."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.runner import Case, Place


def _fifo(place: Place) -> str:
    os.mkfifo(place.folder / "pipe")
    return str(place.folder / "pipe")


def _socket(place: Place) -> str:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")  # a short name: the folder's is too long for it
    return str(place.folder / "socket")


def _link(place: Place, target: str) -> str:
    (place.folder / "link.gguf").symlink_to(target)
    return "link.gguf"


def _json(place: Place, name: str, content: object) -> str:
    return str(place.file(name, content if isinstance(content, str) else json.dumps(content)))


KINDS: list[tuple[str, Callable[[Place], str], str]] = [
    ("a pipe", _fifo, "it is a pipe"),
    ("/dev/zero", lambda place: "/dev/zero", "it is a device"),
    ("a directory", lambda place: str(place.folder), "it is a directory"),
    ("a socket", _socket, "it is a socket"),
]
LINKS: list[tuple[str, Callable[[Place], str], str]] = [
    ("a link to nothing", lambda place: _link(place, "gone"), r"cannot be read.*it is a link to gone, where nothing is"),
    (
        "a link to itself",
        lambda place: _link(place, "link.gguf"),
        r"cannot be read.*it is a link to link\.gguf, which leads",
    ),
]
READERS: list[tuple[str, Callable[[Place, str], list[str]]]] = [
    ("model", lambda place, path: ["inspect", path]),
    ("model to generate from", lambda place, path: ["generate", "-m", path, "--raw", "-p", "a"]),
    ("trace", lambda place, path: ["simulate", path]),
    ("task profile", lambda place, path: ["generate", "-m", str(place.tiny), "--raw", "-p", "a", "--warm-start", path]),
    ("tuned routing", lambda place, path: ["generate", "-m", str(place.tiny), "--raw", "-p", "a", "--routing", f"tuned:{path}"]),
    ("rows to plot", lambda place, path: ["plot", path]),
    ("results file", lambda place, path: ["frontier", path, "-m", str(place.tiny), "--routing", "original"]),
]
NO_FILES = (
    [
        Case(f"{kind} as {what}", lambda place, make=make, words=words: words(place, make(place)), sentence=sentence)  # type: ignore[misc]
        for what, words in READERS
        for kind, make, sentence in [*KINDS, *(LINKS if what != "results file" else [])]
    ]
    + [
        Case(
            f"{kind} as text",
            lambda place, make=make: ["trace", "-m", str(place.tiny), "-o", "o", "-f", make(place)],
            sentence=sentence + "|Is a directory|more than 64 MiB|No such device",
        )  # type: ignore[misc]
        for kind, make, sentence in [*KINDS[1:], *LINKS]
    ]
    + [
        Case(f"{kind} as prompts", lambda place, make=make: ["generate", "--prompts", make(place)], sentence=sentence)  # type: ignore[misc]
        for kind, make, sentence in LINKS
    ]
)

_DEEP = "[" * 100_000
_TUNED = {
    "format": "cacheroute-routing-profile",
    "version": 1,
    "model": "",
    "architecture": "qwen3moe",
    "n_expert": 32,
    "n_used": 4,
    "layers": [0, 1],
    "strategy": "cache-prior",
    "parameters": [{"lambda": 0.1}, {"lambda": 0.1}],
}
_TASK = {
    "format": "cacheroute-task-profile",
    "version": 1,
    "model": "tiny qwen3moe",
    "architecture": "qwen3moe",
    "n_expert": 32,
    "layers": [0, 1],
    "tokens": 1,
    "uses": [[1] * 32] * 2,
}


def _side(name: str, option: str, content: object, sentence: str) -> Case:
    def command(place: Place) -> list[str]:
        path = _json(place, "side.json", content)
        value = f"tuned:{path}" if option == "--routing" else path
        return ["generate", "-m", str(place.tiny), "--raw", "-p", "a", "-n", "1", option, value]

    return Case(name, command, sentence=sentence, more=True)


def _nan_trace(place: Place) -> list[str]:
    import numpy as np

    from cacheroute.trace import trace_file

    header = trace_file.Header("m", "a", 8, 2, (0,), (100,), "original", "lru", 4)
    records = np.zeros(4, trace_file.record_dtype(8, 2, mass=False))
    records["flags"], records["n_run"], records["z"][2, 5] = trace_file.DECODE | trace_file.SOFTMAX_MASS, 2, np.nan
    trace_file.write(place.folder / "t.trace", header, records)
    return ["simulate", str(place.folder / "t.trace")]


SIDE_FILES = [
    _side("a tuned routing that is nested deeply", "--routing", _DEEP, "not a tuned routing; `cacheroute tune` writes one"),
    _side("a tuned routing that is cut", "--routing", json.dumps(_TUNED)[:-20], "not a tuned routing; `cacheroute tune`"),
    _side("a tuned routing of infinite K", "--routing", {**_TUNED, "n_used": float("inf")}, "value that cannot be"),
    _side("a tuned routing with a layer too few", "--routing", {**_TUNED, "layers": [0]}, "2 of 1 layers"),
    _side("a tuned routing without its strategy", "--routing", {**_TUNED, "strategy": 7}, "There is no routing '7'"),
    _side("a tuned routing whose lambda is no number", "--routing", {**_TUNED, "parameters": [{"lambda": "x"}] * 2}, "cannot be"),
    _side(
        "a tuned routing whose lambda is NaN",
        "--routing",
        {**_TUNED, "parameters": [{"lambda": float("nan")}] * 2},
        "lambda is a number, not nan",
    ),
    _side(
        "a tuned routing whose m is infinite",
        "--routing",
        {**_TUNED, "strategy": "max-rank", "parameters": [{"m": 1e999}] * 2},
        "m is a number, not inf",
    ),
    Case("a trace whose scores are no numbers", _nan_trace, sentence="scores that are no numbers"),
    _side("a task profile that is a list", "--warm-start", "[]", "not a task profile; `cacheroute trace --save-profile`"),
    _side("a task profile that is nested deeply", "--warm-start", _DEEP, "not a task profile; `cacheroute trace --save-profile`"),
    _side("a task profile of infinite uses", "--warm-start", {**_TASK, "uses": [[float("inf")] * 32] * 2}, "is a damaged"),
    _side("a task profile of too few layers", "--warm-start", {**_TASK, "uses": [[1] * 32]}, "damaged task profile"),
    _side("a task profile of another model", "--warm-start", {**_TASK, "model": "other"}, "task profile is of 'other'"),
    Case("rows to plot that are nested deeply", lambda p: ["plot", _json(p, "r.json", _DEEP)], sentence="does not hold rows"),
    Case("rows to plot that are numbers", lambda p: ["plot", _json(p, "r.json", "[1, 2]")], sentence="does not hold rows"),
    Case("a trace of zeros", lambda p: ["simulate", str(p.file("t.trace", bytes(5000)))], sentence="is not a trace"),
    Case("a trace that is nested deeply", lambda p: ["simulate", _json(p, "t.trace", _DEEP)], sentence="is not a trace"),
    Case(
        "a results file with a line that is no row",
        lambda p: ["frontier", str(p.file("r.jsonl", '{"format": "cacheroute-frontier-3"}\n7\n')), "-m", str(p.tiny)],
        sentence="is not a results file",
    ),
]


def _hub(change: Callable[[Path], object]) -> Callable[[Place], list[str]]:
    """Caches of others in the folder, of which something is damaged: `models` lists what is in order."""

    def command(place: Place) -> list[str]:
        place.monkeypatch.setenv("HOME", str(place.folder))
        for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
            place.monkeypatch.delenv(name, raising=False)
        place.monkeypatch.setenv("CACHEROUTE_CACHE", str(place.demo.parent.parent))
        change(place.folder)
        return ["models"]

    return command


def _put(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


_HUB = ".cache/huggingface/hub/models--a--b/"
_SNAPSHOT = _HUB + "snapshots/1/"
_MANIFEST = ".ollama/models/manifests/r/library/n/latest"
_ELSEWHERE = b'{"layers": [{"mediaType": "a.image.model", "digest": "../../../../../etc/passwd"}]}'
_LIST: dict[str, Any] = {"code": 0, "stdout": True, "more": True}
DISKS = [
    Case(
        "a hub branch that is no text",
        _hub(lambda f: _put(f, _HUB + "refs/main", b"\xff\xfe")),
        **_LIST,
    ),
    Case("a snapshot that is a file", _hub(lambda f: _put(f, _SNAPSHOT.rstrip("/"), b"")), **_LIST),
    Case(
        "a damaged model in the hub cache",
        _hub(lambda f: _put(f, _SNAPSHOT + "m.gguf", b"GGUF")),
        sentence="hf:a/b:m.gguf: .*file ends after 4 bytes",
        **_LIST,
    ),
    Case(
        "a model in the hub cache that is a pipe",
        _hub(lambda f: (_put(f, _SNAPSHOT + "x", b""), os.mkfifo(f / (_SNAPSHOT + "m.gguf")))),
        **_LIST,
    ),
    Case("a manifest that is cut", _hub(lambda f: _put(f, _MANIFEST, b'{"layers": [')), **_LIST),
    Case("a manifest that is nested deeply", _hub(lambda f: _put(f, _MANIFEST, _DEEP.encode())), **_LIST),
    Case(
        "a manifest whose media type is a number",
        _hub(lambda f: _put(f, _MANIFEST, b'{"layers": [{"mediaType": 1, "digest": 2}]}')),
        **_LIST,
    ),
    Case(
        "a manifest whose blob is elsewhere",
        _hub(lambda f: _put(f, _MANIFEST, _ELSEWHERE)),
        **_LIST,
    ),
    Case(
        "a manifest that is a pipe",
        _hub(lambda f: ((f / _MANIFEST).parent.mkdir(parents=True), os.mkfifo(f / _MANIFEST))),
        **_LIST,
    ),
    Case("a folder of LM Studio that is a file", _hub(lambda f: _put(f, ".lmstudio/models", b"")), **_LIST),
]

CASES: list[Case] = [*NO_FILES, *SIDE_FILES, *DISKS]
