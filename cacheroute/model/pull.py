"""Fetches a model from the hub into the hub's own cache: resumable, checked against its sha256, all shards.

huggingface_hub (the extra `pull`) does names, tokens, mirrors and the layout of the cache. The transfer is done here because that
library deletes a partial file when it is stopped (seen in 2.4), which is too costly for 20 GB: here a partial file is kept
beside the blobs as `<sha256>.cacheroute.incomplete` until it is complete and right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from cacheroute.errors import CacherouteError, UsageError, pip_install
from cacheroute.files import size
from cacheroute.model import catalogue

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_MISSING = f"`cacheroute pull` needs huggingface_hub: run {pip_install('huggingface_hub')}."
GB = 1000**3


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; `sha256` is None for small ones that git itself keeps."""

    name: str
    nbytes: int
    sha256: str | None


def pull(name: str) -> Path:
    """Makes a model of the catalogue or of `hf:OWNER/REPO[:FILE]` complete in the hub cache; returns its only or first shard.

    Reports its progress on stderr. Raises UsageError for a name or file that does not exist (listing what does),
    CacherouteError when it cannot be fetched or its checksum is wrong; what was fetched stays for the next attempt.
    """
    repository, pattern = _parse(name)
    hub = _hub()
    try:
        info = hub.HfApi(endpoint=_endpoint()).model_info(repository, files_metadata=True)
    except Exception as e:
        local = catalogue.hub_file(repository, pattern or "*.gguf")
        if local and not _is_answer(e):
            print(f"the hub cannot be reached ({_reason(e)}); this is what is here", file=sys.stderr)
            return local
        raise _failure(e, repository) from None
    wanted = _select(name, pattern, _files(info))
    paths = [_fetch(hub, repository, file, str(info.sha or "main")) for file in wanted]
    return paths[0]


def _parse(name: str) -> tuple[str, str]:
    if not name.strip():
        raise UsageError("The model has no name: `cacheroute models` lists what can be downloaded.")
    if name.startswith("hf:"):
        return catalogue.split_hub_name(name)
    entry = catalogue.load_catalogue().get(name.lower())
    if entry is None and os.path.isfile(os.path.expanduser(name)):
        raise UsageError(f"{name} is a file on this disk already, with nothing to download; run it with -m {name}.")
    if entry is None and catalogue.is_hub_name(name):
        return catalogue.split_hub_name(f"hf:{name}")
    if entry is None:
        raise catalogue.unknown(name)
    if entry.name == catalogue.DEMO:
        raise UsageError("The demo model is made here, not fetched: run `cacheroute setup`.")
    return entry.repository, entry.file


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError as e:
        if e.name != "huggingface_hub":
            raise
        raise CacherouteError(_MISSING) from None
    module: ModuleType = huggingface_hub
    return module


