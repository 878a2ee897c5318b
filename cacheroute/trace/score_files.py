"""The format of the files of scores in the user's cache: evals/scorer.py writes them, and what they say of misses goes into a
forecast (forecast/misses.py)."""

from __future__ import annotations

FORMAT = "cacheroute-scores-3"
