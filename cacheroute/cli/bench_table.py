"""What people see of the rows of `bench`: a line for each arm, why one is not to be trusted, and which was best."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cacheroute.bench.arms import Row
from cacheroute.cli.table import MARK, Cells, View, number, spread
from cacheroute.routing import prompt_routing as prompts
from cacheroute.routing import tuned

_CONTROL = "llama.cpp's mmap"


@dataclass(frozen=True)
class _Arm:
    """One arm: `row` of its decoded tokens, or of its prompt where nothing was decoded; `rows` of both. `name`: of what sets it
    apart from the others."""

    rows: tuple[Row, ...]
    name: str

    @property
    def row(self) -> Row:
        return self.rows[-1]

    @property
    def doubts(self) -> tuple[str, ...]:
        """One of each kind: they differ in their figures between the prompt and the answer."""
        return tuple({_kind(doubt): doubt for row in self.rows for doubt in row.doubts}.values())

    @property
    def is_baseline(self) -> bool:
        return _is_baseline(self.row)


def view(rows: Sequence[Row]) -> View:
    """Of rows in the order in which run_arms() gives them."""
    common = {name: Counter(texts).most_common(1)[0][0] for name, texts in _settings(rows).items()}
    budgets = list(dict.fromkeys(row.budget for row in rows))
    arms = sorted(_arms(rows, common), key=lambda arm: budgets.index(arm.row.budget))
    return View(
        brief=_brief(arms),
        whole=whole(rows),
        above=[_what_was_run(rows, common)],
        below=[*_notes(arms), *_conclusions(arms)],
    )


def _is_baseline(r: Row) -> bool:
    return (r.routing, r.eviction, r.prompt_routing, r.prefetch) == ("original", "lru", prompts.ORIGINAL, 0)


def _texts(row: Row) -> dict[str, str]:
    """Settings beside budget and routing, as they are named; "" for one that is off."""
    paced = f" at {row.flash_mbps:g} MB/s" if row.flash_mbps else ""
    return {
        "eviction": row.eviction,
        "io": row.io + paced,
        "prefetch": f"prefetch {row.prefetch}",
        "prompt routing": f"prompts {row.prompt_routing}",
        "replay": row.replay or "",
    }


def _settings(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Those of the arms that are compared with the baseline, where there are any."""
    hooked = [row for row in rows if not row.control] or rows
    of = [_texts(row) for row in hooked if not _is_baseline(row)] or [_texts(row) for row in hooked]
    return {name: [texts[name] for texts in of] for name in of[0]}


def _arms(rows: Sequence[Row], common: dict[str, str]) -> Iterator[_Arm]:
    """Rows of one arm follow each other, the prompt's first."""
    own: tuple[Row, ...] = ()
    for i, row in enumerate(rows):
        own = (*own, row)
        if row.n_prompt and i + 1 < len(rows) and rows[i + 1].n_gen:
            continue
        others = () if row.control else (text for name, text in _texts(row).items() if text != common[name])
        yield _Arm(own, ", ".join((_routing(row), *others)))
        own = ()


def _routing(row: Row) -> str:
    if row.control:
        return _CONTROL + (", repacked" if row.repack else "")
    return tuned.short(row.routing)


def _what_was_run(rows: Sequence[Row], common: dict[str, str]) -> str:
    """One line: the model, the tokens, and the settings of all arms that do not say otherwise."""
    n_prompt, n_gen = max(r.n_prompt for r in rows), max(r.n_gen for r in rows)
    tokens = [f"prompt of {n_prompt}" if n_prompt else "", f"{n_gen} decoded" if n_gen else ""]
    off = ("", "prefetch 0", f"prompts {prompts.ORIGINAL}")
    n_runs = max(len(r.samples_ts) for r in rows)
    runs = "1 run" if n_runs == 1 else f"{n_runs} runs"
    threads = f"{rows[0].n_threads} thread{'' if rows[0].n_threads == 1 else 's'}"
    parts = [*tokens, runs, threads, *(text for text in common.values() if text not in off)]
    return f"{rows[0].model}: {', '.join(part for part in parts if part)}"


def _brief(arms: Sequence[_Arm]) -> Cells:
    """At 80 columns, units in the head."""
    marked = any(arm.doubts for arm in arms)
    timed = any(arm.row.ttft_s is not None for arm in arms)
    digits = 1 if max(arm.row.avg_ts for arm in arms) >= 10 else 2
    head = ["budget", "routing", "tok/s", "vs LRU", "miss %", "MiB/token", *(["TTFT s"] if timed else [])]
    cells = [([""] if marked else []) + head]
    for arm in arms:
        r = arm.row
        mib = r.device_mib_per_token if r.control else r.read_mib_per_token
        ratio = "base" if arm.is_baseline else "" if r.vs_lru is None else f"{r.vs_lru:.2f}"
        own = [r.budget, arm.name, spread(r.avg_ts, r.stddev_ts, len(r.samples_ts), digits), ratio]
        own += ["" if r.control else number(r.miss_rate, 100, 1), number(mib)]
        own += ["" if r.ttft_s is None else f"{r.ttft_s:.2f}"] if timed else []
        cells.append(([MARK if arm.doubts else ""] if marked else []) + own)
    return cells


