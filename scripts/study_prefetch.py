"""Does it pay to read experts ahead? Prefetch of the next layer's, and background admission of displaced ones, on a trace.

    python scripts/study_prefetch.py TRACE --compute-ms 2.3 [--model demo] [--shape qwen3-30b-a3b]

Predictors are fitted on the first half of the trace and judged on the second; the cache starts where a sequence does. With
--model (the one that was traced, on the held-out text) the next layer's router is also asked for its opinion of a layer's hidden
state. TRACE must hold decoded tokens only (`cacheroute trace` without -n and --n-prompt).

The time of a token is simple and kind to prefetch. A layer computes for c = --compute-ms once its experts are there; a miss is
read before that, at the device's bandwidth. From there to the next router's choice, which is c again, the device is idle, and
reads the likeliest missing experts of the next layer, one after the other. They have a place outside the cache until they are
chosen. An expert in flight counts as resident for the choice, and the rest of it is waited for. Two ratios are printed: in the
first a wrong one in flight is dropped at once, in the second it is read to its end before anything else is. No read is hidden
behind the compute of its own layer. The first layer has no layer before it, and no prefetch.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cacheroute.cli.table import as_markdown
from cacheroute.errors import UsageError
from cacheroute.model import catalogue
from cacheroute.routing import budget as budgets
from cacheroute.routing.strategies import parse
from cacheroute.trace import simulate, trace_file

BUDGETS = ("25%", "50%", "75%")
LAMBDAS = (0.0, 0.2)  # 0: original
ADMIT_LAMBDAS = (0.1, 0.2, 0.4)
GB_PER_S = (0.5, 1.0, 2.0)
RIDGE = 30.0
RATE = 0.1  # of the running mean of scores, as in native/cache.cpp

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """`z`: [tokens, layers, E]; `starts`: whether a token is the first of its sequence; `judged`: of the second half."""

    z: Floats
    starts: Bools
    judged: Bools
    n_used: int

    @property
    def top(self) -> npt.NDArray[np.intp]:
        """[tokens, layers, K]: what the model itself chooses."""
        return np.argsort(-self.z, axis=2, kind="stable")[:, :, : self.n_used]


@dataclass
class Sums:
    """Over the judged tokens and all layers; experts, but for `layers` and `lost`."""

    layers: int = 0  # (token, layer)
    slots: int = 0  # K in each of them
    misses: int = 0
    demand: float = 0.0  # what of the misses had still to be read when they were chosen
    ahead: float = 0.0  # read ahead: by prefetch, or admitted
    useful: float = 0.0  # of the prefetched, what was then chosen
    hit_ahead: int = 0  # misses that were wholly or partly read
    in_the_way: float = 0.0  # what was left to read of wrong ones in flight when others had to be read
    lost: float = 0.0

    @property
    def miss_rate(self) -> float:
        return self.misses / self.slots

    def seconds(self, compute: float, expert: float, *, dropped: bool = True) -> float:
        """A layer's mean time; `expert`: the time to read one; `dropped`: a wrong one in flight is not read to its end."""
        reads = self.demand if dropped else self.demand + self.in_the_way
        return compute + reads / self.layers * expert


