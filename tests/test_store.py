"""The stores: what is evicted is gone for the whole machine, what is resident is what they count.

Works on real pages of a real file: pages of a tmpfs cannot be dropped, so a temporary folder there is an error.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from native_router import native_store

from cacheroute.engine.stats import kernel_counters
from cacheroute.errors import CacherouteError
from cacheroute.native import bindings

PAGE = mmap.PAGESIZE
LIB = bindings.lib
ODD = 3 * PAGE + 1696  # a multiple of 32, as in GGUF, and not of the page

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "android"), reason="counts pages as Linux does")

# Maps a file without touching it and prints one digit per page: 1 is in memory.
LOOK = """
import ctypes, mmap, sys
with open(sys.argv[1], "r+b") as f:
    view = mmap.mmap(f.fileno(), 0)
libc, base = ctypes.CDLL(None, use_errno=True), ctypes.c_char.from_buffer(view)
pages = (ctypes.c_ubyte * (-(-len(view) // mmap.PAGESIZE)))()
if libc.mincore(ctypes.c_void_p(ctypes.addressof(base)), ctypes.c_size_t(len(view)), pages):
    sys.exit("mincore: errno %d" % ctypes.get_errno())
print("".join(str(p & 1) for p in pages))
"""


def on_a_disk(folder: Path) -> Path:
    """The folder, or a failure that says what to do where its pages cannot be dropped."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.fail(f"{folder} is on {kind}, whose pages are the file; give pytest a --basetemp on a disk")
    return folder


def pages_in_memory(path: Path) -> set[int]:
    """Pages of a file in the page cache, as another process sees them."""
    seen = subprocess.run([sys.executable, "-c", LOOK, path], capture_output=True, text=True, check=True).stdout.strip()
    return {i for i, digit in enumerate(seen) if digit == "1"}


@dataclass
class Model:
    """Expert tensors of random bytes in one file, and the store that works on its mapping.

    Args:
        starts: [layer][tensor] offset of expert 0 in the file.
    """

    path: Path
    starts: list[list[int]]
    n_expert: int
    expert_bytes: int
    io: str = "mmap"
    address: int = 0
    store: int = 0
    resident: list[set[int]] = field(default_factory=list)  # per layer

    def tensor_pages(self, start: int, expert: int) -> range:
        """The pages of an expert in the tensor that begins at `start`, whole or in part."""
        first = start + expert * self.expert_bytes
        return range(first // PAGE, (first + self.expert_bytes - 1) // PAGE + 1)

    def expert_pages(self, layer: int, expert: int) -> set[int]:
        """The pages of an expert, whole or in part."""
        return {p for start in self.starts[layer] for p in self.tensor_pages(start, expert)}

    def expected_pages(self) -> set[int]:
        """The pages of all resident experts."""
        return {p for layer, experts in enumerate(self.resident) for e in experts for p in self.expert_pages(layer, e)}

    def expected_bytes(self) -> int:
        """What is to be in memory: of a mapping the pages of all resident experts, of slots each as large as the largest."""
        if self.io == "mmap":
            return len(self.expected_pages()) * PAGE
        slots = [[max(len(self.tensor_pages(s, e)) for e in range(self.n_expert)) for s in starts] for starts in self.starts]
        return sum(sum(pages) * len(experts) for pages, experts in zip(slots, self.resident, strict=True)) * PAGE

    def exchange(self, layer: int, load: Sequence[int] = (), evict: Sequence[int] = ()) -> None:
        arrays = [(ctypes.c_int32 * len(ids))(*ids) for ids in (load, evict)]
        LIB.cr_store_exchange(self.store, layer, arrays[0], len(load), arrays[1], len(evict))
        self.resident[layer] = self.resident[layer] - set(evict) | set(load)

    def touch(self, layer: int, expert: int) -> bytes:
        """Reads the expert where the store says that it is."""
        return b"".join(ctypes.string_at(self.place(layer, expert, t), self.expert_bytes) for t in range(len(self.starts[layer])))

    def place(self, layer: int, expert: int, tensor: int = 0) -> int:
        """Address of its bytes, as the store says."""
        mapped = self.address + self.starts[layer][tensor] + expert * self.expert_bytes
        return int(LIB.cr_store_find(self.store, mapped))

    def in_file(self, layer: int, expert: int) -> bytes:
        """What the file holds of the expert."""
        with open(self.path, "rb") as file:
            return b"".join(
                os.pread(file.fileno(), self.expert_bytes, at + expert * self.expert_bytes) for at in self.starts[layer]
            )

    def counted(self) -> tuple[int, int]:
        """Resident bytes as the store counts them, and as the kernel does."""
        return LIB.cr_store_resident_bytes(self.store), LIB.cr_store_measure_resident(self.store)


@contextmanager
def model(
    folder: Path, *, n_layers: int = 1, n_tensors: int = 1, n_expert: int = 8, expert_bytes: int = ODD, io: str = "mmap"
) -> Iterator[Model]:
    """A store with nothing resident. Tensors follow each other without a gap, as in a GGUF, after an odd header."""
    size = n_expert * expert_bytes
    starts = [[1312 + (layer * n_tensors + t) * size for t in range(n_tensors)] for layer in range(n_layers)]
    path = folder / "experts.bin"
    path.write_bytes(np.random.default_rng(0).bytes(1312 + n_layers * n_tensors * size + 800))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        address = int(np.frombuffer(view, np.uint8).ctypes.data)  # no array may outlive this line: the mapping could not close
        tensors = [bindings.Tensor(i, 0, at, expert_bytes, address + at) for i, layer in enumerate(starts) for at in layer]
        with native_store(str(path), n_layers, n_expert, tensors, io) as store:
            LIB.cr_store_clear(store)
            yield Model(path, starts, n_expert, expert_bytes, io, address, store, [set() for _ in range(n_layers)])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_a_disk(tmp_path_factory.mktemp("store"))


def device_bytes() -> int:
    """Bytes that this process has had fetched from storage."""
    nbytes = kernel_counters().device_bytes
    if nbytes is None:
        pytest.skip("this kernel does not say what was read (/proc/self/io)")
    return nbytes


def test_loaded_pages_are_there_and_evicted_ones_gone_for_everyone(disk: Path) -> None:
    with model(disk, n_tensors=3, expert_bytes=512 * 1024 + 1696) as m:
        assert pages_in_memory(m.path) & m.expert_pages(0, 3) == set()
        m.exchange(0, load=[3, 5])
        assert pages_in_memory(m.path) == m.expected_pages()
        m.exchange(0, evict=[3])
        # the other process looks after the eviction: while it maps the pages, nobody can drop them
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
def test_the_count_is_the_kernels_after_every_exchange(disk: Path, expert_bytes: int, io: str) -> None:
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
