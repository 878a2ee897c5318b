"""Calls to the system that fail, under shim.c: the answer is the same, or one sentence says why there is none."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from faults.runner import Case, Outcome, Place

_SECONDS = 30  # a command that takes longer hangs
_IO = "buffered", "direct"
_ASKED = ("-p", "the cat that was on the mat", "-n", "24", "--seed", "1", "--temp", "0", "-t", "1", "-c", "128", "--budget", "6")


@functools.cache
def _shim(folder: Path) -> Path:
    built = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", built, source, "-ldl"], check=True)
    return built


@functools.cache
def _model(tiny: Path) -> Path:
    """A copy that no other test has mapped: pages of it can be dropped."""
    (tiny.parent / "faults").mkdir()
    return Path(shutil.copy(tiny, tiny.parent / "faults" / "m.gguf"))


def _run(place: Place, rules: str, command: Sequence[str | Path]) -> Outcome:
    """Runs Python under the shim. Every rule must have acted."""
    seen = place.folder / "seen"
    env = os.environ | {"FAULTS": rules, "FAULTS_SEEN": str(seen), "CACHEROUTE_CACHE": str(place.folder / "cache")}
    if rules:
        env["LD_PRELOAD"] = str(_shim(place.tiny.parent))
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    acted = {path.suffix for path in place.folder.glob("seen.*")}
    assert acted == {f".{i}" for i in range(len(rules.split(",")) if rules else 0)}, f"{rules}: only {acted}\n{done}"
    for path in place.folder.glob("seen.*"):
        path.unlink()
    return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def _answer(place: Place, rules: str, io: str, more: Sequence[str]) -> Outcome:
    return _run(place, rules, ["-m", "cacheroute", "generate", "--raw", "-m", _model(place.tiny), *_ASKED, "--io", io, *more])


_answers: dict[Path, str] = {}  # without faults: whatever reads, the text is the same


def _generate(rules: str, io: str, *more: str) -> Callable[[Place], Outcome]:
    def command(place: Place) -> Outcome:
        if place.tiny not in _answers:
            _answers[place.tiny] = _answer(place, "", "buffered", ()).stdout
        outcome = _answer(place, rules, io, more)
        assert outcome.stdout in ("", _answers[place.tiny]), outcome
        return outcome

    return command


def _same(name: str, rules: str, io: str, *more: str, said: str = "") -> Case:
    """The text is that of a run without faults; `said`: a line on stderr beside the statistics."""
    name = f"{name}, {io}{', prefetch' if more else ''}"
    return Case(name, _generate(rules, io, *more), code=0, sentence=said, stdout=True, more=True)


def _refused(name: str, rules: str, io: str, said: str, *more: str) -> Case:
    return Case(f"{name}, {io}{', prefetch' if more else ''}", _generate(rules, io, *more), code=1, sentence=said, more=True)


_BOTH = [
    ("a kernel without PAGEOUT", "madvise/21:EINVAL"),
    ("a system without madvise", "madvise:ENOSYS"),
    ("a system without fadvise", "posix_fadvise:EINVAL"),
    ("a system without any advice", "madvise:ENOSYS,posix_fadvise:EINVAL,fsync:EIO"),
    ("a file that cannot be synced", "fsync:EIO"),
    ("one thread for reads", "pthread_create:EAGAIN:after=1"),
]
_PREFETCH = ("--prefetch", "4")
_EIO = r"m\.gguf: reading experts failed: Input/output error\.$"
_AUTO = r"^cacheroute: --io auto reads through the page cache: "
_NONE = r"the filesystem of \S+m\.gguf has no direct reads\.$"
_CACHED = r"the filesystem of \S+m\.gguf puts direct reads into the page cache\.$"
_WRONG = r"the filesystem of \S+m\.gguf gives other bytes by direct reads\.$"


# A file that becomes shorter while it is read.
_SHORTER = """
import os, sys
from cacheroute import CacherouteError, Llama
path, io = sys.argv[1:]
llm = Llama(path, budget=6, io=io, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)

def say():
    try:
        llm.eval(list(range(3, 200)))
    except CacherouteError as e:
        print(e, file=sys.stderr)

