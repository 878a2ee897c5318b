"""One finding of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `advice`: what to do; "" where nothing is to be done."""

    name: str
    state: State
    found: str
    advice: str = ""
