"""What is learned from: text of packages, and text that the parent writes itself.

The parent's own text covers what it knows far more widely than a few books do; it is sampled once and kept. Of
each sequence the parent's distribution is computed anew when it is read (`distill`). Knows nothing about the child.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from tokenizers import Tokenizer

from . import parent
from .questions import training_questions

TEXT_END, END = 0, 2  # <|endoftext|>, <|im_end|>
CANDIDATES = 256
"""Likeliest tokens that are drawn from."""
KINDS = ("question", "magpie", "continue", "free")
"""What a sequence begins with: a question of ours; the beginning of a user's turn, so that the parent asks, too; 32
tokens of training text; nothing. In turn."""


def openings(tok: Tokenizer) -> tuple[list[list[int]], list[int], list[int]]:
    """(token ids of chats that end before an answer, one that ends before a question; what follows a question; an answer)."""
    head, _, rest = parent.chat("\f").partition("\f")
    asked = [tok.encode(parent.chat(q)).ids for q in training_questions(0)]
    return [*asked, tok.encode(head).ids], tok.encode(rest.removeprefix("<|im_end|>")).ids, tok.encode("\n<|im_start|>user\n").ids


def _step(p: dict[str, torch.Tensor], tokens: torch.Tensor, at: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Logits after `tokens` (batch,) at position `at`; k, v: (LAYERS, batch, KV_HEADS, room, HEAD)."""
    b = tokens.shape[0]
    position = torch.tensor([at], device=tokens.device)
    x = F.embedding(tokens, p["token_embd.weight"])[:, None].float()
    for i in range(parent.LAYERS):
        w = parent.layer_weights(p, i)
        q, new_k, new_v = parent.queries(w, parent.rms_norm(x, w["attn_norm"]), position)
        k[i, :, :, at], v[i, :, :, at] = new_k[:, :, 0], new_v[:, :, 0]
        q = q.reshape(b, parent.KV_HEADS, parent.HEADS // parent.KV_HEADS, parent.HEAD)
        score = (q.to(k.dtype) @ k[i, :, :, : at + 1].transpose(-1, -2)) * parent.HEAD**-0.5
        out = score.softmax(-1).to(v.dtype) @ v[i, :, :, : at + 1]
        x = x + F.linear(out.reshape(b, 1, parent.D), w["attn_output"])
        x = x + F.linear(parent.dense_ffn(w, parent.rms_norm(x, w["ffn_norm"])), w["ffn_down"])
    return F.linear(parent.rms_norm(x[:, 0], p["output_norm.weight"]), p["token_embd.weight"])


@torch.no_grad()  # type: ignore[untyped-decorator]
def sample(
    p: dict[str, torch.Tensor],
    beginnings: list[list[int]],
    before_answer: list[int],
    before_question: list[int],
    chat: np.ndarray,
    length: int,
    seed: int,
) -> np.ndarray:
    """(n, length) uint16: each beginning, continued by the parent, half at temperature 0.7 and half at 1.

    chat (n,) int: -1 where no chat is written, else whose turn the beginning leaves it at, 0 the user's, 1 the answer. All
    advance together; where a turn ends the next one's header is forced.
    """
    device = p["token_embd.weight"].device
    n = len(beginnings)
    generator = torch.Generator(device=device).manual_seed(seed)
    temperature = torch.where(torch.arange(n, device=device) % 8 < 4, 0.7, 1.0)[:, None]
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    k = torch.zeros(parent.LAYERS, n, parent.KV_HEADS, length, parent.HEAD, device=device, dtype=kind)
    v = torch.zeros_like(k)
    forced = np.full((n, length + 64), -1, np.int64)
    for row, tokens in zip(forced, beginnings, strict=True):
        row[: min(len(tokens), length)] = tokens[:length]
    turn, after = chat.copy(), (before_answer, before_question)
    out = np.zeros((n, length), np.int64)
    out[:, 0] = forced[:, 0]
    current = torch.from_numpy(out[:, 0]).to(device)
    for at in range(length - 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = _step(p, current, at, k, v)
        value, ids = logits.float().topk(CANDIDATES, -1)
        pick = torch.multinomial((value / temperature).softmax(-1), 1, generator=generator)
        drawn = ids.gather(1, pick)[:, 0].cpu().numpy()
        free = forced[:, at + 1] < 0
        out[:, at + 1] = np.where(free, drawn, forced[:, at + 1])
        for j in np.flatnonzero(free & (drawn == END) & (turn >= 0)):
            header = after[turn[j]]
            forced[j, at + 2 : at + 2 + len(header)] = header
            turn[j] = 1 - turn[j]
        current = torch.from_numpy(out[:, at + 1]).to(device)
    return out.astype(np.uint16)


def write_text(
    p: dict[str, torch.Tensor],
    chats: tuple[list[list[int]], list[int], list[int]],
    text: np.ndarray,
    n: int,
    length: int,
    seed: int,
) -> np.ndarray:
    """(n, length) uint16 of the parent's own text, `KINDS` in turn; chats from `openings`, text (N,) tokens of training text."""
    asked, before_answer, before_question = chats
    rng = np.random.default_rng((seed, 7))
    beginnings, chat = [], np.full(n, -1)
    for j in range(n):
        kind = KINDS[j % len(KINDS)]
        if kind == "question":
            beginnings.append(asked[int(rng.integers(len(asked) - 1))])
            chat[j] = 1
        elif kind == "magpie":
            beginnings.append(asked[-1])
            chat[j] = 0
        elif kind == "continue":
            at = int(rng.integers(len(text) - 32))
            beginnings.append([int(t) for t in text[at : at + 32]])
        else:
            beginnings.append([TEXT_END])
    written: np.ndarray = sample(p, beginnings, before_answer, before_question, chat, length, seed)
    return written


def make_text(
    p: dict[str, torch.Tensor], tok: Tokenizer, text: np.ndarray, folder: Path, shards: int, n: int, length: int
) -> None:
    """Write `folder/own-*.npy`, one at a time; those already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    chats = openings(tok)
    half = {name: t.bfloat16() if t.dim() == 2 and t.is_cuda else t for name, t in p.items()}
    for s in range(shards):
        path = folder / f"own-{s:02d}.npy"
        if path.exists():
            continue
        start = time.time()
        part = path.with_suffix(".part.npy")
        np.save(part, write_text(half, chats, text, n, length, s))
        part.rename(path)
        print(f"{path.name}: {n * length / (time.time() - start):.0f} tok/s", flush=True)


SHARES = {
    "austen": 0.2,
    "web": 0.08,
    "play": 0.06,
    "devil": 0.05,
    "foldoc": 0.2,
    "glosses": 0.06,
    "handbook": 0.14,
    "jargon": 0.12,
    "perl": 0.09,
}
"""Of the package text that is read, by the beginning of a file's name."""


def tokens_of(tok: Tokenizer, text: Path, path: Path) -> dict[str, np.ndarray]:
    """uint16 tokens of each source of the training text, kept in `path` (npz)."""
    if not path.exists():
        files = {s: "\n\n".join(f.read_text("utf-8") for f in sorted(text.glob(f"{s}*.txt"))) for s in SHARES}
        lines = {s: tok.encode_batch(words.splitlines(keepends=True)) for s, words in files.items()}
        tokens = {s: np.concatenate([np.array(line.ids, np.uint16) for line in found]) for s, found in lines.items()}
        np.savez_compressed(path, **tokens)  # type: ignore[arg-type]
    with np.load(path) as z:
        return dict(z)


def windows(text: dict[str, np.ndarray], n: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """(n, length) random windows of the training text, sources by their `SHARES`."""
    out = np.zeros((n, length), np.uint16)
    for row, source in zip(out, rng.choice(list(SHARES), n, p=list(SHARES.values())), strict=True):
        at = int(rng.integers(len(text[source]) - length))
        row[:] = text[source][at : at + length]
    return out
