"""Tables: aligned, at 80 columns, and the same rows for programs in every form."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cacheroute.cli import interval, table
from cacheroute.cli.table import View
from cacheroute.errors import UsageError
from cacheroute.evals.divergence import Divergence


@dataclass(frozen=True)
class Row:
    name: str
    count: int
    share: float | None
    ok: bool
    samples: tuple[float, ...]
    reasons: tuple[str, ...]


ROWS = [
    Row("it's", 3, 0.25, True, (1.5, 2.25), ("one", "two; three")),
    Row("b", -1, None, False, (), ()),
    Row("c", 2**40, float("nan"), False, (1 / 3,), ()),
]
CELLS = [["name", "tok/s", ""], ["cache-prior:lambda=0.2", "9.50", "!"], ["x", "10.25", ""]]
VIEW = View(CELLS, [["all"], ["of it"]], above=["what was run"], below=["Best: x"])


def test_names_are_aligned_to_the_left_and_figures_to_the_right() -> None:
    assert table.as_text(CELLS).splitlines() == [
        "name                    tok/s",
        "cache-prior:lambda=0.2   9.50  !",
        "x                       10.25",
    ]


def test_a_long_name_takes_several_lines() -> None:
    lines = table.as_text(CELLS, 24).splitlines()
    assert lines[1:3] == ["cache-prior:     9.50  !", "lambda=0.2"] and max(map(len, lines)) == 24
    uncut = table.as_text([["n"], ["x" * 30]], 20).splitlines()
    assert uncut[1:] == ["x" * 20, "x" * 10]
    assert max(map(len, table.as_text([["n", "m"], ["x" * 99, "1"]], 5).splitlines())) == 15, "a name keeps 12 letters"


def test_lines_in_words_are_broken_in_a_pipe_and_nothing_else_is(capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(["word"] * 40)
    table.show(["a" * 200], [words], [f"! {words}"])
    above, cells, below = capsys.readouterr().out.split("\n\n")
    assert all(len(line) <= table.WIDTH for part in (above, below) for line in part.splitlines()) and cells == "a" * 200
    assert above.replace("\n  ", " ") == words and below.rstrip("\n").replace("\n  ", " ") == f"! {words}"
    for output in ("md", "csv", "json", "jsonl", "sql"):
        table.write([Row(words, 1, 1.0, True, (), ())], output, View([["n"], [words]], [["n"], [words]], below=[words]))
        assert words in capsys.readouterr().out, "for programs nothing is broken"


def test_control_characters_of_a_name_are_escaped() -> None:
    assert table.as_text([["n"], ["a\x1b[31m"]]).splitlines()[1] == "a\\x1b[31m"


def write(output: str, capsys: pytest.CaptureFixture[str], **more: bool) -> str:
    table.write(ROWS, output, VIEW, name="rows", **more)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_text_has_the_words_and_wide_all_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = write("text", capsys).splitlines()
    assert lines[:2] == ["what was run", ""] and lines[2].startswith("name") and lines[-2:] == ["", "Best: x"]
    assert write("text", capsys, wide=True).splitlines()[2:4] == ["all", "of it"]
    assert write("md", capsys) == "| all   |\n|-------|\n| of it |\n"


def test_every_form_has_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(write("json", capsys))
    lines = [json.loads(line) for line in write("jsonl", capsys).splitlines()]
    assert whole[:2] == lines[:2] and whole[0]["samples"] == [1.5, 2.25]
    as_csv = list(csv.DictReader(io.StringIO(write("csv", capsys))))
    assert [row["name"] for row in as_csv] == ["it's", "b", "c"]
    assert (as_csv[0]["samples"], as_csv[0]["reasons"], as_csv[1]["share"]) == ("1.5 2.25", "one; two; three", "")
    with sqlite3.connect(":memory:") as database:
        text = write("sql", capsys)
        database.executescript(text + text)  # the table may be there already
        found = database.execute("SELECT name, count, share, ok, samples FROM rows").fetchall()
        kinds = [kind for _, _, kind, *_ in database.execute("PRAGMA table_info(rows)").fetchall()]
    assert found[:3] == [("it's", 3, 0.25, 1, "1.5 2.25"), ("b", -1, None, 0, ""), ("c", 2**40, None, 0, "0.333333")]
    assert len(found) == 6 and kinds == ["TEXT", "INTEGER", "REAL", "INTEGER", "TEXT", "TEXT"]


def test_what_there_is_not_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"^There is no output 'xml'; there are text, md, csv, json, jsonl and sql\.$"):
        table.check("xml")
    with pytest.raises(UsageError, match="-o md has all columns without it"):
        table.check("md", wide=True)
    table.check("text", wide=True)


def test_a_terminal_has_colour_and_its_own_width() -> None:
    code = "from cacheroute.cli import table; table.show(['name  x', '!  b'], ['above'], ['! why', 'Best: b']); "
    code += "print(table.columns())"
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm-256color"}
    subprocess.run(["stty", "cols", "123"], stdin=theirs, check=True)
    subprocess.run([sys.executable, "-c", code], stdout=theirs, env=env, check=True, cwd=Path(__file__).parent.parent)
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    assert "\x1b[1mname  x\x1b[0m" in said and "\x1b[33m! why\x1b[0m" in said and "Best: b\r\n" in said
    assert said.endswith("123\r\n")


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.634, -0.22, 1.54, "+0.63 [-0.22, +1.54]"),
        (0.634, None, None, "+0.63"),
        (0.634, None, 1.54, "+0.63 [?, +1.54]"),
        (None, None, None, "?"),
    ],
)
def test_a_figure_and_its_interval(value: float | None, low: float | None, high: float | None, expected: str) -> None:
    assert interval.figure(value, low, high) == expected
    assert interval.figure(value, low, high, tight=True) == expected.replace(", ", ",")


def test_a_kl_is_in_millinats_and_has_no_sign() -> None:
    found = Divergence(kl=0.0179, kl_low=0.0168, kl_high=0.0191, kl_p99=0.1, top1=0.9, top1_se=0.01)
    assert interval.mean_kl(found) == "17.90 [16.80, 19.10]" and interval.mean_kl(found, tight=True) == "17.9 [16.8,19.1]"
