"""What all prompts of a run begin with (the chat template's head, the system's message): evaluated once, for many prompts.

From there each prompt is evaluated as if it were the first: its answer depends on its own text, and not on those before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cacheroute.engine.checkpoint import Checkpoint, n_shared
from cacheroute.errors import CacherouteError

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


class SharedPrefix:
    """The tokens that two prompts both begin with. `tokens` may be none."""

    def __init__(self, llm: Llama, one: list[int], other: list[int]) -> None:
        self.tokens = one[: n_shared(one, other)]
        self._llm = llm
        self._mark: Checkpoint | None = None

    def go_to(self, prompt: list[int]) -> None:
        """Before Llama.generate() of a prompt. With a lossless routing the experts in memory stay: they change no logits."""
        llm, n = self._llm, len(self.tokens)
        lossy, policy = llm._lossy, llm.routing is not None and bool(llm.routing.policy)
        begins = 0 < n < len(prompt) and prompt[:n] == self.tokens and llm._can_cut()
        there = begins and llm.n_tokens >= n and llm.input_ids[:n].tolist() == self.tokens
        if policy or (llm._hook and llm._hook.failed):
            llm.reset()  # a policy in Python has a state of its own, which cannot be brought back
        elif there and not lossy:
            llm.rewind(n)
        elif begins and not (there and self._returned()):
            if lossy:
                llm.reset()
            else:
                llm.rewind()
            llm.eval(self.tokens)
            self._mark = llm.checkpoint() if lossy else None
        elif lossy and not begins:
            llm.reset()

    def _returned(self) -> bool:
        """Whether the sequence and the caches are at the end of the prefix again: not when the budget has changed meanwhile."""
        if self._mark is None:
            return False
        try:
            self._llm.return_to(self._mark)
        except CacherouteError:
            return False
        return True
