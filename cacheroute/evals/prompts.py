"""What a prompt routing costs: how far the answer after a lossy prompt is from the answer after a lossless one.

A place of a text is a history (may be empty), a prompt, and the tokens after it. History and prompt are evaluated as batches, the
history losslessly; the tokens after the prompt are decoded one by one by `original`, whatever the model would have answered. So
the only difference is what the prompt's tokens left in the keys and values, and in the caches. The first distribution is that of
the prompt's last token. Reads are those asked of the device for the prompt alone.

Knows a loaded model; knows no command line.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cacheroute.engine.asked import Asked
from cacheroute.errors import UsageError
from cacheroute.evals import divergence, loading, paired, text
from cacheroute.evals.perplexity import Floats, LogP, log_probabilities
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.session import floats32, kept_scores
from cacheroute.evals.text import Chunk
from cacheroute.files import MIB, is_count
from cacheroute.install.machine import big_cores
from cacheroute.routing import budget as budgets
from cacheroute.routing.prompt_routing import PromptRouting

if TYPE_CHECKING:
    from cacheroute.engine.checkpoint import Checkpoint
    from cacheroute.engine.llama import Llama

ORIGINAL = PromptRouting()
_FORMAT = "cacheroute-prompt-scores-1"


@dataclass(frozen=True)
class Lengths:
    """Tokens of a place: evaluated losslessly, then as the prompt, then scored."""

    history: int
    prompt: int
    after: int

    @property
    def total(self) -> int:
        return self.history + self.prompt + self.after


class Request(NamedTuple):
    """One prompt routing at one place; `budget` in experts per layer."""

    prompt_routing: PromptRouting
    budget: int
    eviction: str
    place: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.prompt_routing.key, self.budget, self.eviction, self.place


@dataclass(frozen=True, kw_only=True)
class PromptScore:
    """The score of a request, named by the four parts of its key.

    `nll32`, `kl32`: bytes of little-endian float32, nats of each scored token: -log p, and KL(after a lossless prompt || after
    this one). `agreed`: scored tokens with the same likeliest token in both. `reads`: experts read for the prompt, `read_bytes`
    of them; `swapped` of `examined` slots of the prompt.
    """

    routing: str
    budget: int
    eviction: str
    place: int
    nll32: bytes
    kl32: bytes
    agreed: int
    reads: int
    read_bytes: int
    swapped: int
    examined: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.routing, self.budget, self.eviction, self.place

    @property
    def nll(self) -> Floats:
        return np.frombuffer(self.nll32, "<f4").astype(np.float64)

    @property
    def kl(self) -> Floats:
        return np.frombuffer(self.kl32, "<f4").astype(np.float64)


@dataclass(frozen=True)
class Summary:
    """A prompt routing over all places, against the lossless prompt.

    Nats per token, with the 95% intervals of resampled places. `kl_p99`: 99th percentile over tokens; `kl_first`: of the token
    that the prompt itself predicts. `top1`: share of tokens with the same likeliest one. Of the mean prompt: `reads_per_layer`,
    experts read, `read_mib`, asked of the device, and the share `saved` of the lossless prompt's.
    """

    n_places: int
    n_tokens: int
    kl: float
    kl_low: float | None
    kl_high: float | None
    kl_p99: float
    kl_first: float
    delta_nll: float
    delta_nll_low: float | None
    delta_nll_high: float | None
    top1: float
    swap_rate: float
    reads_per_layer: float
    read_mib: float
    saved: float


@dataclass(frozen=True)
class PromptSettings:
    """What a row of `eval prompt` is of: `budget` as typed and its experts per layer, tokens of the history and of the prompt."""

    model: str
    text: str
    budget: str
    budget_experts: int
    eviction: str
    prompt_routing: str
    n_history: int
    n_prompt: int


@dataclass(frozen=True)
class PromptRow(Summary, PromptSettings):
    """One prompt routing at all places, as `eval prompt` reports it: the settings, then the figures."""


def summary(base: Sequence[PromptScore], scores: Sequence[PromptScore], n_layers: int, *, seed: int = 0) -> Summary:
    """`base`: of the lossless prompt at the same places."""
    n = [len(s.kl) for s in scores]
    kl = divergence.summary([s.kl for s in scores], [s.agreed for s in scores], seed=seed)
    nll = paired.compare([float(s.nll.sum()) for s in base], [float(s.nll.sum()) for s in scores], n, seed=seed)
    read, before = (sum(s.read_bytes for s in part) for part in (scores, base))
    return Summary(
        n_places=len(scores),
        n_tokens=sum(n),
        kl=kl.kl,
        kl_low=kl.kl_low,
        kl_high=kl.kl_high,
        kl_p99=kl.kl_p99,
        kl_first=float(np.mean([s.kl[0] for s in scores])),
        delta_nll=nll.delta_nll,
        delta_nll_low=nll.low,
        delta_nll_high=nll.high,
        top1=kl.top1,
        swap_rate=sum(s.swapped for s in scores) / max(sum(s.examined for s in scores), 1),
        reads_per_layer=sum(s.reads for s in scores) / n_layers / len(scores),
        read_mib=read / MIB / len(scores),
        saved=1 - read / before if before else 0.0,
    )


class PromptScorer:
    """Scores prompt routings at places of a text. `after` is called with each score that is computed and not found in `kept`."""

    def __init__(self, llm: Llama, places: Sequence[Chunk], lengths: Lengths, io: str, kept: ResultsFile | None = None) -> None:
        self.llm, self.places, self.lengths = llm, places, lengths
        self.after: Callable[[PromptScore], None] = lambda score: None
        self._io, self._kept = io, kept
        self._scores: dict[tuple[str, int, str, int], PromptScore] = {}
        self._history: tuple[tuple[int, int, str], Checkpoint] | None = None  # of the last place only
        self._reference: tuple[int, npt.NDArray[np.float32]] | None = None  # likewise: it is many MB
        for line in kept.lines if kept else ():
            self._add(_from_json(line))

    @property
    def n_kept(self) -> int:
        """Scores that were there at the start."""
        return len(self._kept.lines) if self._kept else 0

    def scores(self, prompt_routing: PromptRouting, budget: int, eviction: str, places: Sequence[int]) -> list[PromptScore]:
        """The scores at several places."""
        return [self.score(Request(prompt_routing, budget, eviction, i)) for i in places]

    def missing(self, requests: Sequence[Request]) -> int:
        """Requests that are still to be computed."""
        return sum(r.key not in self._scores for r in requests)

    def score(self, request: Request) -> PromptScore:
        """Raises what Llama.configure() and Llama.eval() raise."""
        if request.key not in self._scores:
            found = self._compute(request)
            self._add(found)
            if self._kept:
                self._kept.append(_to_json(found))
            self.after(found)
        return self._scores[request.key]

    def _add(self, score: PromptScore) -> None:
        self._scores[score.key] = score

    def _compute(self, request: Request) -> PromptScore:
        place = self.places[request.place]
        reference = self._original(request) if request.prompt_routing.lossy else None
        rows, prefill = self._run(request)
        following = np.array(place.tokens[place.first : place.first + len(rows)])
        if reference is None:
            reference = rows
            self._reference = request.place, rows
        log_p = reference.astype(np.float64)
        kl = (np.exp(log_p) * (log_p - rows)).sum(axis=1)
        return PromptScore(
            **dict(zip(("routing", "budget", "eviction", "place"), request.key, strict=True)),  # type: ignore[arg-type]
            nll32=(-rows[np.arange(len(rows)), following]).astype("<f4").tobytes(),
            kl32=kl.astype("<f4").tobytes(),
            agreed=int((rows.argmax(axis=1) == reference.argmax(axis=1)).sum()),
            reads=prefill.reads,
            read_bytes=prefill.read_bytes,
            swapped=prefill.swapped,
            examined=prefill.examined,
        )

    def _original(self, request: Request) -> npt.NDArray[np.float32]:
        """log p after the lossless prompt, [n_after, n_vocab]: the same at every budget and eviction."""
        if self._reference is None or self._reference[0] != request.place:
            lossless = request._replace(prompt_routing=ORIGINAL)
            self._reference = request.place, self._run(lossless)[0]
        return self._reference[1]

    def _run(self, request: Request) -> tuple[npt.NDArray[np.float32], Any]:
        """(log p of the tokens after the prompt [n_after, n_vocab], the counters of the prompt)."""
        llm, place, n = self.llm, self.places[request.place], self.lengths
        self._begin(request, place.tokens[: n.history])
        before = llm.stats().prefill
        llm.eval(place.tokens[n.history : place.first])
        prefill = llm.stats().prefill - before
        rows: list[LogP] = [log_probabilities(llm)]
        with llm.decoding():
            for token in place.tokens[place.first : -1]:
                llm.eval([token])
                rows.append(log_probabilities(llm))
        return np.stack(rows), prefill

    def _begin(self, request: Request, history: Sequence[int]) -> None:
        """Brings the model to the end of the history, with the request's settings for what follows."""
        own = Asked(request.budget, eviction=request.eviction, io=self._io)
        at = (request.place, request.budget, request.eviction)
        if history and (self._history is None or self._history[0] != at):
            self.llm.configure_as(own)
            self.llm.reset()
            self.llm.eval(history)
            self._history = at, self.llm.checkpoint(sequence=True)
        self.llm.configure_as(own.but(prompt_routing=request.prompt_routing))
        self.llm.reset()
        if history:
            assert self._history
            self.llm.return_to(self._history[1])


