"""`--budget`: how many experts of each layer may be resident."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from cacheroute.errors import UsageError
from cacheroute.files import MIB, UNITS, parse_size
from cacheroute.model import memory_plan
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.memory_plan import MemoryPlan

AUTO = "auto"
"""What the free memory has room for; only a model that is loaded knows it."""
_UNIT = "|".join(UNITS)
FORMS = "use a share (50%), experts per layer (30), bytes of all layers together (2GiB), all, or auto"


class Experts(Protocol):
    """What a budget is resolved against: E, K, and the bytes of one expert in every layer, whole pages."""

    @property
    def n_expert(self) -> int: ...
    @property
    def n_used(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...


@dataclass(frozen=True)
class Budget:
    """`capacity` experts of each layer; `nbytes`: the most that they take in memory, whole pages, all layers together."""

    capacity: int
    nbytes: int


def parse(text: str | float | None, layout: Experts) -> Budget:
    """Resolves a budget against a model. None: half of the experts, or K where that is more; 0.5 as "50%".

    Raises UsageError when the text has none of the forms, or gives fewer than the K experts that one token needs.
    """
    capacity = max(layout.n_expert // 2, layout.n_used) if text is None else _capacity(str(text).strip().lower(), layout)
    if capacity < layout.n_used:
        share = -(-100 * layout.n_used // layout.n_expert)
        mib = -(-layout.n_used * layout.resident_bytes // MIB)
        raise UsageError(
            f"A budget of {text} keeps {capacity} of {layout.n_expert} experts per layer, but every token needs {layout.n_used}: "
            f"give at least {layout.n_used}, {share}% or {mib}MiB."
        )
    return Budget(capacity, capacity * layout.resident_bytes)


def in_bytes(text: str | float | None, layout: ExpertLayout) -> int:
    """Bytes of experts that a budget comes to: as many as it names, or those of so many experts of each layer of `layout`.

    Raises UsageError as parse() does, but not for bytes that are fewer than `layout` needs.
    """
    if isinstance(text, str) and re.fullmatch(rf"\s*[0-9]+(?:\.[0-9]+)?\s*(?:{_UNIT})\s*", text.lower()):
        return parse_size(text)
    return parse(text, layout).nbytes


def of_bytes(nbytes: int, layout: ExpertLayout) -> int | None:
    """The most experts of each layer that take `nbytes` in memory; all where the whole file's do, which are then loaded as they
    lie in it; None where not even the K that a token needs do."""
    if layout.all_expert_bytes <= nbytes:
        return layout.n_expert
    capacity = min(nbytes // layout.resident_bytes, layout.n_expert)
    return capacity if capacity >= layout.n_used else None


def is_auto(text: str | float | None) -> bool:
    """Whether the budget is left to the free memory."""
    return isinstance(text, str) and text.strip().lower() == AUTO


def automatic(plan: MemoryPlan, layout: ExpertLayout) -> str | int:
    """For parse(): as many experts of each layer as fit the free memory; half of them where that is not known.

    Raises UsageError, with the figures, where not even the K of one token fit.
    """
    capacity = plan.capacity
    if plan.free is None:
        return default_name(layout)
    if capacity is None:
        raise memory_plan.refusal(plan, layout.paths[0].name)
    return "all" if capacity == layout.n_expert else capacity


def default_name(layout: Experts) -> str:
    """How the default budget is typed."""
    return "50%" if layout.n_expert // 2 >= layout.n_used else str(layout.n_used)


def _capacity(text: str, layout: Experts) -> int:
    if text == AUTO:
        raise UsageError("A budget of auto follows the free memory, so nothing can be measured or tuned by it; give another one.")
    if text == "all":
        return layout.n_expert
    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)\s*(%|{_UNIT})?", text)
    if not match:
        raise UsageError(f"{text!r} is not a budget: {FORMS}.")
    number, unit = float(match[1]), match[2]
    if not unit and "." in text and 0 < number <= 1:
        number, unit = 100 * number, "%"
    if unit == "%":
        if number > 100:
            raise UsageError(f"A budget of {text} is more than all experts; {FORMS}.")
        return int(layout.n_expert * number / 100 + 1e-9)
    if unit:
        nbytes = min(number * UNITS[unit], layout.n_expert * layout.resident_bytes)
        return int(nbytes) // layout.resident_bytes
    if number > layout.n_expert or number != int(number):
        raise UsageError(f"A budget of {text} experts does not fit a model of {layout.n_expert} experts per layer; {FORMS}.")
    return int(number)
