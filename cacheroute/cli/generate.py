"""`cacheroute generate`: answers a prompt, printing tokens as they come."""

from __future__ import annotations

import secrets
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute import interrupts
from cacheroute.cli import options, progress, prompts_file, summary
from cacheroute.cli import prompt as prompt_text
from cacheroute.cli import sampling as sampling_options
from cacheroute.cli.settings import load, say_start
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.files import as_json, size
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT
from cacheroute.trace import task_profile

if TYPE_CHECKING:
    from cacheroute.engine.micro_batch import Plan


def generate(
    model: options.ModelOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt; piped-in text is appended to it.")
    ] = None,
    file: options.FileOption = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE|-", help="Answer many prompts, one a line of a file or of standard input (-)."),
    ] = None,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Leave out that many of --prompts: those that are answered.")] = 0,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", help="Leave standard input alone, as </dev/null does.")] = False,
    system: Annotated[str, typer.Option("-sys", "--system-prompt", metavar="TEXT", help="The system's message.")] = "",
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", min=-2, help="Tokens to generate; -1: until it stops.")] = 256,
    ctx_size: options.CtxOption = 4096,
    threads: options.ThreadsOption = None,
    seed: options.SeedOption = -1,
    temp: options.TempOption = 0.8,
    top_k: options.TopKOption = 40,
    top_p: options.TopPOption = 0.95,
    min_p: options.MinPOption = 0.05,
    repeat_penalty: options.RepeatOption = 1.0,
    stop: sampling_options.StopOption = None,
    grammar: sampling_options.GrammarOption = None,
    grammar_file: sampling_options.GrammarFileOption = None,
    json_schema: sampling_options.JsonSchemaOption = None,
    json_schema_file: sampling_options.JsonSchemaFileOption = None,
    logit_bias: sampling_options.LogitBiasOption = None,
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
            "-ub",
            "--ubatch-size",
            min=1,
            help="Tokens of a prompt computed together; fewer than 64 are computed in another way, and an answer may differ. "
            "Default: as many as fit free memory, at least 64.",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="All statistics; say how a prompt is computed, and show its progress where stderr is no terminal, too.",
        ),
    ] = False,
    quiet: options.QuietOption = False,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="text, json (one object at the end) or jsonl (one object per piece of text, or per answer with --prompts). "
            "[default: text, with --prompts jsonl]",
        ),
    ] = None,
) -> None:
    """Answer a prompt. The answer goes to stdout, statistics and the progress of a long prompt go to stderr.

    The prompt is -p, then the file of -f, then what is piped in or redirected from a file, a blank line between them. With -p or
    -f a line on stderr says how much of standard input was read. A file that a shell loop reads is left to the loop; where a loop
    reads from a pipe, as in `ls | while read x`, --no-stdin or </dev/null leaves its input to it.

    A line of --prompts is a text, or a JSON object with prompt and, where wanted, id, system and n_predict. Each is answered by a
    line of JSON, in the same order: index (from 1), id, text, seed (-s, one more for each prompt) and counts, or an error. An
    answer does not depend on the lines before. After an interruption --skip goes on: `--skip $(wc -l <answers) >>answers`.
    """
    output = output or ("text" if prompts is None else "jsonl")
    if output not in ("text", "json", "jsonl"):
        raise UsageError(f"There is no output {output!r}; there are text, json and jsonl.")
    options.check_verbosity(verbose=verbose, quiet=quiet)
    if prompt and len(prompt) > 1:
        raise UsageError(f"-p is given {len(prompt)} times; write one text, or many with --prompts.")
    if raw and system:
        raise UsageError("A system's message is part of the chat template; leave out --raw or --system-prompt.")
    others = bool(prompt or file or prompt_cache)
    many = prompts_file.source(prompts, skip, output, others=others, stdin=not no_stdin)
    text = "" if many else prompt_text.text(prompt[0] if prompt else None, file, stdin=not no_stdin)
    constraints = sampling_options.constraints(stop, grammar, grammar_file, json_schema, json_schema_file, logit_bias)
    seed = secrets.randbelow(2**31) if seed < 0 else seed
    task = task_profile.load(warm_start) if warm_start else None
    from cacheroute.engine import completion
    from cacheroute.engine import prompt_cache as caches
    from cacheroute.engine.asked import Asked
    from cacheroute.model import catalogue, context_memory

    if prompt_cache:
        caches.check(prompt_cache)
    path = catalogue.resolve(model)
    context_memory.check(path, ctx_size)
    settings = Asked(budget, routing, eviction, io, prefetch, prompt_routing)
    more = {"n_ubatch": ubatch_size, "seed": seed}
    llm = load(path, settings, n_ctx=ctx_size, n_threads=threads, flash_mbps=flash_mbps, **more)
    if task:
        llm.warm(task)
    sampling: dict[str, Any] = dict(temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty)
    limit = n_predict if n_predict >= 0 else None
    with closing(llm), progress.PromptLine(verbose=verbose) as llm.prompt_progress:
        sampling |= constraints.sampling(llm)
        chat = not raw and completion.has_chat_template(llm)
        if system and not chat:
            raise UsageError("The model's file has no chat template, so there is no place for a system's message.")
        if many:
            say_start(llm, quiet=quiet)
            own = prompts_file.Settings(chat, system, limit, seed, sampling, constraints)
            return prompts_file.answer(llm, many, own, skip, quiet=quiet)
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
        asked = completion.chat_prompt(llm, messages) if chat else completion.raw_prompt(llm, text)
        asked = constraints.ending(asked)
        kept = prompt_cache is not None and prompt_cache.exists()

        def begins() -> None:
            say_start(llm, quiet=quiet)
            if kept or quiet:  # generate() decides what of a kept prompt is evaluated again
                return
            plan = llm.plan(len(asked.tokens))
            if verbose:
                say(_plan(plan, loaded=llm.io == "load"))
            elif plan.passes > 1 and llm.io != "load":
                say(
                    f"the prompt of {plan.n_tokens} tokens takes {plan.passes} passes, each of which reads the experts again: a "
                    "smaller --budget leaves room for longer ones"
                )

        run = completion.Completion(llm, asked, limit, seed, sampling, prompt_cache, begins)
        try:
            for piece in run.pieces():
                if output == "text":
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                elif output == "jsonl":
                    print(as_json({"text": piece}), flush=True)
            if output == "text" and not run.text.endswith("\n"):
                print(flush=True)
            if run.full:
                say(f"The context of {llm.n_ctx()} tokens is full; give a larger one with -c.")
        except KeyboardInterrupt:
            run.finish_reason = summary.INTERRUPTED
            if output == "text" and run.text and not run.text.endswith("\n"):
                print(flush=True)
            raise KeyboardInterrupt("" if run.first and not quiet else interrupts.STOPPED) from None
        finally:
            if run.finish_reason and (run.first or run.finish_reason != summary.INTERRUPTED):
                summary.report(run, output, path, verbose=verbose, quiet=quiet)
    if run.unkept:
        raise run.unkept


def _plan(plan: Plan, *, loaded: bool) -> str:
    """How a prompt is computed."""
    tokens, passes = "" if plan.n_tokens == 1 else "s", "" if plan.passes == 1 else "es"
    return (
        f"prompt of {plan.n_tokens} token{tokens}: {plan.passes} pass{passes} of {plan.length}, "
        f"about {size(plan.compute)} beside the experts; "
        + ("all experts in memory, as llama.cpp loads them" if loaded else f"up to {size(plan.ahead)} are read ahead")
    )
