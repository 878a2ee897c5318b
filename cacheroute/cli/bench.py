"""`cacheroute bench`: measures the speed of several settings on this machine."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from cacheroute import interrupts
from cacheroute.bench.arms import Arm, Stopped, configure, control_arm, run_arms
from cacheroute.cli import bench_table, options, progress, table
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.files import MIB, size
from cacheroute.routing import prompt_routing as prompts
from cacheroute.routing import strategies
from cacheroute.routing.eviction import DEFAULT
from cacheroute.trace import forced_scores, task_profile

_SECONDS_TO_STOP = 5.0  # a run; then Ctrl-C ends the program without a table


def bench(
    ctx: typer.Context,
    model: options.ModelOption = None,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", min=0, help="Number of prompt tokens.")] = 512,
    n_gen: Annotated[
        int, typer.Option("-n", "--n-gen", min=0, help="Number of tokens decoded one by one after the prompt.")
    ] = 128,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Runs of every combination, interleaved.")] = 5,
    budget: options.BudgetsOption = "50%",
    routing: Annotated[
        str, typer.Option("--routing", help="Routings, separated by commas; see `cacheroute routing`.")
    ] = "original,cache-prior:lambda=0.2",
    prompt_routing: Annotated[
        str, typer.Option("--prompt-routing", help="How experts of prompts are chosen; several separated by commas.")
    ] = "original",
    eviction: Annotated[
        str | None,
        typer.Option(
            "--eviction", help=f"Evictions, separated by commas. [default: {DEFAULT}, and original with lru as the baseline]"
        ),
    ] = None,
    io: Annotated[
        str,
        typer.Option(
            "--io",
            help="How misses are read: auto, direct or buffered, several separated by commas; load: all experts are read with "
            "the model, as llama.cpp does it, which auto does with --budget all alone.",
        ),
    ] = "auto",
    control: Annotated[
        bool, typer.Option("--control", help="Also run llama.cpp's own mmap in a process limited to the same memory (Linux).")
    ] = False,
    control_repack: Annotated[
        str, typer.Option("--control-repack", metavar="off|on", help="Whether the control repacks weights; off,on runs both.")
    ] = "off",
    floor: Annotated[
        bool,
        typer.Option(
            "--floor", help="Also measure the floor: max(compute with all resident and not repacked, bytes missed / bandwidth)."
        ),
    ] = False,
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar=forced_scores.FORM,
            help=f"Route by the scores of a trace, or by random ones, instead of the model's. {forced_scores.HELP}",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="The text to run. [default: the held-out text of the package]")
    ] = None,
    threads: options.ThreadsOption = None,
    flash_mbps: options.FlashOption = None,
    prefetch: Annotated[
        str,
        typer.Option(
            "--prefetch", help="How many experts of the next layer to prefetch at most; several numbers separated by commas."
        ),
    ] = "0",
    warm_start: options.WarmStartOption = None,
    wide: options.WideOption = False,
    output: options.OutputOption = "text",
) -> None:
    """Measure the speed of budgets, routings and evictions. Every combination runs the same tokens from the same cold start.

    A row that is not to be trusted is marked with !, and the reason is below the table. Ctrl-C keeps the runs that are finished.
    """
    table.check(output, wide=wide)
    if not control:
        options.refuse_unused(ctx, "control_repack", "is of --control; give both, or neither.")
    repacks = options.names(control_repack)
    if not repacks or set(repacks) - {"off", "on"}:
        raise UsageError(f"--control-repack is off, on, or both, not {control_repack!r}.")
    if n_prompt + n_gen == 0:
        raise UsageError("There is nothing to run; give -p or -n above 0.")
    parsed = {r: strategies.parse(r) for r in options.names(routing) if r != "tuned"}
    options.say_slow(parsed.values())
    typed = [str(parsed.get(r, r)) for r in options.names(routing)]
    prefetch_counts = _counts(prefetch)
    evictions = options.names(DEFAULT if eviction is None else eviction)
    prompts_typed = [p if p == prompts.TUNED else str(prompts.parse(p)) for p in options.names(prompt_routing)]
    budgets, ios = options.names(budget), options.names(io)
    if not all((budgets, typed, evictions, ios, prompts_typed)):
        raise UsageError("There is nothing to compare; give at least one budget, routing and eviction.")
    task = task_profile.load(warm_start) if warm_start else None
    source = None if replay is None else forced_scores.parse(replay)
    if source and source.trace and any(prefetch_counts):
        raise UsageError("A trace has no predictions to prefetch by; replay synthetic scores, or leave --prefetch out.")
    if source and source.trace and any(r.speculates for r in parsed.values()):
        raise UsageError("A trace has no predictions for `speculate` to go by; replay synthetic scores.")
    from cacheroute.engine import stores
    from cacheroute.engine.llama import Llama
    from cacheroute.model import catalogue, context_memory
    from cacheroute.routing import tuned

    path = catalogue.resolve(model)
    ios = _ios(ios, path, budgets, reads=floor or flash_mbps is not None or any(prefetch_counts))
    loads = stores.LOAD in ios
    if loads and (len(ios) > 1 or floor):
        raise UsageError("With --io load nothing is read: it stands alone, and has no floor of reads to be compared with.")
    if loads and len(budgets) > 1:
        raise UsageError("With --io load all experts are in memory: it goes with --budget all alone.")
    settings = (budgets, typed, evictions, ios, prefetch_counts, prompts_typed)
    context_memory.check(path, n_prompt + n_gen, n_prompt, option="-p and -n")
    arms = [
        Arm(b, *tuned.resolve(path, b, r, e), i, n, prompt_routing=prompts.resolve(path, b, p))
        for b, r, e, i, n, p in itertools.product(*settings)
    ]
    if eviction is None:
        arms = [*(Arm(b, "original", "lru", i) for b, i in itertools.product(budgets, ios)), *arms]
    arms = list(dict.fromkeys(arms))
    llm = Llama(
        str(path),
        budget=budgets[0] if loads else None,
        routing=None,  # each arm configures its own
        io=ios[0] if loads else "auto",
        n_ctx=max(n_prompt + n_gen, 64),
        n_threads=options.threads(threads),
        n_threads_batch=options.threads(threads),
        flash_mbps=flash_mbps,
        verbose=False,
    )
    with closing(llm):
        if task:
            llm.warm(task)
        forced = forced_scores.bind(source, llm.layout, n_prompt, n_gen) if source else None
        for arm in arms:  # all settings are checked before the first run
            configure(llm, arm)
        tokens = llm.tokenize(options.text(file).encode(), add_bos=True)
        if control:
            arms += [control_arm(b, repack=r == "on") for b, r in itertools.product(dict.fromkeys(budgets), repacks)]
            if source:
                _say("the control chooses its own experts: a replay cannot be forced on it")
            if flash_mbps:
                _say("the control reads as fast as the device goes: the kernel's own reads are not paced")
        stopped = None
        interrupts.command_goes_on(_SECONDS_TO_STOP)
        try:
            with progress.steps("bench", (len(arms) + floor) * repetitions) as begin:
                rows = run_arms(
                    llm, arms, tokens, n_prompt, n_gen, repetitions, begin, against_floor=floor, replay=forced, say=_say
                )
        except Stopped as e:
            stopped, rows = e, e.rows
        foreign = max((row.foreign_mib or 0.0 for row in rows), default=0.0)
        if foreign and output not in ("text", "md"):  # people see it below or in the table
            held = size(foreign * MIB)
            _say(f"{held} of experts were in memory before a run, held by another process that has the file mapped")
        table.write(rows, output, bench_table.view(rows), wide=wide, name="bench")
    if stopped:
        raise KeyboardInterrupt("Stopped; the rows are of the runs that were finished.")


def _ios(typed: list[str], path: Path, budgets: list[str], *, reads: bool) -> list[str]:
    """`--io`, or what it is by default: a model with all experts in memory can have no smaller budget, and nothing to read.

    `reads`: whether the run measures or paces reads. Raises UsageError for a budget that does not fit the model.
    """
    if typed != ["auto"]:
        return typed
    from cacheroute.model import experts, gguf_file
    from cacheroute.routing import budget

    layout = experts.layout(gguf_file.read(path))
    whole = [b for b in budgets if budget.parse(b, layout).capacity == layout.n_expert]
    if len(whole) == len(budgets) and not reads:
        return ["load"]
    if whole:
        _say(
            f"--budget {whole[0]} leaves the experts in the file here, as the other settings need them there; "
            "alone it loads them as llama.cpp does, repacked, and may compute faster"
        )
    return typed


def _counts(text: str) -> list[int]:
    """Numbers between commas. Raises UsageError for anything else."""
    try:
        counts = [int(n) for n in options.names(text)]
    except ValueError:
        counts = []
    if not counts or min(counts) < 0 or max(counts) > options.MAX_COUNT:
        raise UsageError(f"--prefetch is a number of experts, or some separated by commas, not {text!r}.")
    return counts


def _say(text: str) -> None:
    say(f"cacheroute: {text}.")
