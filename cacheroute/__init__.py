"""cacheroute: mixture-of-experts models larger than RAM, with experts on flash and cache-conditional routing.

Public are `Llama`, `CacherouteError`, `UsageError` and `__version__`; everything else may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import VERSION

__version__ = VERSION
__all__ = ["CacherouteError", "Llama", "UsageError", "__version__"]

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


def __getattr__(name: str) -> Any:
    # On first use: `cacheroute setup` must work before there is an engine to import.
    if name == "Llama":
        from cacheroute.engine.llama import Llama

        return Llama
    raise AttributeError(f"module 'cacheroute' has no attribute {name!r}")