def _to_json(score: PromptScore) -> dict[str, Any]:
    return asdict(score) | {name: base64.b64encode(getattr(score, name)).decode() for name in ("nll32", "kl32")}


def _from_json(line: dict[str, Any]) -> PromptScore:
    """Raises ValueError, KeyError or TypeError for what no session has written."""
    s = PromptScore(**line | {name: floats32(line[name]) for name in ("nll32", "kl32")})
    texts = isinstance(s.routing, str) and isinstance(s.eviction, str)
    if not (texts and is_count(s.budget, s.place, s.agreed, s.reads, s.read_bytes, s.swapped, s.examined)):
        raise TypeError("a value is of another type")
    if len(s.nll32) != len(s.kl32) or s.agreed > len(s.nll):
        raise ValueError("the lengths differ")
    return s


def _check(line: dict[str, Any], places: Sequence[Chunk], after: int) -> None:
    """Raises ValueError, KeyError or TypeError for a line that is not of these places."""
    score = _from_json(line)
    if score.place >= len(places) or len(score.nll) != after:
        raise ValueError("it is of another text")


def places(tokens: Sequence[int], lengths: Lengths, n_places: int, bos: int | None) -> list[Chunk]:
    """`n_places` pieces of a text that do not overlap, evenly spread, or as many as it has. Raises UsageError without one."""
    if len(tokens) < lengths.total:
        raise UsageError(
            f"The text has {len(tokens)} tokens, and one place needs {lengths.total}; give more text, or fewer --prompt-tokens."
        )
    cut = text.cut(tokens, lengths.total, bos=bos)
    n = min(n_places, len(cut))
    chosen = [cut[round(i * (len(cut) - 1) / max(n - 1, 1))] for i in range(n)]
    return [replace(c, index=i, first=lengths.history + lengths.prompt) for i, c in enumerate(chosen)]


