"""The data of a task from files of the user's own, in place of the hub: prompts, examples, filters and metrics stay those of
lm-evaluation-harness. Knows files and rows only.

A split is a file of CSV (with a head), JSON lines or Parquet. In a folder, a split S of the configuration N of the data set D
(for MMLU anatomy of cais/mmlu, for GSM8K main of openai/gsm8k) is the first of S/N_S, S/N, N_S, N/S and N/S-00000-of-00001; where
D has one configuration, S and D-S as well. All of them may lie in a folder named as D. A file is the test split; its training
split lies beside it, with "train" in its name for "test".
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheroute.errors import UsageError
from cacheroute.evals.text import pyarrow_of
from cacheroute.files import decoded, read_text

SPLITS = ("test", "validation", "dev", "train", "auxiliary_train")
ENDS = (".csv", ".jsonl", ".parquet")
_ONE = (None, "main", "default")  # names of a configuration that is the only one
_COLUMNS = {"mmlu": ("question", "choices", "answer"), "gsm8k": ("question", "answer")}
_LETTERS = "ABCD"

Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The rows of the splits that are there, by the split's name, and the files that they are from."""

    rows: dict[str, list[Row]]
    files: dict[str, Path]


def check(data: Path) -> None:
    """Raises UsageError where there is nothing."""
    if not data.exists():
        raise UsageError(f"There is no file or folder {data}; --data is where the files of a task are.")


def find(data: Path, name: str, config: str | None) -> Found:
    """The splits of a configuration of the data set `name`, as in "cais/mmlu" and "anatomy".

    Raises UsageError when there is no test or validation split, or a file is not what it should be.
    """
    short = name.rpartition("/")[2]
    check(data)
    files = dict(_in_folder(data, short, config)) if data.is_dir() else dict(_beside(data))
    if not files.keys() & {"test", "validation"}:
        tried = ", ".join(f"{place}.csv" for place in list(_places("test", short, config))[:3])
        raise UsageError(f"{data} has no test split of {_called(name, config)}; looked for {tried} and the like.")
    rows = {split: _converted(short, path, _rows(path, short)) for split, path in files.items()}
    for split in files.keys() & {"test", "validation"}:
        if not rows[split]:
            raise UsageError(f"{files[split]} has no rows.")
    return Found(rows, files)


def _called(name: str, config: str | None) -> str:
    return name if config in _ONE else f"{config} ({name})"


def _in_folder(data: Path, short: str, config: str | None) -> Iterator[tuple[str, Path]]:
    for split in SPLITS:
        for place in _places(split, short, config):
            found = next((p for root in (data, data / short) for end in ENDS if (p := root / f"{place}{end}").is_file()), None)
            if found:
                yield split, found
                break


def _places(split: str, short: str, config: str | None) -> Iterator[str]:
    """Paths of a split below the folder, without their ends, the likeliest first."""
    if config:
        yield from (f"{split}/{config}_{split}", f"{split}/{config}", f"{config}_{split}")
        yield from (f"{config}/{split}", f"{config}/{split}-00000-of-00001")
    if config in _ONE:
        yield from (split, f"{short}-{split}", f"{short}_{split}", f"{split}-00000-of-00001")


def _beside(file: Path) -> Iterator[tuple[str, Path]]:
    yield "test", file
    for split in SPLITS[1:]:
        other = file.with_name(file.name.replace("test", split))
        if other != file and other.is_file():
            yield split, other


def _rows(path: Path, short: str) -> list[Row]:
    if path.suffix == ".parquet":
        return _parquet(path)
    text = decoded(read_text(path), str(path))
    if path.suffix == ".jsonl":
        return [_object(line, path, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".csv":
        raise UsageError(f"{path} is not a file of {', '.join(ENDS[:-1])} or {ENDS[-1]}, which the data of a task are.")
    try:
        first, *lines = list(csv.reader(io.StringIO(text), strict=True)) or [[]]
    except csv.Error as e:
        raise UsageError(f"{path} is not CSV ({e}).") from None
    if short == "mmlu" and "question" not in first and len(first) == 6:  # as its authors publish it
        first, lines = ["question", *_LETTERS, "answer"], [first, *lines]
    for number, line in enumerate(lines, 2):
        if line and len(line) != len(first):
            raise UsageError(f"{path}, row {number}, has {len(line)} columns, and its head {len(first)}.")
    return [dict(zip(first, line, strict=True)) for line in lines if line]


def _object(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UsageError(f"{path}, line {number}, is not a JSON object.")
    return row


def _parquet(path: Path) -> list[Row]:
    pa, pq = pyarrow_of(path)
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as e:
        raise UsageError(f"{path} is not a parquet file ({e}).") from None
    return rows


def _converted(short: str, path: Path, rows: list[Row]) -> list[Row]:
    """The rows with the columns that the hub's have, where a known data set is published in other forms as well."""
    if short == "mmlu":
        rows = [_mmlu(row) for row in rows]
    for number, row in enumerate(rows, 1):
        for column in _COLUMNS.get(short, ()):
            if row.get(column) is None:
                raise UsageError(
                    f"{path}, row {number}, has no column {column!r} (its columns: {', '.join(map(str, row))}); "
                    f"{short} has {', '.join(_COLUMNS[short])}."
                )
        if short == "mmlu" and not (isinstance(row["answer"], int) and 0 <= row["answer"] < len(row["choices"])):
            raise UsageError(f"{path}, row {number}, has the answer {row['answer']!r}, which is none of its choices.")
    return rows


def _mmlu(row: Row) -> Row:
    """The choices as one column, and the answer as a number from 0."""
    for names in ([f"choice{i}" for i in range(4)], [*_LETTERS]):
        if "choices" not in row and all(name in row for name in names):
            row = {**{k: v for k, v in row.items() if k not in names}, "choices": [row[name] for name in names]}
    answer = row.get("answer")
    if isinstance(answer, str):
        answer = answer.strip()
        number = _LETTERS.find(answer) if answer in [*_LETTERS] else int(answer) if answer.isdecimal() else answer
        row = {**row, "answer": number}
    return row
