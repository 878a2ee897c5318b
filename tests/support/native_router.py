"""The C++ router, cache and store behind Python objects, with the oracle's types."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from cacheroute.routing import eviction as evictions
from cacheroute.routing.strategies import STRATEGIES
from support.oracle import Event, Routing, Vector


def _doubles(values: Vector) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


class NativeLayer:
    """A cr_router of one layer. Made by `native_layer`."""

    def __init__(self, n_expert: int, n_used: int, capacity: int, routing: Routing, eviction: str) -> None:
        self.n_expert, self.n_used = n_expert, n_used
        native = bindings.Routing(
            strategy=STRATEGIES[routing.strategy].number,
            k=routing.k,
            m=routing.m,
            j=routing.j,
            p=routing.p,
            lambda_=routing.lam,
            f=routing.f,
            max_loss=-1.0 if routing.max_loss is None else routing.max_loss,
        )
        shape = bindings.Shape(1, n_expert, n_used, capacity, evictions.ONLINE[eviction])
        self.handle = bindings.checked(bindings.lib.cr_router_new, shape, native)

    def step(
        self,
        z: Vector,
        mass: Vector,
        *,
        prefill: bool = False,
        prescribed: Sequence[int] | None = None,
        predicted: Vector | None = None,
    ) -> Event:
        """One token; slots that do not run must repeat the first id."""
        before = self.counters(prefill)
        ids, missed = (ctypes.c_int32 * self.n_used)(), (ctypes.c_int32 * self.n_used)()
        evicted, n_missed, n_evicted = (ctypes.c_int32 * self.n_expert)(), ctypes.c_int32(), ctypes.c_int32()
        own = None if prescribed is None else (ctypes.c_int32 * self.n_used)(*prescribed)
        speculated = None if predicted is None else _doubles(predicted)
        n_run = bindings.lib.cr_router_step(
            self.handle, 0, _doubles(z), _doubles(mass), prefill, own, own is not None, speculated,
            ids, missed, n_missed, evicted, n_evicted,
        )  # fmt: skip
        assert list(ids[n_run:]) == [ids[0]] * (self.n_used - n_run)
        after = self.counters(prefill)
        return Event(
            list(ids[:n_run]),
            list(missed[: n_missed.value]),
            list(evicted[: n_evicted.value]),
            after.swapped - before.swapped,
            after.lost_mass - before.lost_mass,
        )

    def counters(self, prefill: bool = False) -> Counters:
        return bindings.counters(bindings.lib.cr_router_counters, self.handle, -1, prefill=prefill)

    @property
    def resident(self) -> set[int]:
        mask = (ctypes.c_uint8 * self.n_expert)()
        bindings.lib.cr_router_resident(self.handle, 0, mask)
        return {e for e in range(self.n_expert) if mask[e]}

    @property
    def mean_range(self) -> float:
        return float(bindings.lib.cr_router_mean_range(self.handle, 0))

    def reset(self) -> None:
        bindings.lib.cr_router_reset(self.handle)


@contextmanager
def native_layer(n_expert: int, n_used: int, capacity: int, routing: Routing, eviction: str = "lru") -> Iterator[NativeLayer]:
    """A NativeLayer that is freed at the end."""
    layer = NativeLayer(n_expert, n_used, capacity, routing, eviction)
    try:
        yield layer
    finally:
        bindings.lib.cr_router_free(layer.handle)


@contextmanager
def native_store(
    path: str, n_layers: int, n_expert: int, tensors: Sequence[bindings.Tensor], io: str = "direct"
) -> Iterator[int]:
    """A cr_store over one file, freed at the end."""
    files = (ctypes.c_char_p * 1)(path.encode())
    own = (bindings.Tensor * len(tensors))(*tensors)
    make = bindings.lib.cr_store_new
    handle = bindings.checked(make, files, 1, own, len(tensors), n_layers, n_expert, io == "direct")
    try:
        yield handle
    finally:
        bindings.lib.cr_store_free(handle)
