"""`cacheroute generate`: answers a prompt, printing tokens as they come."""

from __future__ import annotations

import functools
import json
import secrets
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute import interrupts
from cacheroute.cli import options, progress
from cacheroute.cli import prompt as prompts
from cacheroute.cli.settings import Settings, say_start
from cacheroute.cli.terminal import say
from cacheroute.engine.stats import Stats
from cacheroute.errors import UsageError
from cacheroute.files import MIB
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT
from cacheroute.trace import task_profile

if TYPE_CHECKING:
    from cacheroute.engine.completion import Completion
    from cacheroute.engine.micro_batch import Plan


def generate(
    model: options.ModelOption = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt; piped-in text is appended to it.")] = None,
    file: options.FileOption = None,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", min=-1, help="Tokens to generate; -1: until it stops.")] = 256,
    ctx_size: options.CtxOption = 4096,
    threads: options.ThreadsOption = None,
    seed: options.SeedOption = -1,
    temp: options.TempOption = 0.8,
    top_k: options.TopKOption = 40,
    top_p: options.TopPOption = 0.95,
    min_p: options.MinPOption = 0.05,
    repeat_penalty: options.RepeatOption = 1.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat template.")] = False,
    budget: options.BudgetOption = budgets.AUTO,
    routing: Annotated[str, typer.Option("--routing", help="How experts are chosen; see `cacheroute routing`.")] = "original",
    prompt_routing: options.PromptRoutingOption = "original",
    eviction: options.EvictionOption = DEFAULT,
    io: options.IoOption = "auto",
    flash_mbps: options.FlashOption = None,
    prefetch: options.PrefetchOption = 0,
    warm_start: options.WarmStartOption = None,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            "--prompt-cache",
            help="Keep the evaluated prompt in this file; a later prompt with the same beginning and the same settings does not "
            "evaluate that again.",
        ),
    ] = None,
    ubatch_size: Annotated[
        int | None,
        typer.Option(
            "-ub", "--ubatch-size", min=1, help="Tokens of a prompt computed together; default: as many as fit free memory."
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", help="Say how a prompt is computed, and show its progress where stderr is no terminal, too."
        ),
    ] = False,
    output: Annotated[
        str, typer.Option("-o", "--output", help="text, json (one object at the end) or jsonl (one object per piece of text).")
    ] = "text",
) -> None:
    """Answer a prompt. The answer goes to stdout, statistics and the progress of a long prompt go to stderr.

    The prompt is -p, then the file of -f, then what is piped in or redirected from a file, a blank line between them. With -p or
    -f a line on stderr says how much of standard input was read; </dev/null leaves it out, and a file that a shell loop reads
    is left to the loop.
    """
    if output not in ("text", "json", "jsonl"):
        raise UsageError(f"There is no output {output!r}; there are text, json and jsonl.")
    text = prompts.text(prompt, file)
    seed = secrets.randbelow(2**31) if seed < 0 else seed
    task = task_profile.load(warm_start) if warm_start else None
    from cacheroute.engine import completion
    from cacheroute.engine import prompt_cache as caches
    from cacheroute.engine.llama import Llama
    from cacheroute.model import catalogue, context_memory

    if prompt_cache:
        caches.check(prompt_cache)
    path = catalogue.resolve(model)
    context_memory.check(path, ctx_size)
    settings = Settings(budget, routing, eviction, io, prefetch, prompt_routing)
    llm = Llama(
        str(path),
        **vars(settings),
        flash_mbps=flash_mbps,
        n_ctx=ctx_size,
        n_ubatch=ubatch_size,
        n_threads=options.threads(threads),
        n_threads_batch=options.threads(threads),
        seed=seed,
        verbose=False,
    )
    if task:
        llm.warm(task)
    sampling = dict(temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty)
    with closing(llm), progress.PromptLine(verbose=verbose) as llm.prompt_progress:
        chat = not raw and completion.has_chat_template(llm)
        asked = completion.chat_prompt(llm, [{"role": "user", "content": text}]) if chat else completion.raw_prompt(llm, text)
        if verbose and len(asked.tokens) < llm.n_ctx() and not (prompt_cache and prompt_cache.exists()):
            # what a kept prompt leaves of it is known when it has been read
            say(_plan(llm.plan(len(asked.tokens)), loaded=llm.io == "load"))
        begins = functools.partial(say_start, llm, settings)
        run = completion.Completion(llm, asked, n_predict if n_predict >= 0 else None, seed, sampling, prompt_cache, begins)
        try:
            for piece in run.pieces():
                if output == "text":
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                elif output == "jsonl":
                    print(json.dumps({"text": piece}), flush=True)
            if output == "text" and not run.text.endswith("\n"):
                print(flush=True)
            if run.full:
                say(f"The context of {llm.n_ctx()} tokens is full; give a larger one with -c.")
        except KeyboardInterrupt:
            run.finish_reason = "interrupted"
            if output == "text" and run.text and not run.text.endswith("\n"):
                print(flush=True)
            raise KeyboardInterrupt("" if run.first else interrupts.STOPPED) from None
        finally:
            if run.finish_reason and (run.first or run.finish_reason != "interrupted"):
                _report(run, output, path)
    if run.unkept:
        raise run.unkept


def _plan(plan: Plan, *, loaded: bool) -> str:
    """How a prompt is computed."""
    tokens, passes = "" if plan.n_tokens == 1 else "s", "" if plan.passes == 1 else "es"
    return (
        f"prompt of {plan.n_tokens} token{tokens}: {plan.passes} pass{passes} of {plan.length}, "
        f"about {plan.compute / MIB:.0f} MiB beside the experts; "
        + ("all experts in memory, as llama.cpp loads them" if loaded else f"up to {plan.ahead / MIB:.0f} MiB are read ahead")
    )


def _report(run: Completion, output: str, path: Path) -> None:
    """The statistics: an object on stdout, or a line on stderr, which is the line of an interruption, too."""
    with interrupts.last_words():
        say(_summary(run))
    if output != "text":
        report = _object(run, path)
        if output == "jsonl":
            report.pop("text")
        print(json.dumps(report), flush=True)


def _object(run: Completion, path: Path) -> dict[str, Any]:
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


def _rate(run: Completion) -> float | None:
    """Tokens per second after the first one, whose time is the prompt's."""
    if not run.first or not run.last or run.last <= run.first:
        return None
    return (run.n_tokens - 1) / (run.last - run.first - run.keeping)


def _prompt_rate(run: Completion) -> float | None:
    """Evaluated tokens per second; None where none was."""
    n = run.llm.stats().prefill.tokens
    return n / (run.first - run.started) if run.first and n else None


def _summary(run: Completion) -> str:
    """The line on stderr."""
    s: Stats = run.llm.stats()
    d, rate, prompt_rate = s.decode, _rate(run), _prompt_rate(run)
    cached = len(run.prompt.tokens) - s.prefill.tokens
    parts = [
        f"{run.n_tokens} token{'' if run.n_tokens == 1 else 's'}" + ("" if rate is None else f", {rate:.1f} tok/s"),
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
        f"resident all {s.resident_bytes / MIB:.1f} MiB"
        if s.io == "load"
        else f"resident {s.resident_bytes / MIB:.1f} of {s.budget_bytes / MIB:.1f} MiB",
    ]
    return " | ".join(parts)
