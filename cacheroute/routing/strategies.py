"""Routing strategies by name: the grammar `name:key=value:key=value`, and the meaning and range of each parameter.

The strategies themselves are in native/router.cpp.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.errors import UsageError, did_you_mean
from cacheroute.files import size
from cacheroute.routing import tuned

if TYPE_CHECKING:
    from cacheroute.model.experts import ExpertLayout
    from cacheroute.routing.budget import Budget


@dataclass(frozen=True)
class Parameter:
    """One parameter: its range (`high` None: the model's E or K decides), what it does, and whether it must be given."""

    name: str
    meaning: str
    low: float
    high: float | None
    integer: bool = False
    required: bool = True


@dataclass(frozen=True)
class Strategy:
    """`number` is the enum of native/router.h."""

    name: str
    number: int
    meaning: str
    source: str
    parameters: tuple[Parameter, ...] = ()


_J = Parameter(
    "j", "the j best experts always run, cached or not (default: 1 if K = 2, else 2)", 0, None, integer=True, required=False
)
_MAX_LOSS = Parameter("max-loss", "guard: the share of the top-K's router mass that a token may lose", 0, 1, required=False)

SPECULATE = "speculate"

STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy("original", 0, "the model's own choice of K experts; lossless", "the model"),
        Strategy(
            "pruning",
            1,
            "only the best k of the model's K experts run",
            "arXiv 2412.00099",
            (Parameter("k", "number of experts that run", 1, None, integer=True),),
        ),
        Strategy(
            "max-rank",
            2,
            "cached experts among the m best replace missing ones",
            "arXiv 2412.00099",
            (Parameter("m", "a cached expert must be among the m best", 1, None, integer=True), _J),
        ),
        Strategy(
            "cumsum",
            3,
            "max-rank among the best experts that together have probability p",
            "arXiv 2412.00099",
            (Parameter("p", "total probability of the candidates", 0, 1), _J),
        ),
        Strategy(
            "cache-prior",
            4,
            "cached experts get a bonus of lambda x the mean range of the router logits, then the K best run",
            "arXiv 2412.00099",
            (Parameter("lambda", "the bonus, in mean ranges of the router logits", 0, 1), _J),
        ),
        Strategy(
            "drop-cold",
            5,
            "missing experts with a gate weight below f/K do not run",
            "cacheroute",
            (Parameter("f", "threshold, as a share of the mean gate weight 1/K", 0, None),),
        ),
        Strategy(
            "dynamic-k",
            7,
            "only the best k experts run for a token whose best k have a share p of the router mass of its K; else all K",
            "arXiv 2510.12357",
            (
                Parameter("p", "the share of the router mass; 0: always k", 0, 1),
                Parameter("k", "number of experts that run (default: half of K)", 1, None, integer=True, required=False),
            ),
        ),
        Strategy(
            SPECULATE,
            8,
            "the K best of the cached experts and of those that the hidden state of the layer before would choose, read early",
            "after arXiv 2603.19289",
            (
                Parameter(
                    "lambda", "bonus of cached experts, in ranges of the predicted scores (default: 0)", 0, 1, required=False
                ),
                Parameter("j", "the j best by the layer's own scores always run (default: 0)", 0, None, True, False),
            ),
        ),
    )
}


# Routings that are not written as name:key=value: the form, what it means.
OTHER_FORMS = {
    "tuned[:PATH]": "a strategy with its own parameters and share of the budget for each layer, from a file that `tune` writes",
    "python:package.module:ClassName": "your own policy in Python (example in cacheroute/routing/custom_policy.py); slower",
}
EXPERTS = "experts"  # a parameter that only layers of a tuned routing have: how many of the layer's are in memory
_CUSTOM = 6  # Strategy::custom of native/router.h