llm.eval([5, 6, 7])
os.truncate(path, 200_000)
say()
llm.close()
"""

# An error belongs to its sequence.
_ONCE = """
import sys
from cacheroute import CacherouteError, Llama
llm = Llama(sys.argv[1], budget=6, io=sys.argv[2], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
try:
    llm.eval(list(range(3, 60)))
except CacherouteError as e:
    print(e, file=sys.stderr)
llm.reset()
llm.eval(list(range(3, 60)))
llm.close()
"""

# What the readers drop from the page cache together, is dropped.
_LEFT = """
import sys
from cacheroute import Llama
llm = Llama(sys.argv[1], budget=6, io=sys.argv[2], n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
llm.eval(list(range(3, 60)))
left = llm.measure_resident() - llm.stats().resident_bytes
llm.close()
sys.exit(left and f"{left} bytes are left in the page cache")
"""


def _script(source: str, rules: str, *words: str) -> Callable[[Place], Outcome]:
    def command(place: Place) -> Outcome:
        path = shutil.copy(place.tiny, place.folder / "m.gguf")
        return _run(place, rules, ["-c", source, path, *words])

    return command


def _trace(io: str) -> Callable[[Place], Outcome]:
    def command(place: Place) -> Outcome:
        words = f"-m cacheroute trace -p the -o t.trace -c 512 -t 1 --io {io} -m".split()
        outcome = _run(place, "write:ENOSPC:path=t.trace:after=1", [*words, _model(place.tiny)])
        assert not list(place.folder.glob("*t.trace*"))
        return outcome

    return command


CASES: list[Case] = [
    *(_same(name, rules, io) for name, rules in _BOTH for io in _IO),
    # through the page cache
    _same("short reads", "pread:half", "buffered"),
    _same("reads that are interrupted", "pread:EINTR:every=3", "buffered"),
    _refused("reads that fail", "pread:EIO", "buffered", _EIO),
    _refused("reads that fail later", "pread:EIO:after=60", "buffered", _EIO, *_PREFETCH),
    _refused("no memory for pages", "pread:ENOMEM:after=9", "buffered", r"reading experts failed: Cannot allocate memory\."),
    _refused("no address space", "mmap:ENOMEM", "buffered", r"no address space for experts: Cannot allocate memory\."),
    *(
        Case(
            f"a file that becomes shorter, {io}",
            _script(_SHORTER, "pread:EINTR:every=100", io),
            0,
            r"m\.gguf: reading experts failed: the file has become shorter since it was loaded\.",
        )
        for io in _IO
    ),
    Case("readers that drop pages at the same time", _script(_LEFT, "posix_fadvise/4:alone", "buffered"), 0),
    # direct reads
    _same("a system without mincore", "mincore:ENOSYS", "direct"),
    _same("short reads", "pread:half", "direct"),
    _same("short reads", "pread:half", "direct", *_PREFETCH),
    _same("reads that are interrupted", "pread:EINTR:every=3", "direct"),
    _same("reads that are interrupted", "pread:EINTR:every=3", "direct", *_PREFETCH),
    _refused("reads that fail", "pread:EIO", "direct", r"direct reads of \S+m\.gguf failed: Input/output error\."),
    _refused("reads that fail later", "pread:EIO:after=60", "direct", _EIO),
    _refused("reads that fail later", "pread:EIO:after=60", "direct", _EIO, *_PREFETCH),
    _refused("one read that fails", "pread:EIO:after=60:every=100000", "direct", _EIO),
    _refused("reads that would block", "pread:EAGAIN:after=9", "direct", r"failed: Resource temporarily unavailable\."),
    _refused("no O_DIRECT", "open/direct:EINVAL", "direct", _NONE),
    _refused("O_DIRECT that cannot read", "pread/direct:EINVAL", "direct", _NONE),
    _refused("O_DIRECT with wrong bytes", "pread/direct:wrong", "direct", _WRONG),
    _refused("O_DIRECT with wrong bytes in the middle", "pread/direct:wrong:after=1:every=100000", "direct", _WRONG),
    _refused("O_DIRECT with wrong bytes at the end", "pread/direct:wrong:after=2:every=100000", "direct", _WRONG),
    _refused("O_DIRECT that is buffered", "open/direct:buffered", "direct", _CACHED),
    _same("a file that another process reads meanwhile", "mincore:there:after=1:every=100000", "direct"),
    _refused(
        "no file descriptor left", "open/direct:EMFILE", "direct", r"direct reads of \S+m\.gguf failed: Too many open files\."
    ),
    _refused("no address space", "mmap:ENOMEM", "direct", r"no address space for experts: Cannot allocate memory\."),
    _refused("no memory for the probe", "posix_memalign:ENOMEM", "direct", r"^cacheroute: there is not enough memory\.$"),
    # the faster of both
    _same("no O_DIRECT", "open/direct:EINVAL", "auto", said=_AUTO + _NONE),
    _same("O_DIRECT with wrong bytes", "pread/direct:wrong", "auto", said=_AUTO + _WRONG),
    _same("O_DIRECT that is buffered", "open/direct:buffered", "auto", said=_AUTO + _CACHED),
    _same("direct reads that fail in the measurement", "pread/direct:EIO:after=9", "auto", said=_AUTO + "reading experts failed"),
    # either
    *(_refused("no thread for reads", "pthread_create:EAGAIN", io, r"no thread can be started .*: allow more") for io in _IO),
    *(_refused("no file descriptor at all", "open:EMFILE", io, r"cannot open \S+m\.gguf: Too many open files\.") for io in _IO),
    *(
        Case(f"a read error does not outlive its sequence, {io}", _script(_ONCE, rule, io), 0, "reading experts failed: ")
        for io, rule in (("buffered", "pread:EIO:after=9:every=100000"), ("direct", "pread:EIO:after=9:every=100000"))
    ),
    *(Case(f"a disk that fills up under a trace, {io}", _trace(io), 1, r"No space left on device", more=True) for io in _IO),
]
