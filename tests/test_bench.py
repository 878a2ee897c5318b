"""`cacheroute bench`: the arms are comparable and the rows report what was measured. No time is asserted."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import bench_store
import pytest

from cacheroute import Llama
from cacheroute.routing.eviction import DEFAULT
from support.cli import cacheroute, invoke, sentence

ARMS = ("--budget", "25%,50%", "--routing", "original,cache-prior:lambda=0.5", "-p", 24, "-n", 12, "-r", 2)


def rows(alone: Path, *arguments: object) -> list[dict[str, object]]:
    done = cacheroute("bench", "-m", alone, *ARMS, "-o", "json", *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return list(json.loads(done.stdout))


def test_every_arm_has_a_prompt_and_a_decode_row(alone: Path) -> None:
    table = rows(alone)
    arms = {("original", "lru"), ("original", DEFAULT), ("cache-prior:lambda=0.5", DEFAULT)}
    assert len(table) == 2 * 2 * len(arms) and {(r["routing"], r["eviction"]) for r in table} == arms
    for row in table:
        assert len(row["samples_ts"]) == 2 and row["avg_ts"] > 0  # type: ignore[arg-type, operator]
        assert row["budget_experts"] == {"25%": 8, "50%": 16}[str(row["budget"])]
        assert row["resident_mib"] == row["counted_mib"]
        assert row["vs_lru"] is not None and row["hook_ms_per_token"] > 0  # type: ignore[operator]
        assert row["lossy"] == (row["routing"] != "original") and not any("maps the file" in d for d in row["doubts"])
        if row["routing"] == "original":
            assert row["swap_rate"] == 0 and (row["vs_lru"] == 1) == (row["eviction"] == "lru")
    for first, second in zip(table[::2], table[1::2], strict=True):
        assert first["ttft_s"] == second["ttft_s"] and first["n_prompt"] and second["n_gen"]
        seconds = [24 / ts for ts in first["samples_ts"]]  # type: ignore[attr-defined]
        assert first["ttft_s"] == pytest.approx(sum(seconds) / 2)
    decode = {(r["budget"], r["routing"], r["eviction"]): r for r in table if r["n_gen"]}
    for budget in ("25%", "50%"):
        lru, prior = decode[budget, "original", "lru"], decode[budget, "cache-prior:lambda=0.5", DEFAULT]
        assert prior["miss_rate"] < lru["miss_rate"]  # type: ignore[operator]
        assert prior["read_mib_per_token"] < lru["read_mib_per_token"]  # type: ignore[operator]
        assert prior["swap_rate"] > 0  # type: ignore[operator]
    assert all(r["swap_rate"] == 0 for r in table if r["n_prompt"]), "prompts are routed by original"


def test_the_kernel_read_what_was_asked_for(alone: Path) -> None:
    counted = [row for row in rows(alone) if row["n_gen"] and row["device_mib_per_token"]]
    if not counted:
        pytest.skip("this kernel does not count what was read")
    for row in counted:
        assert row["device_mib_per_token"] == pytest.approx(row["read_mib_per_token"], rel=0.2)


def test_a_paced_row_reports_its_pace(alone: Path) -> None:
    paced = rows(alone, "--flash-mbps", 50)
    assert {row["flash_mbps"] for row in paced} == {50}
    done = cacheroute("bench", "-m", alone, *ARMS, "--flash-mbps", 50, "--io", "buffered", "--wide")
    assert "buffered at 50 MB/s" in " ".join(done.stdout.split("\n\n")[0].split())
    assert done.stdout.count("buffered @ 50 MB/s") == 12


def test_outputs_agree(alone: Path) -> None:
    one = ("bench", "-m", alone, "-p", 8, "-n", 4, "-r", 1, "--routing", "original", "--eviction", "lru")
    names = set(json.loads(invoke(*one, "-o", "json").stdout)[0])
    lines = invoke(*one, "-o", "jsonl").stdout.splitlines()
    assert len(lines) == 2 and all(set(json.loads(line)) == names for line in lines)
    table = list(csv.DictReader(io.StringIO(invoke(*one, "-o", "csv").stdout)))
    assert len(table) == 2 and set(table[0]) == names
    with sqlite3.connect(":memory:") as database:
        database.executescript(invoke(*one, "-o", "sql").stdout)
        assert [test for (test,) in database.execute("SELECT test FROM bench")] == ["pp8", "tg4 @ d8"]
    assert invoke(*one, "-o", "md").stdout.count("\n") == 4
    what, empty, head, line, *_ = invoke(*one).stdout.splitlines()
    assert "prompt of 8, 4 decoded, 1 run, " in what and empty == "" and max(len(head), len(line)) <= 80
    assert head.split()[-2:] == ["TTFT", "s"] and "±" not in line
    assert "-o csv has all columns" in sentence(cacheroute(*one, "-o", "csv", "--wide"), 2)


def test_ctrl_c_keeps_what_is_finished(alone: Path) -> None:
    command = ["bench", "-m", alone, "-p", 24, "-n", 12, "-t", 1, "--routing", "original", "-o", "json", "-r"]
    start = time.monotonic()
    cacheroute(*command, 1)
    enough = time.monotonic() - start
    command.append(100_000)
    with subprocess.Popen(
        [sys.executable, "-m", "cacheroute", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(2 * enough)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "cacheroute: Stopped; the rows are of the runs that were finished.\n")
    table = json.loads(out)
    runs = [len(row["samples_ts"]) for row in table]
    assert len(table) == 4 and min(runs) > 0 and max(runs) - min(runs) <= 1
    assert all(row["vs_lru"] > 0 and row["ttft_s"] > 0 for row in table)


def test_hook_time_excludes_waiting_for_reads(alone: Path) -> None:
    llm = Llama(str(alone), budget="25%", n_ctx=64, flash_mbps=1, verbose=False)
    tokens = llm.tokenize(b"In the beginning was the word")[:6]
    with llm.decoding():
        for token in tokens:
            llm.eval([token])
    c = llm.stats().decode
    llm.close()
    assert 0 < c.hook_seconds < 0.1 * c.read_seconds, "reads are paced to take what they take"


def test_bench_store_measures_reads_and_their_processor_time(alone: Path) -> None:
    llm = Llama(str(alone), budget="25%", eviction="lru", n_ctx=64, verbose=False)
    row = bench_store.measure(llm, n_misses=2, seconds=0.1, seed=0)
    stats = llm.stats()
    llm.close()
    assert stats.prefill.reads > 2 * stats.capacity and row["cpu_ms_per_100mb"] > 0 and row["mb_per_s"] > 0
    assert row["resident_mib"] == stats.resident_bytes / 2**20


def test_too_little_text_is_one_sentence(alone: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    assert "longer" in sentence(cacheroute("bench", "-m", alone, "-f", text, "-p", 64, "-n", 64), 2)
    assert "nothing to run" in sentence(cacheroute("bench", "-m", alone, "-p", 0, "-n", 0), 2)


def test_pages_that_another_process_holds_are_reported(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny, tmp_path / "m.gguf"))
    hold = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
    hold += "sum(m[::4096]); print(flush=True); input()"
    few = ("bench", "-m", path, "-p", 4, "-n", 4, "-r", 1, "-t", 1, "--routing", "original", "--eviction", "lru", "-o", "json")
    alone = cacheroute(*few, "--io", "buffered,direct")
    assert {row["foreign_mib"] for row in json.loads(alone.stdout)} == {0.0} and "held by another" not in alone.stderr
    with subprocess.Popen([sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        beside = cacheroute(*few, "--io", "buffered,direct")
        other.communicate(b"\n")
    assert all(row["foreign_mib"] > 0 for row in json.loads(beside.stdout))
    for row in json.loads(beside.stdout):
        assert any(doubt.endswith("as another process maps the file") for doubt in row["doubts"])
    assert "KiB of experts were in memory before a run, held by another process" in beside.stderr