@dataclass(frozen=True)
class Routing:
    """A strategy with its parameters, not yet bound to a model.

    Of a tuned one: `layers` has a Routing for each of its MoE layers, and `name` is the strategy of all of them.
    Of a policy in Python: `policy` is its package.module:ClassName, and `name` is "python".
    `text` is what was typed, where it is not given by name and parameters.
    """

    name: str
    parameters: dict[str, float] = field(default_factory=dict)
    layers: tuple[Routing, ...] = ()
    tuned: tuned.TunedRouting | None = None
    policy: str = ""
    text: str = ""

    @property
    def lossy(self) -> bool:
        """Whether it may choose other experts than the model would."""
        return self.name != "original"

    @property
    def needs_misses(self) -> bool:
        """Whether it chooses as the model does wherever no expert is missing."""
        return self.name in ("original", "max-rank", "cumsum", "cache-prior", "drop-cold")

    @property
    def speculates(self) -> bool:
        """Whether it chooses by predicted scores, which only a running model has."""
        return self.name == SPECULATE

    def __str__(self) -> str:
        return self.text or ":".join([self.name, *(f"{k}={v:g}" for k, v in self.parameters.items())])

    def check(self, n_expert: int, n_used: int, layers: Sequence[int] = (), model: str = "") -> None:
        """Raises UsageError for what does not fit a model with E = `n_expert`, K = `n_used`.

        `layers` are llama.cpp's numbers of the layers with experts, `model` its name; only a tuned one is checked against them.
        """
        if self.tuned is not None:
            p = self.tuned
            if (p.n_expert, p.n_used, p.layers) != (n_expert, n_used, tuple(layers)):
                raise UsageError(
                    f"{self} is for a model with {len(p.layers)} layers of {p.n_expert} experts, {p.n_used} used "
                    f"({p.model or p.architecture}), and this one has {len(layers)} of {n_expert}, {n_used} used."
                )
            if p.model and model and p.model != model:
                raise UsageError(f"{self} is for the model {p.model!r}, and this one is {model!r}.")
        for layer in self.layers:
            layer.check(n_expert, n_used)
            if not n_used <= layer.parameters.get(EXPERTS, n_used) <= n_expert:
                raise UsageError(f"{self}: a layer holds {n_used} to {n_expert} experts, not {layer.parameters[EXPERTS]:g}.")
        if self.policy:
            from cacheroute.routing import custom_policy

            custom_policy.load(self.policy)
        for name, limit in (("k", n_used), ("m", n_expert), ("j", n_used)):
            if self.parameters.get(name, 0) > limit:
                raise UsageError(f"{self}: {name} is at most {limit} for this model.")
        if "m" in self.parameters and self.parameters["m"] < n_used:
            raise UsageError(f"{self}: m is at least {n_used}, the experts that this model uses.")


def routing_key(routing: Routing) -> str:
    """A routing in full: all digits of its parameters, and of a tuned one the content of its file, not the file's name."""
    if routing.layers:
        return routing.name + json.dumps([r.parameters for r in routing.layers], sort_keys=True)
    if routing.policy:
        return str(routing)
    return ":".join([routing.name, *(f"{name}={value!r}" for name, value in sorted(routing.parameters.items()))])


def capacities(routing: Routing | None, budget: Budget, layout: ExpertLayout) -> tuple[int, ...]:
    """Experts of each layer in memory: the budget's, unless a tuned routing divides the same bytes among the layers differently.

    Raises UsageError when it needs more than the budget.
    """
    alike = (budget.capacity,) * len(layout.layers)
    if routing is None or not routing.layers:
        return alike
    own = tuple(int(r.parameters.get(EXPERTS, budget.capacity)) for r in routing.layers)
    nbytes = sum(n * layer.resident_bytes for n, layer in zip(own, layout.layers, strict=True))
    if nbytes > budget.nbytes:
        raise UsageError(
            f"{routing} keeps {size(nbytes)} of experts in memory, and the budget has {size(budget.nbytes)}; "
            "give the budget that it was made for, or tune for this one."
        )
    return own


def parameters(strategy: Strategy) -> tuple[Parameter, ...]:
    """All parameters that the strategy accepts."""
    return strategy.parameters + ((_MAX_LOSS,) if strategy.name != "original" else ())


def usage(strategy: Strategy) -> str:
    """The form to type: `cache-prior:lambda=[:j=][:max-loss=]`."""
    return form(strategy.name, parameters(strategy))


def form(name: str, known: Sequence[Parameter]) -> str:
    """A name and its parameters as they are typed, those in brackets that may be left out."""
    return name + "".join(f":{p.name}=" if p.required else f"[:{p.name}=]" for p in known)


def parse_parameters(name: str, known: Sequence[Parameter], pairs: Sequence[str]) -> dict[str, float]:
    """The key=value parts behind a name. Raises UsageError for unknown, missing, repeated or wrong ones."""
    by_name = {p.name: p for p in known}
    values: dict[str, float] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in by_name:
            first = next((p.name for p in known if p.required), "")
            number = first and not value and re.fullmatch(r"[0-9.]+", key)
            meant = f"did you mean {name}:{first}={key}?" if number else did_you_mean(key, list(by_name))
            its = f"{meant} Its" if meant else "its"
            raise UsageError(f"{name} has no parameter {key!r}; {its} form is {form(name, known)}.")
        if key in values:
            raise UsageError(f"{name} has {key} twice; its form is {form(name, known)}.")
        values[key] = _value(name, by_name[key], value)
    missing = [p.name for p in known if p.required and p.name not in values]
    if missing:
        raise UsageError(f"{name} needs {', '.join(missing)}; its form is {form(name, known)}.")
    return values