def _notes(arms: Sequence[_Arm]) -> Iterator[str]:
    """What the table cannot say: why rows are marked, how often lossy ones chose other experts, and what a figure is that is not
    as the others."""
    kinds: dict[str, list[tuple[_Arm, str]]] = {}
    for arm in arms:
        for doubt in arm.doubts:
            kinds.setdefault(_kind(doubt), []).append((arm, doubt))
    for doubted in kinds.values():
        arm, doubt = doubted[0]
        name = f"{arm.name} at {arm.row.budget}"
        several = f"{len(doubted)} of {len(arms)} rows, the first of them {name}"
        yield f"{MARK} {several if len(doubted) > 1 else name}: {doubt}."
    for arm in arms:
        if arm.row.lossy:
            swaps = (f"{100 * ((r.swap_rate or 0) + (r.drop_rate or 0)):.1f}% of the {_phase(r)}'s experts" for r in arm.rows)
            yield f"Swapped by {arm.name} at {arm.row.budget}: {', '.join(swaps)}."
    if any(arm.row.control and arm.row.device_mib_per_token is not None for arm in arms):
        yield f"MiB/token of {_CONTROL} are those that the kernel read."


def _kind(doubt: str) -> str:
    """A reason without its figures."""
    return re.sub(r"[\d.]+", "", doubt)


def _phase(row: Row) -> str:
    return "prompt" if row.n_prompt else "answer"


def _conclusions(arms: Sequence[_Arm]) -> Iterator[str]:
    """Which arm was fastest at each budget, among those that can be trusted, and which of those without loss."""
    budgets = list(dict.fromkeys(arm.row.budget for arm in arms))
    if len(arms) > len(budgets) and max(len(arm.row.samples_ts) for arm in arms) < 2:
        yield "One run of each has no spread, so none is called the best: -r 3 or more tells them apart."
        return
    for budget in budgets:
        own = [arm for arm in arms if arm.row.budget == budget]
        trusted = [arm for arm in own if not arm.doubts] or own
        if len(own) < 2:
            continue
        base = next((arm for arm in own if arm.is_baseline), None)
        best = max(trusted, key=lambda arm: arm.row.avg_ts)
        yield _sentence("Best", best, base)
        lossless = [arm for arm in trusted if not arm.row.lossy]
        if best.row.lossy and lossless:
            yield _sentence("Best without loss", max(lossless, key=lambda arm: arm.row.avg_ts), base)


def _sentence(what: str, best: _Arm, base: _Arm | None) -> str:
    r = best.row
    parts = [f"{what}: {best.name}{' (lossy)' if r.lossy else ''}"]
    if best.is_baseline or r.vs_lru is None:
        parts.append(f"{r.avg_ts:.1f} tok/s at {r.budget}")
    else:
        within = len(r.samples_ts) > 1 and abs(r.vs_lru - 1) <= (r.vs_lru_sd or 0)
        parts.append(f"{r.vs_lru:.1f}x of LRU at {r.budget}" + (", which is within the spread" if within else ""))
    if not r.control and r.read_mib_per_token is not None:
        of = f" of {base.row.read_mib_per_token:.1f}" if base and base is not best and base.row.read_mib_per_token else ""
        parts.append(f"reads {r.read_mib_per_token:.1f}{of} MiB a token")
    if best.doubts:
        parts.append(f"but its row is marked {MARK}")
    return ", ".join(parts)


def whole(rows: Sequence[Row]) -> Cells:
    """All columns, a row for the prompt and one for the decoded tokens."""
    head = ["test", "budget", "routing", "eviction", "io", "tok/s", "vs lru", "miss", "swapped"]
    head += ["read MiB/token", "device MiB/token", "resident/budget MiB", "hook ms/tok", "CPU s/tok"]
    timed = any(r.ttft_s is not None for r in rows)
    head += ["TTFT s"] if timed else []
    floors = any(r.floor_share is not None for r in rows)
    head += ["floor tok/s", "of floor"] if floors else []
    prefetches = any(r.prefetch for r in rows)
    head += ["prefetch", "chosen"] if prefetches else []
    rerouted = any(r.prompt_routing != prompts.ORIGINAL for r in rows)
    head += ["prompt routing"] if rerouted else []
    replayed = any(r.replay for r in rows)
    head += ["replay"] if replayed else []
    doubted = any(r.doubts for r in rows)
    head += ["not to be trusted"] if doubted else []
    table = [head]
    for r in rows:
        paced = f" @ {r.flash_mbps:g} MB/s" if r.flash_mbps else ""
        name = "control" + (", repacked" if r.repack else "") if r.control else tuned.short(r.routing)
        n = len(r.samples_ts)
        cells = [
            r.test,
            f"{r.budget} ({r.budget_experts})",
            name,
            r.eviction,
            r.io + paced,
            spread(r.avg_ts, r.stddev_ts, n),
            "" if r.vs_lru is None else spread(r.vs_lru, r.vs_lru_sd or 0.0, n),
            number(r.miss_rate, 100, 1, "%"),
            number(r.swap_rate, 100, 1, "%"),
            number(r.read_mib_per_token),
            number(r.device_mib_per_token),
            f"{number(r.resident_mib, digits=1)}/{r.budget_mib:.1f}",
            number(r.hook_ms_per_token, digits=3),
            number(r.cpu_s_per_token, digits=3),
        ]
        cells += ["" if r.ttft_s is None else f"{r.ttft_s:.2f}"] if timed else []
        cells += [number(r.floor_ts), number(r.floor_share, 100, 0, "%")] if floors else []
        cells += [str(r.prefetch), "" if r.prefetch_used is None else f"{100 * r.prefetch_used:.0f}%"] if prefetches else []
        cells += [r.prompt_routing] if rerouted else []
        cells += [r.replay or ""] if replayed else []
        cells += ["; ".join(r.doubts)] if doubted else []
        table.append(cells)
    return table
