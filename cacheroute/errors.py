"""The two ways in which cacheroute gives up on purpose. Knows nothing of how they are shown."""

from __future__ import annotations


class CacherouteError(Exception):
    """Something failed; the message is one sentence that says what to do. Exit code 1."""

    exit_code = 1


class UsageError(CacherouteError):
    """The user asked for something that cannot be; the message is one sentence. Exit code 2."""

    exit_code = 2
