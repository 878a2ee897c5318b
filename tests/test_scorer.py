"""Cells with prompts that are kept: to the last bit those of prompts that are evaluated, whatever was asked for before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import CacherouteError
from cacheroute.evals import loading
from cacheroute.evals.runner import Job, Request, Runner
from cacheroute.evals.text import Chunk
from cacheroute.routing.strategies import Routing, parse
from support import tiny_models


@pytest.fixture(scope="module", params=["qwen3moe", "deepseek2"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    model = loading.load(tiny_models.write(request.param, tmp_path_factory.mktemp("tiny") / "m.gguf"), 64, 1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def chunks(llm: Llama) -> list[Chunk]:
    rows = np.random.default_rng(5).integers(3, 300, (3, 40)).tolist()
    return [Chunk(i, tuple(row), 24) for i, row in enumerate(rows)]


HELD = Routing("cache-prior", layers=tuple(Routing("cache-prior", {"lambda": 0.4, "experts": float(n)}) for n in (5, 11)))
REQUESTS = [
    Request(parse(routing), budget, eviction, chunk, kl)
    for chunk in (0, 1, 0, 2)
    for budget, eviction in ((8, "lru"), (8, "soft-lfu"), (12, "soft-lfu"))
    for routing, kl in (
        ("original", False),
        ("cache-prior:lambda=0.4", True),
        ("pruning:k=2", False),
        ("drop-cold:f=0.5", False),
        ("speculate", False),
    )
] + [Request(HELD, budget, "lru", 0) for budget in (8, 12)]


def job(io: str) -> Job:
    return Job(Path(), "", 64, 1, io)


@pytest.mark.parametrize("io", ["none", "buffered"])
def test_a_kept_prompt_changes_no_bit(llm: Llama, chunks: list[Chunk], io: str) -> None:
    evaluated, kept = (Runner(llm, job(io), room=room) for room in (0, 1 << 30))
    expected = [evaluated.run(request, chunks[request.chunk]) for request in REQUESTS]
    found = [kept.run(request, chunks[request.chunk]) for request in REQUESTS]
    assert [replace(cell, seconds=0) for cell in found] == [replace(cell, seconds=0) for cell in expected]


def test_it_evaluates_a_prompt_once_and_keeps_no_more_than_fits(
    llm: Llama, chunks: list[Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[int] = []
    evaluate = llm.eval

    def count(tokens: list[int]) -> None:
        prompts.extend([1] if len(tokens) > 1 else [])
        evaluate(tokens)

    monkeypatch.setattr(llm, "eval", count)
    for room, per_round in ((1 << 30, 0), (1, 2), (0, 3)):
        runner = Runner(llm, job("none"), room)
        for _ in range(2):
            prompts.clear()
            for chunk in range(3):
                for routing in ("pruning:k=2", "pruning:k=3"):
                    runner.run(Request(parse(routing), 8, "lru", chunk), chunks[chunk])
        assert len(prompts) == (2 * per_round)


def test_a_checkpoint_fits_only_its_own_budget_and_eviction(llm: Llama, chunks: list[Chunk]) -> None:
    llm.configure(budget=8, routing="original", eviction="lru", io="none")
    llm.eval(chunks[0].tokens)
    mark = llm.checkpoint(sequence=True)
    for other in ({"budget": 9}, {"eviction": "lfu"}, {"routing": None}):
        llm.configure(**{"budget": 8, "routing": Routing("original"), "eviction": "lru", "io": "none", **other})  # type: ignore[arg-type]
        with pytest.raises(CacherouteError, match="fits the budget and the eviction"):
            llm.return_to(mark)
    llm.configure(budget=8, routing="pruning:k=2", eviction="lru", io="none")
    llm.return_to(mark)
    assert llm.n_tokens == len(chunks[0].tokens) and llm.stats().prefill.tokens == 0
    with pytest.raises(CacherouteError, match="does not fit this context"):
        mark.sequence = b"no state"
        llm.return_to(mark)