def parse(text: str) -> Routing:
    """Parses one routing. Raises UsageError naming what exists when the name, a parameter or a value is wrong."""
    name, *pairs = text.strip().split(":")
    if text.strip() == tuned.NAME:
        raise UsageError("`tuned` alone is what `tune` found for one model and budget; here name its file: tuned:PATH.")
    if name == tuned.NAME:
        return from_file(Path(text.strip().partition(":")[2]))
    if name == "python":
        module, _, class_name = text.strip().partition(":")[2].partition(":")
        if not module or not class_name.isidentifier():
            raise UsageError(f"{text!r} is not of the form python:package.module:ClassName.")
        return Routing(name, policy=f"{module}:{class_name}", text=text.strip())
    strategy = STRATEGIES.get(name)
    if strategy is None:
        names = [*STRATEGIES, tuned.NAME, "python"]
        all_of_them = f"there are {', '.join(names)}: `cacheroute routing` lists their parameters."
        raise UsageError(f"There is no routing {name!r}; {did_you_mean(name, names, all_of_them)}")
    return Routing(name, parse_parameters(name, parameters(strategy), pairs))


def from_file(path: Path) -> Routing:
    """The routing in a file of `tune`. Raises UsageError naming the layer whose parameters are wrong."""
    found = tuned.load(path)
    layers = []
    for layer, parameters in zip(found.layers, found.parameters, strict=True):
        held = {k: v for k, v in parameters.items() if k == EXPERTS}
        try:
            own = parse(found.strategy + "".join(f":{k}={v!r}" for k, v in parameters.items() if k not in held))
        except UsageError as e:
            raise UsageError(f"{path}, layer {layer}: {e}") from None
        if not all(v.is_integer() for v in held.values()):
            raise UsageError(f"{path}, layer {layer}: {EXPERTS} is a whole number, not {held[EXPERTS]:g}.")
        layers.append(replace(own, parameters=own.parameters | held))
    return Routing(found.strategy, layers=tuple(layers), tuned=found, text=f"{tuned.NAME}:{path}")


def parse_list(text: str) -> list[Routing]:
    """Routings separated by commas."""
    return [parse(part) for part in text.split(",") if part.strip()]


def _value(name: str, parameter: Parameter, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{name}: {parameter.name}={text!r} is not a number.") from None
    if not math.isfinite(value):
        raise UsageError(f"{name}: {parameter.name} is a number, not {text}.")
    upper = "" if parameter.high is None else f" and at most {parameter.high:g}"
    if not value >= parameter.low or (parameter.high is not None and value > parameter.high):
        raise UsageError(f"{name}: {parameter.name} is at least {parameter.low:g}{upper}, not {text}.")
    if parameter.integer and value != int(value):
        raise UsageError(f"{name}: {parameter.name} is a whole number, not {text}.")
    return value


def to_native(routing: Routing, n_used: int, n_layers: int) -> Any:
    """The array of struct cr_routing, one a layer, of a checked routing."""
    from cacheroute.native import bindings

    each = routing.layers or (routing,) * n_layers
    return (bindings.Routing * n_layers)(*(_one_to_native(r, n_used) for r in each))


def _one_to_native(routing: Routing, n_used: int) -> Any:
    """J is 1 where K is at most 2, else 2 (arXiv 2412.00099); the k of dynamic-k is half of K (arXiv 2510.12357)."""
    from cacheroute.native import bindings

    value = routing.parameters
    always = 0 if routing.speculates else 1 if n_used <= 2 else 2
    few = max(n_used // 2, 1) if routing.name == "dynamic-k" else n_used
    return bindings.Routing(
        strategy=_CUSTOM if routing.policy else STRATEGIES[routing.name].number,
        k=int(value.get("k", few)),
        m=int(value.get("m", n_used)),
        j=int(value.get("j", min(n_used, always))),
        p=value.get("p", 1.0),
        lambda_=value.get("lambda", 0.0),
        f=value.get("f", 0.0),
        max_loss=value.get("max-loss", -1.0),
        experts=int(value.get(EXPERTS, 0)),
    )