def _endpoint() -> str | None:
    """The mirror, if one is set. huggingface_hub reads it too, but once, when it is imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _files(info: ModelInfo) -> list[HubFile]:
    files = []
    for s in info.siblings or []:
        files.append(HubFile(s.rfilename, int(s.size or 0), s.lfs.sha256 if s.lfs else None))
    return files


def _select(name: str, pattern: str, files: list[HubFile]) -> list[HubFile]:
    """All shards of the one model that is meant. Raises UsageError that lists the candidates if it is not one."""
    by_name = {f.name: f for f in files}
    names = list(by_name)
    found = catalogue.match_files(pattern or "*.gguf", names)
    if len(found) == 1:
        group = catalogue.shards(found[0], names)
        first = group[0].rsplit("-of-", 1)
        if len(first) == 2 and len(group) != int(first[1].removesuffix(".gguf")):
            raise UsageError(f"{name}: the repository has {len(group)} shards of {found[0]}, not all of them.")
        return [by_name[n] for n in group]
    candidates = found or catalogue.first_shards(names)
    if not candidates:
        raise UsageError(f"{name}: the repository has no GGUF file.")
    sizes = (sum(by_name[s].nbytes for s in catalogue.shards(n, names)) for n in candidates)
    listed = ", ".join(f"{n} ({size(nbytes, decimal=True)})" for n, nbytes in zip(candidates, sizes, strict=True))
    problem = "is more than one model" if found else f"has no file {pattern}"
    raise UsageError(f"{name} {problem}; write hf:OWNER/REPO:FILE with one of {listed}.")


def _fetch(hub: ModuleType, repository: str, file: HubFile, revision: str) -> Path:
    """Makes one file complete in the cache and returns its path there."""
    cache = catalogue.hub_cache()
    if cache is None:
        raise CacherouteError("There is no home folder to fetch models to: set HF_HUB_CACHE to a folder of yours.")
    blobs = cache / f"models--{repository.replace('/', '--')}" / "blobs"
    by_xet = file.nbytes > getattr(hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 50 * GB)  # the hub refuses plain HTTP for these
    try:
        if file.sha256 and not by_xet and not (blobs / file.sha256).exists():
            blobs.mkdir(parents=True, exist_ok=True)
            _transfer(hub, repository, file, revision, blobs)
        _check_size(blobs / file.sha256 if file.sha256 else None, file)
        # links the blob into a snapshot, or fetches a file that has no sha256 or is too large for us
        path = Path(hub.hf_hub_download(repository, file.name, endpoint=_endpoint(), cache_dir=cache))
    except CacherouteError:
        raise
    except Exception as e:
        raise _failure(e, repository) from None
    if by_xet and file.sha256:
        _check(hub, path.resolve(), file)
    return path


def _transfer(hub: ModuleType, repository: str, file: HubFile, revision: str, blobs: Path) -> None:
    """Fetches what is missing of the partial file, checks the whole, and makes it a blob."""
    from huggingface_hub.file_download import http_get

    partial = blobs / f"{file.sha256}.cacheroute.incomplete"
    with _only_one(partial) as out:
        while (have := out.seek(0, os.SEEK_END)) < file.nbytes:
            _need_space(blobs, file, have)
            verb = f"resuming at {size(have, decimal=True)} of" if have else "fetching"
            print(f"{file.name}: {verb} {size(file.nbytes, decimal=True)}", file=sys.stderr, flush=True)
            url = hub.hf_hub_url(repository, file.name, revision=revision, endpoint=_endpoint())
            headers = hub.utils.build_hf_headers()
            try:
                http_get(url, out, resume_size=have, headers=headers, expected_size=file.nbytes, displayed_filename=file.name)
            except Exception as e:
                if _is_answer(e) or out.seek(0, os.SEEK_END) == have:  # else it broke off, and what came is here
                    raise
        out.flush()
        _check(hub, partial, file)
        os.replace(partial, blobs / str(file.sha256))


@contextmanager
def _only_one(partial: Path) -> Iterator[BinaryIO]:
    """The partial file, open for appending, for one process at a time where the system has locks."""
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as out:
        try:
            import fcntl

            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            raise CacherouteError(f"Another `cacheroute pull` is fetching {partial.name}; wait for it.") from None
        yield out


def _need_space(folder: Path, file: HubFile, have: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < file.nbytes - have:
        raise CacherouteError(
            f"{file.name} needs {size(file.nbytes - have, decimal=True)} more and {folder} has {size(free, decimal=True)} free; "
            "make room, or set HF_HUB_CACHE to another disk."
        )


def _check(hub: ModuleType, path: Path, file: HubFile) -> None:
    """Raises CacherouteError when size or sha256 differ from the hub's; deletes nothing. Shows its progress, as a transfer."""
    size = path.stat().st_size
    if file.nbytes > GB:
        print(f"{file.name}: checking its sha256", file=sys.stderr, flush=True)
    digest = hashlib.sha256()
    shown = {"total": size, "unit": "B", "unit_scale": True, "desc": "sha256", "delay": 2, "leave": False, "disable": None}
    with path.open("rb") as f, hub.utils.tqdm(**shown) as bar:  # None: not where stderr is no terminal
        while block := f.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    if size != file.nbytes or digest.hexdigest() != file.sha256:
        raise CacherouteError(
            f"{file.name} arrived damaged: {size} of {file.nbytes} bytes, and not the sha256 that the hub names; "
            f"it is kept as {path}: delete that file and pull again."
        )


def _check_size(blob: Path | None, file: HubFile) -> None:
    """Raises CacherouteError for a blob of the cache that was cut short or overwritten."""
    if blob is not None and blob.exists() and (not blob.is_file() or blob.stat().st_size != file.nbytes):
        raise CacherouteError(f"{file.name} is damaged in the hub cache; delete {blob} and pull again.")


def _is_answer(e: Exception) -> bool:
    """Whether the hub was reached and said no."""
    response = getattr(e, "response", None)
    return response is not None and 400 <= response.status_code < 500


def _reason(e: Exception) -> str:
    text = str(e).strip() or type(e).__name__
    return text.splitlines()[0].rstrip(".")[:200]


def _failure(e: Exception, repository: str) -> CacherouteError:
    """What went wrong in huggingface_hub or below it, as one sentence. By name: the classes moved between its versions."""
    kinds = {c.__name__ for c in type(e).__mro__}
    where = _endpoint() or "the hub"
    if "GatedRepoError" in kinds:
        return CacherouteError(f"{repository} is gated: accept its terms on its page, then set HF_TOKEN or run `hf auth login`.")
    if "RepositoryNotFoundError" in kinds:
        return UsageError(
            f"There is no repository {repository} at {where}; if it is private, set HF_TOKEN or run `hf auth login`."
        )
    if "HFValidationError" in kinds:
        return UsageError(f"{repository!r} is no repository name; write hf:OWNER/REPO.")
    if "OfflineModeIsEnabled" in kinds:
        return CacherouteError(f"{repository} cannot be fetched: HF_HUB_OFFLINE is set.")
    if isinstance(e, OSError) and e.errno is not None and e.filename:
        return CacherouteError(f"{e.filename} cannot be written ({e.strerror}); set HF_HUB_CACHE to another folder.")
    if _is_answer(e):
        return CacherouteError(f"{repository} cannot be fetched from {where}: {_reason(e)}.")
    return CacherouteError(f"{repository} could not be fetched from {where} ({_reason(e)}); run the same command to resume.")
