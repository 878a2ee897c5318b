"""`cacheroute routing`: lists the strategies."""

from __future__ import annotations

from collections.abc import Sequence

from cacheroute.cli import table
from cacheroute.cli.terminal import folded
from cacheroute.routing import prompt_routing, strategies
from cacheroute.routing.strategies import Parameter


def routing() -> None:
    """List the routing strategies with their parameters and sources."""
    for strategy in strategies.STRATEGIES.values():
        _print(strategies.usage(strategy), f"{strategy.meaning} ({strategy.source})")
        _print_parameters(strategies.parameters(strategy))
    for form, meaning in strategies.OTHER_FORMS.items():
        _print(form, meaning)
    prompts = prompt_routing
    _print(f"--prompt-routing {strategies.form(prompts.KEEP, prompts.PARAMETERS)}", f"{prompts.MEANING} ({prompts.SOURCE})")
    _print_parameters(prompts.PARAMETERS)
    _print(f"--prompt-routing {prompts.TUNED}", "what `tune --prompt` found for the model and the budget")


def _print(form: str, meaning: str) -> None:
    width = table.columns()
    print("\n".join([*folded(form, width, 4), *(f"    {line}" for line in folded(meaning, width - 4))]))


def _print_parameters(known: Sequence[Parameter]) -> None:
    for p in known:
        high = "" if p.high is None else f"..{p.high:g}"
        width = table.columns()
        lines = folded(f"{p.name:9} {p.low:g}{high or ' or more'}: {p.meaning}", width - 4, 10)
        print("\n".join(f"    {line}" for line in lines))
