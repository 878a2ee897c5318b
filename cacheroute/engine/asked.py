"""How experts are to be kept and chosen, as it was asked for: before a model and its memory say what that comes to."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cacheroute.routing import budget as budgets
from cacheroute.routing import eviction as evictions

if TYPE_CHECKING:
    from cacheroute.routing.prompt_routing import PromptRouting
    from cacheroute.routing.strategies import Routing


class Kept(enum.Enum):
    """For an argument that leaves a setting as it is; None is a budget and a routing already."""

    KEPT = "kept"

    def __repr__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Asked:
    """The arguments of Llama.configure(), each with what Llama() takes where it is not given."""

    budget: str | float | None = budgets.AUTO
    routing: str | Routing | None = "original"
    eviction: str = evictions.DEFAULT
    io: str = "auto"
    prefetch: int = 0
    prompt_routing: str | PromptRouting = "original"

    @property
    def follows_memory(self) -> bool:
        """Whether the budget is "auto", and memory is kept at all."""
        return budgets.is_auto(self.budget) and self.io != "none" and self.routing is not None

    def but(self, **changed: Any) -> Asked:
        """With some of them changed; what is Kept.KEPT stays."""
        return Asked(**(vars(self) | {name: value for name, value in changed.items() if value is not Kept.KEPT}))
