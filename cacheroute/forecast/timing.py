"""Seconds of a token and of a prompt: how compute and reads lie beside each other.

Decoding: a layer's reads begin when it has chosen its experts, and go on while it computes its shared expert and the experts
that are there. The rest of a layer, and the output, have nothing to read beside them (scripts/LOG.md, "How much of the floor is
within reach"). So with m misses in a layer

    layer(m) = rest + max(shared + experts + m * read_cpu, m * read + last)

where `read` is one expert's bytes over the speed of the device, `read_cpu` what reading takes of the threads that compute, and
`last` what is computed on the last piece. m is taken as binomial: K experts, each missed at the expected rate. Two constants are
fitted to tables of scripts/RESULTS.md ("Speed on real shapes", "The files that people have"), compute worked back from their
floors: of 42 cells of three shapes at 500 to 2,000 MB/s 41 are then within 25%, by 7% on average; without them 40, by 11%.

Prompts: while a layer computes, the experts of the next are read, so the first layer's reads stand alone:

    pass = read + (layers - 1) * max(compute, read) + compute + output
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cacheroute.engine.micro_batch import passes_of
from cacheroute.forecast import kernels
from cacheroute.forecast.drive import Drive
from cacheroute.forecast.kernels import TypeSpeed
from cacheroute.forecast.speed import ComputeSpeed
from cacheroute.forecast.workload import Amount, Amounts, Workload

DEPTH = 512
"""Tokens of context that a decoded token is taken to look back on."""
_NODES_DENSE, _NODES_MOE = 22, 26  # small operations of a layer of llama.cpp's graphs, and of its experts
_HOOK_SECONDS = 25e-6  # of a layer (scripts/RESULTS.md, "What the instrument costs")
_TOKEN_SECONDS = 5e-4  # of Python and of making the graph
_WAKE_SECONDS = 3e-4  # of a layer that misses, until its first read has begun and those that wait go on (fitted)
_READ_EFFICIENCY = 0.92  # of the device's speed, as a layer reads few experts at a time (fitted)
_PIECES = 3  # matrices of an expert


@dataclass(frozen=True)
class Decoding:
    """Seconds of a token: all, compute alone with every expert in memory, and reads alone. `read_bytes` of a token."""

    seconds: float
    compute_seconds: float
    read_seconds: float
    read_bytes: float


def decoding(work: Workload, speed: ComputeSpeed, drive: Drive | None, miss_rate: float, n_kv: int, spare: int = 0) -> Decoding:
    """Of a token that looks back on `n_kv` others. `drive`: None for a model that is loaded whole, its experts repacked; `spare`:
    cores beside the threads."""
    layers = work.n_layers
    experts = work.n_used * _one_token(work.expert, speed.of_experts if drive else speed.of_repacked) / layers
    shared = _one_token(work.shared, speed.of_dense) / layers
    attention = n_kv * work.kv_bytes / speed.of_dense("f16").bytes_per_s
    nodes = (work.blocks * _NODES_DENSE + layers * _NODES_MOE) * speed.node_seconds
    alone = _one_token(work.dense, speed.of_dense) + attention + nodes + layers * _HOOK_SECONDS
    alone += _one_token(work.output, speed.of_dense) + _TOKEN_SECONDS
    compute = alone + layers * (shared + experts)
    if not miss_rate or drive is None:
        return Decoding(compute, compute, 0.0, 0.0)
    one = work.read_bytes / layers
    read, read_cpu = one / (drive.bytes_per_s * _READ_EFFICIENCY), _stolen(one, drive, speed.n_threads, spare)
    last = experts / work.n_used / _PIECES + _WAKE_SECONDS
    beside = 0.0
    for m in range(work.n_used + 1):
        seconds = max(shared + experts + m * read_cpu, m * read + last) if m else shared + experts
        beside += math.comb(work.n_used, m) * miss_rate**m * (1 - miss_rate) ** (work.n_used - m) * seconds
    missed = work.n_used * miss_rate * work.read_bytes
    return Decoding(alone + layers * beside, compute, missed / (drive.bytes_per_s * _READ_EFFICIENCY), missed)


@dataclass(frozen=True)
class Prompt:
    """A prompt of `tokens` from an empty cache, in `passes` over the layers: seconds to its first token, bytes read."""

    tokens: int
    passes: int
    seconds: float
    read_bytes: float


def prompt(
    work: Workload, speed: ComputeSpeed, drive: Drive | None, capacity: int, n_tokens: int, longest: int, spare: int = 0
) -> Prompt:
    """`longest`: tokens of a pass. `drive`: None where all experts are in memory."""
    passes = passes_of(n_tokens, longest)
    length = -(-n_tokens // passes)
    # experts that a pass uses, if each token's are drawn evenly
    distinct = work.n_expert * (1 - (1 - work.n_used / work.n_expert) ** length)
    output = _one_token(work.output, speed.of_dense)
    seconds, read_bytes = _TOKEN_SECONDS, 0.0
    for i in range(passes):
        n, past = min(length, n_tokens - i * length), i * length
        compute = _batch_seconds(work, speed, n, past, distinct, whole=drive is None) / work.n_layers
        if drive is None:
            seconds += work.n_layers * compute + output
            continue
        # what an earlier pass has left in memory is not read again
        nbytes = max(distinct - (capacity if i else 0), 0.0) * work.read_bytes / work.n_layers
        read = nbytes / drive.bytes_per_s
        compute += min(_stolen(nbytes, drive, speed.n_threads, spare), compute)
        seconds += read + (work.n_layers - 1) * max(compute, read) + compute + output
        read_bytes += nbytes * work.n_layers
    return Prompt(n_tokens, passes, seconds, read_bytes)


def _stolen(nbytes: float, drive: Drive, n_threads: int, spare: int) -> float:
    """Seconds by which reading holds up the threads that compute, where no core is left for it."""
    return nbytes * drive.cpu_seconds_per_byte / n_threads if spare <= 0 else 0.0


def _one_token(amounts: Amounts, of: Callable[[str], TypeSpeed]) -> float:
    return sum(a.nbytes / of(kind).bytes_per_s for kind, a in amounts.items())


def _batch_seconds(work: Workload, speed: ComputeSpeed, n: int, past: int, distinct: float, *, whole: bool) -> float:
    """Of `n` tokens after `past` others in all layers."""
    seconds = 0.0
    for amounts in (work.dense, work.shared):
        for kind, a in amounts.items():
            seconds += _batch(a, speed.of_dense(kind), n, kernels.BATCH)
    each = max(n * work.n_used / distinct, 1.0)  # tokens of an expert
    for kind, a in work.expert.items():
        own = speed.of_repacked(kind) if whole else speed.of_experts(kind)
        seconds += distinct * _batch(a, own, each, kernels.BATCH * kernels.USED / kernels.EXPERTS_IN_BATCH)
    pairs = n * (past + n / 2) * work.heads * work.kv_layers  # tokens that are masked for all of a tile are skipped
    return seconds + pairs * work.head_width * speed.attention_seconds


def _batch(a: Amount, own: TypeSpeed, n: float, measured: float) -> float:
    """Of `n` tokens on the same weights: on the line through one token and the batch that was `measured`, up to it; then by its
    speed."""
    first, many = a.nbytes / own.bytes_per_s, measured * a.weights / own.batch_per_s
    if n >= measured or many <= first:
        return max(n * a.weights / own.batch_per_s, first)
    return first + (n - 1) / (measured - 1) * (many - first)
