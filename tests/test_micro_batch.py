"""How many passes over the layers a prompt takes: as few as free memory allows, whose estimate is not below what is used."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.engine import micro_batch
from cacheroute.engine.flash_attention import LEAST, FlashAttention
from cacheroute.engine.micro_batch import MicroBatches
from cacheroute.files import MIB
from cacheroute.model import context_memory, experts, gguf_file
from cacheroute.model.context_memory import ROOM
from cacheroute.routing import budget as budgets
from support import tiny_models
from support.systems import LINUX


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write("qwen3moe", tmp_path_factory.mktemp("model") / "m.gguf", n_layer=4)


def batches(model: Path, n_ctx: int = 4096, **settings: Any) -> MicroBatches:
    header = gguf_file.read(model)
    settings = {"flash_attn": FlashAttention.NEVER, "all_outputs": False} | settings
    return MicroBatches(header, experts.layout(header), n_ctx=n_ctx, **settings)


def plan(
    monkeypatch: pytest.MonkeyPatch, model: Path, free: int | None, n_tokens: int = 4000, **settings: Any
) -> micro_batch.Plan:
    monkeypatch.setattr(micro_batch, "available_memory", lambda **_: free)
    made = batches(model, **settings)
    return made.plan(n_tokens, 0, budgets.parse("25%", experts.layout(gguf_file.read(model))), 0)


@pytest.mark.parametrize("free", [None, 2**40])
def test_one_pass_where_memory_allows(monkeypatch: pytest.MonkeyPatch, model: Path, free: int | None) -> None:
    made = plan(monkeypatch, model, free)
    assert (made.passes, made.length) == (1, 4000)
    layout = experts.layout(gguf_file.read(model))
    assert (
        made.ahead == max(layer.resident_bytes for layer in layout.layers) * layout.n_expert * 3 // 4
    )  # what the budget has not


@pytest.mark.parametrize("free_mib", [20, 40, 80, 160])
def test_as_few_passes_as_fit_and_all_of_them_alike(monkeypatch: pytest.MonkeyPatch, model: Path, free_mib: int) -> None:
    made = plan(monkeypatch, model, free_mib * MIB)
    assert made.passes > 1 and made.length * (made.passes - 1) < 4000 <= made.length * made.passes
    assert made.compute <= free_mib * MIB
    header = gguf_file.read(model)
    each = context_memory.compute_bytes(header, experts.layout(header), 1, 4000, flash_attn=False, n_outputs=0)
    assert (4000 // (made.passes - 1)) * each > free_mib * MIB * 0.7  # one pass less would not fit


def test_however_little_is_free_some_tokens_are_computed_together(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    made = plan(monkeypatch, model, 0)
    assert (made.passes, made.length, made.ahead) == (4000 // LEAST, LEAST + 1, 0)


@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 127, 128, 191, 1124])
def test_no_pass_is_so_short_that_it_is_computed_in_another_way(
    monkeypatch: pytest.MonkeyPatch, model: Path, n_tokens: int
) -> None:
    cuts = plan(monkeypatch, model, 0, n_tokens).cuts()
    lengths = [end - begin for begin, end in itertools.pairwise(cuts)]
    assert cuts[0] == 0 and cuts[-1] == n_tokens and min(lengths) >= min(n_tokens, LEAST) and max(lengths) < ROOM == 2 * LEAST


def test_the_users_length_is_kept(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    made = plan(monkeypatch, model, 0, length=300)
    assert (made.passes, made.length) == (14, 300)


def test_what_a_pass_has_taken_before_is_there_for_the_next(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    layout = experts.layout(gguf_file.read(model))
    budget, made = budgets.parse("25%", layout), batches(model)
    monkeypatch.setattr(micro_batch, "available_memory", lambda **_: 2**40)
    first = made.plan(2000, 0, budget, budget.nbytes)
    monkeypatch.setattr(micro_batch, "available_memory", lambda **_: 32 * MIB)
    assert made.plan(2000, 0, budget, budget.nbytes).passes == first.passes == 1


def test_a_model_that_is_loaded_whole_takes_llama_cpps_passes_or_what_fits(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    header = gguf_file.read(model)
    layout = experts.layout(header)
    loaded = header.nbytes + context_memory.least_bytes(header, 4096)
    each = context_memory.compute_bytes(header, layout, 1, 4096, flash_attn=False, n_outputs=0)
    for free, length in ((None, 512), (2**40, 512), (0, ROOM), ((loaded + 200 * each) * 16 // 15 + 16, 200)):
        monkeypatch.setattr(micro_batch, "available_memory", lambda free=free: free)
        assert micro_batch.length_beside_all(header, layout, 4096, flash_attn=FlashAttention.NEVER, all_outputs=False) == length


def test_scores_of_every_token_count(model: Path) -> None:
    header = gguf_file.read(model)
    layout = experts.layout(header)
    each = [context_memory.compute_bytes(header, layout, 1, 100, flash_attn=False, n_outputs=n) for n in (0, 1)]
    assert each[1] - each[0] == context_memory.output_bytes(header, 1) > 0


GROWTH = """
import sys
from cacheroute import Llama
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
settings = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
flash_attn = {"never": False, "always": True, "prompts": None}[sys.argv[2]]
llm = Llama(sys.argv[1], budget=4, io="direct", flash_attn=flash_attn, **settings)
llm.eval(list(range(3, 40)))
llm.reset()
plan, before = llm.plan(1500), resident()
llm.eval([3 + i % 50 for i in range(1500)])
print(plan.compute, resident() - before)
"""


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2"])
@pytest.mark.parametrize("flash_attn", ["never", "always", "prompts"])
def test_the_estimate_is_not_below_what_a_pass_takes(tmp_path: Path, arch: str, flash_attn: str) -> None:
    path = tiny_models.write(arch, tmp_path / "m.gguf", n_embd=256, n_ff=256)
    done = subprocess.run([sys.executable, "-c", GROWTH, str(path), flash_attn], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    estimate, growth = map(int, done.stdout.split())
    assert growth < 1.1 * estimate + 8 * MIB


def test_several_passes_give_the_logits_of_that_split(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(3, 60, 150)]
    found = []
    for sizes in ({}, {"n_batch": 50, "n_ubatch": 50}):
        llm = Llama(str(model), budget=4, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **sizes)
        if not sizes:
            made = micro_batch.Plan(150, 50, 3, 0, 0)
            monkeypatch.setattr(llm._batches, "plan", lambda *_, made=made: made)
        llm.eval(tokens)
        found.append(np.array(llm.scores[:150]))
        llm.close()
    assert np.array_equal(*found)


@pytest.mark.parametrize("n_tokens", [130, 700])
def test_an_answer_does_not_depend_on_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, model: Path, n_tokens: int
) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(3, 60, n_tokens)]
    found = []
    for free in (2**40, 0):
        llm = Llama(str(model), budget=4, n_ctx=1024, n_threads=2, logits_all=True, verbose=False)
        monkeypatch.setattr(micro_batch, "available_memory", lambda free=free, **_: free)
        assert (llm.plan(n_tokens).passes == 1) == bool(free)
        llm.eval(tokens)
        found.append(np.array(llm.scores[:n_tokens]))
        llm.close()
    assert np.array_equal(*found)
