"""Task profiles: the experts that a task uses are in the cache before the first token, within the budget."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cacheroute import Llama
from cacheroute.cli import app
from cacheroute.errors import UsageError
from cacheroute.native import bindings
from cacheroute.trace import task_profile
from cacheroute.trace.task_profile import TaskProfile
from support.cli import invoke
from support.traces import fed


def task(n_used: int = 20) -> TaskProfile:
    uses = tuple(tuple(10 * e + 1 if e < n_used else 0 for e in range(32)) for _ in range(2))
    return TaskProfile("tiny qwen3moe", "qwen3moe", 32, (0, 1), 100, uses)


def resident(llm: Llama, layer: int) -> set[int]:
    mask = (ctypes.c_uint8 * 32)()
    bindings.lib.cr_hook_resident(llm._hook.handle, layer, mask)
    return {e for e in range(32) if mask[e]}


def test_a_summary_counts_what_ran() -> None:
    t = fed(False)
    profile = task_profile.summarise(t)
    assert profile.tokens == 160 and profile.layers == (0, 1)
    for layer in (0, 1):
        counted = np.bincount(t.records["ids"][t.records["layer"] == layer].ravel(), minlength=24)
        assert profile.uses[layer] == tuple(counted)
    best = profile.best(0, 5)
    assert [profile.uses[0][e] for e in best] == sorted(profile.uses[0])[-5:]


@pytest.mark.parametrize("io", ["buffered", "none"])
def test_a_sequence_starts_with_a_filled_cache_within_the_budget(tiny: Path, io: str) -> None:
    llm = Llama(str(tiny), io=io, budget=8, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    llm.warm(task())
    warm = set(range(12, 20))
    assert resident(llm, 0) == resident(llm, 1) == warm
    if io == "buffered":
        assert llm.stats().resident_bytes > 0 and llm.stats().prefill.reads == 16
    read = llm.stats().prefill.reads
    llm.reset()  # llama.cpp does, before it generates: nothing is read again
    assert llm.stats().prefill.reads == read
    with llm.decoding():
        for token in range(3, 30):
            llm.eval([token])
    assert resident(llm, 0) != warm
    llm.reset()
    assert resident(llm, 0) == warm
    llm.configure(budget=4, io=io)
    assert resident(llm, 0) == set(range(16, 20))
    llm.configure(budget="all", io=io)
    assert resident(llm, 0) == set(range(20))  # what the task never used stays away
    llm.warm(None)
    assert resident(llm, 0) == set()


def test_a_warm_start_misses_less_at_first(tiny: Path, tmp_path: Path) -> None:
    """The model's answer is the same, its misses are fewer."""
    (tmp_path / "text").write_text("the cat of the sea and the sea of the cat ")
    runner, profile = CliRunner(), tmp_path / "task.json"
    common = ["-m", str(tiny), "-t", "1"]
    traced = ["trace", *common, "-f", str(tmp_path / "text"), "-o", str(tmp_path / "t"), "-c", "64"]
    traced += ["--save-profile", str(profile)]
    assert runner.invoke(app, traced).exit_code == 0
    run = ["generate", *common, "-p", "the cat", "-n", "8", "--temp", "0", "-o", "json", "--budget", "75%", "-c", "64", "--raw"]
    cold, warm = (json.loads(runner.invoke(app, [*run, *more]).stdout) for more in ([], ["--warm-start", str(profile)]))
    assert warm["text"] == cold["text"]
    assert warm["stats"]["prefill"]["misses"] < cold["stats"]["prefill"]["misses"]
    assert warm["stats"]["decode"]["misses"] <= cold["stats"]["decode"]["misses"]
    bench = ["bench", *common, "-f", str(tmp_path / "text"), "-p", "4", "-n", "4", "-r", "1", "-o", "json"]
    bench += ["--routing", "original"]
    rows = [json.loads(runner.invoke(app, [*bench, *more]).stdout) for more in ([], ["--warm-start", str(profile)])]
    assert rows[1][0]["miss_rate"] < rows[0][0]["miss_rate"]


def test_what_does_not_fit_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    llm = Llama(str(tiny), io="none", n_ctx=64, verbose=False)
    for other in (replace(task(), model="another"), replace(task(), layers=(0, 2))):
        with pytest.raises(UsageError, match=r"^The task profile is of .* and this model is 'tiny qwen3moe'"):
            llm.warm(other)
    path = tmp_path / "p"
    task_profile.save(task(), path)
    assert task_profile.load(path) == task()
    with pytest.raises(UsageError, match="exists; --force"):
        task_profile.save(task(), path)
    row, *rest = [list(uses) for uses in task().uses]
    wrong = (-1, 1.5, "1", 10**30, None, True)
    for change in ({"uses": [[1, 2]]}, {"uses": None}, {"layers": [0]}, *({"uses": [[n, *row[1:]], *rest]} for n in wrong)):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UsageError, match="is a damaged task profile"):
            task_profile.load(path)
        task_profile.save(task(), path, force=True)
    result = invoke("generate", "-m", str(tiny), "-p", "a", "--warm-start", str(tiny))
    assert result.exit_code == 2 and "is not a task profile" in result.stderr
