"""What a budget holds where the experts of layers differ in size: whole pages, no more than was given, and no expert less."""

from __future__ import annotations

import mmap
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cacheroute.model import experts
from cacheroute.model.experts import ExpertLayer, ExpertLayout, ExpertTensor
from cacheroute.routing import budget as budgets

PAGE = mmap.PAGESIZE
N_EXPERT, N_USED = 16, 2


def pages(at: int, size: int) -> int:
    """That a range of a file touches."""
    return (at + size - 1) // PAGE - at // PAGE + 1


@st.composite
def layouts(draw: st.DrawFn) -> ExpertLayout:
    """Layers of three tensors that follow each other in a file, each with experts of its own size."""
    at, layers = 32 * draw(st.integers(0, 1000)), []
    for i in range(draw(st.integers(1, 6))):
        tensors = []
        for name in ("gate", "up", "down"):
            size = 32 * draw(st.integers(1, 1000))
            tensors.append(ExpertTensor(name, "q4_K", 0, at, size, experts._slot_bytes(at, size, N_EXPERT)))
            at += N_EXPERT * size
        layers.append(ExpertLayer(i, tuple(tensors)))
    return ExpertLayout((Path("m.gguf"),), "qwen3moe", N_EXPERT, N_USED, tuple(layers))


@given(layouts())
def test_a_slot_is_no_larger_than_the_most_pages_of_an_expert(layout: ExpertLayout) -> None:
    for layer in layout.layers:
        for t in layer.tensors:
            assert t.slot_bytes == PAGE * max(pages(t.offset + e * t.expert_bytes, t.expert_bytes) for e in range(N_EXPERT))
            assert t.slot_bytes < t.expert_bytes + 2 * PAGE


@given(layouts())
def test_units_may_be_short(layout: ExpertLayout) -> None:
    for short, whole in (("9Gi", "9GiB"), ("9G", "9GiB"), ("999Mi", "999MiB"), ("99999999ki", "99999999KiB")):
        assert budgets.parse(short, layout) == budgets.parse(whole, layout)
        assert budgets.in_bytes(short, layout) == budgets.in_bytes(whole, layout)


@given(layouts(), st.floats(0, 1))
def test_a_budget_in_bytes_holds_as_many_experts_of_every_layer_as_fit(layout: ExpertLayout, share: float) -> None:
    least, all_of_them = N_USED * layout.resident_bytes, N_EXPERT * layout.resident_bytes
    kib = -(-int(least + share * (all_of_them - least)) // 1024)
    found = budgets.parse(f"{kib}KiB", layout)
    assert N_USED <= found.capacity <= N_EXPERT
    assert found.nbytes == found.capacity * sum(t.slot_bytes for layer in layout.layers for t in layer.tensors)
    assert found.nbytes <= kib * 1024
    assert found.capacity == N_EXPERT or found.nbytes + layout.resident_bytes > kib * 1024
