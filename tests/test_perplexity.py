"""Stepped perplexity: `original` is the unhooked engine, agrees with llama-perplexity's definition, and is repeatable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.cli import eval as evaluation
from cacheroute.errors import UsageError
from cacheroute.evals import loading, text
from cacheroute.evals.perplexity import ChunkScore, score, summary
from cacheroute.evals.text import Chunk
from support.cli import invoke

CHUNK = 48


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[Llama]:
    model = loading.load(tiny, 2 * CHUNK, 1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def chunks(llm: Llama, prose: Path) -> list[Chunk]:
    return loading.chunks(llm, loading.Source(prose, chunk=CHUNK, limit=90))


def scored(llm: Llama, chunks: list[Chunk], carry: bool = False, **settings: Any) -> list[ChunkScore]:
    llm.configure(**{"budget": "25%", "io": "none", **settings})
    return list(score(llm, chunks, carry=carry))


def nll(scores: list[ChunkScore]) -> Any:
    return np.concatenate([s.nll for s in scores])


def llama_perplexity(path: Path, chunks: list[Chunk]) -> float:
    """As perplexity.cpp of llama.cpp: each chunk in one batch, the logits of positions n/2 .. n-2 scored, exp of the mean."""
    n = len(chunks[0].tokens)
    llm = Llama(
        str(path), routing=None, n_ctx=n, n_batch=n, n_ubatch=n, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False
    )
    total, count = 0.0, 0
    for chunk in chunks:
        llm.reset()
        llm.eval(chunk.tokens)
        for i in range(n // 2, n - 1):
            row = llm.scores[i].astype(np.float64)
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[chunk.tokens[i + 1]]
            count += 1
    llm.close()
    return float(np.exp(total / count))


def test_original_is_the_unhooked_engine_at_any_budget(llm: Llama, chunks: list[Chunk]) -> None:
    unhooked = nll(scored(llm, chunks, routing=None))
    for budget in (4, "50%", "all"):
        for eviction in ("lru", "score"):
            np.testing.assert_array_equal(nll(scored(llm, chunks, budget=budget, eviction=eviction)), unhooked)
    np.testing.assert_array_equal(nll(scored(llm, chunks, routing="cache-prior:lambda=0")), unhooked)


def test_original_agrees_with_llama_perplexity(tiny: Path, llm: Llama, chunks: list[Chunk]) -> None:
    assert len(chunks) >= 3
    assert summary(scored(llm, chunks)).ppl == pytest.approx(llama_perplexity(tiny, chunks), rel=1e-3)


def test_the_demo_model_too(demo_model: Path) -> None:
    # Against a batch it is compared by scripts/quality_table.py: 30 tokens are too few where near-ties of the router flip.
    with_room = loading.load(demo_model, 32, 1)
    chunks = loading.chunks(with_room, loading.Source(chunk=32, limit=15))
    unhooked = nll(scored(with_room, chunks, routing=None))
    np.testing.assert_array_equal(nll(scored(with_room, chunks, routing="original", budget="25%")), unhooked)
    with_room.close()


def test_io_none_counts_what_buffered_reads(llm: Llama, chunks: list[Chunk]) -> None:
    settings = {"routing": "cache-prior:lambda=0.3", "eviction": "score"}
    counted, read = (scored(llm, chunks[:2], io=io, **settings) for io in ("none", "buffered"))
    np.testing.assert_array_equal(nll(counted), nll(read))
    assert [s.misses for s in counted] == [s.misses for s in read]
    assert counted[0].missed_bytes == read[0].missed_bytes == sum(counted[0].misses) * llm.layout.layers[0].expert_bytes


def test_what_is_missed_is_not_what_is_asked_of_the_device(llm: Llama, chunks: list[Chunk]) -> None:
    for io, reads in (("none", False), ("buffered", True)):
        before = llm.stats().decode.read_bytes if llm.io == io else 0
        missed = sum(s.missed_bytes for s in scored(llm, chunks[:1], io=io))
        asked = llm.stats().decode.read_bytes - before
        assert missed > 0 and (asked > missed if reads else asked == 0)  # whole pages are read, and none are counted


def test_a_chunk_depends_on_nothing_before_it(llm: Llama, chunks: list[Chunk]) -> None:
    settings = {"routing": "cache-prior:lambda=0.5"}
    together = scored(llm, chunks, **settings)
    alone = [scored(llm, [c], **settings)[0] for c in reversed(chunks)][::-1]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.nll, b.nll)
        assert (a.missed_bytes, a.swapped) == (b.missed_bytes, b.swapped)


def test_carry_keeps_the_cache(llm: Llama, chunks: list[Chunk]) -> None:
    settings = {"routing": "cache-prior:lambda=0.5"}
    fresh, carried = scored(llm, chunks, **settings), scored(llm, chunks, carry=True, **settings)
    np.testing.assert_array_equal(fresh[0].nll, carried[0].nll)
    assert not np.array_equal(nll(fresh[1:]), nll(carried[1:]))


def test_the_policy_acts_on_every_scored_token(llm: Llama, chunks: list[Chunk]) -> None:
    s = scored(llm, chunks[:1], routing="cache-prior:lambda=1")[0]
    decoded = llm.stats().decode
    assert decoded.tokens == chunks[0].n_scored == len(s.nll) == s.n == CHUNK // 2 - 1
    assert sum(s.swapped) == decoded.swapped > 0 and sum(s.misses) == decoded.misses
    assert (s.selected, s.examined, s.dropped) == (decoded.hits + decoded.misses, decoded.examined, decoded.dropped)


def test_nothing_of_a_score_is_rounded(llm: Llama, chunks: list[Chunk]) -> None:
    log_p: list[float] = []
    targets = iter(chunks[0].tokens[chunks[0].first + 1 :])
    llm.configure(budget="25%", io="none")
    s = next(score(llm, chunks[:1], watch=lambda row: log_p.append(float(row[next(targets)]))))
    np.testing.assert_array_equal(s.nll, -np.array(log_p))
    assert s.nll.dtype == np.float64 and s.nll_sum == -np.array(log_p).sum()


def test_standard_error_is_llama_perplexitys() -> None:
    nll = np.array([1.0, 2.0, 4.0])
    counts = {"selected": 0, "dropped": 0, "examined": 0, "misses": (), "swapped": (), "missed_bytes": 0}
    s = summary([ChunkScore(chunk=0, nll32=nll.astype("<f4").tobytes(), seconds=1.0, **counts)])  # type: ignore[arg-type]
    mean = nll.mean()
    assert s.ppl == pytest.approx(np.exp(mean))
    assert s.ppl_se == pytest.approx(np.exp(mean) * np.sqrt(((nll**2).mean() - mean**2) / 2))


# ---- text ------------------------------------------------------------------------------------------


def test_chunks_score_their_second_half() -> None:
    chunks = text.cut(range(25), 10)
    assert [c.tokens[0] for c in chunks] == [0, 10]
    assert [c.first for c in chunks] == [5, 5] and chunks[0].n_scored == 4  # positions 5..8, as llama-perplexity


def test_a_stride_scores_no_token_twice() -> None:
    targets = [t for c in text.cut(range(40), 10, stride=3) for t in c.tokens[c.first + 1 :]]
    assert len(targets) == len(set(targets)) and targets == list(range(targets[0], targets[-1] + 1))


def test_the_first_token_becomes_bos_and_limit_rounds_up() -> None:
    chunks = text.cut(range(1, 101), 10, limit=5, bos=0)
    assert len(chunks) == 2 and [c.tokens[:2] for c in chunks] == [(0, 2), (0, 12)]


def test_documents_are_separated_by_form_feeds(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\f\ntwo")
    assert text.read(tmp_path / "t.txt") == "one\n\ntwo"
    assert "\f" not in text.read(None)


def test_a_dataset_column(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert text.read(path) == "one\n\ntwo"
    with pytest.raises(UsageError, match=r"line 1, has no text in a column 'body' \(its columns: text\)"):
        text.read(path, "body")
    path.write_text("not json")
    with pytest.raises(UsageError, match="line 1, is not JSON"):
        text.read(path)


def test_parquet(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; parquet is optional")
    import pyarrow as pa

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "n": [1, 2]}), path)
    assert text.read(path) == "one\n\ntwo"
    for column, message in (("body", "no column 'body'"), ("n", "does not hold text")):
        with pytest.raises(UsageError, match=message):
            text.read(path, column)
    path.write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="not a parquet file"):
        text.read(path)


# ---- the command -----------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return invoke("eval", "perplexity", *arguments)


@pytest.mark.usefixtures("own_cache")
def test_the_command_pairs_with_original(tiny: Path, prose: Path) -> None:
    arguments = ("-m", tiny, "-f", prose, "--chunk", CHUNK, "--limit", 60, "-t", 1, "--budget", "25%,all", "-o", "json")
    result = run(*arguments, "--routing", "cache-prior:lambda=1")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(r["routing"], r["budget_experts"]) for r in rows] == [
        ("original", 8),
        ("cache-prior:lambda=1", 8),
        ("original", 32),
        ("cache-prior:lambda=1", 32),
    ]
    first, lossy, everything, no_misses = rows
    assert first["delta_nll"] == first["delta_nll_high"] == 0 and first["ppl"] == everything["ppl"]
    assert lossy["delta_nll_low"] < lossy["delta_nll"] < lossy["delta_nll_high"]
    assert lossy["ppl"] == pytest.approx(first["ppl"] * (1 + lossy["ppl_increase"] / 100))
    assert lossy["miss_rate"] < first["miss_rate"] and lossy["swap_rate"] > 0
    assert no_misses["missed_mib_per_token"] < first["missed_mib_per_token"]
    again = json.loads(run(*arguments, "--routing", "cache-prior:lambda=1").stdout)
    assert [r | {"seconds": 0} for r in again] == [r | {"seconds": 0} for r in rows]


@pytest.mark.parametrize("low, high, clear", [(-0.4, 0.1, False), (0.0, 0.5, False), (0.1, 0.5, True), (None, None, True)])
def test_a_change_that_may_be_none_is_called_so(low: float | None, high: float | None, clear: bool) -> None:
    own = {"budget": "50%", "eviction": "lru", "kl": None, "kl_low": None, "kl_high": None, "kl_p99": None, "top1": None}
    own |= {"top1_se": None, "ppl_increase": 0.2, "ppl_increase_low": low, "ppl_increase_high": high}
    pairs = (("original", 2.0), ("pruning:k=3", 1.0))
    rows: Any = [SimpleNamespace(**own, routing=routing, missed_mib_per_token=mib) for routing, mib in pairs]
    said = " ".join(evaluation._conclusions(rows))
    assert said.startswith("Fewest misses at 50%: pruning:k=3 (lossy), misses 1.00 of 2.00 MiB a token, for +0.20 ")
    assert ("% of perplexity, which is not clear of 0" in said) is not clear


@pytest.mark.usefixtures("own_cache")
def test_the_table(tiny: Path, prose: Path) -> None:
    settings = ("-m", tiny, "-f", prose, "--chunk", CHUNK, "--limit", 20, "-t", 1, "--routing", "pruning:k=3")
    result = run(*settings)
    assert result.exit_code == 0, result.output
    above, cells, below = (part.splitlines() for part in result.stdout.split("\n\n"))
    said = " ".join(line.strip() for line in above)
    assert said.endswith("16 experts of each layer (50%), soft-lfu; KLD in millinats, MiB missed per token")
    (head, first, second), last = cells, below[0]
    kl = next(line for line in below if "Mean KLD" in line)
    assert head.split() == ["routing", "ppl", "change", "%", "[95%]", "Mean", "KLD", "[95%]", "miss", "%", "MiB"]
    assert "baseline" in first and second.startswith("pruning:k=3 ") and max(map(len, (head, first, second))) <= 80
    assert last.startswith("Fewest misses at 50%: pruning:k=3 (lossy), misses ")
    assert "of perplexity, which one chunk cannot tell from 0" in " ".join(line.strip() for line in below)
    assert kl.startswith("  Mean KLD ") and all(name in " ".join(below) for name in ("99.0% KLD", "Same top p"))
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "| pruning:k=3 " in run(*settings, "-o", "md").stdout
    assert "one chunk alone gives no interval; a smaller --chunk or a larger --limit gives more" in result.stderr
    assert "?" not in second + last + kl  # a figure without an interval stands alone
    few = run(*settings, "--limit", 40)
    assert "few chunks (3): the intervals are rough" in few.stderr or "few chunks (2)" in few.stderr, few.stderr


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chunk", 100_000), "fewer than one chunk"),
        (("--routing", "best"), "There is no routing 'best'"),
        (("--eviction", "fifo"), "There is no eviction 'fifo'"),
        (("--budget", "1%"), "give at least 4"),
        (("--stride", 64, "--chunk", 32), "stride is 1 to its length"),
        (("-o", "xml"), "There is no output 'xml'"),
        (("-f", "/nonexistent/text"), "cannot be read"),
        (("--io", "tape"), "There is no io 'tape'"),
        (("--carry", "--workers", 2), "--workers cannot share out"),
    ],
)
def test_bad_input_is_one_sentence(tiny: Path, prose: Path, arguments: tuple[object, ...], message: str) -> None:
    defaults = ("-m", tiny, "-f", prose, "--chunk", 32, "-t", 1)
    result = run(*defaults, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") <= 2 and "Traceback" not in result.stderr


def test_text_that_is_not_utf8(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("né".encode("latin-1") * 50)
    result = run("-m", tiny, "-f", tmp_path / "latin")
    assert result.exit_code == 2 and "is not UTF-8 text" in result.stderr
