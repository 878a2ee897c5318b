"""`cacheroute generate`: streams, pipes, seeds, endings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import tiny_models
from support.cli import cacheroute, sentence

RUN = ("--temp", 0, "-c", 256, "-t", 1, "--budget", "50%")


def test_answers_on_stdout_and_statistics_on_stderr(demo_model: Path) -> None:
    done = cacheroute("generate", "-p", "What is the capital of France?", "-n", 24, *RUN, "-t", 2)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    start, line = done.stderr.splitlines()
    assert "of experts in memory" in start
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tok/s, [\d.]+% of experts read from disk", line)
    start, plan, line = cacheroute("generate", "-p", "What is the capital of France?", "-n", 24, "-v", *RUN).stderr.splitlines()
    assert plan.startswith("prompt of ")
    for fact in ("tok/s", "miss", "MiB/token", "swapped 0/", "resident", "first token", "prompt"):
        assert fact in line
    resident, budget = map(float, re.search(r"resident ([\d.]+) of ([\d.]+) MiB", line).groups())  # type: ignore[union-attr]
    assert 0 < resident < 1.6 * budget  # experts of a few pages: page rounding


def test_of_tokens_as_likely_as_the_likeliest_there_is_one(demo_model: Path) -> None:
    greedy = cacheroute("generate", "-p", "Name three colours.", "-n", 12, *RUN)
    sampled = cacheroute("generate", "-p", "Name three colours.", "-n", 12, *RUN, "--temp", 1.5, "--min-p", 1, "-s", 1)
    assert greedy.stdout == sampled.stdout != ""


def test_the_prompt_is_what_was_typed_then_the_file_then_the_pipe(demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("two")
    once = cacheroute("generate", "--raw", "-p", "one", "-f", file, "-n", 8, "-o", "json", *RUN, stdin="three")
    again = cacheroute("generate", "--raw", "-p", "one\n\ntwo\n\nthree", "-n", 8, "-o", "json", *RUN)
    assert json.loads(once.stdout)["n_prompt"] == json.loads(again.stdout)["n_prompt"]
    assert json.loads(once.stdout)["text"] == json.loads(again.stdout)["text"]


def test_json_and_jsonl_carry_the_same_text(demo_model: Path) -> None:
    arguments = ("-p", "Name three colours.", "-n", 12, "--routing", "cache-prior:lambda=0.2", *RUN)
    whole = json.loads(cacheroute("generate", *arguments, "-o", "json").stdout)
    *pieces, last = map(json.loads, cacheroute("generate", *arguments, "-o", "jsonl").stdout.splitlines())
    assert "".join(p["text"] for p in pieces) == whole["text"]
    assert whole["stats"]["decode"]["hits"] == last["stats"]["decode"]["hits"] > 0
    assert whole["stats"]["decode"]["swapped"] > 0
    assert whole["stats"]["routing"] == "cache-prior:lambda=0.2"


@pytest.mark.parametrize("routing", ["original", "cache-prior:lambda=0.3"])
def test_what_a_prompt_cache_keeps_is_not_evaluated_again(demo_model: Path, tmp_path: Path, routing: str) -> None:
    def run(prompt: str, *more: object) -> tuple[dict[str, Any], str]:
        done = cacheroute("generate", "--raw", "-p", prompt, "-n", 12, "-v", "-o", "json", "--routing", routing, *RUN, *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    def decoded(report: dict[str, Any]) -> list[int]:
        return [report["stats"]["decode"][name] for name in ("misses", "hits", "swapped", "examined")]

    file = tmp_path / "p"
    keep = ("--prompt-cache", file)
    text = "A computer is a machine that"
    plain, _ = run(text)
    first, said = run(text, *keep)
    content, n = file.read_bytes(), plain["n_prompt"]
    again, said_again = run(text, *keep)
    assert f"prompt {n} (0 from {file})" in said and f"prompt {n} ({n} from {file})" in said_again
    assert (plain["n_prompt_cached"], first["n_prompt_cached"], again["n_prompt_cached"]) == (0, 0, n)
    assert plain["text"] == first["text"] == again["text"] and again["n_prompt"] == n
    assert decoded(plain) == decoded(first) == decoded(again)
    assert again["stats"]["prefill"]["tokens"] == 0 and again["prompt_ts"] is None and again["time_to_first_token_s"] > 0
    assert file.read_bytes() == content, "a prompt that is kept already is not written again"

    longer, _ = run(f"{text} works with numbers, and", *keep)
    assert longer["n_prompt_cached"] == n < longer["n_prompt"] and file.read_bytes() != content
    once_more, _ = run(f"{text} works with numbers, and", "-n", 0, *keep)
    assert once_more["n_prompt_cached"] == once_more["n_prompt"] == longer["n_prompt"]
    other, _ = run(f"{text} plays music", *keep)  # parts from the file after `text`, which both begin with
    assert other["n_prompt_cached"] == n
    assert run("It is late", *keep)[0]["n_prompt_cached"] == 0


def test_a_seed_repeats_the_bytes_and_another_does_not(demo_model: Path) -> None:
    def run(seed: int) -> str:
        sampling = ("-p", "Tell me a story.", "-n", 24, "-s", seed, "--temp", 1.5, "-c", 256, "-t", 1)
        return cacheroute("generate", *sampling, "--routing", "cache-prior:lambda=0.3").stdout

    assert run(7) == run(7) != run(8)


def test_a_lossy_routing_is_announced_and_its_swaps_are_counted(demo_model: Path) -> None:
    lossy = ("generate", "-p", "Hi", "-n", 2, "--routing", "cache-prior:lambda=0.2", *RUN)
    _, announced, line = cacheroute(*lossy).stderr.splitlines()
    assert announced.startswith("cache-prior:lambda=0.2 is lossy") and re.search(r"% swapped \(\d+ of \d+\)$", line)
    assert cacheroute(*lossy, "-q").stderr.splitlines() == [announced]
    assert cacheroute("generate", "-p", "Hi", "-n", 2, "-q", *RUN).stderr == ""
    assert "give one of them" in sentence(cacheroute("generate", "-p", "Hi", "-v", "-q"), 2)


def test_a_routing_with_all_experts_in_memory_is_not_called_lossy(demo_model: Path) -> None:
    whole = ("--temp", 0, "-c", 256, "-t", 1, "--budget", "all")
    prior = cacheroute("generate", "-p", "Hi", "-n", 2, "--routing", "cache-prior:lambda=0.2", *whole)
    assert "cache-prior:lambda=0.2 changes nothing here: all experts are in memory" in prior.stderr
    assert "lossy" not in prior.stderr and "swapped" not in prior.stderr
    assert prior.stdout == cacheroute("generate", "-p", "Hi", "-n", 2, *whole).stdout
    pruned = cacheroute("generate", "-p", "Hi", "-n", 2, "--routing", "pruning:k=1", *whole)
    assert "pruning:k=1 is lossy" in pruned.stderr and "left out" in pruned.stderr


def test_a_closed_pipe_ends_without_a_message(demo_model: Path) -> None:
    command = f"{sys.executable} -m cacheroute generate -q -p 'Count to one hundred.' -n 200 -c 256 </dev/null | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, cwd=Path(__file__).parent, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("verbose", [False, True])
def test_ctrl_c_keeps_what_was_written(demo_model: Path, verbose: bool) -> None:
    command = [sys.executable, "-m", "cacheroute", "generate", "-p", "Write a very long story.", "-n", "2000", "-c", "4096"]
    command += ["-v"] * verbose
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent
    ) as process:
        assert process.stdout and process.stderr
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert first + rest
    assert b"Traceback" not in errors and re.search(rb"\d+ tokens?", errors) and (b"| miss " in errors) == verbose
    assert b"resident 0.0" not in errors


def test_a_full_context_stops_with_a_message(tmp_path: Path) -> None:
    model = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf")
    # llama.cpp rounds a context up to 256 tokens; a letter is a token of this model
    done = cacheroute("generate", "-m", model, "--raw", "-p", "a" * 248, "-n", -1, "-c", 256, "-s", 1)
    assert done.returncode == 0
    assert "context of 256 tokens is full" in done.stderr
    assert "-c" in sentence(cacheroute("generate", "-m", model, "--raw", "-p", "a" * 300, "-c", 256), 2)


def test_missing_and_unreadable_prompts(tmp_path: Path) -> None:
    assert "-p" in sentence(cacheroute("generate", "-p", "  "), 2)
    assert "nothing.txt" in sentence(cacheroute("generate", "-f", tmp_path / "nothing.txt"), 2)
    assert "UTF-8" in sentence(cacheroute("generate", stdin=b"\xff\xfe\x00x"), 2)


def test_tokens_and_rates_are_counted_from_the_first_token(demo_model: Path) -> None:
    def run(n: int) -> dict[str, float | None]:
        answer = json.loads(cacheroute("generate", "-p", "Tell me a story.", "-n", n, "-s", 5, "-o", "json", *RUN).stdout)
        return {k: answer[k] for k in ("n_gen", "ts", "prompt_ts", "time_to_first_token_s", "finish_reason")}

    assert run(0) == {"n_gen": 0, "ts": None, "prompt_ts": None, "time_to_first_token_s": None, "finish_reason": "length"}
    assert run(1)["n_gen"] == 1 and run(1)["ts"] is None
    many = run(60)
    assert many["n_gen"] == 60 and 0 < (many["ts"] or 0) < 5000
