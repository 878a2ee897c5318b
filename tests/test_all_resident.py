"""A budget of all: the model is llama.cpp's own, loaded as it loads one by default, with counters; nothing is read later."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from cacheroute import CacherouteError, Llama
from cacheroute.engine import stores
from cacheroute.engine.embeddings import tensor_address
from cacheroute.engine.flash_attention import FlashAttention
from cacheroute.errors import UsageError
from cacheroute.files import MIB
from cacheroute.install import processor
from cacheroute.model import context_memory, experts, gguf_file, memory_plan
from support import tiny_models
from support.cli import invoke
from support.decoding import assert_same_bits, last_logits

Floats = npt.NDArray[np.float32]
SIZES: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 60, 620)]
N_PROMPT = 600  # more than a micro-batch of llama.cpp


@pytest.fixture(scope="module")
def repackable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of a type that llama.cpp has kernels for in another order."""
    return tiny_models.write("qwen3moe", tmp_path_factory.mktemp("model") / "m.gguf", quant="Q4_0", n_ff=64)


@contextlib.contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[Llama]:
    with contextlib.closing(Llama(str(path), **SIZES | {"budget": "all"} | settings)) as llm:
        yield llm


def logits(llm: llama_cpp.Llama) -> Floats:
    """After the prompt, and after each of the tokens that follow it."""
    llm.reset()
    rows = []
    llm.eval(TOKENS[:N_PROMPT])
    with getattr(llm, "decoding", contextlib.nullcontext)():
        for token in [None, *TOKENS[N_PROMPT:]]:
            if token is not None:
                llm.eval([token])
            rows.append(last_logits(llm))
    return np.array(rows)


@pytest.mark.parametrize("arch", tiny_models.ARCHS)
def test_it_is_llama_cpp_as_that_loads_a_model(arch: str, tmp_path: Path) -> None:
    path = tiny_models.write(arch, tmp_path / "m.gguf", quant="MXFP4" if arch == "gpt-oss" else "Q4_0", n_embd=64, n_ff=64)
    with contextlib.closing(llama_cpp.Llama(str(path), flash_attn_type=FlashAttention.PROMPTS, **SIZES)) as stock:
        expected = logits(stock)
    with loaded(path) as llm:
        for routing in ("original", "cache-prior:lambda=1", "original"):
            llm.configure(budget="all", routing=routing)
            assert_same_bits(logits(llm), expected)
            s = llm.stats()
            layers = len(llm.layout.layers)
            assert s.io == "load" and s.resident_bytes == llm.layout.all_expert_bytes and llm.measure_resident() is None
            assert (s.prefill.tokens, s.decode.tokens) == (N_PROMPT, len(TOKENS) - N_PROMPT)
            assert s.decode.hits == s.decode.examined == s.decode.tokens * layers * s.n_used
            for c in (s.prefill, s.decode):
                assert c.examined == c.hits > 0
                assert (c.misses, c.swapped, c.evictions, c.reads, c.read_bytes, c.distinct_bytes) == (0,) * 6
        llm.configure(budget="all", routing=None)
        assert_same_bits(logits(llm), expected)


def test_experts_are_repacked_where_llama_cpp_does_it_and_the_user_allows_it(repackable: Path) -> None:
    def address(llm: Any) -> int | None:
        """None in a buffer of another order."""
        return tensor_address(llm._model.model, "blk.0.ffn_down_exps.weight")

    with contextlib.closing(llama_cpp.Llama(str(repackable), **SIZES)) as stock, loaded(repackable) as llm:
        assert (address(llm) is None) == (address(stock) is None)
    with loaded(repackable, use_extra_bufts=False) as plain, loaded(repackable, io="direct", use_extra_bufts=False) as mapped:
        assert address(plain) is not None and mapped.io == "direct"
        assert str(repackable) in maps(address(mapped)) and str(repackable) not in maps(address(plain))
        tokens = TOKENS[:20]
        for model in (plain, mapped):
            model.eval(tokens)
        assert_same_bits(*(last_logits(m) for m in (plain, mapped)))


