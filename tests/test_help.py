"""--help shows the defaults of the options."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cacheroute.cli import app


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
