"""tune --files: the file and routing that miss least within the limit, what is written, resumed, and quoted by plan."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheroute.cli import frontier_files, tune_files
from cacheroute.evals import choose, tune
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.runner import Cell
from cacheroute.evals.text import Chunk
from cacheroute.files import MIB
from cacheroute.model import copies
from cacheroute.model.copies import Copy
from cacheroute.routing import tuned
from cacheroute.routing.strategies import Routing
from support import interrupting, tiny_models
from support.cli import invoke

N = 50  # tokens of a chunk
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 32 experts, 4 used, in F16 and, twice as large, in F32."""
    return tiny_models.in_two_types("qwen3moe", tmp_path_factory.mktemp("files"))


# ---- the choice ------------------------------------------------------------------------------------


class Session:
    """Stands in for a scoring session of a file that loses `alone` nats of KL by itself and `slope` x lambda by rerouting."""

    def __init__(self, alone: float, slope: float, missed: int) -> None:
        self.alone, self.slope, self.missed, self.asked = alone, slope, missed, set[str]()
        self.chunks = [Chunk(i, tuple(range(N + 2)), 1) for i in range(30)]
        self.llm = None

    def submit_next(self, requests: Sequence[Any]) -> None:
        pass

    def keep_references(self) -> None:
        pass

    def cells(self, routing: Routing, budget: int, eviction: str, chunks: Sequence[int], *, kl: bool = False) -> list[Cell]:
        return [self.cell(routing, budget, eviction, i, kl=kl) for i in chunks]

    def cell(self, routing: Routing, budget: int, eviction: str, chunk: int, *, kl: bool = False) -> Cell:
        self.asked.add(str(routing))
        x = routing.parameters.get("lambda", 0.0)
        loss = self.alone + self.slope * x
        rng = np.random.default_rng(chunk)
        kl32 = (loss * rng.uniform(0.9, 1.1, N)).astype("<f4").tobytes()
        missed = round(self.missed * (1 - x) * MIB * N)
        counts = {"selected": N, "dropped": 0, "examined": N, "misses": (N,), "swapped": (0,), "missed_bytes": missed}
        nll32 = np.full(N, 3 + loss, "<f4").tobytes()
        own = {"routing": str(routing), "budget": budget, "eviction": eviction, "kl32": kl32, "same_top": N}
        return Cell(chunk=chunk, nll32=nll32, seconds=0.0, **counts, **own)  # type: ignore[arg-type]


def chosen(
    files: tuple[Path, ...], nbytes: int, sessions: dict[str, Session], monkeypatch: pytest.MonkeyPatch, max_kl: float = 0.02
) -> tuple[Any, list[Any]]:
    read = copies.read(files)
    monkeypatch.setattr(choose, "seconds_per_token", lambda llm, chunk: 0.1)

    def opened(copy: Copy) -> Any:
        return nullcontext(sessions[copy.name])

    goal = tune.Goal(0, "lru", None, uniform=True, max_kl=max_kl)
    chooser = choose.Chooser(read, read[-1], nbytes, goal, opened, opened)
    told: list[float] = []
    chooser.prepare(lambda session, seconds: told.append(chooser.expected_work(session.chunks) * seconds))
    assert told[0] > 0
    found = chooser.run(*tune.split(30, 0))
    return choose.best(found), found


