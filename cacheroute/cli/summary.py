"""What `generate` and `chat` say of an answer: a line on stderr, and the object of `generate -o json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute import interrupts
from cacheroute.cli import options
from cacheroute.cli.terminal import say
from cacheroute.engine.stats import Counters, Stats
from cacheroute.files import MIB, as_json

if TYPE_CHECKING:
    from cacheroute.engine.completion import Completion

INTERRUPTED = "interrupted"  # a finish_reason
_LONG_SECONDS = 2.0  # from which on the time to the first token is named unasked


def report(run: Completion, output: str, path: Path, *, verbose: bool, quiet: bool) -> None:
    """The statistics of `generate`: a line on stderr, which is the line of an interruption, too, and an object on stdout."""
    if not quiet:
        with interrupts.last_words():
            say(whole(run) if verbose else brief(run, run.llm.stats().decode, run.llm.stats().prefill))
    if output != "text":
        said = as_object(run, path)
        if output == "jsonl":
            said.pop("text")
        print(as_json(said), flush=True)


def as_object(run: Completion, path: Path) -> dict[str, Any]:
    """The object of `-o json`. Rates are null where no time has passed: without a token, or of one alone."""
    stats = run.llm.stats()
    return {
        "text": run.text,
        "finish_reason": run.finish_reason,
        "model": str(path),
        "seed": run.seed,
        "n_prompt": len(run.prompt.tokens),
        "n_prompt_cached": len(run.prompt.tokens) - stats.prefill.tokens,
        "n_gen": run.n_tokens,
        "prompt_ts": _prompt_rate(run),
        "prompt_read_mib": stats.prefill.read_mib,
        "prompt_distinct_mib": stats.prefill.distinct_mib,
        "ts": _rate(run),
        "time_to_first_token_s": run.first - run.started if run.first else None,
        "miss_rate": stats.decode.miss_rate,
        "swap_rate": stats.decode.swap_rate,
        "prompt_swap_rate": stats.prefill.swap_rate,
        "read_mib_per_token": stats.decode.read_mib_per_token,
        "stats": asdict(stats),
    }


def brief(run: Completion, decode: Counters, prompt: Counters) -> str:
    """Tokens, speed and misses; of a lossy routing how often it chose other experts; a first token that was waited for. The
    counters are those of this answer."""
    return ", ".join([*_brief(run, decode, prompt), *_waited(run)])


def _brief(run: Completion, decode: Counters, prompt: Counters) -> list[str]:
    llm = run.llm
    parts = [_speed(run)]
    if llm.io == "load":
        parts.append("all experts in memory")
    elif decode.hits + decode.misses:
        what = "missed, and not read" if llm.io == "none" else "read from disk"
        parts.append(f"{_percent(decode.miss_rate)} of experts {what}")
    if llm.routing and llm.routing.lossy and (decode.swapped or decode.dropped or not options.changes_nothing(llm)):
        parts.append(_swaps(decode))
    if llm.prompt_routing.lossy:
        parts.append(f"prompt {_swaps(prompt)}")
    return parts


def _waited(run: Completion) -> list[str]:
    """The time to the first token, where it was long: the tokens per second do not have it."""
    seconds = run.first - run.started if run.first else 0.0
    return [f"first token after {seconds:.{0 if seconds >= 10 else 1}f} s"] if seconds > _LONG_SECONDS else []


def whole(run: Completion) -> str:
    """Everything that is known, as -v shows it."""
    s: Stats = run.llm.stats()
    d, prompt_rate = s.decode, _prompt_rate(run)
    cached = len(run.prompt.tokens) - s.prefill.tokens
    parts = [
        _speed(run),
        f"prompt {len(run.prompt.tokens)}"
        + (f" ({cached} from {run.prompt_cache})" if run.prompt_cache else "")
        + ("" if prompt_rate is None else f", {prompt_rate:.1f} tok/s")
        + f", read {s.prefill.read_mib:.1f}"
        + (f" of {s.prefill.distinct_mib:.1f} MiB" if s.prefill.distinct_mib else " MiB"),
        *([f"first token {run.first - run.started:.2f} s"] if run.first else []),
        f"miss {100 * d.miss_rate:.1f}%",
        f"read {d.read_mib_per_token:.2f} MiB/token",
        f"swapped {d.swapped}/{d.examined}",
        *([f"prompt swapped {s.prefill.swapped}/{s.prefill.examined}"] if run.llm.prompt_routing.lossy else []),
        *([f"dropped {d.dropped}/{d.examined}"] if d.dropped else []),
        *([f"prefetched {d.prefetched}, {d.prefetch_used} of them chosen"] if run.llm.prefetch or d.prefetched else []),
        *_resident(run, s),
    ]
    return " | ".join(parts)


def turn(run: Completion, decode: Counters, prompt: Counters, *, verbose: bool) -> str:
    """The line under an answer of `chat`, from the counters of that turn."""
    text = ", ".join([*_brief(run, decode, prompt), *([] if verbose else _waited(run))])
    if verbose and run.first:
        text += f", first token {run.first - run.started:.1f} s ({prompt.tokens} of {len(run.prompt.tokens)} evaluated)"
        text += f", read {prompt.read_mib:.1f} MiB for the prompt and {decode.read_mib_per_token:.2f} MiB/token"
    return text + ("" if run.finish_reason else ", stopped")


def _resident(run: Completion, s: Stats) -> list[str]:
    """Nothing after an interruption: what was broken off in its middle leaves the cache empty."""
    if s.io == "load":
        return [f"resident all {s.resident_bytes / MIB:.1f} MiB"]
    if run.finish_reason == INTERRUPTED and not s.resident_bytes:
        return []
    return [f"resident {s.resident_bytes / MIB:.1f} of {s.budget_bytes / MIB:.1f} MiB"]


def _speed(run: Completion) -> str:
    rate = _rate(run)
    return f"{run.n_tokens} token{'' if run.n_tokens == 1 else 's'}" + ("" if rate is None else f", {rate:.1f} tok/s")


def _rate(run: Completion) -> float | None:
    """Tokens per second after the first one, whose time is the prompt's."""
    if not run.first or not run.last or run.last <= run.first:
        return None
    return (run.n_tokens - 1) / (run.last - run.first - run.keeping)


def _prompt_rate(run: Completion) -> float | None:
    """Evaluated tokens per second; None where none was."""
    n = run.llm.stats().prefill.tokens
    return n / (run.first - run.started) if run.first and n else None


def _swaps(c: Counters) -> str:
    """How often a lossy routing bit, also when it never did."""
    dropped = f", {_percent(c.drop_rate)} left out" if c.dropped else ""
    return f"{_percent(c.swap_rate)} swapped ({c.swapped} of {c.examined}){dropped}"


def _percent(share: float) -> str:
    """A share, in whole percent from 10 on; one that is not 0 is not shown as 0."""
    percent = 100 * share
    if 0 < percent < 0.05:
        return "<0.1%"
    return f"{percent:.0f}%" if percent >= 9.95 or not percent else f"{percent:.1f}%"