def read(path: Path) -> tuple[trace_file.Trace, Scores]:
    """Raises UsageError for a trace with a prompt, and for one of a model that prescribes experts or masks some."""
    t = trace_file.read(path)
    n_layers = len(t.header.layers)
    records = t.records[: len(t.records) // n_layers * n_layers].reshape(-1, n_layers)
    if not (records["flags"] & trace_file.DECODE).all():
        raise UsageError(f"{path} has a prompt; trace a text token by token.")
    z = records["z"].astype(float)
    if (records["flags"] & trace_file.DICTATED).any() or not np.isfinite(z).all():
        raise UsageError(f"{path} is of a model that prescribes or masks experts; this study knows scores only.")
    n = len(z)
    return t, Scores(z, records["token"][:, 0] == 0, np.arange(n) >= n // 2, t.header.n_used)


def run(s: Scores, capacity: int, lambda_: float, guess: Floats | None = None, ahead: float = 0, admit: float = 0) -> Sums:
    """lru with cache-prior (0: original) over all layers at once; agrees with native/router.cpp, which main() checks.

    `guess`: scores of the experts before the layer's router has spoken, -inf: none; `ahead`: experts that the device can read in
    a window; `admit`: experts per window that it brings in of those displaced, unfinished ones going on in the next.
    """
    n, n_layers, n_expert = s.z.shape
    k, j = s.n_used, 1 if s.n_used <= 2 else 2
    whole, part = int(ahead), ahead - int(ahead)
    shares = np.array([1.0] * whole + [part] * (part > 0))
    resident, last = np.zeros((n_layers, n_expert), bool), np.zeros((n_layers, n_expert))
    mean_range, credit, clock, seen = np.zeros(n_layers), np.zeros(n_layers), 0, 0
    sums, rows = Sums(), np.arange(n_layers)[:, None]
    first = int(np.flatnonzero(s.starts[: int(np.argmax(s.judged)) + 1])[-1])  # nothing is left of sequences before it
    for t in range(first, n):
        if s.starts[t]:
            resident[:], last[:], mean_range[:], credit[:], seen = False, 0, 0, 0, 0
        z = s.z[t]
        seen += 1
        mean_range += (z.max(axis=1) - z.min(axis=1) - mean_range) / seen
        share = np.zeros((n_layers, n_expert))  # of each expert that is not resident, what has been read of it
        if guess is not None and len(shares):
            likely = np.where(resident, -np.inf, guess[t])
            order = np.argsort(-likely, axis=1, kind="stable")[:, : len(shares)]
            share[rows, order] = np.where(np.isfinite(likely[rows, order]), shares[: order.shape[1]], 0)
        top = np.argsort(-z, axis=1, kind="stable")[:, :k]
        key = z + lambda_ * mean_range[:, None] * (resident | (share > 0))
        key[rows, top[:, :j]] = np.inf
        chosen = np.zeros_like(resident)
        chosen[rows, np.argsort(-key, axis=1, kind="stable")[:, :k]] = True
        missed = chosen & ~resident
        if s.judged[t]:
            mass = np.exp(z)
            sums.layers += n_layers
            sums.slots += n_layers * k
            sums.misses += int(missed.sum())
            sums.demand += float((missed * (1 - share)).sum())
            sums.ahead += float(share.sum())
            sums.useful += float((missed * share).sum())
            sums.hit_ahead += int((missed & (share > 0)).sum())
            wrong = ((share > 0) & (share < 1) & ~chosen) * (1 - share)
            sums.in_the_way += float((wrong.sum(axis=1) * (missed & (share < 1)).any(axis=1)).sum())
            sums.lost += float((1 - (mass * chosen).sum(axis=1) / mass[rows, top].sum(axis=1)).sum()) * k
        # the strongest becomes the most recent
        by_weight = np.argsort(-np.where(chosen, z, -np.inf), axis=1, kind="stable")[:, :k]
        last[rows, by_weight] = clock + k - np.arange(k)
        clock += k
        resident |= chosen
        keep = chosen.copy()
        if admit and capacity > k:
            credit = np.minimum(credit + admit, k)
            wanted = np.zeros_like(resident)
            wanted[rows, top] = True
            likely = np.where(wanted & ~resident, z, -np.inf)
            order = np.argsort(-likely, axis=1, kind="stable")[:, : capacity - k]
            now = np.isfinite(likely[rows, order]) & (np.arange(order.shape[1]) + 1 <= credit[:, None])
            credit -= now.sum(axis=1)
            sums.ahead += float(now.sum()) * bool(s.judged[t])
            last[rows, order] = np.where(now, clock, last[rows, order])
            resident[rows, order] |= now
            keep[rows, order] |= now
        excess = resident.sum(axis=1) - capacity
        oldest = np.argsort(np.where(resident & ~keep, last, np.inf), axis=1, kind="stable")
        gone = np.arange(n_expert) < excess[:, None]
        resident[rows, oldest] &= ~gone
    return sums


def predictors(s: Scores, hidden: Floats | None) -> Iterator[tuple[str, Floats]]:
    """Name and guesses [tokens, layers, E] for every layer, from what is known when the layer before it chooses."""
    fit = ~s.judged
    n, n_layers, _ = s.z.shape
    own = s.z - s.z.mean(axis=2, keepdims=True)
    chosen = np.zeros(s.z.shape)
    np.put_along_axis(chosen, s.top, 1.0, axis=2)
    popularity = np.broadcast_to(chosen[fit].mean(axis=0), s.z.shape)
    previous, running = np.empty_like(own), np.empty_like(own)
    mean = own[fit].mean(axis=0)
    for t in range(n):
        previous[t] = mean if s.starts[t] else own[t - 1]
        running[t] = mean if s.starts[t] else running[t - 1] + RATE * (own[t - 1] - running[t - 1])
    yield "how often each is chosen", _without_first(popularity)
    yield "the previous token's scores", _without_first(previous)
    yield "running mean of earlier scores", _without_first(running)
    frequency, linear, combined = (np.full(s.z.shape, -np.inf) for _ in range(3))
    everything = np.full(s.z.shape, -np.inf)
    for i in range(1, n_layers):
        together = chosen[fit, i - 1].T @ chosen[fit, i]
        frequency[:, i] = chosen[:, i - 1] @ (together / np.maximum(chosen[fit, i - 1].sum(axis=0), 1)[:, None])
        linear[:, i] = _ridge([own[:, i - 1]], own[:, i], fit)
        known = [own[:, i - 1], own[:, max(i - 2, 0)], previous[:, i], running[:, i]]
        combined[:, i] = _ridge(known, own[:, i], fit)
        if hidden is not None:
            everything[:, i] = _ridge([*known, hidden[:, i - 1]], own[:, i], fit)
    yield "frequency given the layer before's choice", frequency
    yield "linear map of the layer before's scores", linear
    yield "linear map of all of these scores", combined
    if hidden is not None:
        yield "the next router on the hidden state", np.concatenate([np.full_like(own[:, :1], -np.inf), hidden[:, :-1]], axis=1)
        yield "linear map of scores and next router", everything
    yield "(oracle: the scores themselves)", _without_first(s.z)


def _without_first(guess: Floats) -> Floats:
    guess = guess.copy()
    guess[:, 0] = -np.inf
    return guess


def _ridge(inputs: list[Floats], target: Floats, fit: Bools) -> Floats:
    x = np.concatenate([*inputs, np.ones((len(target), 1))], axis=1)
    a = x[fit].T @ x[fit] + RIDGE * np.eye(x.shape[1])
    return np.asarray(x @ np.linalg.solve(a, x[fit].T @ target[fit]))


def hidden_scores(path: Path, t: trace_file.Trace, s: Scores) -> Floats:
    """Raises UsageError when the model on the held-out text is not what was traced."""
    import next_router

    ends = [*np.flatnonzero(s.starts)[1:].tolist(), len(s.z)]
    tokens = next_router.tokens(path, files("cacheroute").joinpath("data/heldout.txt").read_text(encoding="utf-8"))
    sequences = [tokens[start:end] for start, end in zip(np.flatnonzero(s.starts).tolist(), ends, strict=True)]
    own, after = next_router.scores(path, sequences, t.header.layers)
    alike = np.corrcoef((own - own.mean(axis=2, keepdims=True)).ravel(), (s.z - s.z.mean(axis=2, keepdims=True)).ravel())[0, 1]
    if not alike > 0.99:
        raise UsageError(f"{path} on the held-out text gives other scores than were traced (correlation {alike:.3f}).")
    return after


def prefetch_table(s: Scores, capacity: dict[str, int], hidden: Floats | None, compute: float, nbytes: int) -> list[list[str]]:
    """Recall and precision of one and four experts a window; then tok/s with prefetch against without, best and worst case."""
    head = ["routing", "budget", "predictor", *(f"{what} of {n}" for n in (1, 4) for what in ("recall", "precision"))]
    cells = [[*head, *(f"{g:g} GB/s" for g in GB_PER_S), "misses", "lost mass"]]
    guesses = list(predictors(s, hidden))
    for x, b in itertools.product(LAMBDAS, BUDGETS):
        plain = run(s, capacity[b], x)
        for name, guess in guesses:
            row = ["original" if x == 0 else f"cache-prior {x:g}", f"{b} ({capacity[b]})", name]
            one, four = (run(s, capacity[b], x, guess, n) for n in (1, 4))
            for sums in (one, four):
                row += [f"{100 * sums.hit_ahead / sums.misses:.0f}%", f"{100 * sums.useful / max(sums.ahead, 1):.0f}%"]
            for g in GB_PER_S:
                expert = nbytes / (g * 1e9)
                with_it = run(s, capacity[b], x, guess, compute / expert)
                best, worst = (
                    plain.seconds(compute, expert) / with_it.seconds(compute, expert, dropped=d) for d in (True, False)
                )
                row.append(f"{best:.2f}, {worst:.2f}")
            cells.append([*row, f"{100 * plain.miss_rate:.1f}%", f"{_lost(plain)} -> {_lost(one)}" if x else ""])
    return cells


def _lost(sums: Sums) -> str:
    return f"{100 * sums.lost / sums.slots:.2f}%"


def admission_table(s: Scores, capacity: dict[str, int], compute: float, nbytes: int) -> list[list[str]]:
    """cache-prior with displaced experts read in idle time against without, and against a lambda that loses as much mass."""
    head = ["lambda", "budget", "idle reads a layer", "misses", "lost mass", "admitted / misses"]
    cells = [[*head, "misses of a lambda that loses as much", *(f"{g:g} GB/s against it" for g in GB_PER_S)]]
    for b in BUDGETS:
        if capacity[b] <= s.n_used:
            continue
        curve = [run(s, capacity[b], x) for x in (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)]
        lost, missed = [c.lost for c in curve], [c.misses for c in curve]
        for x in ADMIT_LAMBDAS:
            for admit in (0.0, *(compute / (nbytes / (g * 1e9)) for g in GB_PER_S)):
                got = run(s, capacity[b], x, admit=admit)
                same = float(np.interp(got.lost, lost, missed))
                row = [f"{x:g}", f"{b} ({capacity[b]})", f"{admit:.2f}", f"{100 * got.miss_rate:.1f}%", _lost(got)]
                row += [f"{got.ahead / got.misses:.2f}", f"{100 * same / got.slots:.1f}%"]
                for g in GB_PER_S:
                    expert = nbytes / (g * 1e9)
                    own = math.isclose(admit, compute / expert)
                    ratio = (compute + same / got.layers * expert) / got.seconds(compute, expert)
                    row.append(f"{ratio:.2f}" if own else "")
                cells.append(row)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--compute-ms", type=float, required=True, help="measured time of one layer with its experts resident")
    parser.add_argument("--model", help="the model that was traced on the held-out text, to ask its next routers")
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="a model of catalogue.toml whose experts' bytes (Q4_0) are read")
    args = parser.parse_args()
    t, s = read(args.trace)
    capacity = {b: budgets.parse(b, t.header.layout).capacity for b in BUDGETS}
    entry = catalogue.load_catalogue()[args.shape]
    nbytes = 3 * entry.n_embd * entry.n_ff * 18 // 32
    replay = simulate.Replay(t)
    everything = Scores(s.z, s.starts, np.ones_like(s.judged), s.n_used)
    for b in BUDGETS:
        for x in LAMBDAS:
            name = f"cache-prior:lambda={x}" if x else "original"
            expected = replay.run(simulate.Arm(b, parse(name), "lru"))[0]
            got = run(everything, capacity[b], x)
            assert got.misses == expected.misses, f"{name} {b}: {got.misses} misses here, {expected.misses} in the C++ router"
    hidden = hidden_scores(catalogue.resolve(args.model), t, s) if args.model else None
    h = t.header
    print(f"{h.model}: {len(h.layers)} layers, E = {h.n_expert}, K = {h.n_used}, {int(s.judged.sum())} tokens judged, lru; ")
    print(f"experts of {args.shape} ({nbytes / 1e6:.2f} MB), {args.compute_ms:g} ms of compute a layer.\n\n## Prefetch\n")
    table = prefetch_table(s, capacity, hidden, args.compute_ms / 1e3, nbytes)
    print(as_markdown(table))
    print("\n## Admission of displaced experts in idle time, cache-prior\n")
    print(as_markdown(admission_table(s, capacity, args.compute_ms / 1e3, nbytes)))


if __name__ == "__main__":
    main()
