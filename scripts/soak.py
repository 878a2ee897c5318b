"""Decodes many tokens and looks, at every thousandth, whether memory, file descriptors and threads are what they should be.

Three conversations take turns on one model, for each io: one routed by `original` and one by a lossy routing, which reset and
reuse prefixes of their own prompts; and one that goes on from a saved state, by load_state() and by set_cache().
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from cacheroute import Llama  # noqa: E402
from cacheroute.files import MIB  # noqa: E402

SLACK = 1.02  # of the budget
GROWTH = 1.05  # of anonymous memory, over the most that the warm-up needed
LOSSY = "cache-prior:lambda=0.3"
_STEP = 25  # tokens of one turn
# experts of 48 KiB in each of three tensors, not at the beginning of a page
_SHAPE: dict[str, Any] = {"n_layer": 3, "n_embd": 128, "n_ff": 192, "n_expert": 16, "n_used": 2, "n_ctx_train": 512}


class ViolationError(Exception):
    """What a long run must not do."""


@dataclass
class Figures:
    """Everything that was seen at the looks, in order."""

    resident: list[int] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def line(self, budget: int) -> str:
        def span(values: list[int], unit: float = 1, digits: int = 0) -> str:
            return f"{min(values) / unit:.{digits}f} to {max(values) / unit:.{digits}f}"

        return (
            f"resident {span(self.resident, MIB, 2)} of {budget / MIB:.2f} MiB, anonymous {span(self.anonymous, MIB, 1)} MiB, "
            f"file descriptors {span(self.files)}, threads {span(self.threads)}, {len(self.resident)} looks"
        )


def _of_this_process(name: str) -> int:
    """A number of /proc/self/status, kB as bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            words = line.split()
            return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    raise ViolationError(f"/proc/self/status has no {name}.")


class Soak:
    """One model, its conversations, and what was seen of it."""

    def __init__(self, model: Path, io: str, tokens: int, every: int) -> None:
        self.io, self.tokens, self.every, self.done = io, tokens, every, 0
        self.random = random.Random(0)
        self.figures = Figures()
        self.llm = Llama(
            str(model), budget="40%", io=io, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1, verbose=False
        )

    def run(self) -> Figures:
        turns = [self._talk("original"), self._talk(LOSSY), self._resume()]
        with contextlib.closing(self.llm):
            while self.done < self.tokens:
                for turn in turns:
                    next(turn)
        return self.figures

    def _prompt(self, n: int) -> list[int]:
        return [self.random.randrange(3, self.llm.n_vocab()) for _ in range(n)]

    def _decode(self, n: int) -> None:
        """Likely tokens and, so that experts change, a random one now and then."""
        llm = self.llm
        with llm.decoding():
            for i in range(n):
                if llm.n_tokens >= llm.n_ctx() - 1 or self.done >= self.tokens:
                    return
                llm.eval(self._prompt(1) if i % 3 == 0 else [llm.sample(temp=0.8)])
                self.done += 1
                if self.done % self.every == 0:
                    self._look()

    def _talk(self, routing: str) -> Iterator[None]:
        """Asks again with the same beginning, and then anew."""
        while True:
            beginning = self._prompt(40)
            self.llm.configure(budget="40%", routing=routing, io=self.io)
            for again in range(4):
                prompt = beginning + self._prompt(10)
                for _ in self.llm.generate(prompt, temp=0.0):  # takes what it can of what is evaluated
                    break
                self._decode(_STEP)
                if again == 1:
                    self.llm.reset()
            yield

    def _resume(self) -> Iterator[None]:
        """Goes back to a state, once by hand and once by a cache of prefixes."""
        from llama_cpp import LlamaRAMCache

        llm = self.llm
        while True:
            llm.configure(budget="40%", routing=LOSSY, io=self.io)
            llm.eval(self._prompt(40))
            self._decode(5)
            state = llm.save_state()
            for _ in range(3):
                self._decode(_STEP)
                llm.load_state(state)
            self._decode(_STEP)
            llm.set_cache(LlamaRAMCache(capacity_bytes=1 << 20))
            text = llm.detokenize(self._prompt(20)).decode("utf-8", "replace")
            for _ in range(3):
                said = llm.create_completion(text, max_tokens=_STEP, temperature=0)
                text += said["choices"][0]["text"]
                self._decode(_STEP)
            llm.set_cache(None)
            yield

    def _look(self) -> None:
        f, llm = self.figures, self.llm
        counted, measured, budget = llm.stats().resident_bytes, llm.measure_resident(), llm.budget.nbytes
        at = f"--io {self.io}, token {self.done}"
        if measured is None:
            raise ViolationError("The kernel does not say what is in memory of a file of another user.")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed is no growth
        f.resident.append(measured)
        f.anonymous.append(_of_this_process("RssAnon"))
        f.threads.append(_of_this_process("Threads"))
        f.files.append(len(os.listdir("/proc/self/fd")))
        if measured != counted:
            raise ViolationError(f"{at}: {measured} bytes are in memory, {counted} were counted.")
        if measured > SLACK * budget:
            raise ViolationError(f"{at}: {measured} bytes are in memory of a budget of {budget}.")
        warm = max(5, self.tokens // self.every // 4)  # looks
        if len(f.resident) <= warm:
            return
        if f.anonymous[-1] > GROWTH * max(f.anonymous[:warm]):
            raise ViolationError(f"{at}: anonymous memory has grown from {max(f.anonymous[:warm])} to {f.anonymous[-1]} bytes.")
        for name, seen in (("file descriptors", f.files), ("threads", f.threads)):
            if seen[-1] > max(seen[:warm]):
                raise ViolationError(f"{at}: {seen[-1]} {name}, {max(seen[:warm])} before.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="decoded tokens, of both io together (default: 100000)")
    parser.add_argument("--every", type=int, default=1000, help="tokens between two looks (default: 1000)")
    parser.add_argument("-m", "--model", type=Path, help="a GGUF file (default: a random one, made for it)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            from random_model import write

            model = write("qwen3moe", Path(folder) / "soak.gguf", **_SHAPE)
        for io in ("buffered", "direct"):
            soak = Soak(model, io, given.tokens // 2, given.every)
            try:
                figures = soak.run()
            except ViolationError as e:
                sys.exit(f"soak: {e}")
            print(f"{io}: {soak.done} tokens, {figures.line(soak.llm.budget.nbytes)}", flush=True)


if __name__ == "__main__":
    main()
