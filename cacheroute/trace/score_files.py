"""The formats of the files of scores in the user's cache: evals/scorer.py writes them, and what they say of misses goes into a
forecast (forecast/misses.py)."""

from __future__ import annotations

FORMAT = "cacheroute-scores-3"
EARLIER = "cacheroute-scores-2"
"""Without a KL; read, and no longer written."""
