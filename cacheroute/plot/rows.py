"""Rows of bench, simulate, eval and frontier, read by the names of their fields from json, jsonl or csv."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheroute.errors import UsageError
from cacheroute.files import named
from cacheroute.plot import words

_MIB_FIELDS = {"missed": "missed_mib_per_token", "read": "read_mib_per_token"}
_WANTED = "rows of bench, simulate, frontier or eval; -o json, jsonl or csv writes them"
_OPTIONAL = ("delta_nll", "delta_nll_low", "delta_nll_high", "ppl", "ppl_se", "lost_mass", "ts")


@dataclass(frozen=True)
class Row:
    """What a figure takes from a row of results; None where the row does not have it.

    `mib_per_token` are "read" from the device, or "missed" (misses x bytes of an expert), as `mib_kind` says.
    """

    model: str
    routing: str
    eviction: str
    budget: str
    budget_experts: int
    miss_rate: float
    mib_per_token: float
    mib_kind: str
    delta_nll: float | None = None
    delta_nll_low: float | None = None
    delta_nll_high: float | None = None
    ppl: float | None = None
    ppl_se: float | None = None
    lost_mass: float | None = None
    ts: float | None = None
    shuffled: bool = False

    @property
    def strategy(self) -> str:
        return self.routing.partition(":")[0]

    @property
    def choosable(self) -> bool:
        """Whether a run can have it: the offline optimum needs the future, and tokens in random order are no text."""
        return self.eviction != "belady" and not self.shuffled


def read(path: Path) -> list[dict[str, Any]]:
    """What a json, jsonl or csv file holds: rows, and perhaps a header. Raises UsageError when it is none of them."""
    try:
        raws = _raw_rows(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, csv.Error, RecursionError) as e:
        raise _strange(path, e) from None
    if not all(isinstance(raw, dict) for raw in raws):
        raise _strange(path, TypeError("no names of fields"))
    return raws


def latest(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a file of `frontier`, each setting's last row: a resumed run adds a row where what it finds cannot be used."""
    if not content or not str(content[0].get("format")).startswith("cacheroute-frontier"):
        return list(content)
    names = ("fingerprint", "memory_mib", "budget", "budget_experts", "eviction", "routing")
    return list({tuple(str(raw.get(name)) for name in names): raw for raw in content}.values())


def of(path: Path, content: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows of decoded tokens, all layers together, of what was read from `path`. Raises UsageError when there are none."""
    try:
        found = [row for raw in content if (row := _row(raw))]
    except (ValueError, TypeError, OverflowError) as e:
        raise _strange(path, e) from None
    if not found:
        if any(str(raw.get("format")).startswith("cacheroute-frontier") for raw in content):
            raise UsageError(f"{path} has no row yet; the same `cacheroute frontier` goes on from there.")
        what = named(content[0].get("format")) if content else ""
        of = f"{path} is {what}, and does" if what else f"{path} does"
        raise UsageError(f"{of} not hold {_WANTED}.")
    return found


def _strange(path: Path, e: Exception) -> UsageError:
    return UsageError(f"{path} does not hold {_WANTED} ({e}).")


def _raw_rows(text: str) -> list[dict[str, Any]]:
    if not text.lstrip().startswith(("[", "{")):
        return [{k: v for k, v in line.items() if v != ""} for line in csv.DictReader(text.splitlines())]
    try:
        content = json.loads(text)
        return content if isinstance(content, list) else [content]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _row(raw: dict[str, Any]) -> Row | None:
    kind = next((kind for kind, field in _MIB_FIELDS.items() if raw.get(field) is not None), "")
    if not kind or raw.get("routing") is None or raw.get("layer") is not None or raw.get("n_gen") in (0, "0"):
        return None  # a header, a control of bench, one layer, a prompt
    values = {field: _finite(raw[field]) for field in _OPTIONAL if raw.get(field) is not None}
    return Row(
        model=str(raw.get("model", "")),
        routing=words.short(str(raw["routing"])),
        eviction=str(raw.get("eviction", "")),
        budget=str(raw.get("budget", "")),
        budget_experts=int(raw.get("budget_experts", 0)),
        miss_rate=_finite(raw["miss_rate"]) if raw.get("miss_rate") is not None else math.nan,
        mib_per_token=_finite(raw[_MIB_FIELDS[kind]]),
        mib_kind=kind,
        shuffled=str(raw.get("shuffled")) == "True",
        **values,
    )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is endless or no number")
    return number
