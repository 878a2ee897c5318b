"""`generate --prompts`: order, errors in their lines, --skip, answers that do not depend on each other, pipes and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cacheroute.cli import progress, prompts_file
from cacheroute.errors import UsageError
from faults.runner import Outcome, in_process
from support import tiny_models

pytestmark = pytest.mark.engine

FEW = ("-n", 6, "-c", 256, "-t", 1, "-s", 5, "--temp", 1, "--budget", "50%")
LINES = [
    "What is the capital of France?",
    "",
    json.dumps({"prompt": "Name a colour.", "id": "colour", "n_predict": 2}),
    json.dumps({"prompt": "Who are you?", "system": "You are a pirate.", "id": 7}),
    '{"prompt": "broken',
    json.dumps({"prompt": "word " * 400, "id": "long"}),
    "{a} and {b} are names, and this is a text",
    json.dumps({"prompt": "Hi", "sytem": "Be brief."}),
    "What is the capital of Spain?",
]


def written(folder: Path, lines: list[str]) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def command(*words: object) -> Outcome:
    return in_process([str(word) for word in words])


def answers(file: Path, *more: object, code: int = 0) -> list[dict[str, Any]]:
    done = command("generate", "--prompts", file, *FEW, *more)
    assert done.code == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("routing", ["original", "cache-prior:lambda=0.3"])
def test_each_line_is_answered_and_one_that_cannot_be_says_so(demo_model: Path, tmp_path: Path, routing: str) -> None:
    file = written(tmp_path, LINES)
    done = command("generate", "--prompts", file, *FEW, "--routing", routing)
    assert done.code == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["index"] for line in lines] == list(range(1, 9))
    assert [line.get("id") for line in lines] == [None, "colour", 7, None, "long", None, None, None]
    assert "Line 5 of" in lines[3]["error"] and "not valid JSON" in lines[3]["error"]
    assert "does not fit the context of 256; give a larger one with -c" in lines[4]["error"]
    assert "the key 'sytem'; did you mean system?" in lines[6]["error"]
    good = [line for line in lines if "error" not in line]
    assert len(good) == 5 and [line["seed"] for line in good] == [5, 6, 7, 10, 12]
    assert good[1]["n_gen"] == 2 and good[1]["finish_reason"] == "length"
    assert all(0 < line["n_gen"] <= 6 and line["text"] and 0 <= line["miss_rate"] <= 1 for line in good)
    assert (sum(line["swap_rate"] for line in good) > 0) == (routing != "original")
    *_, summary, last = done.stderr.splitlines()
    assert (
        summary.startswith("8 prompts, 3 failed | ") and "tok/s" in summary and ("swapped" in summary) == (routing != "original")
    )
    assert last == "cacheroute: 3 of 8 prompts failed; their lines say why."

    # what is skipped changes no answer, and neither does another order
    rest = answers(file, "--routing", routing, "--skip", 5, code=1)
    assert [line["text"] for line in rest if "text" in line] == [line["text"] for line in lines[5:] if "text" in line]
    if routing != "original":
        file = written(tmp_path, [LINES[0], LINES[2], LINES[3], LINES[-1]])
        straight = answers(file, "--routing", routing, "--temp", 0)
        turned = answers(written(tmp_path, [LINES[-1], LINES[3], LINES[2], LINES[0]]), "--routing", routing, "--temp", 0)
        assert [line["text"] for line in turned] == [line["text"] for line in straight][::-1]


def test_to_skip_all_prompts_is_said(demo_model: Path, tmp_path: Path) -> None:
    file = written(tmp_path, LINES[:3])
    done = command("generate", "--prompts", file, "--skip", 9)
    assert (done.code, done.stdout) == (0, "") and f"--skip 9 leaves out every prompt of {file}, which has 2" in done.stderr


def test_an_answer_is_that_of_the_prompt_alone(demo_model: Path, tmp_path: Path) -> None:
    file = written(tmp_path, ["Hello there", "What is the capital of France?"])
    both = answers(file, "--temp", 0, "-sys", "Be brief.")
    alone = command("generate", "-p", "What is the capital of France?", "-sys", "Be brief.", *FEW, "--temp", 0, "--no-stdin")
    assert alone.stdout.strip() == both[1]["text"].strip()
    assert both[0]["n_prompt"] != answers(file, "--temp", 0)[0]["n_prompt"], "the system's message is heard"


def test_prompts_are_answered_as_they_come(tiny: Path) -> None:
    command = [sys.executable, "-m", "cacheroute", "generate", "--prompts", "-", "-m", tiny, "--raw", *FEW]
    with subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        assert "experts in memory" in process.stderr.readline()
        assert process.stderr.readline() == "waiting for prompts on standard input, one a line\n"
        for text in ("the cat", "the mat"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"]
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stderr.read().startswith("2 prompts | ")


def test_quiet_has_no_line_but_the_answers(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Lines, "SECONDS_BETWEEN", 0.0)
    file = written(tmp_path, ["the cat", "the mat", "the dog"])
    for more, n in (((), 4), (("-q",), 0)):  # the start, two of progress, the summary
        done = command("generate", "--prompts", file, "-m", tiny, "--raw", *FEW, *more)
        assert (done.code, done.stdout.count("\n"), done.stderr.count("\n")) == (0, 3, n), done.stderr


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(demo_model: Path, tmp_path: Path) -> None:
    file, out = written(tmp_path, [f"Tell me a story about the number {i}." for i in range(200)]), tmp_path / "out"
    command = [sys.executable, "-m", "cacheroute", "generate", "--prompts", str(file), *map(str, FEW)]
    with out.open("wb") as stdout, subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while out.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    lines = out.read_text().splitlines()
    assert process.returncode == 130 and out.read_bytes().endswith(b"\n")
    assert [json.loads(line)["index"] for line in lines] == list(range(1, len(lines) + 1))
    *_, summary, last = said.decode().splitlines()
    assert summary.startswith(f"{len(lines)} prompts | ")
    assert last == f"cacheroute: Stopped; --skip {len(lines)} goes on after what is answered."


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (("--prompts", "nothing.txt"), "nothing.txt cannot be read"),
        (("--prompts", "/dev/zero"), "a file of prompts has to be a file"),
        (("--prompts", "/"), "a directory"),
        (("--prompts", "{file}", "-o", "text"), "leave -o"),
        (("--prompts", "{file}", "-o", "json"), "leave -o"),
        (("--prompts", "{file}", "-p", "Hi"), "leave out -p, -f"),
        (("--prompts", "-", "--no-stdin"), "name a file"),
        (("--prompts", "{empty}"), "has no prompt"),
        (("-p", "Hi", "--skip", "3"), "there are none"),
    ],
)
def test_what_does_not_go_together(tiny: Path, tmp_path: Path, words: tuple[str, ...], wrong: str) -> None:
    (tmp_path / "empty").write_text(" \n\n")
    files = {"file": written(tmp_path, ["Hi"]), "empty": tmp_path / "empty"}
    done = command("generate", "-m", tiny, *(word.format(**files) for word in words))
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1) and wrong in done.stderr


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"caf\xe9", "is not UTF-8 text"),
        (b'{"prompt": 5}', "has no prompt"),
        (b'{"prompt": "a", "prompt": "b"}', "has the key 'prompt' twice; leave out one."),
        (b'{"prompt": " "}', "has no prompt"),
        (b"{}", "has no prompt"),
        (b'{"prompt": "a", "system": 5}', "system is a text"),
        (b'{"prompt": "a", "n_predict": "5"}', "n_predict is a number"),
        (b'{"prompt": "a", "n_predict": true}', "n_predict is a number"),
        (b'{"prompt": "a", "id": NaN}', "no number of JSON"),
        (b'{"prompt": "a", "messages": []}', "there are prompt, id, system, n_predict"),
        (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_line(line: bytes, wrong: str) -> None:
    asked = prompts_file._parsed(3, line, "Line 4 of f")
    assert asked.index == 3 and asked.error.startswith("Line 4 of f") and wrong in asked.error


def test_what_a_line_may_be(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes("\ufeffone\r\n\n  two \n{3}\n".encode() + b'{"prompt": "four", "id": null, "system": ""}')
    source = prompts_file.Source.of(str(file))
    assert source.total == 4
    assert [(a.index, a.prompt, a.system) for a in source.prompts()] == [
        (1, "one", None),
        (2, "  two ", None),
        (3, "{3}", None),
        (4, "four", ""),
    ]


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_file.prompt, "MAX_BYTES", 1000)
    file = tmp_path / "f"
    file.write_bytes(b"x" * 3_000_000)
    with pytest.raises(UsageError, match="more than"):
        list(prompts_file.Source.of(str(file)).prompts())


def test_a_named_pipe_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prompts_file, "_SECONDS_BEFORE_WORD", 0.2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    source = prompts_file.Source.of(str(pipe))
    writer = subprocess.Popen(["sh", "-c", f"sleep 1; echo one >{pipe}"])
    assert [a.prompt for a in source.prompts()] == ["one"]
    assert writer.wait() == 0
    assert capsys.readouterr().err == f"waiting for prompts on {pipe}, one a line\n"


def test_a_model_without_a_template_has_no_place_for_a_system_message(tmp_path: Path) -> None:
    model = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf")
    file = written(tmp_path, ["the", json.dumps({"prompt": "the", "system": "Be brief."})])
    first, second = answers(file, "-m", model, code=1)
    assert first["text"] and "chat template" in second["error"]
    done = command("generate", "-m", model, "-p", "the", "-sys", "x", "-c", 256)
    assert done.code == 2 and "chat template" in done.stderr
