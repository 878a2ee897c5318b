"""A conversation with a loaded model: its messages, and the next answer to them within the context.

What of a turn's prompt is evaluated already is not evaluated again, and experts stay in memory (sequence.py). Knows no terminal.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.engine.completion import Completion, Message, Prompt, chat_prompt, has_chat_template
from cacheroute.engine.constraints import Constraints
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import check_regular, is_text, read_text, write_json

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_KIND = "cacheroute conversation"
_ROOM = 0.25  # of the context is kept free for an answer when old turns leave


@dataclass
class Conversation:
    """`messages`: user and assistant in turns, without the system's. `gone`: messages that have left as the context was full.
    `constraints`: whose stop strings end an answer; what else they say is in the `sampling` of ask()."""

    llm: Llama
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    gone: int = 0
    constraints: Constraints = field(default_factory=Constraints)

    def ask(self, text: str, max_tokens: int | None, seed: int, sampling: dict[str, Any]) -> Completion:
        """The next answer, not begun. The oldest turns leave while they, the question and room for an answer do not fit.

        Raises CacherouteError where the question alone does not fit, or the model's chat template cannot be used; then the
        conversation is what it was.
        """
        before, gone = list(self.messages), self.gone
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fitting()
        except BaseException:
            self.messages, self.gone = before, gone
            raise
        return Completion(self.llm, self.constraints.ending(prompt), max_tokens, seed, sampling)

    def answered(self, text: str) -> None:
        """Takes what has come of the answer into the conversation; nothing: the question leaves it, too."""
        if text.strip():
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def take_back(self) -> str | None:
        """Removes the last turn and returns its question; None: there is none."""
        if not self.messages:
            return None
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self.messages.pop()["content"]

    def clear(self) -> None:
        """Forgets the turns; the system's message stays."""
        self.messages.clear()
        self.gone = 0

    def _fitting(self) -> Prompt:
        """The prompt of as many of the last turns as leave room."""
        size, pairs = self.llm.n_ctx(), len(self.messages) // 2
        room = int((1 - _ROOM) * size)
        prompts = {0: self._prompt(self.messages)}
        least, most = 0, 0 if len(prompts[0].tokens) <= room else pairs  # the number of turns to leave is between them
        while least < most:
            middle = (least + most) // 2
            prompts[middle] = prompts.get(middle) or self._prompt(self.messages[2 * middle :])
            if len(prompts[middle].tokens) <= room:
                most = middle
            else:
                least = middle + 1
        prompt = prompts.get(least) or self._prompt(self.messages[2 * least :])
        if len(prompt.tokens) >= size:
            raise UsageError(
                f"The question takes {len(prompt.tokens)} tokens and the context has {size}; give a larger one with -c."
            )
        del self.messages[: 2 * least]
        self.gone += 2 * least
        return prompt

    def _prompt(self, messages: list[Message]) -> Prompt:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return chat_prompt(self.llm, [*system, *messages])

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON. Raises UsageError where a file is."""
        if os.path.exists(path):
            raise UsageError(f"{path} exists; give another name.")
        write_json(path, {"kind": _KIND, "system": self.system, "messages": self.messages}, force=False)

    def load(self, path: Path) -> None:
        """Takes the place of this conversation. Raises UsageError for a file that save() has not written."""
        check_regular(path, "a conversation")
        try:
            kept = json.loads(read_text(path))
            own = kept["kind"] == _KIND and isinstance(kept["system"], str)
            turns = [{"role": m["role"], "content": m["content"]} for m in kept["messages"]]
            own = own and [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
            own = own and all(isinstance(t, str) and is_text(t) for t in (kept["system"], *(m["content"] for m in turns)))
        except (ValueError, KeyError, TypeError, RecursionError):
            own = False
        if not own:
            raise UsageError(f"{path} is no conversation that /save has written.")
        self.system, self.messages, self.gone = kept["system"], turns, 0


def check_template(llm: Llama) -> None:
    """Raises CacherouteError for a model that is not made for conversations: its file has no chat template, or one that fails."""
    if not has_chat_template(llm):
        raise CacherouteError("The model's file has no chat template; `cacheroute generate --raw` continues text with it.")
    chat_prompt(llm, [{"role": "user", "content": "Hello"}])
