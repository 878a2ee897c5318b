"""The two ways in which cacheroute gives up on purpose, and the name that was meant. Knows nothing of how they are shown."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterable


class CacherouteError(Exception):
    """Something failed; the message is one sentence that says what to do. Exit code 1."""

    exit_code = 1


class UsageError(CacherouteError):
    """The user asked for something that cannot be; the message is one sentence. Exit code 2."""

    exit_code = 2


def did_you_mean(wrong: str, names: Iterable[str], otherwise: str = "") -> str:
    """The question "did you mean X?" with the nearest name, or `otherwise` without one. Case, and _ for -, do not count."""
    import difflib

    by_form = {name.lower().replace("_", "-"): name for name in names}
    found = difflib.get_close_matches(wrong.lower().replace("_", "-"), list(by_form), n=1)
    return f"did you mean {by_form[found[0]]}?" if found else otherwise


def pip_install(packages: str, find: Callable[[str], object] = importlib.util.find_spec) -> str:
    """The command that installs them where this cacheroute runs, which need not be the `python` of the user's PATH, and need not
    have pip: uv and pipx leave it out. `find`: whether a package is here."""
    here = shlex.quote(sys.executable or "python")
    if find("pip"):
        return f"`{here} -m pip install {packages}`"
    return f"`uv pip install --python {here} {packages}` or `pipx inject cacheroute {packages}`"
