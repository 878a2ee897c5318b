"""The data of tasks from files: every layout and form that is published, and one sentence for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import UsageError
from cacheroute.evals import task_data

HUB = {"question": "Which?", "choices": ["a", "b, with a comma", "c", "d"], "answer": 2}
WITH_HEAD = 'question,choice0,choice1,choice2,choice3,answer\nWhich?,a,"b, with a comma",c,d,2\n'
AUTHORS = 'Which?,a,"b, with a comma",c,d,C\n'


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("content", [WITH_HEAD, AUTHORS])
@pytest.mark.parametrize("place", ["test/anatomy_test", "test/anatomy", "anatomy_test", "anatomy/test", "mmlu/test/anatomy_test"])
def test_mmlu_in_every_form_and_place(tmp_path: Path, content: str, place: str) -> None:
    write(tmp_path / f"{place}.csv", content)
    found = task_data.find(tmp_path, "cais/mmlu", "anatomy")
    assert found.rows == {"test": [HUB]}


def test_mmlu_as_on_the_hub(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "anatomy").mkdir()
    pq.write_table(pa.Table.from_pylist([HUB]), tmp_path / "anatomy" / "test-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist([HUB, HUB]), tmp_path / "anatomy" / "dev-00000-of-00001.parquet")
    found = task_data.find(tmp_path, "cais/mmlu", "anatomy")
    assert found.rows == {"test": [HUB], "dev": [HUB, HUB]}


def test_a_file_is_the_test_split_and_has_its_training_split_beside_it(tmp_path: Path) -> None:
    row = {"question": "How many\u2028hats?", "answer": "#### 2"}
    for split in ("test", "train"):
        write(tmp_path / f"gsm8k-{split}.jsonl", json.dumps(row, ensure_ascii=False) + "\n\n")
    for data in (tmp_path / "gsm8k-test.jsonl", tmp_path):
        found = task_data.find(data, "openai/gsm8k", "main")
        assert found.rows == {"test": [row], "train": [row]}
    write(tmp_path / "questions.jsonl", json.dumps(row))
    assert list(task_data.find(tmp_path / "questions.jsonl", "openai/gsm8k", "main").rows) == ["test"]


def test_another_data_set_keeps_its_columns(tmp_path: Path) -> None:
    write(tmp_path / "validation.jsonl", '{"a": 1, "answer": "B"}')
    assert task_data.find(tmp_path, "some/other", None).rows == {"validation": [{"a": 1, "answer": "B"}]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "anatomy_test.csv",
            "question,choice0,answer\nWhich?,a,0\n",
            "no column 'choices' (its columns: question, choice0, answer)",
        ),
        ("anatomy_test.csv", WITH_HEAD.replace("d,2", "d,4"), "row 1, has the answer 4, which is none of its choices"),
        ("anatomy_test.csv", WITH_HEAD.replace("d,2", "d,two"), "row 1, has the answer 'two', which is none"),
        ("anatomy_test.csv", WITH_HEAD + "Which?,a\n", "row 3, has 2 columns, and its head 6"),
        ("anatomy_test.csv", WITH_HEAD + 'Which?,"a', "is not CSV"),
        ("anatomy_test.csv", "question,choices,answer\n", "has no rows"),
        ("anatomy_test.jsonl", "[1]\n", "line 1, is not a JSON object"),
        ("anatomy_test.jsonl", "{\n", "line 1, is not a JSON object"),
        ("anatomy_test.jsonl", '{"question": "Which?"}\n', "row 1, has no column 'choices'"),
        ("virology_test.csv", WITH_HEAD, "has no test split of anatomy (cais/mmlu); looked for test/anatomy_test.csv"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UsageError) as failed:
        task_data.find(tmp_path, "cais/mmlu", "anatomy")
    assert message in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.parametrize(("name", "message"), [("missing", "There is no file or folder"), ("a.txt", "is not a file of .csv")])
def test_a_path_that_is_no_data(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / "a.txt", "text")
    with pytest.raises(UsageError, match=message):
        task_data.find(tmp_path / name, "cais/mmlu", "anatomy")


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write(tmp_path / "test.parquet", "no parquet")
    with pytest.raises(UsageError, match="is not a parquet file"):
        task_data.find(tmp_path, "some/other", None)


def test_a_split_that_is_not_there_is_empty_unless_it_is_asked(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    from cacheroute.evals import harness

    write(tmp_path / "test.jsonl", '{"question": "How many?", "answer": "2"}')
    splits: Any = harness._Splits(task_data.find(tmp_path, "openai/gsm8k", "main"), tmp_path)
    assert len(splits["train"]) == 0 and list(splits["train"].features) == ["question", "answer"]
    with pytest.raises(UsageError, match="has no split 'validation'"):
        splits["validation"]
