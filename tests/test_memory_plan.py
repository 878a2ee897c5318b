"""`--budget auto`: what fits the free memory is taken, what does not is refused with the figures, and nothing else is."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheroute import Llama, UsageError
from cacheroute.engine import computing, configured
from cacheroute.files import GIB, MIB
from cacheroute.model import context_memory, experts, gguf_file, memory_plan
from cacheroute.model.memory_plan import MemoryPlan
from support.cli import cacheroute, sentence


@st.composite
def plans(draw: st.DrawFn) -> MemoryPlan:
    layers, n_expert = draw(st.integers(1, 60)), draw(st.integers(2, 256))
    layer = draw(st.integers(1, 20 * MIB))
    free = draw(st.integers(0, 64 * GIB))
    return MemoryPlan(
        free=free,
        reserve=memory_plan.reserve(free),
        dense=draw(st.integers(0, 2 * GIB)),
        embedding=draw(st.integers(0, GIB)),
        context=draw(st.integers(0, GIB)),
        compute=draw(st.integers(0, GIB)),
        pass_tokens=512,
        resident_bytes=layer * layers,
        layer_bytes=layer,
        file_expert_bytes=layer * layers,
        n_expert=n_expert,
        n_used=draw(st.integers(1, n_expert)),
    )


@given(plans())
def test_the_most_that_fits_is_taken_and_no_more(plan: MemoryPlan) -> None:
    assert plan.free is not None
    room, capacity = plan.free - plan.reserve, plan.capacity
    if capacity is None:
        assert plan.needed(plan.n_used) > room
        return
    assert plan.n_used <= capacity <= plan.n_expert
    assert plan.needed(capacity) <= room
    assert capacity == plan.n_expert or plan.needed(capacity + 1) > room


@given(plans())
def test_a_model_that_does_not_fit_is_refused_with_what_is_missing(plan: MemoryPlan) -> None:
    if plan.capacity is not None:
        return
    text = str(memory_plan.refusal(plan, "m.gguf"))
    short = plan.least - (plan.free or 0)
    assert text.startswith("m.gguf needs at least ") and f"free {context_memory.size(short)}, or " in text


def free_is(monkeypatch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    for module in (memory_plan, context_memory, configured, computing):
        monkeypatch.setattr(module, "available_memory", lambda **_: nbytes)


def open_model(path: Path, budget: str | None = "auto", **more: object) -> contextlib.closing[Llama]:
    return contextlib.closing(Llama(str(path), budget=budget, n_ctx=64, n_threads=1, verbose=False, **more))


def test_auto_loads_all_where_all_fits_and_what_fits_where_it_does_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf_file.read(tiny)
    layout = experts.layout(header)
    with open_model(tiny) as llm:
        back = {"budget": "auto"}
        for asked in ({}, {"routing": "tuned"}, {"eviction": "lru"}, {"budget": "all", "routing": "original"}, back):
            assert (llm.io, llm.budget.capacity, str(llm.routing)) == ("load", layout.n_expert, "original")
            assert llm.automatic == (llm.__getstate__()["budget"] == "auto") == (asked != back)
            llm.configure(**asked)
        assert llm.automatic
    enough = memory_plan.of(header, layout, n_ctx=64, free=GIB).needed(layout.n_expert) + 64 * MIB
    assert memory_plan.of(header, layout, n_ctx=64, free=enough).capacity == layout.n_expert
    paged = memory_plan.of(header, layout, n_ctx=64, whole=False, free=GIB)
    free_is(monkeypatch, paged.needed(layout.n_expert // 2) + 64 * MIB)
    with open_model(tiny, io="direct") as llm:  # such small experts take less loaded whole than in whole pages
        assert llm.budget.capacity == layout.n_expert // 2 and llm.automatic
        free_is(monkeypatch, GIB)
        llm.configure(routing="cache-prior:lambda=0.1")  # what is not given stays as asked: auto, of what is free now
        assert llm.io == "direct" and llm.budget.capacity == layout.n_expert and llm.automatic
        llm.configure(budget="auto")  # its experts are in the file, and there they stay
        assert llm.io != "load" and llm.budget.capacity == layout.n_expert
        llm.configure(budget="25%")
        assert llm.budget.capacity == layout.n_expert // 4 and not llm.automatic
    free_is(monkeypatch, None)  # not known: half
    with open_model(tiny) as llm:
        assert llm.budget.capacity == layout.n_expert // 2


def test_what_does_not_fit_is_refused_before_it_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_is(monkeypatch, 64 * MIB)
    with pytest.raises(UsageError, match=r"needs at least .* are free: free .*, or "):
        open_model(tiny)


def test_auto_is_for_what_answers(tiny: Path) -> None:
    assert "auto follows the free memory" in sentence(cacheroute("tune", "-m", tiny, "--budget", "auto"), 2)


def test_none_stays_half_and_a_model_without_a_hook_asks_for_no_memory(tiny: Path) -> None:
    with open_model(tiny, None) as llm:
        assert llm.budget.capacity == llm.layout.n_expert // 2 and not llm.automatic
    with open_model(tiny, routing=None) as llm:
        assert llm.io != "load"


def test_under_a_limit_of_address_space_a_model_is_loaded_whole_or_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf_file.read(tiny)
    layout = experts.layout(header)
    monkeypatch.setattr(memory_plan, "ulimit_room", lambda: [GIB + 16 * MIB])
    assert memory_plan.of(header, layout, n_ctx=64).capacity == layout.n_expert
    monkeypatch.setattr(memory_plan, "ulimit_room", lambda: [GIB])
    with pytest.raises(UsageError, match=r"of address space, used or not, and `ulimit -v` leaves 1.0 GiB: raise it by \d"):
        open_model(tiny)


def test_what_is_asked_for_suffices_and_does_not_depend_on_what_is_free(tiny: Path) -> None:
    header = gguf_file.read(tiny)
    layout = experts.layout(header)

    def plan(free: int) -> memory_plan.MemoryPlan:
        return memory_plan.of(header, layout, n_ctx=4096, whole=False, free=free)

    least = plan(MIB).least
    assert plan(least).capacity is not None and plan(least - 1).capacity is None
    assert {plan(least * share // 100).least for share in (10, 50, 90, 99)} == {least}
    large = MemoryPlan(
        free=MIB,
        reserve=0,
        dense=8 * GIB,
        embedding=0,
        context=0,
        compute=0,
        pass_tokens=64,
        resident_bytes=MIB,
        layer_bytes=MIB,
        file_expert_bytes=MIB,
        n_expert=8,
        n_used=2,
    )
    for dense in (large.dense, 40 * GIB, 100 * MIB):
        asked = replace(large, dense=dense).least
        with_it = replace(large, dense=dense, free=asked, reserve=memory_plan.reserve(asked))
        assert with_it.capacity is not None
        assert replace(with_it, free=asked - MIB, reserve=memory_plan.reserve(asked - MIB)).capacity is None
