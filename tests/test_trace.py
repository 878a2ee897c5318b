"""Traces: numpy reads them in five lines, they are never half there, and float16 does not change the model's own choice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.trace import task_profile, trace_file
from cacheroute.trace.trace_file import DECODE, PRESCRIBED, Header, TraceWriter
from support.cli import invoke
from support.native_hook import SIGMOID, SOFTMAX, SOFTMAX_WEIGHT, bare_hook
from support.traces import fed, header, made_up

# ---- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [False, True])
def test_numpy_reads_a_trace_as_the_docstring_says(tmp_path: Path, mass: bool) -> None:
    t = fed(mass)
    trace_file.write(tmp_path / "my.trace", t.header, t.records)
    code = textwrap.dedent((trace_file.__doc__ or "").partition("Five lines read it:\n\n")[2].partition("\n\nOne record")[0])
    found: dict[str, Any] = {}
    exec(code.replace("my.trace", str(tmp_path / "my.trace")), found)
    np.testing.assert_array_equal(found["records"], t.records)
    np.testing.assert_array_equal(found["top"], t.records["ids"])
    assert found["header"]["model"] == "made up" and found["header"]["expert_bytes"] == [1 << 20] * 2
    again = trace_file.read(tmp_path / "my.trace")
    assert again.header == t.header and again.complete
    np.testing.assert_array_equal(again.records, t.records)


@pytest.mark.parametrize("cut", [1, 4, 50])
def test_a_trace_cut_short_is_readable(tmp_path: Path, cut: int) -> None:
    t = fed(False)
    path = tmp_path / "t"
    trace_file.write(path, t.header, t.records)
    path.write_bytes(path.read_bytes()[:-cut])
    again = trace_file.read(path)
    assert not again.complete
    n = len(t.records) - (cut > 4)
    np.testing.assert_array_equal(again.records, t.records[:n])
    result = invoke("simulate", path, "--budget", "50%", "--routing", "original", "--eviction", "lru,belady", "-o", "json")
    assert result.exit_code == 0 and "was cut short; its complete records are replayed" in result.stderr
    assert len(json.loads(result.stdout)) == 2


def test_a_replay_has_rows_of_its_layers(tmp_path: Path) -> None:
    t = fed(False)
    trace_file.write(tmp_path / "t", t.header, t.records)
    words = ("simulate", tmp_path / "t", "--budget", "50%", "--routing", "original", "--eviction", "lru", "-o", "json")
    (whole,) = json.loads(invoke(*words).stdout)
    first, *layers = json.loads(invoke(*words, "--per-layer").stdout)
    assert first == whole and len(layers) == len(t.header.layers)
    assert [row["layer"] for row in layers] == list(t.header.layers) and whole["layer"] is None
    assert sum(row["misses"] for row in layers) == whole["misses"] > 0


def damaged(content: bytes, change: str) -> bytes:
    line, _, rest = content.partition(b"\n")
    head = json.loads(line)
    if change == "another file":
        return b"GGUF" + content
    if change == "header only":
        return line + b"\n" + rest[:10]
    if change == "ids":
        return content.replace(rest[:92], b"\xff" * 92)
    change, _, wrong = change.partition(" ")
    values = {"version": 2, "n_expert": 25, "layers": [0], "n_used": 99, "dtype": [["z", "f4"]]}
    head[change] = wrong or values[change]
    return json.dumps(head).encode() + b"\n" + rest


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("another file", "is not a trace; `cacheroute trace` makes one"),
        ("version", "is a trace of version 2; this cacheroute reads version 1"),
        ("n_expert", "a header that contradicts itself"),
        ("layers", "a header that contradicts itself"),
        ("n_used", "a header that contradicts itself"),
        ("dtype", "a header that contradicts itself"),
        ("layers x", "a damaged header"),
        ("header only", "was cut short before its first record"),
        ("ids", "names experts or layers that its model does not have"),
    ],
)
def test_a_damaged_trace_is_one_sentence(tmp_path: Path, change: str, sentence: str) -> None:
    path = tmp_path / "t"
    trace_file.write(path, fed(False).header, fed(False).records)
    path.write_bytes(damaged(path.read_bytes(), change))
    with pytest.raises(UsageError, match=sentence):
        trace_file.read(path)


def test_a_file_that_is_not_a_trace_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        result = invoke("simulate", path)
        assert result.exit_code == 2 and "cannot be read" in result.stderr and result.stderr.count("\n") == 1


def test_no_file_is_overwritten_unasked_or_left_half_written(tmp_path: Path) -> None:
    t, path = fed(False), tmp_path / "t"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists; --force"):
        trace_file.write(path, t.header, t.records)
    assert path.read_text() == "precious"
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, t.header, force=True) as writer:
        full = np.zeros(3, trace_file.record_dtype(24, 4, mass=True))
        writer.append(full.tobytes())
        assert path.read_text() == "precious"
        raise KeyboardInterrupt
    assert path.read_text() == "precious"
    left = trace_file.read(tmp_path / "t.part")
    assert len(left.records) == 3 and not left.complete
    with pytest.raises(UsageError, match=r"t\.part exists"):
        trace_file.write(tmp_path / "t.part", t.header, t.records)
    trace_file.write(path, t.header, t.records, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    with TraceWriter(tmp_path / "empty", t.header):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


# ---- float16 --------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([SOFTMAX, SIGMOID, SOFTMAX_WEIGHT]), st.sampled_from([1e-5, 1e-3, 0.3]))
@settings(deadline=None, max_examples=80)
def test_rounding_keeps_the_choice_and_its_order(seed: int, gating: int, spread: float) -> None:
    """Scores so near each other that they are equal in float16."""
    rng = np.random.default_rng(seed)
    e, k = int(rng.integers(4, 40)), int(rng.integers(1, 4))
    scores = (0.3 + spread * rng.normal(size=(20, e))).astype(np.float32)
    probs = scores
    if gating == SOFTMAX:
        probs = scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    elif gating == SIGMOID:
        probs = np.abs(0.5 + spread * rng.normal(size=scores.shape)).astype(np.float32)
        scores = np.where(rng.random(scores.shape) < 0.1, -np.inf, scores).astype(np.float32)
    with bare_hook((1, e, k, k)) as hook:
        ids = hook.select(0, scores, None if gating != SIGMOID else probs, gating, decode=True)
        records = hook.take()
    np.testing.assert_array_equal(records["ids"], ids)
    z = records["z"].astype(float)
    np.testing.assert_array_equal(np.argsort(-z, kind="stable")[:, :k], ids)
    np.testing.assert_array_equal(np.isneginf(z), np.isneginf(scores))
    exact = np.log(scores.astype(float)) if gating == SOFTMAX else scores.astype(float)
    exact -= exact.max(axis=1, keepdims=True)
    finite = np.isfinite(exact)
    off = np.abs(z[finite] - exact[finite]).max()
    assert off <= 2.0**-11 * (np.abs(exact[finite]).max() * (1 + k) + 1e-3)
    if gating == SIGMOID:
        for row, mass, own in zip(records["mass"].astype(float), probs, ids, strict=True):
            assert sorted(own, key=lambda i: (-row[i], i)) == sorted(own, key=lambda i: (-mass[i], i))


def test_prescribed_ids_are_marked_and_replayed(tmp_path: Path) -> None:
    """Some models prescribe the ids of a layer, and the replay runs those with any scores."""
    from cacheroute.routing.strategies import parse
    from cacheroute.trace.simulate import Arm, Replay

    t = made_up(1, 8, 2, 40, 1, mass=False)
    records = t.records.copy()
    records["flags"] |= PRESCRIBED
    rng = np.random.default_rng(0)
    records["ids"] = [rng.permutation(8)[:2] for _ in records]
    row = Replay(trace_file.Trace(t.header, records, True)).run(Arm("2", parse("cache-prior:lambda=1"), "lru"))[0]
    decoded = [set(r["ids"].tolist()) for r in records if r["flags"] & DECODE]
    assert row.swapped == 0 and row.hits + row.misses == 2 * len(decoded)
    assert row.misses > row.hits  # at random, where the bonus would have kept two experts for ever


# ---- recording ------------------------------------------------------------------------------------


def test_prompt_tokens_are_marked(tiny: Path, tmp_path: Path) -> None:
    llm = Llama(str(tiny), io="none", budget="25%", n_ctx=128, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False)
    with TraceWriter(tmp_path / "t", Header.of(llm.layout, "original", "lru", 8)) as writer, llm.tracing(writer.append):
        llm.eval(list(range(3, 44)))
        with llm.decoding():
            llm.eval([50])
            llm.eval([51])
    records = trace_file.read(tmp_path / "t").records
    first, last = (records[records["layer"] == layer] for layer in (0, 1))
    assert first["token"].tolist() == list(range(43))
    assert last["token"].tolist() == [40, 41, 42]  # llama.cpp takes only the wanted outputs through the last layer
    prompt, batch = trace_file.SOFTMAX_MASS, trace_file.SOFTMAX_MASS | trace_file.BATCH
    assert first["flags"].tolist() == [prompt | batch * (t in (0, 16, 32)) for t in range(41)] + [batch | DECODE] * 2
    assert last["flags"].tolist() == [batch] + [batch | DECODE] * 2
    assert (records["n_run"] == 4).all() and (records["sequence"] == 0).all()
    assert "mass" not in (records.dtype.names or ())
    llm.reset()
    llm.eval([3])  # outside of tracing(): nothing is recorded
    assert len(trace_file.read(tmp_path / "t").records) == len(records)


def test_the_command_records_what_it_reports(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the cat of the sea and the sea of the cat " * 8)
    out, task = tmp_path / "t", tmp_path / "task.json"
    run = ["trace", "-m", tiny, "-f", text, "-o", out, "-c", 40, "--max-tokens", 100, "--n-prompt", 10, "-t", 1]
    result = invoke(*run, "--save-profile", task)
    assert result.exit_code == 0, result.output
    t = trace_file.read(out)
    assert t.complete and t.header.model == "tiny qwen3moe" and t.header.budget_experts == 16
    first = t.records[t.records["layer"] == 0]
    assert first["sequence"].tolist() == [0] * 40 + [1] * 40 + [2] * 20
    assert (first["flags"] & DECODE).tolist() == ([0] * 10 + [1] * 30) * 2 + [0] * 10 + [1] * 10
    assert "100 tokens x 2 layers x" in result.stderr and "70 tokens decoded" in result.stderr
    uses = task_profile.load(task)
    assert uses.tokens == 100 and sum(uses.uses[0]) == 400
    again = invoke(*run)
    assert again.exit_code == 2 and "exists; --force replaces it" in again.stderr
    assert invoke(*run, "--force").exit_code == 0
    row = json.loads(invoke("simulate", out, "--routing", "original", "--eviction", "lru", "-o", "json").stdout)[1]
    assert row["budget"] == "50%" and row["tokens"] == 70


def test_generated_tokens_are_decoded(tiny: Path, tmp_path: Path) -> None:
    run = ("trace", "-m", tiny, "-p", "the cat", "-n", 5, "-o", tmp_path / "t", "-t", 1)
    result = invoke(*run, "--routing", "max-rank:m=8")
    assert result.exit_code == 0, result.output
    t = trace_file.read(tmp_path / "t")
    assert t.header.routing == "max-rank:m=8"
    first = t.records[t.records["layer"] == 0]
    assert 0 < (first["flags"] & DECODE).sum() <= 5 and not first["flags"][0] & DECODE


@pytest.mark.parametrize("option", [["-p", "a", "-f", "b"], ["-f", "nowhere"], ["--routing", "x"], ["--budget", "1"]])
def test_bad_options_are_one_sentence_and_leave_nothing(tiny: Path, tmp_path: Path, option: list[str]) -> None:
    result = invoke("trace", "-m", tiny, "-o", tmp_path / "t", *option)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_leaves_a_readable_part(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    command = [sys.executable, "-m", "cacheroute", "trace", "-m", str(tiny), "-o", str(out), "-t", "1", "-c", "128"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        part = tmp_path / "t.part"
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 20_000) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and f"The records so far are in {part}" in stderr
    t = trace_file.read(part)
    assert not t.complete and len(t.records) > 50 and not out.exists()


def test_an_unwritable_folder_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    result = invoke("trace", "-m", tiny, "-o", tmp_path / "no" / "t")
    assert result.exit_code == 2 and "t.part cannot be written: there is no folder" in result.stderr


def test_the_header_does_not_move_the_layout() -> None:
    h = header(3, 16, 2)
    assert h.layout.indices == (0, 1, 2) and h.layout.expert_bytes == 3 << 20 and h.layout.model == "made up"
