"""How the experts of a prompt are chosen: `original`, or `keep:cover=0.9`, in the grammar of the strategies.

`keep` itself is in native/prompt_router.cpp. The last token of a prompt predicts the first one of the answer, so it is spared by
default. Of a prompt that llama.cpp cuts into micro-batches, the last tokens of each are spared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError, did_you_mean
from cacheroute.files import cache_dir, read_json, write_json
from cacheroute.model import catalogue, experts, gguf_file
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies
from cacheroute.routing.strategies import Parameter

ORIGINAL, KEEP, TUNED = "original", "keep", "tuned"
_FORMAT, _VERSION = "cacheroute-prompt-routing", 1
_MOST = 2**31 - 1  # tokens that the native core can count
PARAMETERS = (
    Parameter("cover", "share of the batch's router mass that the experts which may run carry; 1: all may run", 0.01, 1),
    Parameter("last", "tokens at the batch's end that run the model's own experts (default: 1)", 0, None, True, required=False),
)
MEANING = (
    "a prompt's batch keeps to the experts in memory, those of its last tokens, and those with most router mass over its tokens, "
    "until they carry the share `cover` of it; a token runs the K best of these"
)
SOURCE = "cacheroute; the thought is of arXiv 2511.02237"


@dataclass(frozen=True)
class PromptRouting:
    """`original`, or `keep` with its parameters."""

    name: str = ORIGINAL
    parameters: dict[str, float] = field(default_factory=dict)

    @property
    def cover(self) -> float:
        """Share of a batch's router mass that the experts which may run carry."""
        return self.parameters.get("cover", 1.0)

    @property
    def last(self) -> int:
        """Tokens at a batch's end that run the model's own experts."""
        return int(self.parameters.get("last", 1))

    @property
    def lossy(self) -> bool:
        """Whether a prompt's tokens may run other experts than the model would choose."""
        return self.cover < 1

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{k}={v:g}" for k, v in self.parameters.items())])

    @property
    def key(self) -> str:
        """In full: all digits of its parameters."""
        return ":".join([self.name, *(f"{k}={v!r}" for k, v in sorted(self.parameters.items()))])

    def set(self, per_layer: Iterable[Any]) -> None:
        """Writes itself into what strategies.to_native() has made."""
        for own in per_layer:
            own.prompt_cover, own.prompt_last = self.cover, min(self.last, _MOST)


def parse(text: str | PromptRouting) -> PromptRouting:
    """Raises UsageError naming what exists when the name, a parameter or a value is wrong."""
    if isinstance(text, PromptRouting):
        return text
    name, *pairs = text.strip().split(":")
    if text.strip() == TUNED:
        raise UsageError("`tuned` is what `tune --prompt` found for one model and budget; here write the prompt routing out.")
    if name not in (ORIGINAL, KEEP):
        both = f"there are {ORIGINAL} and {strategies.form(KEEP, PARAMETERS)}."
        raise UsageError(f"There is no prompt routing {name!r}; {did_you_mean(name, (ORIGINAL, KEEP, TUNED), both)}")
    return PromptRouting(name, strategies.parse_parameters(name, PARAMETERS if name == KEEP else (), pairs))


def parse_list(text: str) -> list[PromptRouting]:
    """Prompt routings separated by commas."""
    return [parse(part) for part in text.split(",") if part.strip()]


def tuned_path(model: Path, capacity: int) -> Path:
    """The file of `tune --prompt` for a model file and a budget of so many experts per layer, whether it is there or not."""
    return cache_dir() / "tuned" / f"{gguf_file.fingerprint(model)}-{capacity}-prompt.json"


def save(found: PromptRouting, path: Path, notes: dict[str, Any]) -> None:
    """Replaces an earlier file. `notes`: how it was found. Raises CacherouteError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CacherouteError(f"{path.parent} cannot be made ({e.strerror}).") from None
    write_json(path, {"format": _FORMAT, "version": _VERSION, "prompt_routing": found.key, "notes": notes}, force=True)


def resolve(model: Path, budget: str | float | None, text: str) -> str:
    """As given, or what was found for that model and budget where it is "tuned". Raises UsageError when nothing was."""
    if text.strip() != TUNED:
        return text
    layout = experts.layout(gguf_file.read(model))
    path = tuned_path(model, budgets.parse(budget, layout).capacity)
    if not path.exists():
        budget = budget or budgets.default_name(layout)
        name = layout.model or model.name
        command = f"cacheroute tune{catalogue.as_option(model)} --prompt --budget {budget}"
        raise UsageError(f"No prompt routing is tuned for {name} at a budget of {budget}; run `{command}` first.")
    return str(parse(str(read_json(path, _FORMAT, _VERSION).get("prompt_routing"))))
