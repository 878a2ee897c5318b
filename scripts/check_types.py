"""Does a model of some quantisation, with experts of real size, keep within its budget and give llama.cpp's own logits?

`python scripts/check_types.py qwen3-30b-a3b --layers 4 --type q4_k_m --folder DIR` writes the shape model to the folder
(make_shape_model.py), runs it unhooked, then with two budgets and both ways of reading, and prints a row for each: what is in
memory after the prompt and after each later token as the store counts it (as the kernel does, or the program ends); the most
above the budget in the prompt, and what the experts of two layers can be above it; MiB asked of the device, and what came.
The model is deleted. Exit code 1: not within these limits, or other logits.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import llama_cpp
import make_shape_model as shapes
import numpy as np
import numpy.typing as npt

from cacheroute import Llama
from cacheroute.engine.flash_attention import FlashAttention
from cacheroute.engine.stats import kernel_counters
from cacheroute.errors import CacherouteError
from cacheroute.files import MIB

COLUMNS = (
    *("shape", "type", "MiB of an expert", "io", "budget, MiB", "resident", "over in the prompt", "two layers"),
    *("asked", "fetched", "same bits"),
)
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_batch": 1024, "n_threads": 2, "n_threads_batch": 2, "verbose": False}

Logits = npt.NDArray[np.float32]


def logits(llm: llama_cpp.Llama, tokens: list[int], n_prompt: int, look: Callable[[], None]) -> Logits:
    """After the prompt and after each later token; `look` is called there, too."""
    rows = []
    for part in (tokens[:n_prompt], *([token] for token in tokens[n_prompt:])):
        with llm.decoding() if isinstance(llm, Llama) and len(part) == 1 else contextlib.nullcontext():
            llm.eval(part)
        rows.append(np.array(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),))))
        look()
    return np.array(rows)


def row(
    path: Path, budget: str, io: str, options: dict[str, Any], tokens: list[int], n_prompt: int, expected: Logits
) -> tuple[list[str], bool]:
    """(cells of the table, whether all is as it should be) of one run."""
    resident: int = 0
    over: int | None = None
    with contextlib.closing(Llama(str(path), budget=budget, io=io, **options)) as llm:
        hook = llm._hook
        assert hook

        def look() -> None:
            nonlocal resident, over
            counted, measured = llm.stats().resident_bytes, llm.measure_resident()
            if measured not in (counted, None):
                raise CacherouteError(f"{counted} bytes are counted as resident, and the kernel says {measured}.")
            over = hook.peak_bytes - llm.budget.nbytes if over is None else over  # the first time, after the prompt
            resident = max(resident, counted)

        before = kernel_counters().device_bytes
        found = logits(llm, tokens, n_prompt, look)
        after = kernel_counters().device_bytes
        stats, layout = llm.stats(), llm.layout
        beyond = [(layout.n_expert - llm.budget.capacity) * layer.resident_bytes for layer in layout.layers]
        assert over is not None
        most = max(one + following for one, following in itertools.pairwise(beyond))
        same = np.array_equal(found.view(np.uint32), expected.view(np.uint32))
        asked = stats.prefill.read_bytes + stats.decode.read_bytes
        sizes = " and ".join(f"{n / MIB:.2f}" for n in sorted({layer.expert_bytes for layer in layout.layers}))
        fetched = "?" if before is None or after is None else f"{(after - before) / MIB:.1f}"
        numbers = [f"{n / MIB:.1f}" for n in (llm.budget.nbytes, resident, over, most, asked)]
    cells = [sizes, io, f"{budget}: {numbers[0]}", *numbers[1:], fetched, "yes" if same else "no"]
    return cells, same and resident <= llm.budget.nbytes and over <= most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=shapes.SHAPES, metavar="NAME", help=", ".join(shapes.SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--type", choices=shapes.TYPES, default="q4_k_m")
    parser.add_argument("--tokens", type=int, default=300, help="of the prompt, computed in two passes [default: 300]")
    parser.add_argument("-n", type=int, default=12, help="tokens after it [default: 12]")
    parser.add_argument("--folder", type=Path, help="for the model, on the disk to read from [default: that of temporary files]")
    args = parser.parse_args()
    try:
        return check(args)
    except CacherouteError as e:
        print(f"check_types: {e}", file=sys.stderr)
        return e.exit_code


def check(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    good, options = True, OPTIONS | {"n_ubatch": -(-args.tokens // 2)}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = shapes.write(args.name, Path(folder) / "m.gguf", layers=args.layers, quant=args.type)
        with contextlib.closing(
            llama_cpp.Llama(str(path), flash_attn_type=FlashAttention.PROMPTS, lazy_mode=3, use_mmap=False, **options)
        ) as plain:
            tokens = [int(t) for t in np.random.default_rng(0).integers(3, plain.n_vocab(), args.tokens + args.n)]
            expected = logits(plain, tokens, args.tokens, lambda: None)
        print("|", " | ".join(COLUMNS), "|")
        print("|---" * len(COLUMNS) + "|", flush=True)
        for io, budget in itertools.product(("direct", "buffered"), ("25%", "50%")):
            cells, right = row(path, budget, io, options, tokens, args.tokens, expected)
            print("|", " | ".join([args.name, args.type, *cells]), "|", flush=True)
            good = good and right
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
