"""What the tests share: the demo model that the set-up has built, a tiny model, and a text."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from cacheroute.model import demo_model as demo
from support import tiny_models
from support.fake_build import bench as bench

# A shell that starts the tests in the background ignores SIGINT, and so would the commands with a tested Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Images of containers set it: each of the hundreds of commands that tests start would compile all that it imports, half its time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A person's own defaults are not for the tests; only where the cache and the library under test are.
for name in [n for n in os.environ if n.startswith("CACHEROUTE_") and n not in ("CACHEROUTE_CACHE", "CACHEROUTE_LIBRARY")]:
    del os.environ[name]
os.environ["CACHEROUTE_CONFIG"] = os.devnull

# Before any test is collected: properties take the settings that hold when they are defined.
settings.register_profile("ours", deadline=None, max_examples=80)
settings.load_profile("ours")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model. Missing, it is a fault of the set-up, not a reason to skip."""
    path = demo.default_path()
    assert path.exists(), f"{path} is missing; `cacheroute setup` makes it"
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two MoE layers with 32 experts each, 4 used, random weights. Read only."""
    return tiny_models.write("qwen3moe", tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for the module alone, for tests of what is in memory: another mapping of the same file keeps its pages there."""
    return Path(shutil.copy(tiny, tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("the cat that was on the mat is with this and a hat it had for a while " * 40)
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, with no scores in it."""
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
