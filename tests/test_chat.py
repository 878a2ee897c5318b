"""`cacheroute chat`: turns, commands, a full context, pipes, a terminal, and Ctrl-C that stops an answer alone."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheroute import CacherouteError, Llama, UsageError
from cacheroute.engine.conversation import Conversation, check_template
from cacheroute.model import demo_model
from support import tiny_models
from support.cli import cacheroute, sentence
from support.systems import LINUX

pytestmark = pytest.mark.engine

GREEDY: dict[str, Any] = {"temp": 0.0}
PROMPT = "\x1b[?2004h"  # the line editor has begun
FEW = ("-n", 8, "--temp", 0, "-t", 1, "-c", 512)


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    path = demo_model.ensure()
    with contextlib.closing(Llama(str(path), budget="50%", n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)) as loaded:
        yield loaded


def answer(conversation: Conversation, question: str, n: int = 8) -> str:
    run = conversation.ask(question, n, 7, GREEDY)
    text = "".join(run.pieces())
    conversation.answered(text)
    return text


# ---- the conversation -----------------------------------------------------------------------------


def test_a_turn_evaluates_only_what_is_new_and_answers_as_upstream(llm: Llama) -> None:
    llm.reset()
    conversation = Conversation(llm, "Be brief.")
    first = answer(conversation, "What is the capital of France?")
    before = llm.stats().prefill.tokens
    second = answer(conversation, "And of Spain?")
    whole = len(conversation._prompt(conversation.messages).tokens)
    assert 0 < llm.stats().prefill.tokens - before < whole / 2
    llm.reset()
    messages = [{"role": "system", "content": "Be brief."}, *conversation.messages[:3]]
    upstream = llm.create_chat_completion(messages, max_tokens=8, temperature=0)
    assert upstream["choices"][0]["message"]["content"] == second
    assert [m["content"] for m in conversation.messages] == ["What is the capital of France?", first, "And of Spain?", second]


def test_the_oldest_turns_leave_a_full_context(llm: Llama) -> None:
    llm.reset()
    conversation = Conversation(llm, "Be brief.")
    for i in range(12):
        answer(conversation, f"Tell me about the number {i}, and then about the one after it.")
        assert len(conversation._prompt(conversation.messages).tokens) <= llm.n_ctx()
    assert conversation.gone > 0 and conversation.gone % 2 == 0
    assert conversation.messages[0]["role"] == "user" and conversation.system == "Be brief."
    kept = list(conversation.messages)
    with pytest.raises(UsageError, match=r"^The question takes \d+ tokens and the context has 256; give a larger one with -c"):
        Conversation(llm).ask("word " * 400, 8, 7, GREEDY)
    assert conversation.messages == kept


def test_a_question_without_an_answer_leaves(llm: Llama) -> None:
    conversation = Conversation(llm)
    conversation.ask("Hello", 8, 7, GREEDY)
    conversation.answered(" ")
    assert conversation.messages == [] and conversation.take_back() is None
    answer(conversation, "Hello")
    assert conversation.take_back() == "Hello" and conversation.messages == []


def test_a_conversation_is_kept_in_a_file(llm: Llama, tmp_path: Path) -> None:
    conversation, file = Conversation(llm, "Be brief."), tmp_path / "talk.json"
    answer(conversation, "Hello")
    conversation.save(file)
    with pytest.raises(UsageError, match="exists"):
        conversation.save(file)
    other = Conversation(llm)
    other.load(file)
    assert (other.system, other.messages) == (conversation.system, conversation.messages)
    for content in ("", "{}", "[1]", '{"kind": "cacheroute conversation", "system": 1, "messages": []}', "\xff"):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(UsageError, match=r"talk\.json is no conversation that /save has written\.$"):
            other.load(file)
    assert other.messages == conversation.messages


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf")
    with (
        contextlib.closing(Llama(str(path), budget="50%", n_ctx=64, verbose=False)) as tiny,
        pytest.raises(CacherouteError, match="--raw"),
    ):
        check_template(tiny)
    sentence(cacheroute("chat", "-m", path, "-t", 1), 1)


# ---- in a pipe ------------------------------------------------------------------------------------


def piped(*lines: str, more: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cacheroute", "chat", *map(str, (*FEW, *more))]
    return subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=120, check=False)


def test_lines_of_a_pipe_are_messages_and_commands(tmp_path: Path) -> None:
    file = tmp_path / "a talk.json"
    done = piped(
        "What is the capital of France?",
        "",
        "/routing",
        "/system Answer in one word.",
        "/routing cache-prior:lambda=0.2",
        "And of Spain?",
        "/retry",
        "/budget 25%",
        "/budget 1%",
        "/what",
        "/stats",
        f'/save "{file}"',
        "/clear",
        "/retry",
        f'/load "{file}"',
        "//quoted",
        "/quit",
        "never",
        more=("-v", "--budget", "50%"),
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads(file.read_text())
    kept = [m["content"] for m in saved["messages"]]
    assert len(kept) == 4 and kept[2] == "And of Spain?" and saved["system"] == "Answer in one word."
    answers = done.stdout
    assert answers.startswith(kept[1]) and kept[3] in answers
    said = done.stderr
    assert "\nrouting original\n" in said
    assert "cache-prior:lambda=0.2 is lossy" in said and "A budget of 1% keeps 0 of 16 experts" in said
    assert "There is no command /what; /help lists them." in said and "Nothing has been asked yet." in said
    assert said.count("first token") == 4  # a line for each answer
    assert said.count(" swapped (") >= 3, "also of an answer in which a lossy routing chose nothing else"
    assert "answers: " in said and "never" not in answers


def test_the_end_of_a_pipe_ends_it_and_options_are_checked() -> None:
    assert piped("/help").stderr.count("\n") > 8
    assert piped("Hello", more=("-q",)).stderr == ""
    wrong = piped("Hello", more=("--budget", "1%"))
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1


# ---- on a terminal --------------------------------------------------------------------------------


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *more: object) -> None:
        self._main, other = pty.openpty()
        command = [sys.executable, "-m", "cacheroute", "chat", "-t", "1", "--temp", "0", *map(str, more)]
        env = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command, stdin=other, stdout=subprocess.PIPE, stderr=other, env=env, start_new_session=True
        )
        os.close(other)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self._main], [], [], 0.1)[0]:
                self.seen += os.read(self._main, 4096).decode("utf-8", "replace")
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def close(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=60)
        os.close(self._main)
        return self.process.returncode, out.decode()


@pytest.mark.skipif(not LINUX, reason="makes a terminal")
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on() -> None:
    terminal = Terminal("-c", 2048, "--flash-mbps", 10)
    terminal.until("/help lists the commands")
    terminal.until(PROMPT)
    terminal.type("Tell me a very long story about a dog and a cat.\r")
    assert terminal.process.stdout is not None
    os.read(terminal.process.stdout.fileno(), 1)
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("stopped", 10)
    terminal.until(PROMPT)
    terminal.type("\x03")
    terminal.until("Ctrl-D or /quit leaves.")
    terminal.until(PROMPT)
    terminal.type("/stats\r")
    terminal.until("resident")
    terminal.until(PROMPT)
    terminal.type("\x04")
    code, out = terminal.close()
    assert code == 0 and out.endswith("\n")


def test_what_goes_wrong_loses_nothing(llm: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cacheroute.cli.chat import Talk

    llm.reset()
    conversation = Conversation(llm, "Be brief.")
    answer(conversation, "Hello")
    kept = list(conversation.messages)
    talk = Talk(conversation, GREEDY, iter([7] * 9), 8)
    for line in ("word " * 400, "/save ~nouser7/x", "caf\udcff", "/load /nowhere", '/save "open', "/routing\tnone-such"):
        assert talk.take(line)
        assert conversation.messages == kept, line

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "_prompt", interrupted)
    for line in ("And now?", "/retry"):
        assert talk.take(line)
        assert conversation.messages == kept, line
    assert capsys.readouterr().err.count("Stopped.") == 2


def test_a_long_conversation_is_cut_at_once(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, rendered = Conversation(llm), []
    for i in range(300):
        conversation.messages += [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"It is {i}."}]
    prompt = Conversation._prompt
    monkeypatch.setattr(Conversation, "_prompt", lambda self, m: (rendered.append(1), prompt(self, m))[1])
    run = conversation.ask("And?", 4, 7, GREEDY)
    assert len(rendered) < 14 and 0.4 * llm.n_ctx() < len(run.prompt.tokens) <= 0.75 * llm.n_ctx()
    assert conversation.gone % 2 == 0 and conversation.messages[0]["role"] == "user"
