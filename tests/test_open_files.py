"""Dense weights are asked for before the loader comes to them, and only they."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cacheroute.engine.open_files import OpenFiles
from cacheroute.model import experts, gguf_file
from support import tiny_models
from support.waiting import until


def test_dense_ranges_are_all_that_is_neither_expert_nor_left_in_the_file(tmp_path: Path) -> None:
    header = gguf_file.read(tiny_models.write("deepseek2", tmp_path / "m.gguf", shards=2))
    layout = experts.layout(header)
    covered = {t.name for t in header.tensors for f, at, n in layout.dense_ranges if f == t.file and at <= t.offset < at + n}
    of_experts = {t.name for layer in layout.layers for t in layer.tensors}
    left = {experts.EMBEDDING} if layout.embedding_bytes else set()
    assert covered == {t.name for t in header.tensors} - of_experts - left
    ends = [(f, at + n) for f, at, n in layout.dense_ranges]
    starts = [(f, at) for f, at, _ in layout.dense_ranges]
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False)), "in order, and none touches the next"


def test_the_kernel_is_asked_for_every_range_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    asked: list[tuple[int, int]] = []

    def advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((offset, nbytes))
        if len(asked) == 1:
            raise OSError("no advice is taken")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    opened = OpenFiles([file])
    ranges = [(0, 10, 20), (0, 50, 5), (0, 60, 40)]
    with opened.fetched(ranges):
        until(lambda: len(asked) >= 3)
    opened.close()
    assert asked == [(10, 20), (50, 5), (60, 40)]


def test_a_load_that_fails_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10))
    opened = OpenFiles([file])
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, nbytes, advice: asked.append(offset))
    with pytest.raises(ValueError, match="broken"), opened.fetched([(0, i, 1) for i in range(1_000_000)]):
        raise ValueError("broken")
    opened.close()
    assert len(asked) < 1_000_000
