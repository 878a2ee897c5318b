"""The live engine keeps its budget: bytes of experts in memory, by its own count and by the kernel's, token by token."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from cacheroute import Llama
from cacheroute.engine.hook import _api
from cacheroute.errors import UsageError
from cacheroute.native import bindings
from support import oracle, tiny_models
from support.expert_file import PAGE, on_a_disk, pages_in_memory
from support.hook_abi import CCallback, CHook

CAPACITY = 6
# experts of 1.1 MiB; the rest is as small as it can be, so that 2,000 tokens pass in seconds
LARGE: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "n_ff": 1536, "n_expert": 16, "n_used": 2, "n_ctx_train": 4096}
SLACK = 1.02  # of the budget, outside prefill


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of 38 MB, nearly all of it experts."""
    path = tiny_models.write("qwen3moe", on_a_disk(tmp_path_factory.mktemp("budget")) / "large.gguf", **LARGE)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 3 tensors of 2 KiB: two share each page."""
    folder = on_a_disk(tmp_path_factory.mktemp("budget"))
    return tiny_models.write("qwen3moe", folder / "small.gguf", n_ff=16, n_expert=24, n_used=2, n_ctx_train=4096)


@contextmanager
def loaded(path: Path, **options: Any) -> Iterator[Llama]:
    """A loaded model, closed at the end: the next one could not evict what this one maps."""
    options = {"budget": CAPACITY, "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
    llm = Llama(str(path), **options)
    try:
        yield llm
    finally:
        llm.close()


def tokens(llm: Llama, n: int, seed: int = 0) -> list[int]:
    """Any tokens, each as likely as any other."""
    return [int(t) for t in np.random.default_rng(seed).integers(3, llm.n_vocab(), n)]


def text(llm: Llama, n: int) -> list[int]:
    """Tokens as skewed as words are, so that a cache helps."""
    words = 1 / np.arange(1, llm.n_vocab() - 2) ** 1.5
    return [int(t) for t in np.random.default_rng(0).choice(len(words), n, p=words / words.sum()) + 3]


@dataclass
class Seen:
    """What one layer was asked and what it answered, per token."""

    probs: list[list[float]] = field(default_factory=list)
    hidden: list[list[float]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


@contextmanager
def overheard(llm: Llama) -> Iterator[list[Seen]]:
    """Listens between llama.cpp and the hook: per layer, the probabilities asked about and the ids answered."""
    seen = [Seen() for _ in llm.layout.layers]
    native = CHook.from_address(bindings.lib.cr_hook_address(llm._hook.handle))

    def select(user_data: int, event: Any) -> None:
        native.select(user_data, event)
        e = event.contents
        seen[e.il].probs += np.ctypeslib.as_array(e.probs, (e.n_tokens, e.n_expert)).tolist()
        seen[e.il].hidden += np.ctypeslib.as_array(e.hidden, (e.n_tokens, e.n_embd)).tolist()
        seen[e.il].ids += np.ctypeslib.as_array(e.ids, (e.n_tokens, e.n_used)).tolist()

    ours = CHook.of(CCallback(select), native.reweight, native.user_data, native.source)
    _api.llama_set_expert_hook(llm._ctx.ctx, ctypes.addressof(ours))
    try:
        yield seen
    finally:
        _api.llama_set_expert_hook(llm._ctx.ctx, ctypes.addressof(native))


def resident(llm: Llama, layer: int) -> set[int]:
    mask = (ctypes.c_uint8 * llm.layout.n_expert)()
    bindings.lib.cr_hook_resident(llm._hook.handle, layer, mask)
    return {e for e, r in enumerate(mask) if r}


def pages_of(llm: Llama, layer: int, expert: int) -> set[int]:
    """Pages of the file that an expert touches."""
    starts = [(t.offset + expert * t.expert_bytes, t.expert_bytes) for t in llm.layout.layers[layer].tensors]
    return {p for start, n in starts for p in range(start // PAGE, (start + n - 1) // PAGE + 1)}


def counted(llm: Llama) -> int:
    """Resident bytes as the store counts them; any thread may ask."""
    return int(bindings.lib.cr_hook_resident_bytes(llm._hook.handle))


def measured(llm: Llama) -> int:
    """Resident bytes of a file of this user, by the kernel's count."""
    nbytes = llm.measure_resident()
    assert nbytes is not None
    return nbytes