_WHICH = """
import llama_cpp, sys
from cacheroute.engine.embeddings import tensor_address
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False)
print(*(tensor_address(llm._model.model, f"blk.0.{name}.weight") is None for name in ("attn_q", "ffn_down_exps")))
"""


@pytest.mark.skipif("avx2" not in processor.features(), reason="without AVX2 llama.cpp has no tiled kernels")
@pytest.mark.skipif("amx_int8" in processor.features(), reason="AMX takes the weights first")
def test_weights_stay_as_they_are_for_the_tiled_kernels(tmp_path: Path) -> None:
    """patches/0010-tiled-not-repacked.patch: experts, and dense weights with AVX-512 VNNI; without those kernels as upstream."""
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", mix="Q4_K_M", n_embd=256, n_ff=256)

    def repacked(tiled: str) -> list[str]:
        command = [sys.executable, "-c", _WHICH, str(path)]
        done = subprocess.run(command, env=os.environ | {"GGML_CPU_TILED_MM": tiled}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert repacked("0") == ["True", "True"]
    assert repacked("1") == [str("avx512_vnni" not in processor.features()), "False"]


def maps(address: int | None) -> str:
    """What the kernel says of the mapping that an address is in."""
    assert address is not None
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError(address)


@pytest.mark.parametrize("io", ["auto", "load"])
@pytest.mark.parametrize("budget", ["all", "100%", 32, "9GiB"])
def test_every_way_to_say_all_loads_the_experts(tiny: Path, budget: str | int, io: str) -> None:
    with loaded(tiny, budget=budget, io=io) as llm:
        assert llm.io == "load" and llm.n_batch == llm.context_params.n_ubatch == 512


def test_a_smaller_budget_or_another_io_leaves_them_in_the_file(tiny: Path) -> None:
    for settings in ({"budget": 31}, {"io": "buffered"}, {"io": "direct"}, {"flash_mbps": 500}, {"prefetch": 1}):
        with loaded(tiny, **settings) as llm:
            assert llm.io == settings.get("io", llm.io) != "load"
            llm.configure(budget="all")
            llm.eval(TOKENS[:8])
            assert llm.io != "load" and llm.stats().prefill.misses > 0
            with pytest.raises(UsageError, match="loaded with its experts left in the file; load it again"):
                llm.configure(budget="all", io="load")


def test_what_needs_reads_does_not_go_with_load() -> None:
    for holds_all, reads, said in ((False, "", "give it a budget of all"), (True, "a prefetch", "a prefetch has no meaning")):
        with pytest.raises(UsageError, match=said):
            stores.choose("load", holds_all=holds_all, reads=reads)


def test_a_loaded_model_can_have_no_smaller_budget(tiny: Path) -> None:
    with loaded(tiny) as llm:
        for settings in ({"budget": "50%"}, {"budget": None}, {"budget": "all", "io": "direct"}):
            with pytest.raises(UsageError, match="loaded with all of its experts in memory; for a smaller budget or another io"):
                llm.configure(**settings)
        with pytest.raises(UsageError, match="no reads to pace"):
            llm.flash_mbps = 10
        llm.eval(TOKENS[:8])  # and goes on
        again = pickle.loads(pickle.dumps(llm))
    with contextlib.closing(again):
        assert again.io == "load" and again.stats().resident_bytes == again.layout.all_expert_bytes


def test_whatever_happens_to_the_sequence_all_experts_are_there(tiny: Path) -> None:
    with loaded(tiny, io="direct") as mapped:
        mapped.eval(TOKENS[:8])
        mark = mapped.checkpoint(sequence=True)  # of a cache that is not full
        assert mapped.stats().prefill.misses > 0
    with loaded(tiny) as llm:

        def decode() -> None:
            with llm.decoding():
                for token in TOKENS[:20]:
                    llm.eval([token])

        llm.return_to(mark)
        decode()
        llm.reset()
        decode()
        with llm.tracing(lambda records: None):
            decode()
        decode()
        llm.return_to(llm.checkpoint())
        decode()
        assert llm.stats().decode.tokens == 100 and llm.stats().decode.misses == 0


def test_what_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_layer=8)  # a layer's reserve is little of all experts
    header = gguf_file.read(tiny)
    layout = experts.layout(header)
    n_ctx = SIZES["n_ctx"]
    compute = context_memory.compute_bytes(header, layout, min(n_ctx, 128), n_ctx, flash_attn=True, n_outputs=1)
    needed = header.nbytes + context_memory.least_bytes(header, n_ctx) + compute + 48 * MIB
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: needed - 1)
    with (
        pytest.raises(UsageError, match=r"needs .* of experts\), and .* are free: --budget (\d+) fits\.$") as refused,
        loaded(tiny),
    ):
        pass
    fits = int(str(refused.value).split("--budget ")[1].split()[0])
    assert layout.n_used <= fits < layout.n_expert
    for settings in ({"budget": fits, "io": "direct"}, {"budget": fits}):
        with loaded(tiny, **settings) as llm:
            llm.eval([5])
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: needed)
    with loaded(tiny) as llm:
        llm.eval([5])


