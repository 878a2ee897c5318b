"""cacheroute: mixture-of-experts models larger than RAM, with experts on flash and cache-conditional routing.

Public are `Llama`, `CacherouteError`, `UsageError` and `__version__`; everything else may move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cacheroute.errors import CacherouteError, UsageError

__all__ = ["CacherouteError", "Llama", "UsageError", "__version__"]

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

    __version__: str


def __getattr__(name: str) -> Any:
    # On first use: `cacheroute setup` must work before there is an engine to import, and the program must be there to hear
    # Ctrl-C before it imports anything that takes time.
    if name == "__version__":
        from cacheroute.files import VERSION

        return VERSION
    if name == "Llama":
        from cacheroute.engine.llama import Llama

        return Llama
    raise AttributeError(f"module 'cacheroute' has no attribute {name!r}")
