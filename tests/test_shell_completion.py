"""What a shell completes: commands, models, routings, evictions; and that it fails in silence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import typer

from cacheroute import cli
from cacheroute.cli import completion
from cacheroute.model import catalogue
from cacheroute.routing.strategies import STRATEGIES
from support.cli import cacheroute

ROOT = typer.main.get_command(cli.app)


def commands(group: Any = ROOT) -> list[Any]:
    found = []
    for command in group.commands.values():
        found += commands(command) if hasattr(command, "commands") else [command]
    return found


def completed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """As bash asks for it."""
    words = line.split(" ")
    monkeypatch.setenv("_CACHEROUTE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit) as end:
        cli._run([])
    said = capsys.readouterr()
    assert not end.value.code and said.err == "", said.err
    return said.out.split()


def test_every_option_that_has_words_completes_them() -> None:
    for command in commands():
        ctx = command.context_class(command, info_name=command.name, resilient_parsing=True)
        for parameter in command.params:
            if parameter.name in completion.WORDS and not getattr(parameter, "is_flag", False):
                found = [item.value for item in parameter.shell_complete(ctx, "")]
                assert found, f"{command.name} --{parameter.name} completes nothing"


def test_words_of_each_kind() -> None:
    models = [word for word, _ in completion._COMPLETERS["model"]("")]
    assert {*catalogue.load_catalogue()} <= {*models}
    routings = [word for word, _ in completion._COMPLETERS["routing"]("")]
    assert {r.partition(":")[0] for r in routings} == {*STRATEGIES, "tuned"}
    assert [w for w, _ in completion._COMPLETERS["routing"]("original,cache")] == [
        "original,cache-prior:lambda=0.1",
        "original,cache-prior:lambda=",
    ]
    assert [w for w, _ in completion._COMPLETERS["eviction"]("so")] == ["soft-lfu"]
    assert completion._COMPLETERS["model"]("./q") == [] == completion._COMPLETERS["model"]("/models/"), "left to the shell"


def test_a_failure_completes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError

    assert completion.completer(broken)("") == []
    monkeypatch.setenv("HF_HUB_CACHE", "~nosuchuser/x")
    assert completion._COMPLETERS["model"]("de") == []


def test_commands_options_and_values_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(line: str) -> list[str]:
        return completed(line, monkeypatch, capsys)

    assert {"generate", "doctor", "setup"} <= {*ask("cacheroute ")}
    assert ask("cacheroute sim") == ["simulate"]
    assert ask("cacheroute generate -m dem") == ["demo"]
    assert ask("cacheroute eval perplexity --eviction lru,l") == ["lru,lru", "lru,lfu"]
    assert "--prompt-routing" in ask("cacheroute chat --pro")
    (tmp_path / "broken.toml").write_text("[generate]\nbugdet = 1\n")
    monkeypatch.setenv("CACHEROUTE_CONFIG", str(tmp_path / "broken.toml"))
    assert ask("cacheroute generate --budget 5") == ["50%"]


def test_the_program_completes() -> None:
    done = cacheroute(env={"_CACHEROUTE_COMPLETE": "complete_bash", "COMP_WORDS": "cacheroute ins", "COMP_CWORD": "1"})
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["inspect"], "")


def test_it_is_quick() -> None:
    """Everything that a completion does after the program has started."""
    start = time.process_time()
    for complete in completion._COMPLETERS.values():
        complete("")
    assert time.process_time() - start < 1.0


def test_showing_the_script_changes_nothing(tmp_path: Path) -> None:
    shown = cacheroute(
        "--show-completion", "bash", env={"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert shown.returncode == 0 and "_CACHEROUTE_COMPLETE=complete_bash" in shown.stdout
    assert not [*tmp_path.iterdir()]
