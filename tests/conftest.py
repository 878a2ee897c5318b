"""What the tests share: the demo model that the set-up has built."""

from __future__ import annotations

from pathlib import Path

import pytest

from cacheroute import demo_model as demo


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model. Missing, it is a fault of the set-up, not a reason to skip."""
    path = demo.default_path()
    assert path.exists(), f"{path} is missing; scripts/make_demo_model.py builds it"
    return path
