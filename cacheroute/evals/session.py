"""What the sessions of all evaluations share: a model, the processes beside it, what they are told, and scores kept before."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cacheroute.engine import stores
from cacheroute.engine.asked import Asked
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import loading, processes
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.runner import Job
from cacheroute.files import VERSION, cache_dir, sha256
from cacheroute.install import patched_llama_cpp
from cacheroute.install.machine import big_cores
from cacheroute.model import gguf_file
from cacheroute.native import bindings

_IOS = tuple(io for io in stores.ALL if io != stores.LOAD)

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


@dataclass(frozen=True)
class Opened:
    """`llm` computes with `n_threads`, as each of the `n_workers` processes of `executor` does, which is None for one. `asked_io`
    as given, or by default."""

    path: Path
    llm: Llama
    n_ctx: int
    n_threads: int
    n_workers: int
    asked_io: str
    executor: Executor | None

    def job(self, text: str) -> Job:
        """For the processes; `text`: a fingerprint of what is scored."""
        return Job(self.path.resolve(), text, self.n_ctx, self.n_threads, self.llm.io, n_processes=self.n_workers)


@contextmanager
def opened(
    path: Path,
    n_ctx: int,
    settings: Sequence[Mapping[str, Any]],
    *,
    threads: int | None = None,
    n_workers: int = 1,
    io: str | None = None,
) -> Iterator[Opened]:
    """`threads`: in total, None for all fast cores. `settings`: arguments of configure() that are tried, as `io` is.

    Raises UsageError for settings that do not fit, CacherouteError when the model cannot be loaded.
    """
    if io is not None and io not in _IOS:
        raise UsageError(f"There is no io {io!r} for scores; there are {', '.join(_IOS[:-1])} and {_IOS[-1]}.")
    each = max((threads or big_cores()) // n_workers, 1)
    with closing(loading.load(path, n_ctx, each)) as llm:
        io = io or loading.default_io(llm.layout)
        for own in settings:
            llm.configure_as(Asked(**own, io=io))
        with processes.pool(n_workers) if n_workers > 1 else nullcontext() as executor:
            yield Opened(path, llm, n_ctx, each, n_workers, io, executor)


def kept_scores(
    model: Path, text: str, kind: str, parse: Callable[[dict[str, Any]], Any], reference_model: Path | None = None
) -> ResultsFile:
    """The scores of that kind that this build has computed: another router or engine may choose and round differently.

    `text` says what was scored. `parse` raises for a line that is damaged. `reference_model`: what they are compared with, where
    that is another file.
    """
    header = header_of(model, text, kind)
    if reference_model:
        header["reference"] = gguf_file.content_fingerprint(reference_model)
    file = score_file(header)
    try:
        return KeptScores(file, header, parse)
    except UsageError:
        print(f"{file} is damaged: what it kept is computed again.", file=sys.stderr)
    try:
        file.unlink(missing_ok=True)
    except OSError as e:
        return KeptScores(file, header, parse, unkept=f"It cannot be removed ({e.strerror})")
    return KeptScores(file, header, parse)


class KeptScores(ResultsFile):
    """Scores in the user's cache. Where they cannot be written, that is said once, and nothing more is kept. Lines of which
    `parse` says that they are damaged, by raising an exception, are left out.

    `unkept`: why nothing is to be kept from the start, "" where it is.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], parse: Callable[[dict[str, Any]], Any] = lambda _: None, *, unkept: str = ""
    ) -> None:
        self.path, self.lines, self._kept = path, [], True
        self._parse = parse
        if unkept:
            self._give_up(unkept)
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            self._give_up(f"{path} cannot be written ({e.strerror})")
            return
        try:
            super().__init__(path, header)
        except UsageError:
            raise
        except CacherouteError as e:
            self._give_up(str(e))

    def _parsed(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        good = []
        for line in lines:
            with suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
                found = json.loads(line)
                self._parse(found)
                good.append(found)
        if len(good) < len(lines):
            print(
                f"{self.path} is damaged: {len(lines) - len(good)} of its {len(lines)} lines are computed again.", file=sys.stderr
            )
        return good

    def append(self, line: dict[str, Any]) -> None:
        if not self._kept:
            return
        try:
            super().append(line)
        except CacherouteError as e:
            self._give_up(str(e))

    def _give_up(self, why: str) -> None:
        self._kept = False
        print(f"{why.rstrip('.')}; scores are not kept, and another run computes them again.", file=sys.stderr)


def floats32(text: object) -> bytes:
    """Finite little-endian float32 values that were kept as base64. Raises ValueError for anything else."""
    data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    values = np.frombuffer(data, "<f4") if data and len(data) % 4 == 0 else None
    if values is None or not np.isfinite(values).all():
        raise ValueError("these are not the values of tokens")
    return data


def header_of(model: Path, text: str, kind: str) -> dict[str, Any]:
    """Of a file of scores: what they have in common."""
    return {
        "format": kind,
        "version": VERSION,
        "engine": patched_llama_cpp.module().__version__,
        "router": sha256(Path(bindings.lib._name))[:16],
        "model": gguf_file.content_fingerprint(model),
        "text": text,
    }


def score_file(header: dict[str, Any]) -> Path:
    """Where the scores with that header are kept."""
    name = hashlib.sha256(json.dumps(header).encode()).hexdigest()[:16]
    return cache_dir() / "scores" / f"{name}.jsonl"
