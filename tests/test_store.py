"""The store: what is evicted is gone for the whole machine, what is resident is what it counts, however it reads.

Works on real pages of a real file: pages of a tmpfs cannot be dropped, so a temporary folder there is an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from cacheroute.engine.stats import kernel_counters
from cacheroute.errors import CacherouteError
from cacheroute.native import bindings
from support import expert_file
from support.expert_file import ODD, PAGE, Model, on_a_disk, pages_in_memory
from support.native_router import native_store
from support.systems import LINUX

LIB = bindings.lib

pytestmark = pytest.mark.skipif(not LINUX, reason="counts pages as Linux does")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_a_disk(tmp_path_factory.mktemp("store"))


def device_bytes() -> int:
    """Bytes that this process has had fetched from storage."""
    nbytes = kernel_counters().device_bytes
    if nbytes is None:
        pytest.skip("this kernel does not report what was read (/proc/self/io)")
    return nbytes


@contextmanager
def model(disk: Path, *, io: str, **shape: int) -> Iterator[Model]:
    """A store, skipped where the filesystem has no direct reads."""
    with ExitStack() as stack:
        with expert_file.skipped_without_direct_reads():
            made = stack.enter_context(expert_file.model(disk, io=io, **shape))
        yield made


@pytest.fixture(params=["buffered", "direct"])
def io(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_is_read_leaves_nothing_in_the_page_cache(disk: Path, io: str) -> None:
    """As another process sees it: or a miss would be read from memory, and memory would hold it twice."""
    with model(disk, io=io, n_tensors=3, expert_bytes=512 * 1024 + 1696) as m:
        for load, evict in (([3, 5], []), ([4], [3]), ([0, 1, 2], [5])):
            m.exchange(0, load, evict)
            assert pages_in_memory(m.path) == set()
        assert all(m.touch(0, e) == m.in_file(0, e) for e in m.resident[0])


def test_every_load_reads_the_pages_of_the_expert_from_the_device_once(disk: Path, io: str) -> None:
    with model(disk, io=io, n_tensors=2, expert_bytes=256 * 1024 + 1696) as m:
        m.exchange(0, load=[6])  # so that the code itself has been read
        m.exchange(0, evict=[6])
        for expert in (3, 4, 0, 7, 3, 4):  # 3 and 4 share a page in each tensor
            before_store, before_device = LIB.cr_store_read_bytes(m.store), device_bytes()
            m.exchange(0, load=[expert])
            assert LIB.cr_store_read_bytes(m.store) - before_store == m.read_bytes(0, expert)
            assert device_bytes() - before_device == m.read_bytes(0, expert)
            m.exchange(0, evict=[expert])


@pytest.mark.parametrize(
    "expert_bytes",
    [160, 2016, PAGE, PAGE + 32, ODD, 64 * 1024, 300 * 1024 + 32],
    ids=["25 a page", "2 a page", "a page", "more than a page", "odd", "whole pages", "large"],
)
def test_counted_bytes_equal_the_kernels_after_every_exchange(disk: Path, expert_bytes: int, io: str) -> None:
    rng = np.random.default_rng(expert_bytes)
    n_expert = 12
    with model(disk, io=io, n_layers=2, n_tensors=3, n_expert=n_expert, expert_bytes=expert_bytes) as m:
        for step in range(60):
            layer = step % 2
            there = sorted(m.resident[layer])
            absent = [e for e in range(n_expert) if e not in there]
            load = rng.permutation(absent)[: rng.integers(0, 5)].tolist()
            evict = rng.permutation(there)[: rng.integers(0, 5)].tolist()
            m.exchange(layer, load, evict)
            assert m.counted() == (m.expected_bytes(),) * 2, f"after exchange {step}"
        assert pages_in_memory(m.path) == set()
        for layer, expert in [(layer, e) for layer, experts in enumerate(m.resident) for e in experts]:
            assert m.touch(layer, expert) == m.in_file(layer, expert)


def test_clear_drops_everything(disk: Path, io: str) -> None:
    with model(disk, io=io, n_layers=2, n_tensors=2) as m:
        m.exchange(0, load=range(8))
        m.exchange(1, load=[1, 2])
        m.path.read_bytes()  # and what others have left in the page cache
        LIB.cr_store_clear(m.store)
        assert m.counted() == (0, 0)
        assert pages_in_memory(m.path) == set()
        m.resident = [set(), set()]
        m.exchange(0, load=[6])  # and starts again from nothing
        assert m.counted() == (m.expected_bytes(),) * 2


def test_a_paced_read_takes_its_time(disk: Path, io: str) -> None:
    with model(disk, io=io, expert_bytes=200 * 1000) as m:
        LIB.cr_store_set_pace(m.store, 1e6)
        start = time.monotonic()
        m.exchange(0, load=[0])
        assert time.monotonic() - start >= 0.19
        start = time.monotonic()
        m.exchange(0, evict=[0])  # reads nothing, waits for nothing: only the next read is paced
        m.exchange(0, load=[1, 2])
        assert time.monotonic() - start >= 0.39


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacherouteError, match=r"^cannot open .*nowhere\.gguf: No such file or directory\.$"):
        native_store(os.fspath(tmp_path / "nowhere.gguf"), 1, 1, []).__enter__()
