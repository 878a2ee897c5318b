"""Coverage-guided fuzzing of the readers of files: anything but a CacherouteError is a finding, and so is a crash or a hang.

Each target runs in a child, as the header reader of llama.cpp is C and may take the process with it. The corpus is
tests/faults/corpus/TARGET; what is found new stays in a scratch folder, and an input that breaks a reader in
tests/faults/corpus/found. Where atheris cannot be installed, the same targets get random mutations without coverage.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

CORPUS = ROOT / "tests/faults/corpus"
_LONGEST = 1 << 16
_SECONDS_EACH = 30  # one input that takes longer hangs
_PADDING = 2 << 20  # the corpus holds headers: a hole stands for the tensor data


def _gguf(path: Path) -> None:
    from cacheroute.model import experts, gguf_file, report

    os.truncate(path, path.stat().st_size + _PADDING)
    experts.layout(gguf_file.read(path))
    report.inspect(path)


def _trace(path: Path) -> None:
    from cacheroute.trace import simulate, task_profile, trace_file

    trace = trace_file.read(path)
    task_profile.summarise(trace)
    if len(trace.records) < 1000 and trace.header.n_expert <= 256 and len(trace.header.layers) <= 16:
        from cacheroute.routing import strategies

        simulate.run(trace, simulate.arms(["50%"], strategies.parse_list("original,cache-prior:lambda=0.2"), ["lru"]))


def _tuned(path: Path) -> None:
    from cacheroute.routing import strategies, tuned

    tuned.load(path)
    routing = strategies.parse(f"tuned:{path}")
    routing.check(32, 4, (0, 1), "tiny")


def _task(path: Path) -> None:
    from cacheroute.trace import task_profile

    profile = task_profile.load(path)
    for layer in range(len(profile.layers)):
        profile.best(layer, 4)


def _rows(path: Path) -> None:
    from cacheroute.plot import figures

    figures.chart([path])


def _results(path: Path) -> None:
    from cacheroute.evals import frontier
    from cacheroute.evals.results import ResultsFile

    frontier.finished(ResultsFile(path, {"format": frontier.FORMAT}).lines)


def _manifest(path: Path) -> None:
    from cacheroute.model import catalogue

    catalogue._ollama_blob(path.parent, path)


TARGETS: dict[str, Callable[[Path], None]] = {
    "gguf": _gguf,
    "trace": _trace,
    "tuned": _tuned,
    "task": _task,
    "rows": _rows,
    "results": _results,
    "manifest": _manifest,
}


# Modules whose branches guide the search; atheris' hook on imports does not reach an editable install.
_READERS = (
    *("cacheroute.files", "cacheroute.model.catalogue", "cacheroute.model.checks", "cacheroute.model.experts"),
    *("cacheroute.model.gguf_file", "cacheroute.model.report", "cacheroute.routing.strategies", "cacheroute.routing.tuned"),
    *("cacheroute.trace.simulate", "cacheroute.trace.task_profile", "cacheroute.trace.trace_file", "cacheroute.plot.figures"),
    *("cacheroute.plot.rows", "cacheroute.plot.curves", "cacheroute.plot.misses", "cacheroute.plot.bench_bars"),
    *("cacheroute.evals.frontier", "cacheroute.evals.results"),
)


def _instrument(module: ModuleType, instrument: Callable[[Any], Any]) -> None:
    """Every function and method that a module defines, in place."""
    owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for owner in owners:
        for value in vars(owner).values():
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                instrument(function)


def try_input(target: str, data: bytes, folder: Path) -> None:
    """Writes a file and reads it. Raises what is no CacherouteError."""
    from cacheroute.errors import CacherouteError

    path = folder / ("input.jsonl" if target == "rows" else "input")
    path.write_bytes(data)
    try:
        TARGETS[target](path)
    except CacherouteError as e:
        assert str(e).strip(), "an empty sentence"


def mutated(target: str, data: bytes, rng: random.Random) -> bytes:
    """An input near another: of a GGUF, keys, shapes or tensors changed, or bytes; of anything else, bytes."""
    if target == "gguf" and rng.random() < 0.7:
        try:
            return bytes(_other_header(importlib.import_module("support.gguf_bytes").read(data), rng).to_bytes()[:_LONGEST])
        except Exception:  # what an earlier mutation has damaged cannot be taken apart
            pass
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(out) + 1)
        piece = rng.choice(
            (bytes([rng.randrange(256)]), b"\xff" * 8, bytes(8), b"1e999", b"NaN", b"null", b"-1", b"[", b'""', b"{}")
        )
        kind = rng.randrange(4)
        if kind == 0:
            out[at : at + len(piece)] = piece
        elif kind == 1:
            out[at:at] = piece
        elif kind == 2:
            del out[at : at + rng.choice((1, 2, 8, 64))]
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.choice((4, 16, 64))]
    return bytes(out[:_LONGEST])


def _other_header(gguf: Any, rng: random.Random) -> Any:
    g = importlib.import_module("support.gguf_bytes")
    numbers = (0, 1, 2, 3, 7, 31, 255, 512, 1024, 2**31 - 1, 2**31, 2**32 - 1)
    for _ in range(rng.choice((1, 1, 2, 3))):
        choice = rng.randrange(8)
        key = rng.choice(list(gguf.keys)) if gguf.keys else "k"
        tensor = rng.choice(gguf.tensors) if gguf.tensors else g.Tensor("t", [1], 0, 0)
        if choice == 0:
            gguf.keys[key] = g.U32, rng.choice(numbers)
        elif choice == 1:
            gguf.keys[key] = g.F32, rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-5))
        elif choice == 2:
            gguf.keys[key] = rng.choice(
                ((g.STR, "x"), (g.U64, 2**63), (g.BOOL, True), (g.ARR, (g.U32, [1, 2])), (g.ARR, (g.STR, [])))
            )
        elif choice == 3:
            gguf.keys.pop(key, None)
        elif choice == 4:
            tensor.shape = [rng.choice((0, 1, 2, 32, 64, 2**31, 2**63)) for _ in range(rng.randrange(6))]
        elif choice == 5:
            tensor.type = rng.choice((0, 1, 2, 4, 5, 8, 30, 39, 40, 99, 2**31))
        elif choice == 6:
            tensor.name = rng.choice(("blk.9.ffn_up_exps.weight", "blk.99999999999.ffn_down_exps.weight", "", "x" * 70, "\udcff"))
        elif tensor in gguf.tensors:
            gguf.without(tensor.name)
    return gguf


@dataclass(frozen=True)
class Effort:
    """So many seconds, or, if it is not 0, so many inputs, the same ones each time."""

    seconds: float
    inputs: int = 0

    def options(self) -> list[str]:
        """For libFuzzer."""
        return [f"-runs={self.inputs}", "-seed=1"] if self.inputs else [f"-max_total_time={max(int(self.seconds), 1)}"]


def child(target: str, effort: Effort, corpus: Path, scratch: Path) -> None:
    """Runs one target in this process."""
    os.environ["CACHEROUTE_CACHE"] = str(scratch / "cache")
    devnull = os.open(os.devnull, os.O_WRONLY)
    if importlib.util.find_spec("atheris") is None:
        os.dup2(devnull, 1)
        _without_coverage(target, effort, corpus, scratch)
        return
    import atheris

    for name in _READERS:
        _instrument(importlib.import_module(name), atheris.instrument_func)

    def one(data: bytes) -> None:
        try_input(target, data, scratch)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return mutated(target, data, rng)[:most] if rng.random() < 0.8 else bytes(atheris.Mutate(data, most))

    (scratch / "new").mkdir()
    options = [
        *effort.options(),
        f"-max_len={_LONGEST}",
        f"-timeout={_SECONDS_EACH}",
        "-rss_limit_mb=4096",
    ]
    options += [f"-artifact_prefix={scratch}/broken-", "-print_final_stats=1", "-verbosity=1", str(scratch / "new"), str(corpus)]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _without_coverage(target: str, effort: Effort, corpus: Path, scratch: Path) -> None:
    rng = random.Random(0)
    seeds = [path.read_bytes() for path in sorted(corpus.iterdir())]
    end, n = time.monotonic() + effort.seconds, 0
    while n < effort.inputs if effort.inputs else time.monotonic() < end:
        data = mutated(target, rng.choice(seeds), rng)
        (scratch / "broken-last").write_bytes(data)  # the input that a crash leaves behind
        try_input(target, data, scratch)
        n += 1
    (scratch / "broken-last").unlink(missing_ok=True)
    print(f"stat::number_of_executed_units: {n}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        target, seconds, inputs, corpus, scratch = arguments[1:]
        child(target, Effort(float(seconds), int(inputs)), Path(corpus), Path(scratch))
        return 0
    counted = arguments[:1] == ["--inputs"]
    amount, *names = (arguments[1:] if counted else arguments) or [""]
    names = names or list(TARGETS)
    if not amount.isdecimal() or not set(names) <= TARGETS.keys():
        usage = "usage: scripts/fuzz SECONDS [TARGET...], or --inputs N [TARGET...], the same ones each time"
        print(f"{usage}; the targets are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    shares = {name: 3 if name == "gguf" else 1 for name in names}
    failed = 0
    for name in names:
        share = float(amount) * shares[name] / sum(shares.values())
        failed += _run(name, Effort(0, int(amount)) if counted else Effort(share))
    return 1 if failed else 0


def _run(name: str, effort: Effort) -> int:
    """One target in a child; 1 when it found something."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        amounts = [str(effort.seconds), str(effort.inputs)]
        command = [sys.executable, __file__, "--child", name, *amounts, str(CORPUS / name), folder]
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, timeout=(effort.inputs * _SECONDS_EACH or effort.seconds) + 240)
            code, said = done.returncode, (done.stderr + done.stdout).decode("utf-8", "replace")
        except subprocess.TimeoutExpired as e:
            code, said = -1, (e.stderr or b"").decode("utf-8", "replace") + "\nit hangs"
        runs = next((line.split()[-1] for line in said.splitlines() if "number_of_executed_units" in line), "?")
        new = len(list((Path(folder) / "new").glob("*"))) if (Path(folder) / "new").exists() else 0
        print(f"{name}: {runs} inputs in {time.monotonic() - start:.0f} s, {new} new, exit {code}", flush=True)
        if code == 0:
            return 0
        found = CORPUS / "found"
        found.mkdir(exist_ok=True)
        for path in Path(folder).glob("broken-*"):
            print(f"  kept as {shutil.copy(path, found / f'{name}-{path.name}')}")
        print("\n".join(line for line in said.splitlines() if "INFO" not in line)[-3000:])
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
