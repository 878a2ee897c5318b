"""frontier --files: rows of equal memory against one reference, resumed, by several processes or a cluster, and their figure."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import files_table
import pytest

from cacheroute.cli import frontier_files
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import across, loading, runner, scorer
from cacheroute.evals.across import FilesRow
from cacheroute.evals.runner import Request
from cacheroute.files import MIB
from cacheroute.model import copies
from cacheroute.plot import figures
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import Routing
from support import tiny_models
from support.cli import invoke

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.engine]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 8 experts, 2 used, in F16 and, twice as large, in F32."""
    return tiny_models.in_two_types("llama", tmp_path_factory.mktemp("files"))


def settings(files: tuple[Path, ...], prose: Path, results: Path, *more: object) -> tuple[object, ...]:
    few = ("--chunk", 32, "--limit", 60, "-t", 1, "--routing", "cache-prior:lambda=0.5", "--eviction", "lru,soft-lfu")
    return (
        "frontier",
        results,
        "--files",
        ",".join(map(str, files)),
        "-f",
        prose,
        *few,
        "--budget",
        "50%,1536KiB",
        "-o",
        "json",
        *more,
    )


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A speed that takes no time to measure."""
    monkeypatch.setattr(frontier_files, "machine", lambda *_: object())
    monkeypatch.setattr(frontier_files, "speed", lambda copy, own, missed, whole: 100.0 if whole else 50 / (1 + missed))


def stable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"seconds": 0, "ts": 0, "chunk_nll": list(row["chunk_nll"])} for row in rows]


@pytest.mark.usefixtures("known_machine")
def test_rows_at_equal_memory(files: tuple[Path, Path], prose: Path, tmp_path: Path) -> None:
    result = invoke(*settings(files, prose, tmp_path / "f.jsonl"))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    found = [(r["file"], r["budget"], r["whole"], r["budget_experts"], r["routing"], r["eviction"]) for r in rows]
    each = [(r, e) for r in ("original", "cache-prior:lambda=0.5") for e in ("lru", "soft-lfu")]
    assert [f[4:] for f in found if f[:2] == ("F16", "50%")] == each and found[0][3] == 4
    assert ("F16", "1536KiB", True, 8, "original", DEFAULT) in found and len(found) == 4 + 1 + 4 + 4
    assert {r["reference"] for r in rows} == {"F32"}
    large = [r for r in rows if r["file"] == "F32"]
    assert all(r["memory_mib"] == rows[0]["memory_mib"] for r in large if r["budget"] == "50%")
    assert all(r["kl"] == 0 and r["delta_nll"] == 0 for r in large if r["routing"] == "original")
    plain = [r for r in rows if r["file"] == "F16" and r["routing"] == "original"]
    assert len({r["kl"] for r in plain}) == 1 and 0 < plain[0]["kl"] < 0.01
    whole = next(r for r in rows if r["whole"])
    assert whole["miss_rate"] == whole["missed_mib_per_token"] == 0 and not any(whole["chunk_missed"])
    assert sum(plain[0]["chunk_kl"]) == pytest.approx(plain[0]["kl"] * plain[0]["n_tokens"])
    lossy = next(r for r in large if r["routing"] != "original" and r["budget"] == "50%" and r["eviction"] == "lru")
    text = ("-f", prose, "--chunk", 32, "--limit", 60, "-t", 1, "-o", "json", "--eviction", "lru")
    n = lossy["budget_experts"]
    own = json.loads(
        invoke("eval", "perplexity", "-m", files[1], *text, "--budget", n, "--routing", "cache-prior:lambda=0.5").stdout
    )
    assert own[-1]["kl"] == lossy["kl"] and own[-1]["missed_mib_per_token"] == lossy["missed_mib_per_token"]


@pytest.mark.usefixtures("known_machine")
def test_it_resumes_and_gives_the_same_with_workers(
    files: tuple[Path, Path], prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "f.jsonl"
    whole = json.loads(invoke(*settings(files, prose, results)).stdout)
    complete = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(complete[:6]) + b'{"half": ')
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "other"))
    result = invoke(*settings(files, prose, results, "--workers", 2))
    assert result.exit_code == 0, result.output
    assert "has 5 of 13 rows already" in result.stderr
    assert stable(json.loads(result.stdout)) == stable(whole)
    renamed = shutil.copy(files[0], tmp_path / "x-other.gguf")
    again = invoke(*settings((Path(renamed), files[1]), prose, results))
    assert "has 13 of 13 rows already" in again.stderr and {r["file"] for r in json.loads(again.stdout)} == {"x-other", "m-F32"}
    other = invoke(*settings(files, prose, results, "--reference", files[0]))
    assert other.exit_code == 2 and "holds results of another model" in other.stderr


@pytest.mark.usefixtures("known_machine")
def test_a_dask_cluster_gives_the_same(
    files: tuple[Path, Path], prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    few = ("--budget", "50%", "--eviction", "lru")
    alone = json.loads(invoke(*settings(files, prose, tmp_path / "a.jsonl", *few)).stdout)
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "other"))
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        result = invoke(*settings(files, prose, tmp_path / "b.jsonl", *few, "--scheduler", cluster.scheduler_address))
    assert result.exit_code == 0, result.output
    assert stable(json.loads(result.stdout)) == stable(alone)


def test_a_worker_makes_the_reference_that_its_machine_lacks(
    files: tuple[Path, Path], prose: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = files
    source = loading.Source(prose, chunk=32, limit=16)
    request = Request(Routing("cache-prior", {"lambda": 0.5}), 4, "lru", 0, True)
    monkeypatch.setattr(runner, "_runners", runner.Loaded())
    with scorer.session(small, source, threads=1, reference_model=large) as session:
        with pytest.raises(CacherouteError, match=r"m-F32\.gguf for chunk 0 is gone from the cache folder; run the same"):
            session.cell(*request[:4], kl=True)
        cell = runner.compute(session.job, request, session.chunks[0])
        runner._runners._of.popitem()[1].llm.close()
        kept = list((own_cache / "scores").glob("reference-*/*.npz"))
        assert len(kept) == 1
        assert replace(session.cell(*request[:4], kl=True), seconds=0.0) == replace(cell, seconds=0.0)
    with scorer.session(small, source, threads=1) as session:  # compared with itself: other figures, kept apart
        assert session.n_kept == 0 and session.cell(*request[:4], kl=True).kl32 != cell.kl32


def test_a_file_without_room_is_left_out(files: tuple[Path, Path], tmp_path: Path) -> None:
    read = copies.read(files)
    found, left = across.arms(read, ["cache-prior:lambda=0.1"], ["lru"], ["2"])
    assert {a.copy.name for a in found} == {"F16"} and len(found) == 2
    assert len(left) == 1 and left[0].startswith("F32 needs ") and left[0].endswith("so it is not at 2")
    found, left = across.arms(read, ["tuned"], ["lru"], ["50%"])
    assert [a.arm.routing for a in found] == ["original"] * 2 and "nothing is tuned for F16 at 50% (4 experts" in left[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "demo"), "--files takes the place of -m"),
        (("--files", "a.gguf"), "There is no file"),
        (("--budget", "3KiB"), "There is nothing to score"),
        (("--budget", "auto"), "follows the free memory"),
        (("--routing", "pruning:k=9"), "k is at most 2"),
    ],
)
def test_bad_input_is_one_sentence(
    files: tuple[Path, Path], prose: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = invoke(*settings(files, prose, tmp_path / "f.jsonl"), *arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr, result.output
    assert not (tmp_path / "f.jsonl").exists()


def test_a_results_file_with_another_row_is_refused() -> None:
    good = vars(made_up("Q8", "original", 0.0, 9.0))
    assert len(across.finished([good])) == 1
    for line in ({}, good | {"chunk_kl": 7}, good | {"file": []}, good | {"kl": "x"}, {**good, "more": 1}):
        with pytest.raises(UsageError, match="no row of frontier"):
            across.finished([line])


def test_one_file_alone_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, message in (
        (("--files", files[0]), "names two or more files"),
        (("--reference", files[0]), "--reference is for --files"),
    ):
        result = invoke("frontier", tmp_path / "f.jsonl", *arguments)
        assert result.exit_code == 2 and message in result.stderr


# ---- figures ---------------------------------------------------------------------------------------


def made_up(file: str, routing: str, kl: float, missed: float, ts: float | None = None, **others: Any) -> FilesRow:
    own: dict[str, Any] = {
        **dict.fromkeys(("eviction", "text", "model"), "x"),
        **dict.fromkeys(("chunk", "stride", "n_chunks", "n_tokens"), 4),
        **dict.fromkeys(
            ("ppl", "ppl_se", "nll", "delta_nll", "ppl_increase", "miss_rate", "swap_rate", "drop_rate", "seconds"), 1.0
        ),
        **dict.fromkeys(("delta_nll_low", "delta_nll_high", "ppl_increase_low", "ppl_increase_high"), 1.0),
        **{"carry": False, "kl_low": kl * 0.9, "kl_high": kl * 1.1, "kl_p99": kl, "top1": 0.9, "top1_se": 0.01},
        **{"budget": "50%", "budget_experts": 4, "ts": None, "chunk_nll": (1.0,), "reference": "Q8"},
        **{
            "fingerprint": file,
            "routing_digest": routing,
            "timed_with": "",
            "memory_mib": 10.0,
            "experts_mib": 20.0,
            "dense_mib": 1.0,
        },
        **{"whole": False, "chunk_kl": (kl,), "chunk_missed": (missed * MIB,)},
    }
    return FilesRow(
        **own | {"file": file, "routing": routing, "kl": kl, "missed_mib_per_token": missed, "predicted_ts": ts} | others
    )


def test_the_front_by_bytes_and_by_speed() -> None:
    rows = [
        made_up("Q8", "original", 0.0, 9.0, 5.0),
        made_up("Q8", "cache-prior:lambda=0.1", 0.01, 6.0, 8.0),
        made_up("Q4", "original", 0.02, 4.0, 7.0),  # fewer bytes, slower
        made_up("Q4", "cache-prior:lambda=0.1", 0.03, 1.0, 20.0),
        made_up("Q2", "original", 0.2, 0.0, 50.0, whole=True),
    ]
    assert [r.kl for r in across.front(rows)] == [0.2, 0.03, 0.01, 0.0]
    assert [r.kl for r in across.front([replace(r, predicted_ts=None) for r in rows])] == [0.2, 0.03, 0.02, 0.01, 0.0]
    view = frontier_files.view(rows)
    assert len(view.below) == 1 and view.below[0].startswith("50%: Q2, all in memory has a KL of 200.0")
    assert view.below[0].endswith("nothing as fast has less")
    fast = made_up("Q4", "cache-prior:lambda=0.4", 0.1, 0.1, 60.0)
    below = frontier_files.view([*rows, fast]).below
    assert below[0].endswith("at 50.0 tok/s; better:") and "Q4 cache-prior:lambda=0.4, 100.0 [90.0,110.0] at 60.0" in below[1]


def test_bytes_at_the_same_kl() -> None:
    def row(file: str, routing: str, kl: float, missed: float, **others: Any) -> FilesRow:
        size = {"Q8": 20.0, "Q4": 10.0}[file]
        return made_up(file, routing, kl, missed, eviction="lru", experts_mib=size, n_tokens=1, **others)

    rows = [
        row("Q8", "original", 0.0, 9.0),
        row("Q8", "cache-prior:lambda=0.1", 0.1, 5.0),
        row("Q4", "original", 0.05, 3.5),
        row("Q4", "cache-prior:lambda=0.1", 0.2, 1.0),
    ]
    own, far = files_table.report(rows).splitlines()[2:]
    assert "Q4 original, lru" in own and "Q8 7.000" in own and "50.0% [50.0, 50.0]" in own, "half way between Q8's rows"
    assert "none: no lambda that was scored has that KL" in far, "nothing is taken beyond the last lambda"
    tuned = row("Q4", "tuned:x", 0.04, 3.8)
    alone, line = [line for line in files_table.report([*rows, tuned]).splitlines() if "3.800" in line]
    assert "Q8 7.400" in alone and "Q4" not in alone.split("|")[5] and "48.6%" in alone
    assert "Q8 7.400; Q4 -" in line and "48.6%" in line, "against all files, of which Q4 loses more with any lambda"
    whole = [replace(r, whole=True, chunk_missed=(0.0,)) if r.file == "Q4" else r for r in [*rows, tuned]]
    line = files_table.report([*whole[:3], replace(tuned, kl=0.06, chunk_kl=(0.06,))]).splitlines()[-1]
    assert "none: a file misses nothing" in line
    with pytest.raises(UsageError, match="no memory with two files"):
        files_table.report(rows[:2])


def test_the_figure_names_every_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        made_up("Q8", "original", 0.0, 9.0, 5.0),
        made_up("Q4", "cache-prior:lambda=0.1", 0.03, 1.0, 20.0),
        made_up("Q2", "original", 0.2, 0.0, 50.0, whole=True),
        made_up("Q2", "original", 0.2, 3.0, 9.0, budget="25%", memory_mib=5.0),
    ]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in [{"format": across.FORMAT}, *map(vars, rows)]))
    chart = figures.chart([path])
    names = ["Q2 original", "Q2, all in memory", "Q4 cache prior λ 0.1", "Q8 original"]
    assert [row[2] for row in chart.cells[1:]] == names
    assert [row[-1] for row in chart.cells[1:]] == ["*", "*", "*", "*"] and chart.cells[0][4] == "tokens per second (forecast)"
    result = invoke("plot", path, "-o", tmp_path / "f.svg")
    assert result.exit_code == 0, result.output
    drawn = (tmp_path / "f.svg").read_text()
    keys = ("3 Q2, all in memory *", "2 Q4 cache prior λ 0.1 *", "1 Q8 original *", "1 Q2 original *")
    assert all(name in drawn for name in (*keys, "Pareto front"))
    assert "In 10.0 MiB (50%) the front goes from Q2, all in memory" in result.stderr
    mixed = [*map(vars, rows), vars(rows[0]) | {"reference": "F16"}]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    with pytest.raises(UsageError, match="compared with several"):
        figures.chart([tmp_path / "mixed.json"])
