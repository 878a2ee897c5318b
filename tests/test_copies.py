"""Quantisations of one model: what makes two files one, what they are called, and how many experts of each fit some memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import UsageError
from cacheroute.files import MIB
from cacheroute.model import copies, experts, gguf_file
from cacheroute.routing import budget as budgets
from support import tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of one model in two types, and models that differ from them in one thing each."""
    path = tmp_path_factory.mktemp("copies")
    for name, changes in {
        "m-F32": {"quant": "F32", "dense_quant": "F32"},
        "m-F16": {},
        "experts": {"n_expert": 16},
        "width": {"n_ff": 64},
        "words": {"words": ("other", "words", "than", "those")},
        "layers": {"n_layer": 3},
    }.items():
        wide: dict[str, Any] = {"n_ff": 256}  # so that whole pages take little more than the experts
        tiny_models.write("qwen3moe", path / f"{name}.gguf", **wide | changes)
    tiny_models.write("llama", path / "arch.gguf")
    return path


def test_types_may_differ(folder: Path) -> None:
    found = copies.read([folder / "m-F32.gguf", folder / "m-F16.gguf"])
    assert [c.name for c in found] == ["F32", "F16"]
    assert found[0].layout.all_expert_bytes == 2 * found[1].layout.all_expert_bytes
    assert found[0].fingerprint != found[1].fingerprint


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("experts", "its qwen3moe.expert_count is 16, not 32"),
        ("width", "is 64, not 256"),
        ("words", "its tokenizer is another one (tokenizer.ggml.tokens differs)"),
        ("layers", "its qwen3moe.block_count is 3, not 2"),
        ("arch", "its architecture is llama, not qwen3moe"),
    ],
)
def test_another_model_is_refused(folder: Path, other: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        copies.read([folder / "m-F16.gguf", folder / "m-F32.gguf", folder / f"{other}.gguf"])
    message = str(e.value)
    assert said in message and message.startswith(f"{folder / other}.gguf is no copy of the model in {folder / 'm-F16.gguf'}")
    assert message.endswith("give quantisations of one model.") and "\n" not in message


def test_a_file_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.gguf"
    again.write_bytes((folder / "m-F16.gguf").read_bytes())
    with pytest.raises(UsageError, match="are the same file"):
        copies.read([folder / "m-F16.gguf", folder / "m-F32.gguf", again])


@pytest.mark.parametrize(
    ("stems", "names"),
    [
        (["Qwen3-30B-Q4_K_M", "Qwen3-30B-Q3_K_S"], ["Q4_K_M", "Q3_K_S"]),
        (["model-Q4_K_M", "model-Q4_K_S"], ["Q4_K_M", "Q4_K_S"]),
        (["model", "model-Q4"], ["model", "model-Q4"]),
        (["a-00001-of-00002", "b-00001-of-00003"], ["a", "b"]),
        (["one"], ["one"]),
    ],
)
def test_names_are_what_files_differ_in(stems: list[str], names: list[str]) -> None:
    assert copies.names([Path(f"/x/{stem}.gguf") for stem in stems]) == names


def test_files_of_one_name_are_called_by_their_paths() -> None:
    paths = [Path("/a/m.gguf"), Path("/b/m.gguf")]
    assert copies.names(paths) == ["/a/m.gguf", "/b/m.gguf"]


def test_memory_in_bytes_and_experts_in_it(folder: Path) -> None:
    small, large = (experts.layout(gguf_file.read(folder / f"m-{kind}.gguf")) for kind in ("F16", "F32"))
    half = budgets.in_bytes("50%", small)
    assert half == budgets.parse("50%", small).nbytes == 16 * small.resident_bytes
    assert budgets.in_bytes("3MiB", small) == 3 * MIB == budgets.in_bytes(" 3mib ", small)
    assert budgets.of_bytes(half, small) == 16
    assert budgets.of_bytes(half, large) == half // large.resident_bytes < 16
    assert budgets.of_bytes(small.all_expert_bytes, small) == small.n_expert  # loaded whole, it takes no whole pages
    assert (budgets.of_bytes(small.all_expert_bytes - 1, small) or 0) < small.n_expert
    assert budgets.of_bytes(small.n_used * small.resident_bytes - 1, small) is None
    assert budgets.of_bytes(small.n_used * small.resident_bytes, small) == small.n_used


@pytest.mark.parametrize("text", ["auto", "x", "101%", "3"])
def test_what_is_no_memory_is_refused(folder: Path, text: str) -> None:
    layout: Any = experts.layout(gguf_file.read(folder / "m-F16.gguf"))
    with pytest.raises(UsageError):
        budgets.in_bytes(text, layout)
