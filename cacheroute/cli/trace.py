"""`cacheroute trace`: records the router's scores and choices."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute.cli import options, progress
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.files import check_distinct, check_new, size
from cacheroute.routing.eviction import DEFAULT
from cacheroute.trace import task_profile, trace_file

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


def trace(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write the trace to.")],
    model: options.ModelOption = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The text to run.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="A file with the text to run. [default: the held-out text of the package]")
    ] = None,
    n_predict: Annotated[
        int, typer.Option("-n", "--n-predict", min=0, help="Use the text as a prompt and generate that many tokens, greedily.")
    ] = 0,
    n_prompt: Annotated[int, typer.Option("--n-prompt", min=0, help="Run that many tokens of each sequence as a prompt.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=0, help="Stop after that many tokens of the text; 0: all.")] = 0,
    ctx_size: Annotated[
        int, typer.Option("-c", "--ctx-size", min=2, help="Tokens per sequence; each starts with an empty cache.")
    ] = 1024,
    threads: options.ThreadsOption = None,
    budget: options.StudyBudgetOption = None,
    routing: Annotated[str, typer.Option("--routing", help="How experts are chosen; see `cacheroute routing`.")] = "original",
    eviction: options.EvictionOption = DEFAULT,
    io: Annotated[
        str, typer.Option("--io", help="How misses are read: auto, direct, buffered, or none (only counted).")
    ] = "auto",
    save_profile: Annotated[
        Path | None, typer.Option("--save-profile", help="Also write how often each expert was used, for --warm-start.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Record the router's scores and choices, for `simulate`.

    One record for each token and layer. The text is decoded token by token in sequences of -c tokens; with -n it is a prompt
    instead.
    """
    if prompt is not None and file is not None:
        raise UsageError("Give one text, with -p or with -f.")
    if n_predict:
        options.refuse_unused(
            ctx, "n_prompt", "is of a text that is decoded; with -n all of it is a prompt. Leave one of them out."
        )
    text = options.text(file) if prompt is None else prompt
    if not text.strip():
        raise UsageError("The text is empty; give one with -p or -f.")
    for path in (output, save_profile):
        if path:
            check_new(path, force=force)
    from cacheroute.engine.llama import Llama
    from cacheroute.model import catalogue, context_memory, gguf_file

    path = catalogue.resolve(model)
    check_distinct([p for p in (output, save_profile) if p], [*gguf_file.read(path).paths, *([file] if file else [])])
    context_memory.check(path, ctx_size)
    llm = Llama(
        str(path),
        budget=budget,
        routing=routing,
        eviction=eviction,
        io=io,
        n_ctx=ctx_size,
        n_threads=options.threads(threads),
        n_threads_batch=options.threads(threads),
        verbose=False,
    )
    with closing(llm):
        options.say_slow([llm.routing] if llm.routing else [])
        tokens = llm.tokenize(text.encode(), add_bos=True)
        tokens = tokens[: max_tokens or len(tokens)]
        header = trace_file.Header.of(llm.layout, str(llm.routing), llm.eviction, llm.budget.capacity)
        record = trace_file.record_dtype(header.n_expert, header.n_used, mass=False).itemsize
        per_token = record * len(header.layers)
        n = len(tokens) + n_predict
        say(f"{n} tokens x {len(header.layers)} layers x {record} bytes: {size(n * per_token)}")
        try:
            with trace_file.TraceWriter(output, header, force=force) as writer, llm.tracing(writer.append):
                if n_predict:
                    _generate(llm, tokens, n_predict)
                else:
                    _step(llm, tokens, n_prompt, ctx_size)
        except KeyboardInterrupt:
            kept = f" The records so far are in {writer.part}; `simulate` can read it." if writer.n_records else ""
            raise KeyboardInterrupt(f"Stopped.{kept}") from None
        stats = llm.stats().decode
    done = trace_file.read(output)
    say(
        f"{output}: {len(done.records)} records, {size(output.stat().st_size)} | {stats.tokens} tokens decoded | "
        f"miss {100 * stats.miss_rate:.1f}% | swapped {stats.swapped}/{stats.examined}",
    )
    if save_profile:
        task_profile.save(task_profile.summarise(done), save_profile, force=force)


def _step(llm: Llama, tokens: list[int], n_prompt: int, n_sequence: int) -> None:
    with progress.bar("trace", len(tokens)) as advance:
        for start in range(0, len(tokens), n_sequence):
            sequence = tokens[start : start + n_sequence]
            llm.reset()
            if n_prompt:
                llm.eval(sequence[:n_prompt])
                advance(len(sequence[:n_prompt]), "trace")
            with llm.decoding():
                for token in sequence[n_prompt:]:
                    llm.eval([token])
                    advance(1, "trace")


def _generate(llm: Llama, tokens: list[int], n_predict: int) -> None:
    from cacheroute.engine.completion import is_end

    with progress.bar("trace", n_predict) as advance:
        for n, token in enumerate(llm.generate(tokens, temp=0.0)):
            if n == n_predict or is_end(llm, token):  # each token is recorded when the next is asked for
                break
            advance(1, "trace")
