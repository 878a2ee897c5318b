"""`cacheroute inspect`: describes a model, with a table of budgets."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from cacheroute.cli import table
from cacheroute.cli.defaults import is_typed
from cacheroute.cli.terminal import columns, folded
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import MIB, as_json, printable
from cacheroute.model import catalogue
from cacheroute.model import report as inspector
from cacheroute.model.report import Report
from cacheroute.routing import tuned


def inspect(
    ctx: typer.Context,
    file: Annotated[str | None, typer.Argument(metavar="PATH|NAME", help="A GGUF file or a name. [default: demo]")] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="text or json (sizes in bytes).")] = "text",
    model: Annotated[str | None, typer.Option("-m", "--model", hidden=True)] = None,
) -> None:
    """Describe a model and the memory of each budget.

    Reads only its header, and what `tune` has measured of its router.
    """
    if output not in ("text", "json"):
        raise UsageError(f"There is no output {output!r}; there are text and json.")
    if file is not None and is_typed(ctx, "model"):
        raise UsageError("Name one model.")
    report, past = inspector.inspect(catalogue.resolve(model if file is None else file)), None
    with contextlib.suppress(CacherouteError):  # no folder for what has been measured
        past = tuned.mass_past_k(report.path)
    if output == "json":
        print(as_json({**asdict(report), "path": str(report.path), "mass_past_k": past}))
    else:
        print("\n".join(_text(report, past, columns(sys.stdout))))


def _text(r: Report, past: float | None = None, width: int | None = None) -> list[str]:
    """`past`: the share of the router's mass past rank K, where `tune` has measured it; `width`: columns of a terminal."""
    shards = f" and {r.shards - 1} more shard{'s' if r.shards > 2 else ''}" if r.shards > 1 else ""
    prediction = f" and {r.prediction_layers} for multi-token prediction, which do not run" if r.prediction_layers else ""
    groups = f", {r.groups_used} of {r.groups} groups" if r.groups > 1 else ""
    bias = ", selection bias" if r.selection_bias else ""
    facts = [
        ("model", r.name),
        ("file", f"{r.path}{shards}"),
        ("architecture", r.architecture),
        ("layers", f"{r.blocks}, {r.layers} with experts{prediction}"),
        ("experts", f"{r.experts} a layer, {r.used} used" + (f", shared ones as wide as {r.shared:g}" if r.shared else "")),
        ("gating", f"{r.gating}{bias}{groups}"),
        *([] if past is None else [("router", f"{100 * past:.0f}% of its mass past rank {r.used}, as `tune` measured it")]),
        ("context", f"{r.context} tokens"),
        ("one expert", f"{_sizes(r)}, {_mib(r.expert_bytes_all_layers)} in all layers"),
        ("all experts", _mib(r.all_expert_bytes)),
        ("always in memory", _mib(r.dense_bytes)),
        *([("read by row", f"{_mib(r.embedding_bytes)} of token embeddings")] if r.embedding_bytes else []),
        ("total", _mib(r.total_bytes)),
    ]
    lines = [line for key, value in facts for line in folded(f"{key:17} {printable(value)}", width, 18)]
    tensors = [["tensors", "MiB", "types"]]
    for c in r.tensors:
        tensors.append([c.name, f"{c.nbytes / MIB:.1f}", ", ".join(f"{kind} x{n}" for kind, n in c.types.items())])
    budgets = [["budget", "experts", "MiB, at most", "MiB/token if all miss"]]
    for b in r.budgets:
        sizes = (b.resident_bytes, b.worst_read_bytes_per_token)
        budgets.append([b.budget, str(b.experts), *(f"{nbytes / MIB:.1f}" for nbytes in sizes)])
    return [*lines, "", *table.fitted(tensors, width), "", *table.fitted(budgets, width)]


def _sizes(r: Report) -> str:
    """Of one expert in a layer; how many layers have which size, where these are few."""
    if len(r.expert_sizes) == 1:
        return f"{_mib(r.expert_bytes)} a layer"
    if len(r.expert_sizes) > 3:
        sizes = [nbytes for nbytes, _ in r.expert_sizes]
        return f"{_mib(min(sizes))} to {_mib(max(sizes))} a layer"
    return ", ".join(f"{_mib(nbytes)} in {n} layer{'s' if n > 1 else ''}" for nbytes, n in r.expert_sizes)


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.2f} MiB" if nbytes < 10 * MIB else f"{nbytes / MIB:.1f} MiB"
