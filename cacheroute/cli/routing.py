"""`cacheroute routing`: the strategies there are."""

from __future__ import annotations

from cacheroute import routing as routings


def routing() -> None:
    """List the routing strategies, their parameters and where they come from."""
    for strategy in routings.STRATEGIES.values():
        print(f"{routings.usage(strategy)}\n    {strategy.meaning} ({strategy.source})")
        for p in routings.parameters(strategy):
            high = "" if p.high is None else f"..{p.high:g}"
            print(f"    {p.name:9} {p.low:g}{high or ' or more'}: {p.meaning}")
    for form, meaning in routings.OTHER_FORMS.items():
        print(f"{form}\n    {meaning}")
