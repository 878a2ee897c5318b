"""--help shows the defaults of the options, and the commands in groups; the README has the same table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import readme_help
import typer
from typer.testing import CliRunner

from cacheroute.cli import app, groups

ROOT = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("generate", "[default: demo]"),
        ("eval perplexity", "[default: the held-out text of the package]"),
        ("tune", "[default: all fast cores]"),
        ("frontier", "[default: a grid over all strategies]"),
        ("plot", "[default: chosen by the content of the files]"),
    ],
)
def test_defaults_are_shown(command: str, default: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0 and default in " ".join(result.stdout.split())


def test_every_command_has_a_group() -> None:
    assert groups.REST not in dict(groups.grouped(ROOT))
    listed = [name for names in groups.GROUPS.values() for name in names]
    assert len(listed) == len(set(listed))


def test_the_list_of_commands_fits_a_terminal() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "..." not in "".join(lines).replace("[ARGS]...", "").replace("ARGS...", "")
    for heading in groups.GROUPS:
        assert f"{heading}:" in lines
    begins = {
        line.index(line.split(None, 1)[1], 3) for line in lines if line.startswith("  ") and line.split()[0] in ROOT.commands
    }
    assert len(begins) == 1, "the second column is one column"


def test_a_command_without_a_group_is_listed_all_the_same() -> None:
    other = typer.Typer(cls=groups.Grouped)

    @other.command()
    def generate() -> None:
        """Answer. And more."""

    @other.command()
    def new() -> None:
        """Something
        new. And more."""

    @other.command(hidden=True)
    def old() -> None:
        """Not shown."""

    group = typer.main.get_command(other)
    found = {heading: [(name, groups.summary(c)) for name, c in commands] for heading, commands in groups.grouped(group)}
    assert found == {"Run": [("generate", "Answer.")], groups.REST: [("new", "Something new.")]}


def test_the_readme_has_the_table_of_this_version() -> None:
    text = readme_help.README.read_text(encoding="utf-8")
    assert readme_help.updated(text) == text, "run scripts/readme_help.py"


def test_only_what_is_between_the_marks_changes(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    old = f"before\n{readme_help.BEGIN}\nold\n{readme_help.END}\nafter\n"
    new = readme_help.updated(old)
    assert new.startswith(f"before\n{readme_help.BEGIN}\n| |") and new.endswith(f"|\n{readme_help.END}\nafter\n")
    assert "old" not in new and "| `eval perplexity`, `task`" in new and new.count("| Run |") == 1
    for wrong in ("no marks", old + old, f"{readme_help.END} {readme_help.BEGIN}"):
        with pytest.raises(ValueError, match="around the table"):
            readme_help.updated(wrong)


def test_the_script_checks_without_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["readme_help.py", "--check"])
    readme_help.main()
    old = f"{readme_help.BEGIN}\nold\n{readme_help.END}\n"
    stale = tmp_path / "README.md"
    stale.write_text(old)
    monkeypatch.setattr(readme_help, "README", stale)
    with pytest.raises(SystemExit, match="another table"):
        readme_help.main()
    assert stale.read_text() == old
