"""Every fault of the table: exit code, one sentence, no traceback, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import cases_cli, cases_files, cases_load, cases_models, cases_prompt_cache, cases_system, cases_unused
from faults.runner import Case, Place, check, run

MODULES = (cases_cli, cases_files, cases_load, cases_models, cases_prompt_cache, cases_system, cases_unused)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names), [n for n in names if names.count(n) > 1]


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_fault(case: Case, tiny: Path, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    place = Place(tmp_path / "here", tiny, demo_model, monkeypatch)
    check(case, run(case, place), place)
