"""A file of random experts with the store that works on it, and which of its pages are in memory."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from cacheroute.errors import CacherouteError
from cacheroute.native import bindings
from support.native_router import native_store

PAGE = mmap.PAGESIZE
LIB = bindings.lib
ODD = 3 * PAGE + 1696  # bytes of an expert: a multiple of 32, as in GGUF, and not of the page

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
    """The folder, or a failure with advice where its pages cannot be dropped."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.fail(f"{folder} is on {kind}, which keeps files in memory; give pytest a --basetemp on a disk")
    return folder


@contextmanager
def skipped_without_direct_reads() -> Iterator[None]:
    """Skips the test where the filesystem of a store has none; any other failure is one."""
    try:
        yield
    except CacherouteError as e:
        if "has no direct reads" in str(e):
            pytest.skip(str(e))
        raise


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
    content: bytes
    starts: list[list[int]]
    n_expert: int
    expert_bytes: int
    io: str = "direct"
    address: int = 0
    store: int = 0
    resident: list[set[int]] = field(default_factory=list)  # per layer

    def tensor_pages(self, start: int, expert: int) -> range:
        """The pages of an expert in the tensor that begins at `start`, whole or in part."""
        first = start + expert * self.expert_bytes
        return range(first // PAGE, (first + self.expert_bytes - 1) // PAGE + 1)

    def read_bytes(self, layer: int, expert: int) -> int:
        """What reading an expert asks of the device: whole pages."""
        return sum(len(self.tensor_pages(start, expert)) for start in self.starts[layer]) * PAGE

    def expected_bytes(self) -> int:
        """What should be in memory: the slots of all resident experts, each as large as the largest expert of its tensor."""
        slots = [[max(len(self.tensor_pages(s, e)) for e in range(self.n_expert)) for s in starts] for starts in self.starts]
        return sum(sum(pages) * len(experts) for pages, experts in zip(slots, self.resident, strict=True)) * PAGE

    def exchange(self, layer: int, load: Sequence[int] = (), evict: Sequence[int] = ()) -> None:
        bindings.exchange(self.store, layer, load, evict)
        self.resident[layer] = self.resident[layer] - set(evict) | set(load)

    def touch(self, layer: int, expert: int) -> bytes:
        """The expert's bytes, read at the address that the store returns."""
        return b"".join(ctypes.string_at(self.place(layer, expert, t), self.expert_bytes) for t in range(len(self.starts[layer])))

    def place(self, layer: int, expert: int, tensor: int = 0) -> int:
        """Address of the expert's bytes, from the store."""
        mapped = self.address + self.starts[layer][tensor] + expert * self.expert_bytes
        return int(LIB.cr_store_find(self.store, mapped))

    def in_file(self, layer: int, expert: int) -> bytes:
        """What the file holds of the expert; reading it here would bring its pages into memory."""
        starts = (at + expert * self.expert_bytes for at in self.starts[layer])
        return b"".join(self.content[at : at + self.expert_bytes] for at in starts)

    def counted(self) -> tuple[int, int]:
        """Resident bytes as the store counts them, and as the kernel does."""
        return LIB.cr_store_resident_bytes(self.store), LIB.cr_store_measure_resident(self.store)


@contextmanager
def model(
    folder: Path, *, n_layers: int = 1, n_tensors: int = 1, n_expert: int = 8, expert_bytes: int = ODD, io: str = "direct"
) -> Iterator[Model]:
    """A store with nothing resident. Tensors follow each other without a gap, as in a GGUF, after an odd header."""
    size = n_expert * expert_bytes
    starts = [[1312 + (layer * n_tensors + t) * size for t in range(n_tensors)] for layer in range(n_layers)]
    path = folder / "experts.bin"
    content = np.random.default_rng(0).bytes(1312 + n_layers * n_tensors * size + 800)
    path.write_bytes(content)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        address = int(np.frombuffer(view, np.uint8).ctypes.data)  # no array may outlive this line: the mapping could not close
        tensors = [bindings.Tensor(i, 0, at, expert_bytes, address + at) for i, layer in enumerate(starts) for at in layer]
        with native_store(str(path), n_layers, n_expert, tensors, io) as store:
            LIB.cr_store_clear(store)
            yield Model(path, content, starts, n_expert, expert_bytes, io, address, store, [set() for _ in range(n_layers)])
