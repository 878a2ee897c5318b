"""What the tests share: the demo model that the set-up has built."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cacheroute import demo_model as demo

# A shell that starts us in the background has SIGINT ignored, and so would have the commands whose Ctrl-C we test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model. Missing, it is a fault of the set-up, not a reason to skip."""
    path = demo.default_path()
    assert path.exists(), f"{path} is missing; scripts/make_demo_model.py builds it"
    return path
