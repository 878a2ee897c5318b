"""Stepped perplexity: the negative log-likelihood of text, one token per decode, so that the routing acts on every scored token.

A batched pass would be faster but cannot measure a lossy routing: a prompt is routed by `original` (arXiv 2412.00099 measures
decoding), and the routing of a token depends on the experts that the tokens before it left in the cache. A batch has
neither, so its perplexity is that of `original`.

Knows a loaded model; knows no command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cacheroute.errors import UsageError
from cacheroute.evals.text import Chunk
from cacheroute.files import MIB
from cacheroute.install import patched_llama_cpp
from cacheroute.model.experts import ExpertLayout

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

Floats = npt.NDArray[np.float64]
LogP = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ChunkScore:
    """One chunk with one routing, over its scored tokens.

    `nll32`: bytes of little-endian float32, nats of each token; logits are float32, so nothing is lost. `misses` and `swapped`
    are slots of each MoE layer, of `selected` that ran and `dropped` that did not, all layers together. `missed_bytes` = misses x
    bytes of an expert, not what was asked of the device. `seconds` of decoding, without the prompt and without a `watch`.
    """

    chunk: int
    nll32: bytes
    selected: int
    dropped: int
    examined: int
    misses: tuple[int, ...]
    swapped: tuple[int, ...]
    missed_bytes: int
    seconds: float

    @property
    def n(self) -> int:
        """Scored tokens."""
        return len(self.nll32) // 4

    @property
    def nll(self) -> Floats:
        """Nats of each scored token, [n]."""
        return np.frombuffer(self.nll32, "<f4").astype(np.float64)

    @property
    def nll_sum(self) -> float:
        return float(self.nll.sum())


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
    missed_mib_per_token: float
    seconds: float


def log_probabilities(llm: Llama) -> LogP:
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
    watch: Callable[[LogP], None] | None = None,
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
            patched_llama_cpp.module().Llama.reset(llm)  # not Llama.reset(), which also evicts the experts
        else:
            llm.reset()
        if chunk.first:
            if prompt:
                prompt(chunk)
            else:
                llm.eval(chunk.tokens[: chunk.first])
        yield _score(llm, chunk, watch)


def _score(llm: Llama, chunk: Chunk, watch: Callable[[LogP], None] | None) -> ChunkScore:
    before, layers_before = llm.stats().decode, llm.decoded_by_layer()
    nll = np.empty(chunk.n_scored, "<f4")
    watching = 0.0
    start = time.perf_counter()
    with llm.decoding():
        for i in range(chunk.n_scored):
            llm.eval([chunk.tokens[chunk.first + i]])
            log_p = log_probabilities(llm)
            nll[i] = -log_p[chunk.tokens[chunk.first + i + 1]]
            if watch:
                began = time.perf_counter()
                watch(log_p)
                watching += time.perf_counter() - began
    seconds = time.perf_counter() - start - watching
    layers = [after - earlier for after, earlier in zip(llm.decoded_by_layer(), layers_before, strict=True)]
    counters = llm.stats().decode - before
    misses = tuple(c.misses for c in layers)
    return ChunkScore(
        chunk=chunk.index,
        nll32=nll.tobytes(),
        selected=counters.hits + counters.misses,
        dropped=counters.dropped,
        examined=counters.examined,
        misses=misses,
        swapped=tuple(c.swapped for c in layers),
        missed_bytes=missed_bytes(misses, llm.layout),
        seconds=seconds,
    )


def missed_bytes(misses: Iterable[int], layout: ExpertLayout) -> int:
    """Misses x bytes of an expert, from the misses of each MoE layer (none for an engine without a routing)."""
    return sum(n * layer.expert_bytes for n, layer in zip(misses, layout.layers, strict=False))


def summary(scores: Sequence[ChunkScore]) -> Summary:
    """Raises UsageError when nothing was scored."""
    if not scores:
        raise UsageError("Nothing was scored.")
    nll = np.concatenate([s.nll for s in scores])
    mean = float(nll.mean())
    error = float(np.sqrt(max(float((nll**2).mean()) - mean**2, 0.0) / max(len(nll) - 1, 1)))
    examined = max(sum(s.examined for s in scores), 1)
    return Summary(
        n_tokens=len(nll),
        nll=mean,
        ppl=float(np.exp(mean)),
        ppl_se=error * float(np.exp(mean)),
        miss_rate=miss_rate(scores),
        swap_rate=sum(sum(s.swapped) for s in scores) / examined,
        drop_rate=sum(s.dropped for s in scores) / examined,
        missed_mib_per_token=missed_mib_per_token(scores),
        seconds=sum(s.seconds for s in scores),
    )


def missed_mib_per_token(scores: Sequence[ChunkScore]) -> float:
    return sum(s.missed_bytes for s in scores) / MIB / sum(s.n for s in scores)


def miss_rate(scores: Sequence[ChunkScore]) -> float:
    """Misses per selected expert."""
    return sum(sum(s.misses) for s in scores) / max(sum(s.selected for s in scores), 1)