@contextmanager
def session(
    path: Path,
    file: Path | None,
    column: str,
    lengths: Lengths,
    n_places: int,
    *,
    threads: int | None = None,
    io: str | None = None,
    settings: Sequence[tuple[str | int | None, str]] = (),
) -> Iterator[PromptScorer]:
    """A scorer of a model and a text, with all scores that this build has ever computed for them, in the user's cache.

    `settings`: (budget, eviction) pairs that are checked, as `io` is, before the text is read. Raises UsageError for settings or
    text that do not fit, CacherouteError when the model cannot be loaded.
    """
    if io == "none":
        raise UsageError("With --io none nothing is read, and the reads of the prompt are what is compared; leave it out.")
    with closing(loading.load(path, max(lengths.total, 8), threads or big_cores())) as llm:
        for budget, eviction in settings:
            budgets.parse(budget, llm.layout)
            llm.configure(budget=budget, eviction=eviction, io=io or "auto")
        tokens = llm.tokenize(text.read(file, column).encode(), add_bos=True)
        bos = llm.token_bos() if llm._model.add_bos_token() else None
        found = places(tokens, lengths, n_places, bos)
        about = f"{lengths.history}+{lengths.prompt}:{loading.text_fingerprint(found)}"
        check = partial(_check, places=found, after=lengths.after)
        yield PromptScorer(llm, found, lengths, io or "auto", kept_scores(path, about, _FORMAT, check))
