"""What Ctrl-C leaves half made goes without a word."""

from __future__ import annotations

import pytest

from cacheroute.install import patched_llama_cpp

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaContext", "LlamaBatch", "LlamaSampler"])
def test_what_was_not_made_can_be_closed(name: str) -> None:
    made = getattr(patched_llama_cpp.module()._internals, name)
    made.__new__(made).close()  # as __del__ does; an error there is printed, and cannot be caught
