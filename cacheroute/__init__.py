"""cacheroute: mixture-of-experts models larger than RAM, with experts on flash and cache-conditional routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Llama", "__version__"]

if TYPE_CHECKING:
    from cacheroute.engine import Llama


def __getattr__(name: str) -> Any:
    # On first use: `cacheroute setup` must work before there is an engine to import.
    if name == "Llama":
        from cacheroute.engine import Llama

        return Llama
    raise AttributeError(f"module 'cacheroute' has no attribute {name!r}")
