"""`cacheroute generate`: answers a prompt, printing tokens as they come."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute.cli import options
from cacheroute.engine.stats import Stats
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import MIB
from cacheroute.routing.eviction import DEFAULT
from cacheroute.trace import task_profile

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


def generate(
    model: options.ModelOption = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt; piped-in text is appended to it.")] = None,
    file: options.FileOption = None,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens to generate; -1: until the model stops.")] = 256,
    ctx_size: Annotated[
        int, typer.Option("-c", "--ctx-size", min=0, help="Context in tokens; 0: as the model was trained.")
    ] = 4096,
    threads: options.ThreadsOption = None,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Seed of the sampler; -1: a random one.")] = -1,
    temp: Annotated[float, typer.Option("--temp", min=0, help="Sampling temperature; 0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample among the k likeliest tokens; 0: all.")] = 40,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Sample among the likeliest that sum to p.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1, help="Least probability, over the likeliest token's.")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", min=0, help="Penalty for repeated tokens; 1: none.")] = 1.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat template.")] = False,
    budget: Annotated[
        str, typer.Option("--budget", help="Experts kept in memory: 50%, 30 (per layer), 2GiB (all layers) or all.")
    ] = "50%",
    routing: Annotated[str, typer.Option("--routing", help="How experts are chosen; see `cacheroute routing`.")] = "original",
    eviction: options.EvictionOption = DEFAULT,
    io: options.IoOption = "mmap",
    flash_mbps: options.FlashOption = None,
    prefetch: options.PrefetchOption = 0,
    warm_start: options.WarmStartOption = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="text, json (one object at the end) or jsonl (one object per piece of text).")
    ] = "text",
) -> None:
    """Answer a prompt. The answer goes to stdout, statistics go to stderr."""
    if output not in ("text", "json", "jsonl"):
        raise UsageError(f"There is no output {output!r}; there are text, json and jsonl.")
    text = _prompt(prompt, file)
    seed = secrets.randbelow(2**31) if seed < 0 else seed
    task = task_profile.load(warm_start) if warm_start else None
    from cacheroute.engine.llama import Llama
    from cacheroute.model import catalogue
    from cacheroute.routing import tuned

    path = catalogue.resolve(model)
    routing, eviction = tuned.resolve(path, budget, routing, eviction)
    llm = Llama(
        str(path),
        budget=budget,
        routing=routing,
        eviction=eviction,
        io=io,
        flash_mbps=flash_mbps,
        prefetch=prefetch,
        n_ctx=ctx_size,
        n_threads=options.threads(threads),
        n_threads_batch=options.threads(threads),
        seed=seed,
        verbose=False,
    )
    if task:
        llm.warm(task)
    if llm.routing and llm.routing.lossy:
        print(f"{llm.routing} is lossy: it may run other experts than the model chooses.", file=sys.stderr)
        options.say_slow([llm.routing])
    sampling = dict(
        max_tokens=n_predict if n_predict >= 0 else None,
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    run = _Run(llm)
    try:
        for piece in run.pieces(text, raw, sampling):
            if output == "text":
                sys.stdout.write(piece)
                sys.stdout.flush()
            elif output == "jsonl":
                print(json.dumps({"text": piece}), flush=True)
        if output == "text" and not run.text.endswith("\n"):
            print(flush=True)
    except KeyboardInterrupt:
        run.finish_reason = "interrupted"
        raise
    finally:
        report = run.report(path, seed)
        if output != "text" and report["finish_reason"]:
            if output == "jsonl":
                report.pop("text")
            print(json.dumps(report), flush=True)
        if report["finish_reason"]:
            print(run.summary(), file=sys.stderr)
        llm.close()


def _prompt(prompt: str | None, file: Path | None) -> str:
    """What was typed, then the file, then what was piped in, a blank line between them."""
    parts = [prompt] if prompt else []
    try:
        if file:
            parts.append(file.read_text(encoding="utf-8"))
        if sys.stdin is not None and not sys.stdin.isatty():
            parts.append(sys.stdin.buffer.read().decode("utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"The prompt {f'in {file} ' if file else ''}is not UTF-8 text; convert it first.") from None
    except OSError as e:
        raise UsageError(f"{file or 'standard input'} cannot be read ({e.strerror}).") from None
    text = "\n\n".join(p for p in parts if p.strip())
    if not text:
        raise UsageError("The prompt is empty; give one with -p, -f or a pipe.")
    return text


class _Run:
    """One generation with its text and its times."""

    def __init__(self, llm: Llama) -> None:
        self.llm = llm
        self.text = ""
        self.finish_reason = ""
        self.start = self.first = self.end = time.perf_counter()

    def pieces(self, prompt: str, raw: bool, sampling: dict[str, Any]) -> Iterator[str]:
        """Text as it comes. Raises CacherouteError when the prompt does not fit the context."""
        llm = self.llm
        try:
            if raw or not any(k.startswith("tokenizer.chat_template") for k in llm.metadata):
                stream = llm.create_completion(prompt, stream=True, **sampling)
            else:
                stream = llm.create_chat_completion([{"role": "user", "content": prompt}], stream=True, **sampling)
            for chunk in stream:
                choice = chunk["choices"][0]
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                self.end = time.perf_counter()
                if piece:
                    self.first = self.end if not self.text else self.first
                    self.text += piece
                    yield piece
        except ValueError as e:
            if "exceed context" not in str(e):
                raise
            raise CacherouteError(
                f"The prompt does not fit the context of {llm.n_ctx()} tokens; give a larger one with -c."
            ) from None
        if llm.n_tokens + 1 >= llm.n_ctx() and self.finish_reason == "length":
            print(f"The context of {llm.n_ctx()} tokens is full; give a larger one with -c.", file=sys.stderr)

    def report(self, path: Path, seed: int) -> dict[str, Any]:
        """The object of `-o json`."""
        stats = self.llm.stats()
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "model": str(path),
            "seed": seed,
            "n_prompt": stats.prefill.tokens,
            "n_gen": stats.decode.tokens,
            "prompt_ts": self._rate(stats.prefill.tokens, self.first - self.start),
            "ts": self._rate(stats.decode.tokens, self.end - self.first),
            "time_to_first_token_s": self.first - self.start,
            "miss_rate": stats.decode.miss_rate,
            "swap_rate": stats.decode.swap_rate,
            "read_mib_per_token": stats.decode.read_mib_per_token,
            "stats": asdict(stats),
        }

    @staticmethod
    def _rate(n: int, seconds: float) -> float:
        return n / seconds if seconds > 0 else 0.0

    def summary(self) -> str:
        """The line on stderr."""
        s: Stats = self.llm.stats()
        d = s.decode
        parts = [
            f"{d.tokens} tokens, {self._rate(d.tokens, self.end - self.first):.1f} tok/s",
            f"prompt {s.prefill.tokens}, {self._rate(s.prefill.tokens, self.first - self.start):.1f} tok/s",
            f"first token {self.first - self.start:.2f} s",
            f"miss {100 * d.miss_rate:.1f}%",
            f"read {d.read_mib_per_token:.2f} MiB/token",
            f"swapped {d.swapped}/{d.examined}",
            *([f"dropped {d.dropped}/{d.examined}"] if d.dropped else []),
            *([f"prefetched {d.prefetched}, {d.prefetch_used} of them chosen"] if self.llm.prefetch else []),
            f"resident {s.resident_bytes / MIB:.1f} of {s.budget_bytes / MIB:.1f} MiB",
        ]
        return " | ".join(parts)
