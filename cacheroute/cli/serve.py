"""`cacheroute serve`: the OpenAI API and a page to chat, for one model."""

from __future__ import annotations

import re
from contextlib import closing
from typing import Annotated

import typer

from cacheroute import interrupts
from cacheroute.cli import options
from cacheroute.cli.settings import load, say_start
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, UsageError, pip_install
from cacheroute.files import MIB, is_text
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT

_SECONDS_TO_STOP = 5.0
_PACKAGES = "starlette uvicorn pydantic prometheus_client"


def serve(
    model: options.ModelOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="Answer only those who send this key; $CACHEROUTE_SERVE_API_KEY keeps it out of `ps`."),
    ] = None,
    alias: Annotated[str, typer.Option("-a", "--alias", help="The model's name for clients. [default: that of -m]")] = "",
    queue: Annotated[int, typer.Option("--queue", min=0, max=10_000, help="Requests that may wait; more are refused.")] = 16,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds of a request, waiting included.")] = 600,
    max_body: Annotated[int, typer.Option("--max-body", min=1, max=1024, help="MiB of a request.")] = 1,
    ctx_size: options.CtxOption = 4096,
    threads: options.ThreadsOption = None,
    budget: options.BudgetOption = budgets.AUTO,
    routing: Annotated[str, typer.Option("--routing", help="How experts are chosen; see `cacheroute routing`.")] = "original",
    prompt_routing: options.PromptRoutingOption = "original",
    eviction: options.EvictionOption = DEFAULT,
    io: options.IoOption = "auto",
    flash_mbps: options.FlashOption = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="A line on stderr for each request.")] = False,
) -> None:
    """Answer clients of the OpenAI API, one after the other, and a browser, which finds a page to chat.

    /v1/chat/completions and /v1/completions with streaming, stop strings, JSON schemas and logprobs; /v1/models, /health, and
    /metrics for Prometheus. `usage` has cacheroute's own counters. A client that leaves stops its answer. Without --host only
    this machine is heard. Ctrl-C or SIGTERM ends the server.

    \b
    curl http://127.0.0.1:8080/v1/chat/completions \\
      -H "Content-Type: application/json" \\
      -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    if not is_text(api_key or "") or not is_text(alias):
        raise UsageError("A key and a name are UTF-8 text.")
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise UsageError(
            "--api-key is of printable ASCII characters without spaces, as a header has it; for no key leave it out."
        )
    try:
        from cacheroute.serve import server
        from cacheroute.serve.api import Limits
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in (*_PACKAGES.split(), "pydantic_core", "anyio", "h11"):
            raise
        raise CacherouteError(f"`cacheroute serve` needs {e.name}; run {pip_install(_PACKAGES)}.") from None
    from cacheroute.engine.asked import Asked
    from cacheroute.engine.completion import has_chat_template
    from cacheroute.model import catalogue, context_memory

    path = catalogue.resolve(model)
    settings = Asked(budget, routing, eviction, io, 0, prompt_routing)
    context_memory.check(path, ctx_size)
    with closing(server.bind(host, port, timeout)) as bound:  # before the model is loaded, which takes long
        llm = load(path, settings, n_ctx=ctx_size, n_threads=threads, flash_mbps=flash_mbps)
        with closing(llm):
            say_start(llm)
            if not has_chat_template(llm):
                say("The model's file has no chat template: /v1/completions works, /v1/chat/completions does not.")
            if not api_key and not server.is_loopback(bound):
                say("Whoever reaches this address may use the model; --api-key KEY asks them for a key.")
            name = alias or _name(model)
            interrupts.command_goes_on(_SECONDS_TO_STOP)
            server.serve(
                llm,
                name,
                bound,
                Limits(max_body * MIB, timeout, queue),
                key=api_key or "",
                started=lambda: say(f"{name}: listening on {server.url(bound)} (Ctrl-C or SIGTERM ends it)"),
                fault=lambda e: say(f"cacheroute: a request failed ({type(e).__name__}: {e})."),
                line=say if verbose else lambda _: None,
            )


def _name(model: str | None) -> str:
    """A file's without its folder and ending; any other as it was typed."""
    if model is None:
        return "demo"
    return re.split(r"[/\\]", model)[-1][: -len(".gguf")] if model.lower().endswith(".gguf") else model
