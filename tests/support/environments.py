"""Python environments without pip, with this checkout's cacheroute in them and nothing of what it needs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import venv
from pathlib import Path

import cacheroute

ROOT = Path(cacheroute.__file__).parent.parent


def with_cacheroute(python: Path) -> Path:
    """Puts this checkout's cacheroute into an environment, and nothing of what it needs."""
    done = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    site = Path(done.stdout.strip())
    (site / "cacheroute.pth").write_text(f"{ROOT}\n")
    info = site / "cacheroute-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: cacheroute\nVersion: {importlib.metadata.version('cacheroute')}\n"
    )
    return python


def of_python(folder: Path) -> Path:
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"
