"""Write a model of random weights in the shape of a real one, for measuring time; what it generates is meaningless.

`python scripts/make_shape_model.py qwen3-30b-a3b --layers 12 --out shape.gguf` writes 4 GB and holds one expert in memory.
Experts, their number and their size are those of models.toml; heads and vocabulary are written here. Types are those that
llama-quantize mixes (quant_mix.py), but of q4_0, which is of one type, as with its --pure. Random weights choose
their experts more evenly than trained ones do: hit rates are not those of the real model, unless `cacheroute bench --replay`
forces its routing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import quant_mix
import random_model

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.model import catalogue

# Name -> architecture, and what models.toml lacks. From each model's config.json on the hub.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen1.5-moe-a2.7b": ("qwen2moe", dict(n_head=16, n_head_kv=16, head_dim=128, n_vocab=151936)),
    "olmoe-1b-7b": ("olmoe", dict(n_head=16, n_head_kv=16, head_dim=128, n_vocab=50304)),
    "deepseek-v2-lite": (
        "deepseek2-softmax",
        dict(n_head=16, head_dim=128, rope_dim=64, q_lora=0, kv_lora=512, n_dense=1, n_ff_dense=10944, n_vocab=102400),
    ),
    "qwen3-30b-a3b": ("qwen3moe", dict(n_head=32, n_head_kv=4, head_dim=128, n_vocab=151936)),
    "mixtral-8x7b": ("llama", dict(n_head=32, n_head_kv=8, head_dim=128, n_vocab=32000)),
    "gpt-oss-20b": ("gpt-oss", dict(n_head=64, n_head_kv=8, head_dim=64, window=128, n_vocab=201088)),
}
TYPES = ("q4_0", *(mix.lower() for mix in quant_mix.MIXES))
BLOCK = 32  # the least of all types

# Random layers that write strongly into the residual stream make all tokens alike, and alike tokens choose the same few
# experts: at 1.0 the misses of a 50% cache fell from .44 in the first to .36 in the last of 16 layers of qwen3-30b-a3b (n_ff
# 64, held-out text), at 0.2 they stay at .42. Trained models are at .28 to .35.
OUTPUT_GAIN = 0.2


def shape(name: str, layers: int | None = None, quant: str = "q4_0", experts: int | None = None) -> dict[str, Any]:
    """Fields of random_model.Shape. `layers`: all layers, dense ones included; None: as many as the model has.

    `experts`: another number of experts that have as many bytes together. Raises UsageError for a number of layers that the
    model does not have, and of experts that do not divide its bytes or are fewer than a token uses.
    """
    entry = catalogue.load_catalogue()[name]
    _, own = SHAPES[name]
    dense = own.get("n_dense", 0)
    whole = entry.layers + dense
    if layers is not None and not dense < layers <= whole:
        raise UsageError(f"{name} has {whole} layers, so give --layers {dense + 1} to {whole}.")
    n_expert = experts or entry.experts
    n_ff, left = divmod(entry.experts * entry.n_ff, n_expert)
    if n_expert < entry.used or left or n_ff % BLOCK:
        raise UsageError(
            f"{name} cannot have {n_expert} experts: a multiple of {BLOCK} has to be left for n_ff, and {entry.used} are used."
        )
    return own | dict(
        name=f"{name} (random weights)",
        n_layer=layers or whole,
        n_embd=entry.n_embd,
        n_expert=n_expert,
        n_used=entry.used,
        n_ff=n_ff,
        n_shared=int(entry.shared),
        **_types(quant),
        output_gain=OUTPUT_GAIN,
        words=frequent_words(),
        n_ctx_train=32768,
    )


def _types(quant: str) -> dict[str, str]:
    """The fields that say which types the matrices have. q4_0 alone: published tables rest on it as it is."""
    kind = quant.upper()
    return {"mix": kind} if kind in quant_mix.MIXES else {"quant": kind, "dense_quant": kind}


def frequent_words() -> tuple[str, ...]:
    """The words of the held-out text, most frequent first: its tokens then repeat as those of a real vocabulary do."""
    text = files("cacheroute").joinpath("data/heldout.txt").read_text(encoding="utf-8")
    return tuple(word for word, _ in Counter(re.findall(r"\w+", text)).most_common())


def write(
    name: str,
    out: Path,
    *,
    layers: int | None = None,
    quant: str = "q4_0",
    experts: int | None = None,
    seed: int = 0,
    **smaller: Any,
) -> Path:
    """Writes the model; `smaller` overrides fields of the shape, for tests."""
    return random_model.write(SHAPES[name][0], out, seed=seed, **(shape(name, layers, quant, experts) | smaller))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--experts", type=int, help="another number of experts of as many bytes together")
    parser.add_argument("--type", choices=TYPES, default="q4_0", help=f"{', '.join(TYPES)} [default: q4_0]", metavar="TYPE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="overwrite")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF to write")
    args = parser.parse_args()
    if args.out.exists() and not args.force:
        print(f"make_shape_model: {args.out} exists; give another name, or --force.", file=sys.stderr)
        return 2
    unfinished = args.out.with_name(args.out.name + ".part")
    try:
        write(args.name, unfinished, layers=args.layers, quant=args.type, experts=args.experts, seed=args.seed)
        unfinished.replace(args.out)
    except CacherouteError as e:
        print(f"make_shape_model: {e}", file=sys.stderr)
        return e.exit_code
    except OSError as e:
        print(f"make_shape_model: {args.out} cannot be written ({e.strerror}).", file=sys.stderr)
        return 1
    finally:
        unfinished.unlink(missing_ok=True)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
