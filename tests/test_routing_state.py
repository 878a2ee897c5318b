"""The routing state of a checkpoint as bytes: nothing is lost, and bytes that are none are a sentence and no crash."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from cacheroute.errors import CacherouteError
from cacheroute.native import bindings
from cacheroute.routing import eviction as evictions
from support.native_hook import SOFTMAX, BareHook, bare_hook

LIB = bindings.lib
LAYERS, E, K, C = 3, 20, 3, 7
ROUTING = "cache-prior:lambda=0.5"
HEAD, LAYER = 12, 16  # bytes before the first layer, and of the sizes of each
STATE = 8 + 8 + 8 + E * 25


@contextlib.contextmanager
def saved(hook: BareHook) -> Iterator[int]:
    handle = LIB.cr_hook_save(hook.handle)
    try:
        yield handle
    finally:
        LIB.cr_checkpoint_free(handle)


def to_bytes(hook: BareHook) -> bytes:
    with saved(hook) as handle:
        out = (ctypes.c_uint8 * LIB.cr_checkpoint_bytes(handle, None, 0))()
        assert LIB.cr_checkpoint_bytes(handle, out, len(out) - 1) == len(out) and not any(out), "too small: nothing is written"
        assert LIB.cr_checkpoint_bytes(handle, out, len(out)) == len(out)
        return bytes(out)


def from_bytes(data: bytes) -> int:
    return bindings.checked(LIB.cr_checkpoint_from, (ctypes.c_uint8 * len(data)).from_buffer_copy(data), len(data))


def resume(hook: BareHook, data: bytes) -> bool:
    handle = from_bytes(data)
    try:
        return bool(LIB.cr_hook_resume(hook.handle, handle))
    finally:
        LIB.cr_checkpoint_free(handle)


def run(hook: BareHook, seed: int, n: int) -> list[list[int]]:
    rng, ids = np.random.default_rng(seed), []
    for token in range(n):
        for layer in range(LAYERS):
            scores = rng.normal(0, 2, (1, E)).astype(np.float32)
            ids.append(hook.select(layer, scores, None, SOFTMAX, decode=token > 4)[0].tolist())
    return ids


def counts(hook: BareHook) -> list[tuple[int, int, int]]:
    return [(c.misses, c.swapped, c.evictions) for c in map(hook.counters, range(LAYERS))]


@pytest.mark.parametrize("eviction", sorted(evictions.ONLINE))
def test_what_follows_is_the_same_in_another_hook(eviction: str) -> None:
    with bare_hook((LAYERS, E, K, C), ROUTING, eviction) as one, bare_hook((LAYERS, E, K, C), ROUTING, eviction) as two:
        run(one, 1, 40)
        data = to_bytes(one)
        before = counts(one)
        run(two, 2, 9)  # replaced
        middle = counts(two)
        assert resume(two, data) and to_bytes(two) == data
        assert run(one, 3, 40) == run(two, 3, 40)
        gained = [tuple(a - b for a, b in zip(x, y, strict=True)) for x, y in zip(counts(one), before, strict=True)]
        assert gained == [tuple(a - b for a, b in zip(x, y, strict=True)) for x, y in zip(counts(two), middle, strict=True)]
        assert to_bytes(one) == to_bytes(two) != data


@pytest.mark.parametrize(
    "shape, eviction",
    [
        ((LAYERS - 1, E, K, C), "lru"),
        ((LAYERS, E + 1, K, C), "lru"),
        ((LAYERS, E, K - 1, C), "lru"),
        ((LAYERS, E, K, C), "lfu"),
    ],
)
def test_another_shape_takes_nothing_over(shape: tuple[int, ...], eviction: str) -> None:
    with bare_hook((LAYERS, E, K, C), ROUTING, "lru") as one, bare_hook(shape, ROUTING, eviction) as other:
        run(one, 1, 20)
        before = to_bytes(other)
        assert not resume(other, to_bytes(one))
        assert to_bytes(other) == before


@pytest.mark.parametrize("capacity", [K, C - 1, C + 1, E])
def test_another_capacity_takes_over_what_it_has_room_for(capacity: int) -> None:
    with bare_hook((LAYERS, E, K, C), ROUTING, "lru") as one, bare_hook((LAYERS, E, K, capacity), ROUTING, "lru") as other:
        run(one, 1, 20)
        assert resume(other, to_bytes(one))
        for layer in range(LAYERS):
            taken = other.resident(layer)
            assert taken <= one.resident(layer) and len(taken) == min(capacity, C)
        run(other, 2, 5)
        assert all(len(other.resident(layer)) <= capacity for layer in range(LAYERS))


def test_every_truncation_is_a_sentence() -> None:
    with bare_hook((LAYERS, E, K, C), ROUTING, "soft-lfu") as hook:
        run(hook, 1, 20)
        data = to_bytes(hook)
        assert len(data) == HEAD + LAYERS * (LAYER + STATE)
        for n in range(len(data)):
            with pytest.raises(CacherouteError, match=r"routing state .*\.$"):
                from_bytes(data[:n])
        with pytest.raises(CacherouteError, match="is not as long as it says"):
            from_bytes(data + b"\0")


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


FIRST = HEAD + LAYER  # the state of the first layer: mean, its count, clock, resident, last use, uses, score
NAN, HUGE = np.float64(np.nan).tobytes(), (2**62).to_bytes(8, "little")


@pytest.mark.parametrize(
    "at, value",
    [
        (0, b"X"), (4, b"\2"), (8, b"\xff\xff\xff\xff"), (8, b"\0"), (HEAD, b"\xff\xff\xff\x7f"), (HEAD, b"\0"),
        (HEAD + 4, b"\0"), (HEAD + 4, b"\xff\xff\xff\xff"), (HEAD + 8, b"\1"), (HEAD + 8, b"\xff\xff\xff\x7f"),
        (HEAD + 12, b"\3"), (HEAD + 12, b"\x09"),
        (FIRST, NAN), (FIRST, np.float64(-1).tobytes()), (FIRST + 24, b"\1" * E), (FIRST + 24, b"\2"), (FIRST + 24 + E, HUGE),
        (FIRST + 24 + E, bytes(8 * E)), (FIRST + 24 + 9 * E, HUGE), (FIRST + 24 + 17 * E, NAN),
        (FIRST + 24 + 17 * E, np.float64(1.5).tobytes()),
    ],
)  # fmt: skip
def test_a_state_that_cannot_be_is_a_sentence(at: int, value: bytes) -> None:
    with bare_hook((LAYERS, E, K, C), ROUTING, "soft-lfu") as hook:
        run(hook, 1, 20)
        with pytest.raises(CacherouteError, match=r"routing state.*\.$"):
            from_bytes(changed(to_bytes(hook), at, value))


def test_any_changed_byte_is_a_state_or_a_sentence() -> None:
    rng = np.random.default_rng(0)
    with bare_hook((LAYERS, E, K, C), ROUTING, "soft-lfu") as hook:
        run(hook, 1, 20)
        data = to_bytes(hook)
        refused = 0
        for _ in range(400):
            at = int(rng.integers(len(data)))
            try:
                resume(hook, changed(data, at, bytes([data[at] ^ int(rng.integers(1, 256))])))
                run(hook, 5, 3)
            except CacherouteError:
                refused += 1
        assert 0 < refused < 400
