"""The parent's output: sampled chats, and its top-k next-token distribution on any text.

The distillation target of a position is the parent's `TOP` largest log-probabilities; the mass
outside is one more bucket. Chats are sampled once and kept in shards; text is read afresh at every
step, because a recorded 130k tokens were learned by heart within two epochs (the loss on them went
on falling, held-out perplexity did not). Knows nothing about the child.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from tokenizers import Tokenizer

from . import parent
from .questions import training_questions

TOP = 64
END = 2  # <|im_end|>


@dataclass(frozen=True)
class Shard:
    """Sequences of one length with the parent's distribution after each token.

    tokens (n, t) uint16; ids (n, t, TOP) uint16; logp (n, t, TOP) float16, natural logarithm.
    """

    tokens: np.ndarray
    ids: np.ndarray
    logp: np.ndarray

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part.npz")
        np.savez(part, tokens=self.tokens, ids=self.ids, logp=self.logp)
        part.rename(path)

    @staticmethod
    def load(path: Path) -> Shard:
        with np.load(path) as z:
            return Shard(z["tokens"], z["ids"], z["logp"])


def top_logp(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest log-probabilities and their ids along the last axis."""
    value, ids = logits.topk(TOP, -1)
    return value - logits.logsumexp(-1, keepdim=True), ids


def targets(p: dict[str, torch.Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parent's (ids, logp), each (t, TOP), after each of the tokens (t,)."""
    with torch.no_grad():
        logp, ids = top_logp(F.linear(parent.parent_hidden(p, tokens[None])[0], p["token_embd.weight"]))
    return ids, logp


def _step(p: dict[str, torch.Tensor], tokens: torch.Tensor, at: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Logits after `tokens` (batch,) at position `at`; k, v: (LAYERS, batch, KV_HEADS, room, HEAD)."""
    b = tokens.shape[0]
    position = torch.tensor([at], device=tokens.device)
    x = p["token_embd.weight"][tokens]
    for i in range(parent.LAYERS):
        h = parent.rms_norm(x, p[f"blk.{i}.attn_norm.weight"])
        q = F.linear(h, p[f"blk.{i}.attn_q.weight"]).view(b, parent.HEADS, 1, parent.HEAD)
        new_k = F.linear(h, p[f"blk.{i}.attn_k.weight"]).view(b, parent.KV_HEADS, 1, parent.HEAD)
        k[i, :, :, at] = parent.rotate(new_k, position)[:, :, 0]
        v[i, :, :, at] = F.linear(h, p[f"blk.{i}.attn_v.weight"]).view(b, parent.KV_HEADS, parent.HEAD)
        q = parent.rotate(q, position).view(b, parent.KV_HEADS, parent.HEADS // parent.KV_HEADS, parent.HEAD)
        score = (q @ k[i, :, :, : at + 1].transpose(-1, -2)) * parent.HEAD**-0.5
        out = score.softmax(-1) @ v[i, :, :, : at + 1]
        x = x + F.linear(out.reshape(b, parent.D), p[f"blk.{i}.attn_output.weight"])
        a = parent.dense_ffn(p, i, parent.rms_norm(x, p[f"blk.{i}.ffn_norm.weight"]))
        x = x + F.linear(a, p[f"blk.{i}.ffn_down.weight"])
    return F.linear(parent.rms_norm(x, p["output_norm.weight"]), p["token_embd.weight"])


def sample_chats(p: dict[str, torch.Tensor], tok: Tokenizer, questions: list[str], length: int, seed: int) -> Shard:
    """One conversation of `length` tokens per two questions; the parent writes the answers.

    All conversations advance together from position 0: while a question is not over its tokens are
    forced. When an answer ends, the second question follows; half are sampled at temperature 0.6, half at 1.
    """
    device = p["token_embd.weight"].device
    n = len(questions) // 2
    first = [tok.encode(parent.chat(q)).ids for q in questions[:n]]
    second = [tok.encode(f"\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n").ids for q in questions[n : 2 * n]]
    forced = [list(s) for s in first]
    generator = torch.Generator(device=device).manual_seed(seed)
    temperature = torch.where(torch.arange(n, device=device) % 2 == 0, 0.6, 1.0)[:, None]
    k = torch.zeros(parent.LAYERS, n, parent.KV_HEADS, length, parent.HEAD, device=device)
    v = torch.zeros_like(k)
    tokens = np.zeros((n, length), np.uint16)
    all_ids = np.zeros((n, length, TOP), np.uint16)
    all_logp = np.zeros((n, length, TOP), np.float16)
    tokens[:, 0] = [f.pop(0) for f in forced]
    for at in range(length):
        logits = _step(p, torch.from_numpy(tokens[:, at].astype(np.int64)).to(device), at, k, v)
        logp, ids = top_logp(logits)
        all_ids[:, at], all_logp[:, at] = ids.cpu().numpy(), logp.cpu().numpy()
        if at + 1 == length:
            break
        pick = torch.multinomial((logp / temperature).softmax(-1), 1, generator=generator)
        chosen = ids.gather(1, pick)[:, 0].tolist()
        for j in range(n):
            if forced[j]:
                chosen[j] = forced[j].pop(0)
            elif chosen[j] == END:
                forced[j] = list(second[j])
        tokens[:, at + 1] = chosen
    return Shard(tokens, all_ids, all_logp)


def make_chats(p: dict[str, torch.Tensor], tok: Tokenizer, folder: Path, shards: int, batch: int, length: int) -> None:
    """Write `folder/chat-*.npz`, one at a time; those already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = training_questions(0)
    for s in range(shards):
        path = folder / f"chat-{s:02d}.npz"
        if path.exists():
            continue
        start = time.time()
        asked = [questions[(s * 2 * batch + j) % len(questions)] for j in range(2 * batch)]
        sample_chats(p, tok, asked, length, seed=s).save(path)
        print(f"{path.name}: {batch * length / (time.time() - start):.0f} tok/s", flush=True)


SHARES = {
    "austen": 0.22,
    "web": 0.1,
    "play": 0.06,
    "devil": 0.05,
    "foldoc": 0.2,
    "glosses": 0.05,
    "handbook": 0.14,
    "jargon": 0.12,
    "perl": 0.06,
}
"""Of the package text that is read, by the beginning of a file's name."""


class Reading:
    """Random windows of the training text; the n-th is the same at every run."""

    def __init__(self, tok: Tokenizer, text: Path, length: int) -> None:
        self.tok, self.length = tok, length
        self.sources = {s: "\n\n".join(f.read_text("utf-8") for f in sorted(text.glob(f"{s}*.txt"))) for s in SHARES}

    def __getitem__(self, n: int) -> np.ndarray:
        """Window n: (length,) int64, from the beginning of a line."""
        rng = np.random.default_rng((1000, n))
        while True:
            source = self.sources[str(rng.choice(list(SHARES), p=list(SHARES.values())))]
            at = int(rng.integers(0, max(1, len(source) - 8 * self.length)))
            at = source.find("\n", at) + 1
            ids = self.tok.encode(source[at : at + 8 * self.length]).ids[: self.length]
            if len(ids) == self.length:
                return np.array(ids, np.int64)
