"""Chat templates in a model's metadata, of which a broken one must not keep the model from loading."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cacheroute.install import patched_llama_cpp

_PREFIX = "tokenizer.chat_template"


def split(metadata: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(metadata without the templates that cannot be parsed, why the default one cannot be, or "")."""
    broken = {key: _error(value) for key, value in metadata.items() if key == _PREFIX or key.startswith(f"{_PREFIX}.")}
    usable = {key: value for key, value in metadata.items() if not broken.get(key)}
    return usable, broken.get(_PREFIX, "") or broken.get(f"{_PREFIX}.default", "")


def _error(template: str) -> str:
    formatter = import_module(f"{patched_llama_cpp.module().__name__}.llama_chat_format").Jinja2ChatFormatter
    try:
        formatter(template, eos_token="", bos_token="")
    except Exception as e:  # jinja2 may raise anything, RecursionError included
        return f"{type(e).__name__}: {e}"
    return ""
