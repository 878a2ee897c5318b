"""`cacheroute models`: lists the catalogue and the models on this disk, and whether this machine can run them."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from cacheroute.cli import table
from cacheroute.cli.terminal import columns, say
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import GIB, as_json, printable, size
from cacheroute.install.machine import available_memory
from cacheroute.model import catalogue, experts, gguf_file, memory_plan
from cacheroute.model.catalogue import DiskModel, ModelEntry
from cacheroute.model.experts import NotRoutableError
from cacheroute.model.memory_plan import MemoryPlan

_CONTEXT = 4096  # what `generate` takes by default


@dataclass(frozen=True)
class Row:
    """One model. Sizes in bytes, None where unknown. `fits` is "yes", "?" or what is missing.

    `quantisation`: of a known model its usual name, of another the types of its experts.
    """

    name: str
    title: str
    nbytes: int
    path: str | None
    fits: str = "?"
    suggested_budget: str | None = None
    experts: int | None = None
    used: int | None = None
    expert_bytes_all_layers: int | None = None
    dense_bytes: int | None = None
    quantisation: str | None = None
    licence: str | None = None
    j: int | None = None
    lambda_start: float | None = None


def models(
    output: Annotated[str, typer.Option("-o", "--output", help="text or json (sizes in bytes).")] = "text",
) -> None:
    """List known models and those on this disk, and what fits.

    Uses no network. A model fits if the memory that is free now holds the weights that are always there, a context of 4096 tokens
    and the least budget (K experts per layer). The budget shown is the largest that fits, in experts per layer.
    """
    if output not in ("text", "json"):
        raise UsageError(f"There is no output {output!r}; there are text and json.")
    memory, disk = available_memory(), free_disk(catalogue.hub_cache())
    rows = list(_rows(memory, disk))
    if output == "json":
        print(as_json({"memory_available": memory, "disk_free": disk, "models": [asdict(r) for r in rows]}))
        return
    _print(rows)
    free = "unknown" if memory is None else size(memory)
    room = "unknown" if disk is None else size(disk)
    say(f"free: {free} of memory, {room} of disk for `cacheroute pull`")


def _rows(memory: int | None, disk: int | None) -> Iterator[Row]:
    listed = set()
    for entry in catalogue.load_catalogue().values():
        path = catalogue.entry_path(entry)
        if path:
            listed.add(path.resolve())
        yield _entry_row(entry, path, memory, disk)
    left_out = 0
    for model in (*catalogue.hub_models(), *catalogue.ollama_models(), *catalogue.lmstudio_models()):
        if model.path.resolve() in listed:
            continue
        try:
            yield _disk_row(model, memory)
        except UsageError as e:
            left_out += 1
            if not isinstance(e, NotRoutableError):
                say(f"{model.name}: {e}")
        except CacherouteError as e:  # cut short, or there is no engine yet to read it
            say(f"{model.name}: {e}")
            yield Row(model.name, model.name, model.nbytes, str(model.path))
    if left_out:
        say(f"{left_out} more on this disk have no experts, or none that can be used")


def _entry_row(entry: ModelEntry, path: Path | None, memory: int | None, disk: int | None) -> Row:
    fits, budget = _fit(entry, path, memory)
    if not path and entry.repository and disk is not None and disk < entry.nbytes:
        fits = f"needs {size(entry.nbytes)} of disk"
    return Row(
        name=entry.name,
        title=entry.title,
        nbytes=entry.nbytes,
        path=str(path) if path else None,
        fits=fits,
        suggested_budget=budget,
        experts=entry.experts,
        used=entry.used,
        expert_bytes_all_layers=entry.expert_bytes,
        dense_bytes=entry.dense_bytes,
        quantisation=entry.quantisation,
        licence=entry.licence,
        j=entry.j,
        lambda_start=entry.lambda_,
    )


def _disk_row(model: DiskModel, memory: int | None) -> Row:
    """Raises NotRoutableError for a model without experts, CacherouteError for one that cannot be read."""
    gguf = gguf_file.read(model.path)
    layout = experts.layout(gguf)
    fits, budget = _shown(memory_plan.of(gguf, layout, n_ctx=_CONTEXT, free=memory))
    types = Counter(t.type.upper() for layer in layout.layers for t in layer.tensors)
    return Row(
        name=model.name,
        title=str(gguf.metadata.get("general.name", model.name)),
        nbytes=model.nbytes,
        path=str(model.path),
        fits=fits,
        suggested_budget=budget,
        experts=layout.n_expert,
        used=layout.n_used,
        expert_bytes_all_layers=layout.expert_bytes,
        dense_bytes=layout.dense_bytes,
        quantisation="/".join(kind for kind, _ in types.most_common()),
    )


def _fit(entry: ModelEntry, path: Path | None, memory: int | None) -> tuple[str, str | None]:
    """By the header where the model is here, else by the catalogue's numbers."""
    if path:
        with contextlib.suppress(CacherouteError):  # cut short, or there is no engine yet to read it
            gguf = gguf_file.read(path)
            return _shown(memory_plan.of(gguf, experts.layout(gguf), n_ctx=_CONTEXT, free=memory))
    return _shown(memory_plan.of_entry(entry, n_ctx=_CONTEXT, free=memory))


def _shown(plan: MemoryPlan) -> tuple[str, str | None]:
    """(whether it fits, the largest budget that does)."""
    capacity = plan.capacity
    if plan.free is None:
        return "?", None
    if capacity is None:
        return f"needs {size(plan.least)} of memory", None
    return "yes", "all" if capacity == plan.n_expert else str(capacity)


def _print(rows: list[Row]) -> None:
    """In a pipe each model on one line, however long its name is."""
    head = ("NAME", "GiB", "HERE", "E/K", "FITS", "BUDGET")
    cells = [
        (
            printable(r.name),
            f"{r.nbytes / GIB:.1f}",
            "yes" if r.path else "no",
            f"{r.experts}/{r.used}" if r.experts else "?",
            r.fits,
            r.suggested_budget or "-",
        )
        for r in rows
    ]
    table.show(table.fitted([head, *cells], columns(sys.stdout)))


def free_disk(folder: Path | None) -> int | None:
    """Free bytes on the disk where `folder` is, or would be; None without a folder."""
    if folder is None:
        return None
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
