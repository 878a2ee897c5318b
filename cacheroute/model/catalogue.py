"""Models by name: the catalogue (models.toml) and the files on this disk (hub cache, Ollama, LM Studio).

Reads directories and small JSON files only: it opens no model and no connection.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError, did_you_mean
from cacheroute.files import broken_link, cache_dir, expanded, home, packaged

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEMO = "demo"

# Weights and bytes of one block (ggml-common.h); the test compares them with the gguf package's.
BLOCKS = {
    "F16": (1, 2),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
    "MXFP4": (32, 17),
}

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_DIGEST = re.compile(r"\w+[:-]\w+")
_HUB_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+?)(?::(?P<file>.+))?$")


@dataclass(frozen=True)
class ModelEntry:
    """One model of models.toml; the header of that file explains each field. Sizes in bytes."""

    name: str
    title: str
    repository: str
    file: str
    quantisation: str
    nbytes: int
    approximate: bool
    experts: int
    used: int
    shared: float
    layers: int
    n_embd: int
    n_ff: int
    expert_types: dict[str, int]
    unloaded: int
    j: int
    lambda_: float
    least: int
    budget: str
    licence: str
    source: dict[str, str]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in every layer: sum over types of matrices x n_embd x n_ff x block bytes / block weights."""
        weights = self.n_embd * self.n_ff
        return sum(n * weights * BLOCKS[kind][1] // BLOCKS[kind][0] for kind, n in self.expert_types.items())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the file that are always in memory: all that is loaded and is not a routed expert."""
        return self.nbytes - self.unloaded - self.experts * self.expert_bytes


@dataclass(frozen=True)
class DiskModel:
    """A GGUF file on this disk: `name` is what `-m` takes, `path` the first shard, `nbytes` of all shards."""

    name: str
    path: Path
    nbytes: int


@functools.cache
def load_catalogue() -> dict[str, ModelEntry]:
    """The entries of models.toml by name, in its order. Raises CacherouteError when it is missing or damaged."""
    path = packaged("models.toml")
    if path is None:
        raise CacherouteError("models.toml is missing; install cacheroute again.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: _entry(name, table) for name, table in tables.items()}
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as e:
        raise CacherouteError(f"{path} is damaged ({e}); install cacheroute again.") from None


def _entry(name: str, table: dict[str, Any]) -> ModelEntry:
    renamed = {"bytes": "nbytes", "lambda": "lambda_"}
    fields = {"approximate": False, "unloaded": 0, **{renamed.get(k, k): v for k, v in table.items()}}
    return ModelEntry(name=name, **fields)


def resolve(name_or_path: str | None) -> Path:
    """The file to load for `-m`: the only shard or the first one.

    In this order: nothing or "demo" is the demo model; a name of the catalogue; an existing path; `hf:OWNER/REPO[:FILE]`,
    `ollama:NAME[:TAG]`, `lmstudio:NAME`; OWNER/REPO[:FILE] as with `hf:`. A file that has the name of a model is given as ./NAME.

    Raises UsageError for a name that fits no model or several, and for a known model that is not here, with the command for it.
    """
    if name_or_path is not None and not name_or_path.strip():
        raise UsageError("The model has no name: give a file or a name, or leave -m out for the demo model.")
    text = name_or_path or DEMO
    entry = load_catalogue().get(text.lower())
    if entry:
        return _catalogue_path(entry)
    path = expanded(text)
    if path.exists():
        return path
    if broken := broken_link(path):
        raise UsageError(f"{text} cannot be read: {broken}; mend the link, or give the file itself.")
    if text.startswith("hf:"):
        return _hub_path(text)
    for prefix, models in (("ollama:", ollama_models), ("lmstudio:", lmstudio_models)):
        if text.startswith(prefix):
            return _choose(text, prefix, list(models()))
    if is_hub_name(text):
        return _hub_path(f"hf:{text}")
    if text.lower().endswith(".gguf") or os.sep in text:
        raise _no_file(text, path)
    raise unknown(text)


def is_hub_name(text: str) -> bool:
    """Whether it is OWNER/REPO or OWNER/REPO:FILE, as others write hub names; OWNER/FILE.gguf is a path."""
    return bool(_HUB_NAME.fullmatch(f"hf:{text}")) and not (text.lower().endswith(".gguf") and ":" not in text)


def _hub_path(text: str) -> Path:
    repository, pattern = split_hub_name(text)
    found = hub_file(repository, pattern or "*.gguf")
    if found:
        return found
    here = [m.name for m in hub_models() if m.name.startswith(f"hf:{repository}:")]
    if len(here) > 1 and not pattern:
        raise UsageError(f"{text} may be {', '.join(here[:8])}; write the whole name.")
    raise UsageError(f"{text} is not on this disk: run `cacheroute pull {text}`.")


def _no_file(text: str, path: Path) -> UsageError:
    """The error for a path where nothing is, with the model beside it whose name comes nearest."""
    try:
        beside = [str(Path(text).parent / p.name) for p in path.parent.iterdir() if p.suffix.lower() == ".gguf" and p.exists()]
    except (OSError, ValueError):
        beside = []
    meant = did_you_mean(str(Path(text)), beside, "`cacheroute models` lists the models that are here.")
    return UsageError(f"There is no file {text}; {meant}")


def unknown(text: str) -> UsageError:
    """The error for an unknown name, with the names that come close."""
    names = [*load_catalogue(), *(m.name for m in (*ollama_models(), *lmstudio_models()))]
    close = [n for n in names if text.lower() in n.lower()] or difflib.get_close_matches(text.lower(), names, cutoff=0.4)
    hint = f"did you mean {' or '.join(close[:4])}?" if close else "`cacheroute models` lists the names."
    return UsageError(f"There is no model and no file {text!r}; {hint}")


def split_hub_name(text: str) -> tuple[str, str]:
    """(repository, file or "") of `hf:OWNER/REPO[:FILE]`. Raises UsageError for another form."""
    match = _HUB_NAME.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is no hub name; write hf:OWNER/REPO or hf:OWNER/REPO:FILE.")
    return match["repository"], match["file"] or ""


def demo_path() -> Path:
    """Where the demo model is, or would be: demo_model.default_path(), without its half second of imports."""
    return cache_dir() / "models" / load_catalogue()[DEMO].file


def entry_path(entry: ModelEntry) -> Path | None:
    """The file of a catalogue entry if it is here, all shards of it."""
    if entry.name == DEMO:
        path = demo_path()
        return path if path.is_file() else None
    return hub_file(entry.repository, entry.file)


def _catalogue_path(entry: ModelEntry) -> Path:
    path = entry_path(entry)
    if path:
        return path
    raise UsageError(f"The model {entry.name} is not on this disk: run `{how_to_get(entry)}`.")


def how_to_get(entry: ModelEntry) -> str:
    """The command that brings a known model here."""
    return "cacheroute setup" if entry.name == DEMO else f"cacheroute pull {entry.name}"


def as_option(path: Path) -> str:
    """What a command needs to take this file, with a blank before it; nothing for the demo model."""
    return "" if path.absolute() == demo_path().absolute() else f" -m {shlex.quote(str(path))}"


def _choose(text: str, prefix: str, models: list[DiskModel]) -> Path:
    """The model of exactly the name `text`, or else the only one with a name that contains it."""
    wanted = text.lower()
    exact = [m for m in models if m.name.lower() in (wanted, wanted + ":latest")]
    found = exact or [m for m in models if wanted.removeprefix(prefix) in m.name.lower()]
    if len(found) == 1:
        return found[0].path
    if not found:
        there = ", ".join(m.name for m in models[:8]) or "no model"
        raise UsageError(f"There is no {text}; this store has {there}.")
    raise UsageError(f"{text} may be {', '.join(m.name for m in found[:8])}; write the whole name.")


def shards(path: str, names: list[str]) -> list[str]:
    """All of `names` that are shards of the same model as `path` (a shard or the only file), in order."""
    match = _SHARD.search(path)
    if not match:
        return [path]
    of_this = re.compile(rf"{re.escape(path[: match.start()])}-\d{{5}}-of-{match[2]}\.gguf$", re.IGNORECASE)
    return sorted(n for n in names if of_this.match(n))


def first_shards(names: list[str]) -> list[str]:
    """One name per model: single files and first shards; companions (vision projectors, importance matrices) left out."""
    models = []
    for name in sorted(names):
        base, match = name.rsplit("/", 1)[-1].lower(), _SHARD.search(name)
        if base.endswith(".gguf") and not base.startswith(("mmproj", "imatrix")) and (not match or int(match[1]) == 1):
            models.append(name)
    return models


def match_files(pattern: str, names: list[str]) -> list[str]:
    """First shards that `pattern` matches: a file name, a glob, a shard of it, or a quantisation such as Q4_K_M; case ignored."""
    models, wanted = first_shards(names), pattern.lower()
    exact = [n for n in names if n.lower() == wanted]
    if exact:
        group = shards(exact[0], names)
        return group[:1]
    globbed = [n for n in models if any(fnmatch.fnmatchcase(part, wanted) for part in (n.lower(), n.lower().rsplit("/", 1)[-1]))]
    if globbed:
        return globbed
    # as llama.cpp's `-hf owner/repo:QUANT`; a name part of its own, so that Q4_K does not mean Q4_K_M
    part = re.compile(rf"(?:^|[-./]){re.escape(wanted)}(?:[-./]|$)")
    return [n for n in models if part.search(n.lower())]


def hub_cache() -> Path | None:
    """The cache of huggingface_hub, by its own rules (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME); None without a home folder.

    Raises UsageError for the folder of a user that does not exist.
    """
    for variable, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if chosen := os.environ.get(variable):
            return expanded(os.path.expandvars(chosen), variable) / below
    user = home()
    return user / ".cache" / "huggingface" / "hub" if user else None


def hub_file(repository: str, pattern: str) -> Path | None:
    """The model of a hub repository that `pattern` matches, if all its shards are here and no other model matches.

    The snapshot that `main` points to comes first, then the newest.
    """
    cache = hub_cache()
    if cache is None:
        return None
    for snapshot in _snapshots(cache / f"models--{repository.replace('/', '--')}"):
        names = _complete(snapshot)
        found = match_files(pattern, names)
        if len(found) == 1:
            return snapshot / found[0]
    return None


def _snapshots(folder: Path) -> list[Path]:
    try:
        main = _small(folder / "refs" / "main").decode("utf-8", "replace").strip()
    except OSError:
        main = ""
    try:
        found = [(p.name == main, p.stat().st_mtime, p) for p in (folder / "snapshots").iterdir() if p.is_dir()]
    except OSError:
        return []
    return [p for _, _, p in sorted(found, reverse=True)]


def _small(path: Path) -> bytes:
    """A file of a few lines, as those that describe models are. Raises OSError for what is none: a pipe would not end."""
    if not path.is_file():
        raise FileNotFoundError(str(path))
    with path.open("rb") as file:
        return file.read(1 << 20)


def _complete(folder: Path) -> list[str]:
    """GGUF files under a folder, relative; split models only with all their shards; dangling links left out."""
    names = [
        (Path(at).relative_to(folder) / name).as_posix()
        for at, _, found in os.walk(folder)  # which leaves out what it may not read
        for name in found
        if name.endswith(".gguf") and (Path(at) / name).is_file()
    ]
    return [n for n in names if not (m := _SHARD.search(n)) or len(shards(n, names)) == int(m[2])]


def hub_models() -> Iterator[DiskModel]:
    """Every model in the hub cache, once per repository, as `hf:OWNER/REPO:FILE`."""
    cache = hub_cache()
    for folder in sorted(cache.glob("models--*--*")) if cache else []:
        repository, seen = folder.name.removeprefix("models--").replace("--", "/", 1), set()
        for snapshot in _snapshots(folder):
            names = _complete(snapshot)
            for name in first_shards(names):
                if name not in seen:
                    seen.add(name)
                    yield from _disk_model(f"hf:{repository}:{name}", snapshot, name, names)


def lmstudio_models() -> Iterator[DiskModel]:
    """Every model of LM Studio, as `lmstudio:PUBLISHER/REPO/FILE`."""
    user = home()
    for root in (user / ".lmstudio" / "models", user / ".cache" / "lm-studio" / "models") if user else ():
        names = _complete(root) if root.is_dir() else []
        for name in first_shards(names):
            yield from _disk_model(f"lmstudio:{name}", root, name, names)


def _disk_model(name: str, root: Path, first: str, names: list[str]) -> Iterator[DiskModel]:
    """None where a file has just gone."""
    with contextlib.suppress(OSError):
        yield DiskModel(name, root / first, sum((root / n).stat().st_size for n in shards(first, names)))


def ollama_models() -> Iterator[DiskModel]:
    """Every model of Ollama, as `ollama:NAME:TAG`; one of another owner or registry has that before its name.

    A manifest is manifests/REGISTRY/OWNER/NAME/TAG and names the GGUF by its digest: blobs/sha256-...
    """
    chosen, user = os.environ.get("OLLAMA_MODELS"), home()
    if chosen:
        root = expanded(chosen, "OLLAMA_MODELS")
    elif user:
        root = user / ".ollama" / "models"
    else:
        return
    manifests = sorted(p for p in root.glob("manifests/*/*/*/*") if p.is_file())
    # the registry that holds `library` is Ollama's own: its name need not be written
    own = {p.parts[-4] for p in manifests if p.parts[-3] == "library"}
    for manifest in manifests:
        registry, owner, name, tag = manifest.parts[-4:]
        blob = _ollama_blob(root, manifest)
        if blob:
            prefix = "" if owner == "library" else f"{owner}/"
            prefix = prefix if registry in own else f"{registry}/{owner}/"
            yield DiskModel(f"ollama:{prefix}{name}:{tag}", blob, blob.stat().st_size)


def _ollama_blob(root: Path, manifest: Path) -> Path | None:
    try:
        layers = json.loads(_small(manifest))["layers"]
        digests = [layer["digest"] for layer in layers if str(layer["mediaType"]).endswith("image.model")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # half-written or of a later format: not ours to judge
    if len(digests) != 1 or not _DIGEST.fullmatch(str(digests[0])):
        return None
    blob = root / "blobs" / str(digests[0]).replace(":", "-")
    return blob if blob.is_file() else None
