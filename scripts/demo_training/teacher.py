"""What is learned from: text of packages, and text that the parent writes itself.

The parent's own text covers what it knows far more widely than a few books do; it is sampled once and kept. Of
each sequence the parent's distribution is computed anew when it is read (`distill`). Knows nothing about the child.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from tokenizers import Tokenizer

from . import parent
from .questions import JUDGED, training_questions

TEXT_END, END = 0, 2  # <|endoftext|>, <|im_end|>
CANDIDATES = 256
"""Likeliest tokens that are drawn from."""
KINDS = ("question", "article", "magpie", "continue", "article", "free")
"""What a sequence begins with: a question of ours; the first words of an article; the beginning of a user's turn, so that
the parent asks, too; 32 tokens of training text; nothing. In turn."""
ARTICLES = ("{0}\n\n{0} is", "# {0}\n\n", "{0}, {1}, ", "The history of {0}", "{0} was", "{0} ({1})")
"""How an article on {0}, of which a dictionary says {1}, may begin."""
TAXON = re.compile(r"[Gg]enus .*|[Ff]amily .*|\w*(idae|aceae|ales|inae)|[A-Z]\w+ [a-z]\w+")
"""Biology's Latin names, a third of the names in WordNet: left out."""


@dataclass(frozen=True)
class Openings:
    """Token ids that sequences begin with, or that follow a turn of a chat."""

    asked: list[list[int]]
    """Chats that end before an answer."""
    silent: list[int]
    """A chat that ends before a question."""
    before_answer: list[int]
    before_question: list[int]
    articles: list[list[int]]


def articles(glosses: str, n: int, seed: int) -> list[str]:
    """n beginnings of articles on what `glosses` (lines of `words: gloss`) names, three of four with a capital letter.

    Topics of the questions that the finished model is judged by are left out.
    """
    rng = np.random.default_rng(seed)
    judged = set(re.findall(r"[a-z]{3,}", " ".join(JUDGED).lower()))
    named: list[tuple[str, str]] = []
    common: list[tuple[str, str]] = []
    for line in glosses.splitlines():
        words, _, gloss = line.partition(": ")
        if not judged & set(re.findall(r"[a-z]{3,}", words.lower())):
            for name in words.split(", "):
                if not TAXON.fullmatch(name):
                    (named if name[:1].isupper() else common).append((name, gloss.split(";")[0].strip()))
    found = []
    for _ in range(n):
        pool = named if rng.random() < 0.75 else common
        word, gloss = pool[int(rng.integers(len(pool)))]
        found.append(ARTICLES[int(rng.integers(len(ARTICLES)))].format(word[:1].upper() + word[1:], gloss))
    return found


def openings(tok: Tokenizer, glosses: str) -> Openings:
    """Of our questions, the parent's chat template, and 20,000 articles."""
    head, _, rest = parent.chat("\f").partition("\f")
    return Openings(
        asked=[tok.encode(parent.chat(q)).ids for q in training_questions(0)],
        silent=tok.encode(head).ids,
        before_answer=tok.encode(rest.removeprefix("<|im_end|>")).ids,
        before_question=tok.encode("\n<|im_start|>user\n").ids,
        articles=[e.ids for e in tok.encode_batch(articles(glosses, 20_000, 0))],
    )


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
    follows: tuple[list[int], list[int]],
    chat: np.ndarray,
    length: int,
    seed: int,
) -> np.ndarray:
    """(n, length) uint16: each beginning, continued by the parent, half at temperature 0.7 and half at 1.

    chat (n,) int: -1 where no chat is written, else whose turn the beginning leaves it at, 0 the user's, 1 the answer. All
    advance together; where a question or an answer ends, follows[0] or [1], the next turn's header, is forced.
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
    turn = chat.copy()
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
            header = follows[turn[j]]
            forced[j, at + 2 : at + 2 + len(header)] = header
            turn[j] = 1 - turn[j]
        current = torch.from_numpy(out[:, at + 1]).to(device)
    return out.astype(np.uint16)


def write_text(
    p: dict[str, torch.Tensor],
    opening: Openings,
    text: np.ndarray,
    n: int,
    length: int,
    seed: int,
) -> np.ndarray:
    """(n, length) uint16 of the parent's own text, `KINDS` in turn; text (N,) tokens of training text."""
    rng = np.random.default_rng((seed, 7))
    beginnings, chat = [], np.full(n, -1)
    for j in range(n):
        kind = KINDS[j % len(KINDS)]
        if kind == "question":
            beginnings.append(opening.asked[int(rng.integers(len(opening.asked)))])
            chat[j] = 1
        elif kind == "magpie":
            beginnings.append(opening.silent)
            chat[j] = 0
        elif kind == "article":
            beginnings.append([TEXT_END, *opening.articles[int(rng.integers(len(opening.articles)))]])
        elif kind == "continue":
            at = int(rng.integers(len(text) - 32))
            beginnings.append([int(t) for t in text[at : at + 32]])
        else:
            beginnings.append([TEXT_END])
    written: np.ndarray = sample(p, beginnings, (opening.before_answer, opening.before_question), chat, length, seed)
    return written


def make_text(
    p: dict[str, torch.Tensor], opening: Openings, text: np.ndarray, folder: Path, shards: int, n: int, length: int
) -> None:
    """Write `folder/own-*.npy`, one at a time; those already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: t.bfloat16() if t.dim() == 2 and t.is_cuda else t for name, t in p.items()}
    for s in range(shards):
        path = folder / f"own-{s:02d}.npy"
        if path.exists():
            continue
        start = time.time()
        part = path.with_suffix(".part.npy")
        np.save(part, write_text(half, opening, text, n, length, s))
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