def test_a_smaller_file_is_taken_where_it_leaves_room_for_rerouting(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 16 * copies.read(files)[0].layout.resident_bytes
    sessions = {"F16": Session(0.005, 0.1, 4), "F32": Session(0.0, 0.1, 10)}
    best, found = chosen(files, half, sessions, monkeypatch)
    assert best.copy.name == "F16" and best.capacity == 16 and not best.whole
    assert best.outcome.chosen.routing.parameters["lambda"] == pytest.approx(0.14)  # 5 + 14 millinats, and 0.16 would be 21
    assert best.outcome.validation.within == "yes" and best.outcome.validation.kl.kl_high <= 0.02
    larger = next(f for f in found if f.copy.name == "F32")
    assert larger.outcome.chosen.routing.parameters["lambda"] == pytest.approx(0.18) and larger.missed > best.missed
    expensive = {"F16": Session(0.0195, 0.1, 4), "F32": Session(0.0, 0.1, 3)}
    best, found = chosen(files, half, expensive, monkeypatch)
    assert best.copy.name == "F32"
    smaller = next(f for f in found if f.copy.name == "F16")
    assert smaller.outcome.chosen.routing.name == "original"  # nothing is left of the limit


def test_a_file_that_is_too_lossy_by_itself_is_not_searched(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    half = 16 * copies.read(files)[0].layout.resident_bytes
    sessions = {"F16": Session(0.03, 0.1, 1), "F32": Session(0.0, 0.1, 10)}
    best, found = chosen(files, half, sessions, monkeypatch)
    assert best.copy.name == "F32" and sessions["F16"].asked == {"original"}
    out = next(f for f in found if f.copy.name == "F16")
    assert out.outcome.chosen is None and not out.outcome.trials[0].passed and not out.outcome.trials[0].complete
    assert chosen(files, half, sessions, monkeypatch, max_kl=0.0)[0].outcome.chosen.routing.name == "original"


def test_a_file_that_fits_whole_misses_nothing(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = copies.read(files)[0].layout.all_expert_bytes
    sessions = {"F16": Session(0.01, 0.1, 4), "F32": Session(0.0, 0.1, 10)}
    best, found = chosen(files, nbytes, sessions, monkeypatch)
    assert best.copy.name == "F16" and best.whole and best.missed == 0
    assert found[1].outcome is None and sessions["F32"].asked == {"original"}  # as the reference
    sessions["F16"] = Session(0.05, 0.1, 4)
    best, _ = chosen(files, nbytes, sessions, monkeypatch)
    assert best.copy.name == "F32" and best.outcome.chosen.routing.name == "cache-prior"


# ---- the command -----------------------------------------------------------------------------------


def settings(files: tuple[Path, Path], prose: Path, *more: object) -> tuple[object, ...]:
    few = ("--chunk", 32, "--limit", 200, "-t", 1, "--price-tokens", 16, "--price-groups", 2, "--budget", "50%")
    return ("tune", "--files", ",".join(map(str, files)), "-f", prose, *few, "-o", "json", *more)


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_files, "machine", lambda *_: None)
    monkeypatch.setattr(frontier_files, "machine", lambda *_: None)


@pytest.mark.engine
@pytest.mark.usefixtures("no_speed")
def test_the_choice_is_used_and_quoted(files: tuple[Path, Path], prose: Path, tmp_path: Path) -> None:
    result = invoke(*settings(files, prose, "--max-kl", 0.2))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    best = report["chosen"]
    assert best["file"] == "F16" and best["budget_experts"] == 16 and report["reference"] == "F32"
    assert best["kl"] <= 0.2 and best["within"] in ("yes", "perhaps") and (best["within"] == "yes") == (best["kl_high"] <= 0.2)
    assert report["answer"].startswith("In 3.4 MiB") and " take F16 with cache-prior per layer" in report["answer"]
    assert "3 steps: F32 as the reference, then in " in result.stderr and "to decode, " in result.stderr
    assert report["profile"] == str(tuned.path(files[0], 16))
    saved = tuned.load(Path(report["profile"]))
    assert saved.notes["reference"] == "F32" and saved.notes["files"] == ["F16", "F32"] and saved.notes["max_kl"] == 0.2
    used = invoke("generate", "-m", files[0], "-p", "the", "-n", 3, "--routing", "tuned", "--budget", 16, "--raw", "-o", "json")
    assert used.exit_code == 0 and "tuned:" in used.stderr, used.output
    from cacheroute.forecast import candidates

    quoted = candidates.tuned_for(files[0], 16)
    assert quoted and quoted.reference == "F32" and quoted.kl and quoted.kl[0] == best["kl"]
    few = ("--chunk", 32, "--limit", 60, "-t", 1, "--budget", "50%", "--routing", "tuned", "--eviction", "lru", "-o", "json")
    table = invoke("frontier", tmp_path / "t.jsonl", "--files", ",".join(map(str, files)), "-f", prose, *few)
    assert [r["file"] for r in json.loads(table.stdout) if r["routing"].startswith("tuned:")] == ["F16"]
    assert "nothing is tuned for F32 at 50%" in table.stderr


@pytest.mark.engine
@pytest.mark.usefixtures("no_speed")
def test_it_resumes_where_it_was_stopped(
    files: tuple[Path, Path], prose: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    whole = json.loads(invoke(*settings(files, prose, "--max-kl", 0.2, "--uniform")).stdout)
    monkeypatch.setenv("CACHEROUTE_CACHE", str(own_cache / "other"))
    append = ResultsFile.append
    interrupting.at_score(monkeypatch, 40)
    stopped = invoke(*settings(files, prose, "--max-kl", 0.2, "--uniform"))
    assert stopped.exit_code == 130 and "run the same command to resume" in stopped.stderr
    computed: list[dict[str, Any]] = []
    monkeypatch.setattr(ResultsFile, "append", lambda self, line: (computed.append(line), append(self, line))[1])
    again = invoke(*settings(files, prose, "--max-kl", 0.2, "--uniform"))
    assert again.exit_code == 0, again.output
    assert {**json.loads(again.stdout), "profile": ""} == {**whole, "profile": ""}
    lines = sum(len(p.read_text().splitlines()) - 1 for p in (own_cache / "scores").glob("*.jsonl"))
    assert len(computed) == lines - 39  # each cell once


@pytest.mark.engine
@pytest.mark.usefixtures("no_speed")
def test_a_prompt_routing_beside_it(files: tuple[Path, Path], prose: Path) -> None:
    few = ("--prompt-tokens", 16, "--after", 4, "--places", 8)
    result = invoke(*settings(files, prose, "--max-kl", 0.2, "--uniform", "--prompt", *few))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompt"]["prompt_routing"].startswith("keep:cover=") and report["prompt"]["budget_experts"] == 16
    assert "use it with --prompt-routing tuned --budget 16" in result.stderr
    both = ("--routing", "tuned", "--prompt-routing", "tuned", "--budget", 16)
    used = invoke("generate", "-m", report["chosen"]["path"], "-p", "the cat", "-n", 2, *both, "--raw", "-o", "json")
    assert used.exit_code == 0, used.output


@pytest.mark.engine
@pytest.mark.usefixtures("no_speed")
def test_nothing_fits_is_one_sentence(files: tuple[Path, Path], prose: Path) -> None:
    result = invoke(*settings(files[:1], prose, "--max-kl", 0, "--reference", files[1]))
    assert result.exit_code == 1 and "Nothing fits 0 millinats of KL: the mildest, F16 with original, loses" in result.stderr
    assert json.loads(result.stdout)["chosen"] is None and json.loads(result.stdout)["profile"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "demo"), "--files takes the place of -m"),
        (("--budget", "1KiB"), "No file has room for the experts of one token in 1.0 KiB; give at least "),
        (("--max-ppl-increase", "1%", "--max-kl", 1), "not both"),
        (("--uniform", "--strategy", "original"), "'original' has nothing to tune"),
        (("--strategy", "pruning"), "is fitted with --uniform only"),
    ],
)
def test_bad_input_is_one_sentence(files: tuple[Path, Path], prose: Path, arguments: tuple[object, ...], message: str) -> None:
    result = invoke(*settings(files, prose), *arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr, result.output


def test_what_is_for_files_is_refused_without(tmp_path: Path) -> None:
    for arguments in (("--reference", "demo"), ("--flash-mbps", 100)):
        result = invoke("tune", *arguments)
        assert result.exit_code == 2 and f"{arguments[0]} is for" in result.stderr
    assert not os.listdir(tmp_path)
