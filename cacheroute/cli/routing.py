"""`cacheroute routing`: lists the strategies."""

from __future__ import annotations

from collections.abc import Sequence

from cacheroute.routing import prompt_routing, strategies
from cacheroute.routing.strategies import Parameter


def routing() -> None:
    """List the routing strategies with their parameters and sources."""
    for strategy in strategies.STRATEGIES.values():
        print(f"{strategies.usage(strategy)}\n    {strategy.meaning} ({strategy.source})")
        _print_parameters(strategies.parameters(strategy))
    for form, meaning in strategies.OTHER_FORMS.items():
        print(f"{form}\n    {meaning}")
    prompts = prompt_routing
    print(f"--prompt-routing {strategies.form(prompts.KEEP, prompts.PARAMETERS)}\n    {prompts.MEANING} ({prompts.SOURCE})")
    _print_parameters(prompts.PARAMETERS)
    print(f"--prompt-routing {prompts.TUNED}\n    what `tune --prompt` found for the model and the budget")


def _print_parameters(known: Sequence[Parameter]) -> None:
    for p in known:
        high = "" if p.high is None else f"..{p.high:g}"
        print(f"    {p.name:9} {p.low:g}{high or ' or more'}: {p.meaning}")