def during(llm: Llama, work: Callable[[], None]) -> tuple[int, int]:
    """Most bytes in memory while `work` runs, watched by another thread: as the store counts, as the kernel does."""
    most, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            before, kernel, after = counted(llm), measured(llm), counted(llm)
            most[0] = max(most[0], before, after)
            # the kernel is asked tensor by tensor: what moved meanwhile would be counted twice
            most[1] = max(most[1], kernel if before == after else 0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return most[0], most[1]


@pytest.mark.parametrize("routing, eviction", [("original", "lru"), ("cache-prior:lambda=0.2", "score")])
def test_2000_tokens_stay_within_the_budget(large: Path, routing: str, eviction: str) -> None:
    with loaded(large, n_ctx=2048, routing=routing, eviction=eviction) as llm:
        assert llm.layout.layers[0].expert_bytes >= 1 << 20
        limit = llm.budget.nbytes * SLACK
        with llm.decoding():
            for i, token in enumerate(text(llm, 2000)):
                llm.eval([token])
                assert counted(llm) <= limit, f"token {i}"
                if i % 20 == 0:
                    assert measured(llm) == counted(llm), f"token {i}"
        stats = llm.stats()
        assert stats.decode.tokens == 2000
        assert stats.decode.evictions > 100  # the budget was felt
        assert 0.9 * llm.budget.nbytes <= stats.resident_bytes == counted(llm)  # and used
        if routing != "original":
            assert stats.decode.swapped > 0


def test_within_a_token_the_budget_is_exceeded_by_what_is_being_read(large: Path) -> None:
    """A token's reads start before its evictions end, so that the device does not wait: K experts of one layer at most."""
    with loaded(large) as llm, llm.decoding():

        def decode() -> None:
            for token in tokens(llm, 100):
                llm.eval([token])

        over = llm.layout.n_used * llm.layout.layers[0].expert_bytes
        most, _ = during(llm, decode)
        assert most <= llm.budget.nbytes * SLACK + over


def test_small_experts_are_counted_in_whole_pages(small: Path) -> None:
    with loaded(small, n_ctx=2048) as llm, llm.decoding():
        for i, token in enumerate(tokens(llm, 1000)):
            llm.eval([token])
            assert counted(llm) <= llm.budget.nbytes, f"token {i}"
            if i % 10 == 0:
                assert measured(llm) == counted(llm), f"token {i}"
        assert llm.stats().decode.evictions > 100


def test_a_prompt_exceeds_the_budget_by_one_layer_at_most_and_only_while_it_runs(large: Path) -> None:
    # two batches of two micro-batches, each of which needs nearly all experts of each layer; slow enough to be watched
    with loaded(large, n_batch=64, n_ubatch=32, flash_mbps=200) as llm, overheard(llm) as seen:
        prompt = tokens(llm, 128)
        most, kernel = during(llm, lambda: llm.eval(prompt))
        needed = {e for ids in seen[0].ids[:32] for e in ids}
        assert len(needed) > CAPACITY + 4, "this prompt does not press the budget"

        layer = llm.layout.layers[0].expert_bytes
        over = (llm.layout.n_expert - CAPACITY) * layer
        assert llm.budget.nbytes + layer < kernel
        assert max(most, kernel) <= llm.budget.nbytes * SLACK + over

        assert counted(llm) == measured(llm) <= llm.budget.nbytes * SLACK
        with llm.decoding():  # and the budget holds from the first token on
            for token in tokens(llm, 10, seed=1):
                llm.eval([token])
                assert counted(llm) == measured(llm) <= llm.budget.nbytes * SLACK


@pytest.mark.parametrize("eviction", oracle.EVICTIONS)
def test_after_a_prompt_the_last_distinct_experts_are_in_memory(large: Path, eviction: str) -> None:
    with loaded(large, n_batch=64, n_ubatch=32, eviction=eviction, logits_all=True) as llm:
        with overheard(llm) as seen:
            llm.eval(tokens(llm, 100))
        for layer, said in enumerate(seen):
            assert len(said.ids) == 100
            used = [e for p, ids in zip(said.probs, said.ids, strict=True) for e in sorted(ids, key=lambda e: (p[e], -e))]
            last = oracle.last_distinct(used, CAPACITY)
            assert len(last) == CAPACITY and resident(llm, layer) == last
        assert measured(llm) == counted(llm)
        path = llm.layout.paths[0]
        experts = {p for layer in range(len(seen)) for e in range(llm.layout.n_expert) for p in pages_of(llm, layer, e)}
        assert not pages_in_memory(path) & experts  # as another process sees it


@pytest.mark.parametrize(
    "spec, routing",
    [
        ("cache-prior:lambda=0.3:j=1", oracle.Routing("cache-prior", lam=0.3, j=1)),
        ("max-rank:m=8:j=1:max-loss=0.25", oracle.Routing("max-rank", m=8, j=1, max_loss=0.25)),
        ("drop-cold:f=0.9", oracle.Routing("drop-cold", f=0.9)),
        ("dynamic-k:p=0.6", oracle.Routing("dynamic-k", p=0.6, k=1)),
        ("speculate", oracle.Routing("speculate", j=0)),
        ("speculate:lambda=0.2:j=1", oracle.Routing("speculate", lam=0.2, j=1)),
    ],
)
def test_live_choices_match_the_oracle(small: Path, spec: str, routing: oracle.Routing) -> None:
    """Prompt and decode of a live model, replayed by the oracle from the probabilities and hidden states that the hook saw."""
    weights = {t.name: np.array(t.data, np.float64) for t in GGUFReader(small).tensors if t.tensor_type.name == "F32"}
    with loaded(small, routing=spec, eviction="score") as llm:
        with overheard(llm) as seen:
            llm.eval(tokens(llm, 40))
            with llm.decoding():
                for token in tokens(llm, 150, seed=1):
                    llm.eval([token])
        misses = swapped = 0
        for i, said in enumerate(seen):
            layer = oracle.Layer(llm.layout.n_expert, llm.layout.n_used, CAPACITY, routing, "score")
            n_prompt = len(said.ids) - 150  # 40, but in the last layer: the last token alone
            for t, (probs, ids) in enumerate(zip(said.probs, said.ids, strict=True)):
                mass = np.array(probs)
                predicted = None
                if i and t >= n_prompt:
                    own, its = (weights[f"blk.{n}.ffn_norm.weight"] for n in (i - 1, i))
                    hidden = np.array(seen[i - 1].hidden[t - len(said.ids)])
                    predicted = weights[f"blk.{i}.ffn_gate_inp.weight"] @ (hidden / own * its)
                event = layer.step(np.log(mass), mass, prefill=t < n_prompt, predicted=predicted)
                assert ids == event.run + event.run[:1] * (llm.layout.n_used - len(event.run)), f"token {t}"
                misses += len(event.missed) if t >= n_prompt else 0
                swapped += event.swapped
        decode = llm.stats().decode
        assert (decode.misses, decode.swapped) == (misses, swapped)
        assert swapped + decode.dropped > 0


def test_prompt_tokens_are_counted(small: Path) -> None:
    with loaded(small, n_batch=64) as llm:
        llm.eval(tokens(llm, 100))  # upstream's last layer computes only the tokens with wanted logits
        assert llm.stats().prefill.tokens == 100


def test_a_prompt_of_one_token(large: Path) -> None:
    with loaded(large) as llm:
        llm.eval(tokens(llm, 1))
        assert llm.stats().prefill.tokens == 1
        n = llm.layout.n_used
        assert counted(llm) == measured(llm) <= n * llm.layout.expert_bytes * SLACK
        assert llm.create_completion([5], max_tokens=3)["usage"]["completion_tokens"] == 3


def test_an_empty_prompt_is_a_sentence(small: Path) -> None:
    with loaded(small) as llm:
        llm.eval([])  # nothing to do
        assert llm.n_tokens == 0 and llm.stats().prefill.tokens == 0
        with pytest.raises(UsageError, match="give a prompt that is not empty"):
            next(llm.generate([]))
        with pytest.raises(UsageError, match="give a prompt that is not empty"):
            llm.create_completion([], max_tokens=2)
        llm.eval([5])  # and it still works
        assert llm.n_tokens == 1


def test_a_full_context_stops_with_a_message(small: Path) -> None:
    with loaded(small) as llm:
        with pytest.raises(UsageError, match=r"^257 tokens do not fit the context of 256; .*\(-c, n_ctx=\)\.$"):
            llm.eval([5] * 257)
        assert llm.n_tokens == 0
        # a generation ends where the context does: 254 evaluated, and one that was sampled and has no room
        assert sum(1 for _ in llm.generate([5, 6], temp=0.0)) == 255
        assert llm.n_tokens == 256
        assert counted(llm) == measured(llm) <= llm.budget.nbytes
        # upstream's own limit, quietly at the end
        done = llm.create_completion([5, 6], max_tokens=1000, logit_bias={llm.token_eos(): -1e9})
        assert done["choices"][0]["finish_reason"] == "length"
