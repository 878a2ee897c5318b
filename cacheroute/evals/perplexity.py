"""Stepped perplexity: the negative log-likelihood of text, one token per decode, so that the routing acts on every scored token.

A batched pass would be faster and is no option for a lossy routing: a prompt is routed by `original` (arXiv 2412.00099 measures
decoding), and what a token's routing is depends on the experts that the tokens before it left in the cache. A batch has
neither, so its figure is `original`'s and hides the damage.

Knows a loaded model; knows no command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cacheroute.errors import UsageError
from cacheroute.evals.text import Chunk
from cacheroute.files import MIB
from cacheroute.install import patched_llama_cpp
from cacheroute.native.counters import Counters

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

Floats = npt.NDArray[np.float64]
Row = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ChunkScore:
    """One chunk: `nll` in nats of each scored token, counters of the decoded ones, `read_bytes` as misses x bytes of an expert.

    `layers`: (misses, swapped slots) of each MoE layer. `seconds` of decoding, without the prompt.
    """

    index: int
    nll: Floats
    counters: Counters
    layers: tuple[tuple[int, int], ...]
    read_bytes: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Of all chunks: perplexity with its standard error as llama-perplexity computes it (tokens taken as independent)."""

    n_tokens: int
    nll: float
    ppl: float
    ppl_se: float
    miss_rate: float
    swap_rate: float
    drop_rate: float
    read_mib_per_token: float
    seconds: float


def log_probabilities(llm: Llama) -> Row:
    """log p of every token of the vocabulary, [n_vocab], after the last evaluated one."""
    logits = np.array(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)), dtype=np.float32)
    logits -= logits.max()
    logits -= np.float32(np.log(np.exp(logits).sum(dtype=np.float64)))
    return logits


def score(
    llm: Llama,
    chunks: Sequence[Chunk],
    *,
    carry: bool = False,
    watch: Callable[[Row], None] | None = None,
    prompt: Callable[[Chunk], None] | None = None,
) -> Iterator[ChunkScore]:
    """Scores chunks with the settings that `llm` has, one after the other.

    Every chunk starts with an empty cache and fresh running ranges, so its score depends on nothing but its tokens and the
    settings; with `carry` they are kept from chunk to chunk (the sequence is not). `watch` gets the log-probabilities of
    each scored position. `prompt` brings the model to where the tokens before the scored ones are evaluated, in place of
    evaluating them. Raises UsageError when a chunk does not fit the context of the model.
    """
    if chunks and max(len(c.tokens) for c in chunks) - 1 > llm.n_ctx():  # the last token is not evaluated
        raise UsageError(f"A chunk of {len(chunks[0].tokens)} tokens does not fit the context of {llm.n_ctx()}.")
    llm.reset()
    for chunk in chunks:
        if carry:
            patched_llama_cpp.module().Llama.reset(llm)  # the sequence only; ours empties the cache, too
        else:
            llm.reset()
        if chunk.first:
            if prompt:
                prompt(chunk)
            else:
                llm.eval(chunk.tokens[: chunk.first])
        yield _score(llm, chunk, watch)


def _score(llm: Llama, chunk: Chunk, watch: Callable[[Row], None] | None) -> ChunkScore:
    before, layers_before = llm.stats().decode, llm.decoded_by_layer()
    nll = np.empty(chunk.n_scored)
    start = time.perf_counter()
    with llm.decoding():
        for i in range(chunk.n_scored):
            llm.eval([chunk.tokens[chunk.first + i]])
            log_p = log_probabilities(llm)
            nll[i] = -log_p[chunk.tokens[chunk.first + i + 1]]
            if watch:
                watch(log_p)
    seconds = time.perf_counter() - start
    layers = [after - earlier for after, earlier in zip(llm.decoded_by_layer(), layers_before, strict=True)]
    return ChunkScore(
        index=chunk.index,
        nll=nll,
        counters=llm.stats().decode - before,
        layers=tuple((c.misses, c.swapped) for c in layers),
        read_bytes=sum(c.misses * layer.expert_bytes for c, layer in zip(layers, llm.layout.layers, strict=False)),
        seconds=seconds,
    )


def summary(scores: Sequence[ChunkScore]) -> Summary:
    """Raises UsageError when nothing was scored."""
    if not scores:
        raise UsageError("Nothing was scored.")
    nll = np.concatenate([s.nll for s in scores])
    counters = total([s.counters for s in scores])
    mean = float(nll.mean())
    error = float(np.sqrt(max(float((nll**2).mean()) - mean**2, 0.0) / max(len(nll) - 1, 1)))
    return Summary(
        n_tokens=len(nll),
        nll=mean,
        ppl=float(np.exp(mean)),
        ppl_se=error * float(np.exp(mean)),
        miss_rate=counters.miss_rate,
        swap_rate=counters.swap_rate,
        drop_rate=counters.dropped / max(counters.examined, 1),
        read_mib_per_token=sum(s.read_bytes for s in scores) / MIB / len(nll),
        seconds=sum(s.seconds for s in scores),
    )


def total(counters: Sequence[Counters]) -> Counters:
    """The sums of all fields."""
    return Counters(**{f.name: sum(getattr(c, f.name) for c in counters) for f in fields(Counters)})
