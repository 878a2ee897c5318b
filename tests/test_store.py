"""The stores: what is evicted is gone for the whole machine, what is resident is what they count.

Works on real pages of a real file: pages of a tmpfs cannot be dropped, so a temporary folder there is an error.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from cacheroute.engine.stats import kernel_counters
from cacheroute.errors import CacherouteError
from cacheroute.native import bindings
from support.expert_file import ODD, PAGE, model, on_a_disk, pages_in_memory
from support.native_router import native_store

LIB = bindings.lib

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "android"), reason="counts pages as Linux does")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_a_disk(tmp_path_factory.mktemp("store"))


def device_bytes() -> int:
    """Bytes that this process has had fetched from storage."""
    nbytes = kernel_counters().device_bytes
    if nbytes is None:
        pytest.skip("this kernel does not report what was read (/proc/self/io)")
    return nbytes


def test_other_processes_see_loaded_pages_in_memory_and_evicted_ones_gone(disk: Path) -> None:
    with model(disk, n_tensors=3, expert_bytes=512 * 1024 + 1696) as m:
        assert pages_in_memory(m.path) & m.expert_pages(0, 3) == set()
        m.exchange(0, load=[3, 5])
        assert pages_in_memory(m.path) == m.expected_pages()
        m.exchange(0, evict=[3])
        # the other process looks after the eviction: while it maps the pages, they cannot be dropped
        assert pages_in_memory(m.path) == m.expected_pages() == m.expert_pages(0, 5)


def test_an_evicted_expert_is_read_again_from_the_device(disk: Path) -> None:
    with model(disk, expert_bytes=1024 * 1024 + 1696) as m:
        m.exchange(0, load=[2])
        want = m.in_file(0, 2)
        LIB.cr_store_clear(m.store)
        m.exchange(0, load=[2])

        before = device_bytes()
        assert m.touch(0, 2) == want
        assert device_bytes() == before  # it was there

        m.exchange(0, evict=[2])
        before = device_bytes()
        assert m.touch(0, 2) == want
        assert device_bytes() - before >= m.expert_bytes  # all of it was gone
        m.resident[0].add(2)  # the kernel brought it back, behind the store's back


def test_loading_reads_each_page_once(disk: Path) -> None:
    with model(disk, n_tensors=2, expert_bytes=256 * 1024 + 1696) as m:
        m.exchange(0, load=[6])  # so that the code itself has been read
        m.exchange(0, evict=[6])
        for expert in (3, 4, 0, 7):  # 3 and 4 share a page in each tensor
            before_pages, before_store, before_device = m.expected_pages(), LIB.cr_store_read_bytes(m.store), device_bytes()
            m.exchange(0, load=[expert])
            new = len(m.expert_pages(0, expert) - before_pages) * PAGE
            assert LIB.cr_store_read_bytes(m.store) - before_store == new
            assert device_bytes() - before_device == new
        total = LIB.cr_store_read_bytes(m.store)
        m.exchange(0, evict=[3, 4])
        m.exchange(0, load=[3, 4])
        assert LIB.cr_store_read_bytes(m.store) - total == len(m.expert_pages(0, 3) | m.expert_pages(0, 4)) * PAGE


@pytest.mark.parametrize("first, second", [(3, 4), (4, 3)])
def test_a_shared_page_stays_while_either_expert_is_resident(disk: Path, first: int, second: int) -> None:
    with model(disk) as m:
        (shared,) = m.expert_pages(0, 3) & m.expert_pages(0, 4)
        m.exchange(0, load=[3, 4])
        m.exchange(0, evict=[first])
        assert shared in pages_in_memory(m.path)
        assert pages_in_memory(m.path) == m.expert_pages(0, second)
        m.exchange(0, evict=[second])
        assert pages_in_memory(m.path) == set()


def test_a_page_shared_across_tensors_and_layers_stays_too(disk: Path) -> None:
    with model(disk, n_layers=2, n_tensors=2) as m:
        last = m.n_expert - 1
        (shared,) = m.expert_pages(0, last) & m.expert_pages(1, 0)
        m.exchange(0, load=[last])
        m.exchange(1, load=[0])
        m.exchange(0, evict=[last])
        assert shared in pages_in_memory(m.path)
        assert m.counted() == (len(m.expected_pages()) * PAGE,) * 2
        m.exchange(1, evict=[0])
        assert m.counted() == (0, 0)


def test_a_swap_of_neighbours_keeps_the_page_between_them(disk: Path) -> None:
    with model(disk) as m:
        m.exchange(0, load=[3])
        before = LIB.cr_store_read_bytes(m.store)
        m.exchange(0, load=[4], evict=[3])
        assert pages_in_memory(m.path) == m.expert_pages(0, 4)
        assert LIB.cr_store_read_bytes(m.store) - before == len(m.expert_pages(0, 4) - m.expert_pages(0, 3)) * PAGE


@pytest.mark.parametrize("io", ["mmap", "direct"])
@pytest.mark.parametrize(
    "expert_bytes",
    [160, 2016, PAGE, PAGE + 32, ODD, 64 * 1024, 300 * 1024 + 32],
    ids=["25 a page", "2 a page", "a page", "more than a page", "odd", "whole pages", "large"],
)
def test_counted_bytes_equal_the_kernels_after_every_exchange(disk: Path, expert_bytes: int, io: str) -> None:
    rng = np.random.default_rng(expert_bytes)
    n_expert = 12
    with ExitStack() as stack:
        try:
            m = stack.enter_context(model(disk, n_layers=2, n_tensors=3, n_expert=n_expert, expert_bytes=expert_bytes, io=io))
        except CacherouteError as e:
            if "has no direct reads" in str(e):
                pytest.skip(str(e))
            raise
        for step in range(60):
            layer = step % 2
            there = sorted(m.resident[layer])
            absent = [e for e in range(n_expert) if e not in there]
            load = rng.permutation(absent)[: rng.integers(0, 5)].tolist()
            evict = rng.permutation(there)[: rng.integers(0, 5)].tolist()
            m.exchange(layer, load, evict)
            assert m.counted() == (m.expected_bytes(),) * 2, f"after exchange {step}"
        # direct reads hold experts in the memory of the process, and nothing in the page cache
        assert pages_in_memory(m.path) == (m.expected_pages() if io == "mmap" else set())
        for layer, expert in [(layer, e) for layer, experts in enumerate(m.resident) for e in experts]:
            assert m.touch(layer, expert) == m.in_file(layer, expert)


def test_clear_drops_everything(disk: Path) -> None:
    with model(disk, n_layers=2, n_tensors=2) as m:
        m.exchange(0, load=range(8))
        m.exchange(1, load=[1, 2])
        m.path.read_bytes()  # and what others have left in the page cache
        LIB.cr_store_clear(m.store)
        assert m.counted() == (0, 0)
        assert pages_in_memory(m.path) == set()
        m.resident = [set(), set()]
        m.exchange(0, load=[6])  # and starts again from nothing
        assert m.counted() == (len(m.expected_pages()) * PAGE,) * 2


def test_a_paced_read_takes_its_time(disk: Path) -> None:
    with model(disk, expert_bytes=200 * 1000) as m:
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
