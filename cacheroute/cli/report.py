"""What `doctor --report` adds: findings without what is private, and a short bench, in the columns of a phone."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacheroute import files
from cacheroute.cli import options, table
from cacheroute.cli.terminal import folded
from cacheroute.errors import CacherouteError
from cacheroute.install.check import Check

COLUMNS = 45
_N_PROMPT, _N_GEN, _RUNS = 64, 32, 2
_BUDGET = "50%"
_PATH = re.compile(r"\(path\)/[^\s;,:]*|(?<![\w.>)])~?/[^\s;,:]*")
_PRIVATE = ("settings", "variables")  # of the person, not of the machine


def shared(check: Check, model: Path | None) -> Check | None:
    """A finding without paths and without the name of the model's file; None for what concerns the person alone."""
    if check.name in _PRIVATE:
        return None

    def cleaned(text: str) -> str:
        for path in _known_paths(model):
            text = text.replace(path, "(path)")
        return _PATH.sub("(path)", text.replace(model.name, "the model") if model else text)

    return replace(check, found=cleaned(check.found), advice=cleaned(check.advice))


def _known_paths(model: Path | None) -> list[str]:
    """Those that may have spaces in them, the longest first."""
    found = [files.cache_dir(), Path.cwd(), *([files.home()] if files.home() else [])]
    if model:
        found += [model, model.resolve(), model.parent, model.resolve().parent]
    return sorted({str(path) for path in found if path and len(path.parts) > 1}, key=len, reverse=True)


def lines(state: str, text: str) -> list[str]:
    """A finding in the columns of a phone."""
    first, *rest = textwrap.wrap(text, COLUMNS - 6, subsequent_indent="  ")
    return [f"{state:4}  {first}", *(f"      {line}" for line in rest)]


def bench(model: str | None) -> Iterator[str]:
    """A short run of a model: the baseline, and what is tuned for it, if there is anything. Raises CacherouteError."""
    from cacheroute.bench.arms import Arm, run_arms
    from cacheroute.engine.llama import Llama
    from cacheroute.model import catalogue
    from cacheroute.routing import tuned
    from cacheroute.routing.eviction import DEFAULT

    path = catalogue.resolve(model)
    arms = [Arm(_BUDGET, "original", "lru", "auto"), Arm(_BUDGET, "original", DEFAULT, "auto")]
    with contextlib.suppress(CacherouteError):  # nobody has tuned it
        arms.append(Arm(_BUDGET, *tuned.resolve(path, _BUDGET, tuned.NAME, DEFAULT), "auto"))
    n_threads = options.threads(None)
    own: dict[str, Any] = {"n_ctx": _N_PROMPT + _N_GEN, "n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False}
    with closing(Llama(str(path), budget=None, routing=None, **own)) as llm:
        tokens = llm.tokenize(options.text(None).encode(), add_bos=True)
        rows = run_arms(llm, arms, tokens, _N_PROMPT, _N_GEN, _RUNS)
    name = "the demo model" if path == catalogue.demo_path() else "a model of its own"
    yield from folded(
        f"bench: {name}, {_BUDGET}, -t {n_threads}, prompt of {_N_PROMPT}, {_N_GEN} decoded, {_RUNS} runs", COLUMNS, 2
    )
    cells = [["routing", "tok/s", "miss %", "MiB/token", "io", "CPU s/token", "other cores", "doubts"]]
    for row in rows:
        routing = "tuned" if row.routing.startswith(f"{tuned.NAME}:") else f"{row.routing} {row.eviction}"
        phase = "prompt" if row.n_prompt else "answer"
        figures = [table.spread(row.avg_ts, row.stddev_ts, len(row.samples_ts), 1), table.number(row.miss_rate, 100, 1)]
        figures += [table.number(row.read_mib_per_token), row.io, table.number(row.cpu_s_per_token, digits=3)]
        cells.append([f"{routing}, {phase}", *figures, table.number(row.other_cores, digits=1), "; ".join(row.doubts)])
    yield from table.fitted(cells, COLUMNS)
