"""eval perplexity, tune and frontier share one session: its cells, its threads and its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import CacherouteError
from cacheroute.evals import loading, scorer
from cacheroute.evals import session as sessions
from cacheroute.evals.runner import Runner
from cacheroute.routing.strategies import Routing
from support.cli import invoke

ROUTING = "cache-prior:lambda=0.4"


def commands(tiny: Path, prose: Path, file: Path) -> dict[str, tuple[object, ...]]:
    """Each scores `original` and ROUTING (tune: that and other rungs) on all chunks."""
    few = ("-m", tiny, "-f", prose, "--chunk", 32, "--limit", 120, "--budget", "25%", "-o", "json")
    return {
        "tune": ("tune", "--uniform", "--max-ppl-increase", "90%", *few),
        "eval": ("eval", "perplexity", "--routing", ROUTING, *few),
        "frontier": ("frontier", file, "--routing", ROUTING, *few),
    }


def kept(cache: Path) -> set[tuple[str, int]]:
    (file,) = (cache / "scores").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    cells = [(line["routing"], line["chunk"]) for line in lines]
    assert len(cells) == len(set(cells)), "computed twice"
    return set(cells)


@pytest.mark.parametrize("more", [("-t", 1), ("-t", 2, "--workers", 2)])
def test_what_one_command_has_scored_no_other_computes(
    own_cache: Path, tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...]
) -> None:
    every = commands(tiny, prose, tmp_path / "f.jsonl")
    first = invoke(*every["eval"], *more)
    assert first.exit_code == 0 and "in the cache" not in first.stderr, first.output
    scored = kept(own_cache)
    assert {routing for routing, _ in scored} == {"original", ROUTING}
    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("computed"))
    for name in ("frontier", "eval"):
        again = invoke(*every[name], *more)
        assert again.exit_code == 0 and kept(own_cache) == scored, again.output
        total = sum(row["n_tokens"] for row in json.loads(first.stdout))
        assert f"{total} of {total} scored tokens are in the cache" in again.stderr
        rows = json.loads(again.stdout)
        assert [
            {k: row[k] for k in row.keys() - {"ts", "chunk_nll", "routing_digest", "timed_with"}} for row in rows
        ] == json.loads(first.stdout)


def test_tune_begins_with_what_others_have_scored(own_cache: Path, tiny: Path, prose: Path, tmp_path: Path) -> None:
    every = commands(tiny, prose, tmp_path / "f.jsonl")
    assert invoke(*every["frontier"], "-t", 1).exit_code == 0
    scored = kept(own_cache)
    result = invoke(*every["tune"], "-t", 1)
    assert f"{len(scored)} scores of earlier runs are used again" in result.stderr
    added = {routing for routing, _ in kept(own_cache) - scored}
    assert added and not added & {"original", ROUTING}


@pytest.mark.parametrize("name", ["tune", "eval", "frontier"])
def test_workers_share_the_threads(
    own_cache: Path, tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[int] = []

    def load(path: Path, n_ctx: int, n_threads: int) -> Any:
        asked.append(n_threads)
        raise CacherouteError("enough")

    monkeypatch.setattr(loading, "load", load)
    arguments = commands(tiny, prose, tmp_path / "f.jsonl")[name]
    for threads, workers in ((6, 1), (6, 2), (7, 3), (2, 4)):
        assert invoke(*arguments, "-t", threads, "--workers", workers).exit_code == 1
    assert asked == [6, 3, 2, 1]


def test_each_process_gets_the_threads_of_the_job(own_cache: Path, tiny: Path, prose: Path) -> None:
    source = loading.Source(prose, chunk=32, limit=30)
    for workers, each in ((1, 6), (2, 3), (4, 1)):
        with scorer.session(tiny, source, threads=6, n_workers=workers) as session:
            assert (session.job.n_threads, session.job.n_processes) == (each, workers)


def test_a_run_of_more_tokens_begins_with_those_of_fewer(own_cache: Path, tiny: Path, prose: Path) -> None:
    command = ("eval", "perplexity", "-m", tiny, "-f", prose, "--chunk", 32, "--budget", "25%", "--routing", ROUTING, "-t", 1)
    few = invoke(*command, "--chunks", 2, "-o", "json")
    assert few.exit_code == 0 and [row["n_chunks"] for row in json.loads(few.stdout)] == [2, 2]
    more = invoke(*command, "--chunks", 10, "-o", "json")
    assert f"{4 * 15} of {20 * 15} scored tokens are in the cache" in more.stderr
    again = invoke(*command, "--limit", 20, "-o", "json")  # two chunks of 15 tokens
    assert again.stdout == few.stdout and f"{4 * 15} of {4 * 15} scored tokens" in again.stderr
    both = invoke(*command, "--limit", 20, "--chunks", 2)
    assert both.exit_code == 2 and "give one of them" in both.stderr


def test_all_routings_score_some_chunks_before_the_next(
    own_cache: Path, tiny: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    score = Runner.run

    def noted(self: Runner, request: Any, chunk: Any) -> Any:
        order.append((request.routing.name, chunk.index))
        return score(self, request, chunk)

    monkeypatch.setattr(Runner, "run", noted)
    command = ("eval", "perplexity", "-m", tiny, "-f", prose, "--chunk", 32, "--budget", "25%", "--routing", ROUTING, "-t", 1)
    result = invoke(*command, "--chunks", 10, "-o", "json")
    names = ("original", "cache-prior")
    assert order == [(name, i) for part in (range(8), range(8, 10)) for name in names for i in part]
    assert [row["n_chunks"] for row in json.loads(result.stdout)] == [10, 10]


def test_tuned_alone_is_the_routing_of_the_budget(own_cache: Path, demo_model: Path, prose: Path) -> None:
    command = ("eval", "perplexity", "-m", demo_model, "-f", prose, "--chunk", 16, "--chunks", 1, "--eviction", "lru")
    result = invoke(*command, "--budget", "50%", "--routing", "tuned", "-o", "json")
    assert result.exit_code == 0, result.output
    original, tuned = json.loads(result.stdout)
    assert original["eviction"] == "lru" and tuned["routing"].startswith("tuned:") and tuned["eviction"] == "soft-lfu"
    none = invoke(*command, "--budget", "60%", "--routing", "tuned")
    assert none.exit_code == 2 and "Nothing is tuned for" in none.stderr


def test_carried_chunks_are_computed_anew(own_cache: Path, tiny: Path, prose: Path, tmp_path: Path) -> None:
    arguments = (*commands(tiny, prose, tmp_path / "f.jsonl")["eval"], "-t", 1)
    fresh = json.loads(invoke(*arguments).stdout)
    scored = kept(own_cache)
    result = invoke(*arguments, "--carry")
    carried = json.loads(result.stdout)
    assert kept(own_cache) == scored and "in the cache" not in result.stderr
    assert carried[0]["nll"] == fresh[0]["nll"] and carried[1]["nll"] != fresh[1]["nll"]
    assert all(row["carry"] for row in carried) and carried[0]["miss_rate"] < fresh[0]["miss_rate"]


def test_another_build_begins_anew(own_cache: Path, tiny: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loading.Source(prose, chunk=32, limit=30)
    for digest, n_kept in (("one", 0), ("one", 1), ("two", 0)):
        monkeypatch.setattr(sessions, "sha256", lambda path, digest=digest: digest)
        with scorer.session(tiny, source, threads=1) as session:
            assert session.n_kept == n_kept
            session.cell(Routing("original"), 8, "lru", 0)
