"""On which system the tests run, for those that can run on some alone."""

from __future__ import annotations

import sys

LINUX = sys.platform in ("linux", "android")
"""Python 3.13 calls Android by its own name; its kernel is Linux all the same."""
