"""What goes wrong on Android phones, each as a Check: where files lie, what kills processes, what a build takes. Loads nothing.

Sources: agnostic-apollo/Android-Docs on phantom processes; termux-packages on what its packages hold.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from cacheroute.files import size
from cacheroute.install import engine_build, machine
from cacheroute.install.check import Check

_SHARED = re.compile(r"/(sdcard|storage|mnt/(media_rw|runtime|user|sdcard))(/|$)")
_FUSE = ("fuse", "sdcardfs", "esdfs", "fuseblk")
_NO_DIRECT = (*_FUSE, "vfat", "exfat")
_PHANTOM_SDK = 31  # Android 12
_SWITCH = "persist.sys.fflag.override.settings_enable_monitor_phantom_procs"  # what the developer option sets


def getprop(name: str) -> str:
    """A property of the Android system; "" where there is none."""
    program = shutil.which("getprop")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def checks(root: Path = Path("/"), prop: Callable[[str], str] = getprop) -> Iterator[Check]:
    """Of Android as such; none elsewhere. `root`: where proc and system are, for tests."""
    if not machine.is_android(root):
        return
    sdk = prop("ro.build.version.sdk")
    release = prop("ro.build.version.release")
    name = f"Android {release}" if release else "Android"
    said = "it calls itself android, which the patched engine knows and others refuse" if sys.platform == "android" else ""
    yield Check("system", "ok", f"{name}, Python {sys.version_info[0]}.{sys.version_info[1]}" + (f": {said}" if said else ""))
    yield _phantoms(int(sdk) if sdk.isdigit() else None, prop(_SWITCH))


def _phantoms(sdk: int | None, switch: str) -> Check:
    """What ends long work with "signal 9"."""
    awake = "termux-wake-lock keeps the phone awake meanwhile"
    if sdk is not None and sdk < _PHANTOM_SDK:
        return Check("signal 9", "ok", "this Android does not kill processes for computing long", awake)
    if switch == "false":
        return Check("signal 9", "ok", "the phantom process killer is switched off", awake)
    kills = "Android 12 and newer may kill what computes for long (phantom process killer: signal 9)"
    how = (
        "developer options: Disable child process restrictions; or from a PC: "
        "adb shell settings put global settings_enable_monitor_phantom_procs false"
    )
    return Check("signal 9", "warn", kills, f"{how}; {awake}")


def storage(path: Path, root: Path = Path("/")) -> Check | None:
    """Where a file or folder lies, if it is a place at which direct reads cannot be trusted; else None.

    Shared storage of Android is FUSE: it refuses direct reads (EINVAL), or answers them with what is not in the file.
    """
    real = path.resolve()
    kind = filesystem(real, root)
    shared = machine.is_android(root) and _SHARED.match(str(real))
    if not shared and kind not in _NO_DIRECT:
        return None
    what = "shared storage" if shared else f"a filesystem ({kind})"
    advice = "move it into Termux's home" if shared else "move it to a disk of the system's own"
    state: Literal["ok", "warn"] = "warn"
    return Check("place", state, f"{path.name} is on {what}, where direct reads may fail and all are slow", advice)


def filesystem(path: Path, root: Path = Path("/")) -> str:
    """The type of the filesystem that holds `path`, as ext4 or fuse; "" where the system does not tell."""
    try:
        lines = (root / "proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    found, best = "", -1
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind:
            continue
        top = machine.unescaped(fields[4])
        inside = top == "/" or str(path) == top or str(path).startswith(top.rstrip("/") + "/")
        if inside and len(top) >= best:  # of two at one place the later hides the earlier
            found, best = kind[0], len(top)
    return found


def build_memory(root: Path = Path("/")) -> Check | None:
    """Where the engine is still to be built: whether memory bears one compiler. None where it does."""
    free, needed = machine.available_memory(root), engine_build.job_bytes()
    if free is None or free >= needed:
        return None
    found = f"{size(free)} free, and one compiler takes up to {size(needed)}"
    return Check("build", "warn", found, "close other programs, or install a wheel: `cacheroute setup --wheel`")
