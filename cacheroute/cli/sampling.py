"""Options that say what an answer may be, by llama.cpp's names: the same for every command that answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute.cli import prompt
from cacheroute.errors import UsageError
from cacheroute.files import expanded

if TYPE_CHECKING:
    from cacheroute.engine.constraints import Constraints

StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        "-r",
        "--reverse-prompt",
        metavar="TEXT",
        help="End the answer before this text; can be repeated. '\\n' is the end of a line.",
    ),
]
GrammarOption = Annotated[
    str | None, typer.Option("--grammar", metavar="GBNF", help="A grammar that the answer follows, in llama.cpp's GBNF.")
]
GrammarFileOption = Annotated[Path | None, typer.Option("--grammar-file", help="A file with such a grammar.")]
JsonSchemaOption = Annotated[
    str | None, typer.Option("-j", "--json-schema", metavar="JSON|@FILE", help="The answer is JSON of this schema.")
]
JsonSchemaFileOption = Annotated[Path | None, typer.Option("-jf", "--json-schema-file", help="A file with such a schema.")]
LogitBiasOption = Annotated[
    list[str] | None,
    typer.Option(
        "-l",
        "--logit-bias",
        metavar="TOKEN(+/-)BIAS",
        help="Make a token likelier or less likely, as in 15043+1, or impossible: 15043-inf; can be repeated.",
    ),
]


def constraints(
    stop: list[str] | None,
    grammar: str | None,
    grammar_file: Path | None,
    json_schema: str | None,
    json_schema_file: Path | None,
    logit_bias: list[str] | None,
) -> Constraints:
    """What those options say together. Raises UsageError for two grammars, files that cannot be read, what cannot be meant."""
    if sum(option is not None for option in (grammar, grammar_file, json_schema, json_schema_file)) > 1:
        raise UsageError(
            "An answer follows one grammar: give one of --grammar, --grammar-file, --json-schema and --json-schema-file."
        )
    from cacheroute.engine import constraints as checked

    if json_schema is not None and json_schema.startswith("@"):
        json_schema_file = expanded(json_schema.removeprefix("@"))
        json_schema = None
    return checked.of(
        stop or (),
        _text(grammar, grammar_file, "grammar"),
        _text(json_schema, json_schema_file, "JSON schema"),
        logit_bias or (),
    )


def _text(typed: str | None, file: Path | None, what: str) -> str:
    text = prompt.from_file(file) if file else typed
    if text is not None and not text.strip():
        raise UsageError(f"The {what} is empty; leave it out, or write one.")
    return text or ""
