"""What is kept of earlier runs is of the same model, routing and conditions, or it is not taken; and a run goes on without it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import CacherouteError
from cacheroute.evals import answers, frontier, harness, loading, long, prompts, reference
from cacheroute.evals import session as sessions
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.runner import Runner
from cacheroute.files import as_json
from cacheroute.forecast import misses
from cacheroute.model import experts, gguf_file
from cacheroute.plot import rows as plot_rows
from cacheroute.routing import tuned
from support.cli import invoke

LOSSY = "cache-prior:lambda=0.4"
HOLDS_NO_INTERVAL = "one chunk alone gives no interval"


def few(tiny: Path, prose: Path) -> tuple[object, ...]:
    return ("-m", tiny, "-f", prose, "--chunk", 32, "--limit", 40, "-t", 1, "--budget", "25%")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, content: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in content))


def stable(text: str) -> list[dict[str, Any]]:
    return [row | {"seconds": 0} for row in json.loads(text)]


# ---- of another model ------------------------------------------------------------------------------


def test_files_of_one_shape_with_other_weights_share_nothing(own_cache: Path, tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes() + bytes(5 << 20)
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(whole)
    middle = -(-tiny.stat().st_size // (1 << 20)) + 1 << 20
    other.write_bytes(whole[:middle] + b"weight" + whole[middle + 6 :])
    assert gguf_file.fingerprint(one) == gguf_file.fingerprint(other)  # by its ends only
    assert sessions.header_of(one, "t", "k")["model"] != sessions.header_of(other, "t", "k")["model"]
    assert reference.folder_name(one) != reference.folder_name(other)
    source = loading.Source()
    assert frontier.header(one, source)["model"] != frontier.header(other, source)["model"]
    assert tuned.path(one, 8) == tuned.path(other, 8)  # those files name a model by its ends


def test_a_model_that_is_written_to_is_another_one(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(tiny.read_bytes())
    first = gguf_file.content_fingerprint(copy)
    read = gguf_file.fingerprint
    monkeypatch.setattr(gguf_file, "fingerprint", lambda path: pytest.fail("read twice"))
    assert gguf_file.content_fingerprint(copy) == first
    monkeypatch.setattr(gguf_file, "fingerprint", read)
    copy.write_bytes(tiny.read_bytes() + b"more")
    assert gguf_file.content_fingerprint(copy) != first


@pytest.mark.engine
def test_a_forecast_takes_the_misses_of_this_model(own_cache: Path, tiny: Path, prose: Path) -> None:
    assert invoke("eval", "perplexity", *few(tiny, prose)).exit_code == 0
    misses.recorded.cache_clear()
    capacity = json.loads(invoke("eval", "perplexity", *few(tiny, prose), "-o", "json").stdout)[0]["budget_experts"]
    assert "original" in misses.recorded(tiny, capacity, "soft-lfu")


# ---- of another routing ----------------------------------------------------------------------------


def tuned_file(tiny: Path, file: Path, value: float) -> None:
    layout = experts.layout(gguf_file.read(tiny))
    own = tuned.TunedRouting(
        model="",
        architecture="x",
        n_expert=layout.n_expert,
        n_used=layout.n_used,
        layers=tuple(layout.indices),
        strategy="cache-prior",
        parameters=tuple({"lambda": value} for _ in layout.layers),
    )
    tuned.save(own, file, force=True)


@pytest.mark.engine
def test_a_tuned_routing_is_known_by_its_content(own_cache: Path, tiny: Path, prose: Path, tmp_path: Path) -> None:
    results, routing = tmp_path / "f.jsonl", tmp_path / "r.json"
    command = ("frontier", results, *few(tiny, prose), "--routing", f"tuned:{routing}", "-o", "json")
    tuned_file(tiny, routing, 0.1)
    first = json.loads(invoke(*command).stdout)
    tuned_file(tiny, routing, 0.9)
    result = invoke(*command)
    second = json.loads(result.stdout)
    assert "has 1 of 2 rows already" in result.stderr and second[0] == first[0]
    assert second[1]["nll"] != first[1]["nll"] and second[1]["routing"] == first[1]["routing"]
    expected = stable(invoke("eval", "perplexity", *few(tiny, prose), "--routing", f"tuned:{routing}", "-o", "json").stdout)
    assert (second[1] | {"seconds": 0}).items() >= expected[1].items()
    drawn = plot_rows.of(results, plot_rows.latest(plot_rows.read(results)))
    assert [row.ppl for row in drawn] == [row["ppl"] for row in second]  # the row that was replaced is not drawn
    copy = tmp_path / "same.json"
    copy.write_bytes(routing.read_bytes())
    third = invoke(*command[:-4], "--routing", f"tuned:{copy}", "-o", "json")
    assert "has 2 of 2 rows already" in third.stderr and json.loads(third.stdout)[1]["routing"] == f"tuned:{copy}"


@pytest.mark.engine
def test_a_policy_of_ones_own_is_scored_again(
    own_cache: Path, tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept_policy.py").write_text(
        "import numpy as np\n\n\nclass Best:\n    def __init__(self, n_expert, n_used, n_layers):\n        self.n = n_used\n\n"
        "    def choose(self, layer, z, mass, resident):\n        return np.argsort(-z, kind='stable')[: self.n]\n"
    )
    command = ("frontier", "f.jsonl", *few(tiny, prose), "--routing", "python:kept_policy:Best", "-o", "json")
    assert invoke(*command).exit_code == 0
    scored: list[str] = []
    compute = Runner.run
    monkeypatch.setattr(
        Runner, "run", lambda self, request, chunk: scored.append(str(request[0])) or compute(self, request, chunk)
    )
    result = invoke(*command)
    assert "has 1 of 2 rows already" in result.stderr and set(scored) == {"python:kept_policy:Best"}


# ---- of another speed ------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_row_with_another_speed_is_timed_again(own_cache: Path, tiny: Path, prose: Path, tmp_path: Path) -> None:
    results = tmp_path / "f.jsonl"
    command = ("frontier", results, *few(tiny, prose), "--routing", LOSSY, "-o", "json")
    plain = json.loads(invoke(*command).stdout)
    assert all(row["ts"] is None and row["timed_with"] == "" for row in plain)
    for more, words in (
        (("--io", "buffered"), "buffered, 1 thread, unpaced"),
        (("--io", "buffered", "-t", 2), "buffered, 2 threads, unpaced"),
        (("--io", "buffered", "--flash-mbps", 900), "buffered, 1 thread, 900 MB/s"),
    ):
        timed = invoke(*command, *more)
        assert "has 0 of 2 rows already" in timed.stderr and f"rows without a speed ({words}) are timed again" in timed.stderr
        rows = json.loads(timed.stdout)
        assert all(row["ts"] > 0 and row["timed_with"] == words for row in rows)
        again = invoke(*command, *more)
        assert "has 2 of 2 rows already" in again.stderr and json.loads(again.stdout) == rows
    last = invoke(*command)
    assert "has 2 of 2 rows already" in last.stderr and all(row["ts"] is None for row in json.loads(last.stdout))


# ---- damage ----------------------------------------------------------------------------------------


DAMAGE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "short nll": lambda line: line | {"nll32": line["nll32"][:8]},
    "no base64": lambda line: line | {"nll32": "!" + line["nll32"][1:]},
    "nan nll": lambda line: line | {"nll32": "AADAfw==" * (len(line["nll32"]) // 8)},
    "short kl": lambda line: line | {"kl32": line["kl32"][:16]},
    "kl of another type": lambda line: line | {"kl32": 7},
    "nan seconds": lambda line: line | {"seconds": math.nan},
    "seconds in words": lambda line: line | {"seconds": "1"},
    "a routing that is a list": lambda line: line | {"routing": []},
    "fewer layers": lambda line: line | {"misses": line["misses"][1:], "swapped": line["swapped"][1:]},
    "misses in words": lambda line: line | {"misses": ["1"] * len(line["misses"])},
    "misses below none": lambda line: line | {"misses": [-1] * len(line["misses"])},
    "another chunk": lambda line: line | {"chunk": 10**6},
    "a chunk that is none": lambda line: line | {"chunk": True},
    "half of a KL": lambda line: line | {"same_top": None},
    "one field more": lambda line: line | {"more": 1},
}


@pytest.mark.engine
def test_a_damaged_score_is_computed_again(own_cache: Path, tiny: Path, prose: Path) -> None:
    command = ("eval", "perplexity", *few(tiny, prose), "--routing", LOSSY, "-o", "json")
    expected = stable(invoke(*command).stdout)
    (file,) = (own_cache / "scores").glob("*.jsonl")
    content = lines(file)
    for name, damage in DAMAGE.items():
        write(file, [content[0], damage(content[1]), *content[2:]])
        result = invoke(*command)
        said = f"is damaged: 1 of its {len(content) - 1} lines are computed again."
        assert result.exit_code == 0 and said in result.stderr, (name, result.output)
        assert stable(result.stdout) == expected, name
        assert lines(file)[1:-1] == content[2:], name  # the others are kept
        assert "is damaged" not in invoke(*command).stderr, name
    file.write_text("no header\n" + file.read_text())
    result = invoke(*command)
    assert "is damaged: what it kept is computed again" in result.stderr and stable(result.stdout) == expected


def test_a_damaged_answer_is_none() -> None:
    good: dict[str, Any] = {
        **dict.fromkeys(("question", "routing", "eviction"), "x"),
        **dict.fromkeys(("budget", "truncated", "decoded", "selected", "examined", "swapped", "misses", "missed_bytes"), 1),
        **{"values": [[-1.0, True], [-2.0, False]], "seconds": 0.5},
    }
    answer = answers._from_json(good)
    assert answers._fits(answer, answers.Question(answers.CHOICES, "c", ("a", "b")))
    assert not answers._fits(answer, answers.Question(answers.CHOICES, "c", ("a",)))
    assert not answers._fits(answer, answers.Question(answers.TEXT, "c"))
    for change in ({"values": [[math.nan, True]]}, {"values": [1, 2]}, {"values": 7}, {"misses": [1]}, {"seconds": math.inf}):
        with pytest.raises(TypeError):
            answers._from_json(good | change)


def test_damaged_texts_and_prompts_are_none() -> None:
    floats = "AACAPw==AACAPw=="[:8]  # 1.0
    text: dict[str, Any] = {
        **dict.fromkeys(("routing", "eviction", "decoding"), "x"),
        **{"budget": 1, "prompt": 0, "tokens": [5], "nll32": floats, "misses": [], "selected": []},
    }
    long._check(text, 1, 1, 6)
    for change in ({"tokens": [6]}, {"tokens": ["5"]}, {"prompt": 1}, {"nll32": "AADAfw=="}, {"nll32": ""}, {"misses": [1]}):
        with pytest.raises((TypeError, ValueError)):
            long._check(text | change, 1, 1, 6)
    prompt: dict[str, Any] = {
        **dict.fromkeys(("routing", "eviction"), "x"),
        **dict.fromkeys(("budget", "agreed", "reads", "read_bytes", "swapped", "examined"), 1),
        **{"place": 0, "nll32": floats, "kl32": floats},
    }
    places: Any = ["one"]
    prompts._check(prompt, places, 1)
    for change in ({"place": 1}, {"kl32": "AADAfw=="}, {"agreed": 2}, {"reads": None}, {"nll32": "AACAPwAAgD8="}):
        with pytest.raises((TypeError, ValueError)):
            prompts._check(prompt | change, places, 1)


def test_json_has_no_nan() -> None:
    content = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, "x")], "c": {"d": 2}}
    assert json.loads(as_json(content)) == {"a": None, "b": [1.5, None, [None, "x"]], "c": {"d": 2}}


# ---- a file that goes away, and one that cannot be written ------------------------------------------


def test_a_results_file_that_is_removed_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, header = tmp_path / "r" / "f.jsonl", {"format": "x"}
    path.parent.mkdir()
    ResultsFile(path, header).append({"a": 0})
    file = ResultsFile(path, header)
    file.append({"a": 1})
    path.unlink()
    path.parent.rmdir()
    file.append({"a": 2})
    assert lines(path) == [header, {"a": 0}, {"a": 1}, {"a": 2}] and "it is written again" in capsys.readouterr().err
    path.write_bytes(b"")
    file.append({"a": 3})
    assert [line.get("a") for line in lines(path)] == [None, 0, 1, 2, 3]
    path.write_text("my notes\n")
    with pytest.raises(CacherouteError, match="was replaced by another file"):
        file.append({"a": 4})
    assert path.read_text() == "my notes\n"


@pytest.mark.engine
def test_no_row_of_a_run_is_lost_with_its_file(
    own_cache: Path, tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "f.jsonl"
    compute = Runner.run

    def removing(self: Runner, request: Any, chunk: Any) -> Any:
        for file in (results, *(own_cache / "scores").glob("*.jsonl")):
            file.unlink(missing_ok=True)
        return compute(self, request, chunk)

    monkeypatch.setattr(Runner, "run", removing)
    result = invoke("frontier", results, *few(tiny, prose), "--routing", f"{LOSSY},pruning:k=1", "-o", "json")
    assert result.exit_code == 0 and "it is written again" in result.stderr, result.output
    header, *rows = lines(results)
    assert header["format"] == frontier.FORMAT and [r["routing"] for r in rows] == ["original", LOSSY, "pruning:k=1"]
    (scores,) = (own_cache / "scores").glob("*.jsonl")
    assert len(lines(scores)) == 1 + sum(row["n_chunks"] for row in rows)


@pytest.mark.engine
@pytest.mark.parametrize("command", ["eval", "tune"])
def test_without_a_cache_folder_to_write_to_nothing_is_kept(
    tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "good"))
    words = {
        "eval": ("eval", "perplexity", "--routing", LOSSY),
        "tune": ("tune", "--uniform", "--max-kl", 5),
    }[command]
    settings = (*few(tiny, prose), "--limit", 120, "-o", "json")
    expected = json.loads(invoke(*words, *settings).stdout)
    (tmp_path / "c").write_text("a file where a folder should be")
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "c"))
    result = invoke(*words, *settings)
    assert result.stderr.count("scores are not kept, and another run computes them again") == 1, result.output
    found = json.loads(result.stdout)
    if command == "eval":
        assert result.exit_code == 0 and stable(result.stdout) == [row | {"seconds": 0} for row in expected]
    else:  # what was found has nowhere to be saved, but it is printed
        assert result.exit_code == 1 and "cannot be made" in result.stderr
        assert found["routing"] == expected["routing"] and found["profile"] is None


def test_scores_that_can_no_longer_be_written_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = sessions.KeptScores(tmp_path / "s" / "f.jsonl", {"format": "x"})
    kept.append({"a": 1})
    kept.path.unlink()
    kept.path.parent.rmdir()
    (tmp_path / "s").write_text("a file")
    kept.append({"a": 2})
    kept.append({"a": 3})
    assert capsys.readouterr().err.count("scores are not kept") == 1


# ---- few chunks, and names that are no tasks --------------------------------------------------------


@pytest.mark.engine
def test_frontier_warns_of_few_chunks_as_eval_does(own_cache: Path, tiny: Path, prose: Path, tmp_path: Path) -> None:
    one = (*few(tiny, prose), "--limit", 1, "--routing", LOSSY)
    for command in (("eval", "perplexity"), ("frontier", tmp_path / "f.jsonl"), ("frontier", tmp_path / "f.jsonl")):
        result = invoke(*command, *one)
        assert result.stderr.count(HOLDS_NO_INTERVAL) == 1, result.output
        assert "?" not in result.stdout


@pytest.mark.parametrize("name", ["kl", "KLD", "ppl", "perplexty", "mean_kld"])
def test_what_eval_perplexity_reports_is_no_task(tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(harness, "require", lambda: pytest.fail("lm-evaluation-harness is imported"))
    result = invoke("eval", "task", name, "-m", tiny)
    assert result.exit_code == 2 and "`cacheroute eval perplexity` measures" in result.stderr, result.output


def test_paths_are_checked_before_the_harness_is_imported(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "require", lambda: pytest.fail("lm-evaluation-harness is imported"))
    data = invoke("eval", "mmlu", "-m", tiny, "--data", tmp_path / "nope")
    assert data.exit_code == 2 and "There is no file or folder" in data.stderr, data.output
    folder = invoke("eval", "kl", "-m", tiny, "--tasks", tmp_path / "nope")
    assert folder.exit_code == 2 and "is not a folder with task files" in folder.stderr, folder.output
