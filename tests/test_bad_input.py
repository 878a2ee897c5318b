"""What a user gets wrong costs one sentence, exit 2 or 1, and leaves nothing behind. All but one run in this process."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np

from faults.runner import in_process
from support.cli import cacheroute, sentence


def refused(*words: object, code: int = 2) -> str:
    done = in_process([str(word) for word in words])
    return sentence(subprocess.CompletedProcess(words, done.code, done.stdout, done.stderr), code)


def generate(model: Path, *arguments: object, code: int = 2) -> str:
    return refused("generate", "-m", model, "--raw", "-p", "a", "-n", 1, *arguments, code=code)


def test_files_that_are_not_models(tiny: Path, tmp_path: Path) -> None:
    missing, text = tmp_path / "missing.gguf", tmp_path / "text.gguf"
    text.write_text("hello")
    assert str(missing) in generate(missing)
    assert "directory" in generate(tmp_path)
    assert "not a GGUF" in generate(text)


def test_a_truncated_model(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    shutil.copy(tiny, short)
    with short.open("r+b") as file:
        file.truncate(tiny.stat().st_size - 5000)
    assert "cut short" in generate(short)
    with short.open("r+b") as file:
        file.truncate(100)
    assert "damaged" in generate(short)


def test_a_dense_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "no experts" in generate(tmp_path / "dense.gguf")


def test_bad_routings(tiny: Path) -> None:
    assert "cache-prior" in generate(tiny, "--routing", "nonsense")
    assert "lambda" in generate(tiny, "--routing", "cache-prior:mu=1")
    assert "at most 1" in generate(tiny, "--routing", "cache-prior:lambda=1.5")
    assert "not a number" in generate(tiny, "--routing", "cache-prior:lambda=x")
    assert "needs lambda" in generate(tiny, "--routing", "cache-prior")
    assert "lru" in generate(tiny, "--eviction", "fifo")
    assert "m is at least 4" in generate(tiny, "--routing", "max-rank:m=2")


def test_bad_budgets(tiny: Path) -> None:
    too_small = generate(tiny, "--budget", "3")
    assert "at least 4, 13% or 1MiB" in too_small, "K of E = 32, in all three forms"
    assert "at least 4" in generate(tiny, "--budget", "5%")
    assert "at least 4" in generate(tiny, "--budget", "1KiB")
    assert "50%" in generate(tiny, "--budget", "half")
    assert "does not fit" in generate(tiny, "--budget", "33")


def test_an_option_that_does_not_exist_is_a_usage_error() -> None:
    done = cacheroute("generate", "--no-such-option")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_unknown_outputs(tiny: Path) -> None:
    assert "jsonl" in generate(tiny, "-o", "xml")
    assert "jsonl" in refused("bench", "-m", tiny, "-o", "xml")
