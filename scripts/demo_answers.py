"""Greedy answers to the ten everyday questions that the demo model is never trained on.

    python scripts/demo_answers.py                        the demo model's
    python scripts/demo_answers.py PARENT.gguf            those of its dense parent first

`scripts/train_demo_model.py` leaves the parent's GGUF in its work folder. Prints Markdown.
"""

from __future__ import annotations

import sys
from typing import Any

from demo_training.questions import JUDGED

from cacheroute.install import patched_llama_cpp
from cacheroute.model import catalogue

MAX_TOKENS = 110


def answer(llm: Any, question: str) -> str:
    """One line: the likeliest token each time, no repeat penalty."""
    messages = [{"role": "user", "content": question}]
    reply = llm.create_chat_completion(messages, max_tokens=MAX_TOKENS, temperature=0, repeat_penalty=1.0)
    return " ".join(str(reply["choices"][0]["message"]["content"]).split())


def main() -> None:
    paths = [*sys.argv[1:], str(catalogue.resolve(None))]
    loaded = [patched_llama_cpp.module().Llama(path, n_ctx=512, verbose=False) for path in paths]
    for question in JUDGED:
        print(f"**{question}**\n")
        for llm in loaded:
            print(f"- {llm.metadata['general.name']}: {answer(llm, question)}")
        print(flush=True)


if __name__ == "__main__":
    main()
