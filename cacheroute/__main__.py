"""The program `cacheroute`: Ctrl-C and the standard streams are put in order before anything else is imported."""

from __future__ import annotations

import os
import sys

from cacheroute import interrupts


def main() -> None:
    """Runs the command line of this process and leaves it."""
    _keep_streams_apart()  # before anything opens a file
    interrupts.install()
    from cacheroute import cli

    cli.main()


def _keep_streams_apart() -> None:
    """A stream that is closed keeps its number: the next file that is opened, a model, would get it, and be written to.

    sys.stdout stays None, for cli to say so; what goes to a closed stderr is lost.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no such letter


if __name__ == "__main__":
    main()
