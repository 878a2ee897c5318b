"""frontier: the rows of eval perplexity, by one process, several or a cluster; a results file is resumed and mixes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import UsageError
from cacheroute.evals import frontier, scorer, session
from cacheroute.evals.results import ResultsFile
from cacheroute.model import experts, gguf_file
from cacheroute.plot import rows as plot_rows
from cacheroute.routing import strategies
from cacheroute.trace import score_files
from support import tiny_models
from support.cli import invoke

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral, with 8 experts and K = 2, where the other tests have a fine-grained model."""
    return tiny_models.write("llama", tmp_path_factory.mktemp("tiny") / "m.gguf")


def settings(tiny: Path, prose: Path, file: Path) -> tuple[object, ...]:
    few = ("--chunk", 32, "--limit", 60, "-t", 1, "--budget", "3,50%", "--routing", "cache-prior:lambda=0.5,pruning:k=1")
    return ("frontier", file, "-m", tiny, "-f", prose, *few, "-o", "json")


def stable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"seconds": 0, "ts": 0, "chunk_nll": list(row["chunk_nll"])} for row in rows]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_are_those_of_eval_perplexity(tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(*settings(tiny, prose, tmp_path / "f.jsonl"))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(r["routing"], r["budget_experts"]) for r in rows] == [
        *(("original", 3), ("original", 4)),
        *(("cache-prior:lambda=0.5", 3), ("cache-prior:lambda=0.5", 4), ("pruning:k=1", 3), ("pruning:k=1", 4)),
    ]
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "other"))  # so that it is computed
    text = ("-f", prose, "--chunk", 32, "--limit", 60, "-t", 1, "-o", "json")
    one = json.loads(invoke("eval", "perplexity", "-m", tiny, *text, "--budget", "50%", "--routing", "pruning:k=1").stdout)
    assert stable([rows[-1]])[0].items() >= {**one[-1], "seconds": 0}.items()
    header, *cells = lines(tmp_path / "f.jsonl")
    assert header["format"] == frontier.FORMAT and len(header["model"]) == 16 and stable(cells) == stable(rows)
    assert len(plot_rows.of(tmp_path, plot_rows.read(tmp_path / "f.jsonl"))) == 6


def test_it_resumes_and_never_mixes(tiny: Path, prose: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    whole = json.loads(invoke(*settings(tiny, prose, file)).stdout)
    complete = file.read_bytes()
    file.write_bytes(b"".join(complete.splitlines(keepends=True)[:3]) + b'{"half": ')
    result = invoke(*settings(tiny, prose, file))
    assert "has 2 of 6 rows already" in result.stderr
    assert stable(json.loads(result.stdout)) == stable(whole)
    for change, message in ((("--chunk", 16), r"other chunks (--chunk 32"), (("-f", Path(__file__)), "another text")):
        refused = invoke(*settings(tiny, prose, file), *change)
        assert refused.exit_code == 2 and f"holds results of {message}" in refused.stderr
    other = tiny_models.write("llama", tmp_path / "other.gguf", seed=1)
    refused = invoke(*settings(other, prose, file))
    assert refused.exit_code == 2 and "holds results of another model" in refused.stderr
    file.write_text('{"format": "cacheroute-routing-profile"}\n')
    assert "holds a tuned routing, not results of `frontier`; choose another" in invoke(*settings(tiny, prose, file)).stderr
    old = complete.replace(b'"version": "', b'"version": "0', 1)
    file.write_bytes(old)
    assert "holds results of another version" in invoke(*settings(tiny, prose, file)).stderr
    assert file.read_bytes() == old


def test_workers_give_the_same_rows(tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = json.loads(invoke(*settings(tiny, prose, tmp_path / "a.jsonl")).stdout)
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "other"))
    result = invoke(*settings(tiny, prose, tmp_path / "b.jsonl"), "--workers", 2, "--io", "buffered")
    assert result.exit_code == 0 and "in the cache" not in result.stderr, result.output
    assert all(row["ts"] is None for row in json.loads(result.stdout))  # they did not have the machine to themselves
    assert stable(json.loads(result.stdout)) == stable(alone)


def test_a_dask_cluster_gives_the_same_rows(tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    alone = json.loads(invoke(*settings(tiny, prose, tmp_path / "a.jsonl")).stdout)
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "other"))
    # a process, not a thread: llama.cpp's model is not for two threads at once
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        result = invoke(*settings(tiny, prose, tmp_path / "b.jsonl"), "--scheduler", cluster.scheduler_address)
    assert result.exit_code == 0 and "in the cache" not in result.stderr, result.output
    assert stable(json.loads(result.stdout)) == stable(alone)


def test_reads_have_a_speed_and_counts_have_none(tiny: Path, prose: Path, tmp_path: Path) -> None:
    for io, timed in (("none", False), ("buffered", True)):
        rows = json.loads(invoke(*settings(tiny, prose, tmp_path / f"{io}.jsonl"), "--io", io).stdout)
        assert all((row["ts"] is not None) is timed for row in rows)


def test_the_grid_has_every_strategy(tiny: Path) -> None:
    layout = experts.layout(gguf_file.read(tiny))
    grid = frontier.grid(layout, 3)
    assert {name.partition(":")[0] for name in grid} == set(strategies.STRATEGIES)
    assert len(grid) == len(set(grid)) and grid[0] == "original"
    assert frontier.arms(layout, grid, ["lru"], ["50%"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", 2, "--scheduler", "tcp://nowhere:1"), "a cluster has its own workers"),
        (("--budget", ""), "There is nothing to score"),
        (("--budget", "1"), "give at least 2"),
        (("--routing", "pruning:k=9"), "k is at most 2"),
        (("-o", "xml"), "There is no output"),
    ],
)
def test_bad_input_is_one_sentence(tiny: Path, prose: Path, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    result = invoke(*settings(tiny, prose, tmp_path / "f.jsonl"), *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_file_of_something_else_is_left_alone(tiny: Path, prose: Path, tmp_path: Path) -> None:
    for notes in ("my notes\n", "one line without an end"):
        (tmp_path / "notes").write_text(notes)
        result = invoke(*settings(tiny, prose, tmp_path / "notes"))
        assert result.exit_code == 2 and "is not a results file" in result.stderr
        assert (tmp_path / "notes").read_text() == notes
    with pytest.raises(UsageError, match=r"there is no folder .*; make it, or write to another one"):
        ResultsFile(tmp_path / "new" / "r.jsonl", {"a": 1})  # a mistyped folder is not made
    assert not (tmp_path / "new").exists()


def test_a_damaged_score_cache_is_computed_again(tiny: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = session.kept_scores(tiny, "t", score_files.FORMAT, scorer._from_json)
    with kept.path.open("ab") as file:
        file.write(b'{"routing": 7}\n{"half')
    again = session.kept_scores(tiny, "t", score_files.FORMAT, scorer._from_json)
    assert again.lines == [] and "is damaged: 1 of its 1 lines are computed again" in capsys.readouterr().err


def test_a_results_file_with_another_row_is_refused() -> None:
    for line in ({}, {"chunk_nll": 7}, {"chunk_nll": [1.0], "routing": []}):
        with pytest.raises(UsageError, match="no row of frontier"):
            frontier.finished([line])
