"""What a budget of "auto" and a routing of "tuned" come to, for one model on this machine."""

from __future__ import annotations

from cacheroute.engine.asked import Asked
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing import budget as budgets
from cacheroute.routing import prompt_routing as prompts
from cacheroute.routing import tuned


def resolve(layout: ExpertLayout, automatic: str | int | None, asked: Asked) -> Asked:
    """As asked, but for "auto", which is `automatic` (None: the budget does not follow the memory), and "tuned".

    A tuned routing holds for one budget: with "auto" it is the largest that fits and has been tuned for. Where all experts fit,
    nothing is read, and a tuned routing has nothing to save: then it is "original".

    Raises UsageError where nothing is tuned for the model and budget.
    """
    budget, routing, eviction, prompt_routing = asked.budget, asked.routing, asked.eviction, asked.prompt_routing
    if automatic is not None:
        budget = automatic
        most = budgets.parse(budget, layout).capacity
        use_tuned = (routing == tuned.NAME, prompt_routing == prompts.TUNED)
        if most == layout.n_expert:
            routing = "original" if use_tuned[0] else routing
            prompt_routing = prompts.ORIGINAL if use_tuned[1] else prompt_routing
        elif any(use_tuned):
            known = tuned.capacities(layout.paths[0], routing=use_tuned[0])
            budget = max((c for c in known if c <= most), default=most)
    elif budgets.is_auto(budget):
        budget = None
    if isinstance(routing, str):
        routing, eviction = tuned.resolve(layout.paths[0], budget, routing, eviction)
    if isinstance(prompt_routing, str):
        prompt_routing = prompts.resolve(layout.paths[0], budget, prompt_routing)
    return asked.but(budget=budget, routing=routing, eviction=eviction, prompt_routing=prompt_routing)