def test_a_kept_prompt_belongs_to_the_repacking(repackable: Path, tmp_path: Path) -> None:
    file = tmp_path / "p"
    with loaded(repackable) as llm:
        next(llm.generate(TOKENS[:8], temp=0))
        llm.save_prompt(file)
        assert llm.load_prompt(file) == TOKENS[:8]
    with (
        loaded(repackable, io="direct") as llm,
        pytest.raises(UsageError, match=r"loaded with the model .--budget all., and here it is left in the file"),
    ):
        llm.load_prompt(file)


def test_generate_says_so(repackable: Path) -> None:
    asked = ("generate", "-m", repackable, "--raw", "-p", "the cat", "-n", 4, "-c", 64, "-t", 1, "--budget", "all", "-o", "json")
    done = invoke(*asked, "-v")
    first, plan, line = done.stderr.splitlines()
    assert (
        "of experts in memory" in first
        and plan.endswith("all experts in memory, as llama.cpp loads them")
        and "| miss 0.0% |" in line
        and "resident all " in line
    )
    assert json.loads(done.stdout)["stats"]["io"] == "load"
    refused = invoke(*asked, "--io", "load", "--prefetch", 2)
    assert refused.exit_code == 2 and "leave it out, or take io direct" in refused.stderr


def test_bench_loads_them_for_that_budget_alone(repackable: Path) -> None:
    few = (
        "bench",
        "-m",
        repackable,
        "-p",
        8,
        "-n",
        4,
        "-r",
        1,
        "-t",
        1,
        "--routing",
        "original",
        "--eviction",
        "lru",
        "-o",
        "json",
    )
    alone = invoke(*few, "--budget", "all")
    assert alone.stderr == ""
    for row in json.loads(alone.stdout):
        assert (row["io"], row["miss_rate"], row["read_mib_per_token"], row["resident_mib"]) == ("load", 0, 0, None)
    both = invoke(*few, "--budget", "50%,all")
    assert "load" not in {row["io"] for row in json.loads(both.stdout)} and "alone it loads them as llama.cpp does" in both.stderr
    for more, said in (("all", "--io", "load,direct"), "stands alone"), (("50%", "--io", "load"), "a budget of all"):
        refused = invoke(*few, "--budget", *more)
        assert refused.exit_code == 2 and said in refused.stderr


def test_the_floor_needs_reads(tiny: Path) -> None:
    from cacheroute.bench import floor

    with loaded(tiny) as llm, pytest.raises(CacherouteError, match="no floor"):
        floor.measure(llm, TOKENS, 8, 4)
