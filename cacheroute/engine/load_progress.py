"""How much of a model has been read, told to a callback while llama.cpp loads it. Knows nothing of how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cacheroute import interrupts
from cacheroute.install import patched_llama_cpp

LoadCallback = Callable[[float], None]
"""Called with the share of the bytes that has been read, 0 to 1, and with 1 at the end of a load, also of one that fails."""

_callback: LoadCallback | None = None


def report_to(callback: LoadCallback | None) -> None:
    """From now on every model that this process loads tells `callback`, in the thread that loads it; None: nobody."""
    global _callback
    _callback = callback


class Loading:
    """One load. Ctrl-C and what the callback raises end it: Python code that C calls must not raise, so end() does."""

    def __init__(self, params: Any, *, dots: bool) -> None:
        """`params`: the llama_model_params of the load. `dots`: without a callback llama.cpp draws its own progress, and Ctrl-C
        waits for the end of the load."""
        self._told = _callback
        self._error: BaseException | None = None
        if self._told is None and dots:
            return
        told = self._told or (lambda share: None)

        @interrupts.shield
        def tell(share: float, data: Any) -> bool:
            try:
                told(min(share, 0.999))  # 1 is the end, which comes in end()
            except BaseException as e:
                self._error = e
            return self._error is None and not interrupts.pending()

        params.progress_callback = patched_llama_cpp.module().llama_progress_callback(tell)

    def end(self) -> None:
        """Raises what the callback has raised, and KeyboardInterrupt for a Ctrl-C meanwhile."""
        error = self._error
        try:
            if self._told:
                self._told(1.0)
        except Exception as e:
            error = error or e
        if error:
            raise error
        interrupts.check()
