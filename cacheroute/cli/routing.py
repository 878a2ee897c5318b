"""`cacheroute routing`: lists the strategies."""

from __future__ import annotations

from cacheroute.routing import strategies


def routing() -> None:
    """List the routing strategies with their parameters and sources."""
    for strategy in strategies.STRATEGIES.values():
        print(f"{strategies.usage(strategy)}\n    {strategy.meaning} ({strategy.source})")
        for p in strategies.parameters(strategy):
            high = "" if p.high is None else f"..{p.high:g}"
            print(f"    {p.name:9} {p.low:g}{high or ' or more'}: {p.meaning}")
    for form, meaning in strategies.OTHER_FORMS.items():
        print(f"{form}\n    {meaning}")
