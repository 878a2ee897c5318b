"""`original` through the hook is the unhooked engine, bit for bit; policies change which experts run, never their weights.

Experts stay in the file here; test_all_resident.py has those that are loaded with the model.

The first half tests the patch alone, with hooks written in Python; the second half tests `cacheroute.Llama`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader

from cacheroute import Llama
from cacheroute.native import bindings
from support import tiny_models
from support.decoding import assert_same_bits, last_logits
from support.hook_abi import CCallback, CHook

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

N_PROMPT, N_DECODE, N_UBATCH = 41, 24, 16  # the prompt fills two micro-batches and part of a third
SIZES: dict[str, Any] = {"n_ctx": 128, "n_batch": 64, "n_ubatch": N_UBATCH, "verbose": False}
ONE_THREAD: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}  # on such models a second one only waits

CASES: dict[str, tuple[str, dict[str, Any]]] = {arch: (arch, {}) for arch in tiny_models.ARCHS} | {
    "split": ("qwen3moe", {"shards": 2}),
    "merged": ("deepseek2", {"merged": True, "quant": "Q8_0"}),
}


@dataclass(frozen=True)
class Case:
    """One tiny model and its shape."""

    name: str
    path: Path
    shape: tiny_models.Shape

    @property
    def layers(self) -> list[int]:
        """The layers that have experts."""
        return list(range(self.shape.n_dense, self.shape.n_layer))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each of CASES in turn."""
    arch, overrides = CASES[request.param]
    path = tiny_models.write(arch, tmp_path_factory.mktemp("tiny") / "m.gguf", **overrides)
    return Case(request.param, path, tiny_models.shape_of(arch, **overrides))


def run(llm: llama_cpp.Llama, n_decode: int = N_DECODE) -> Floats:
    """From a fresh sequence: the logits after a prompt, then after each token decoded on its own."""
    llm.reset()
    tokens = np.random.default_rng(7).integers(3, llm.n_vocab(), N_PROMPT + n_decode).tolist()
    llm.eval(tokens[:N_PROMPT])
    rows = [last_logits(llm)]
    with getattr(llm, "decoding", contextlib.nullcontext)():
        for token in tokens[N_PROMPT:]:
            llm.eval([token])
            rows.append(last_logits(llm))
    return np.array(rows)


# ---- hooks in Python ------------------------------------------------------------------------------


@dataclass
class Event:
    """What one call of the hook saw and chose, rows are tokens."""

    il: int
    gating: int
    scores: Floats
    probs: Floats
    ids: Ids
    weights: Floats | None = None  # before normalisation; only where the hook reweights


def matrix(pointer: Any, n_tokens: int, width: int) -> npt.NDArray[Any]:
    return np.ctypeslib.as_array(pointer, (n_tokens, width))


class PythonHook:
    """Records events and lets `choose` fill in their ids. With `reweight`, sees the gate weights and leaves them alone."""

    def __init__(self, choose: Callable[[Any], None], *, reweight: bool = False) -> None:
        self.events: list[Event] = []
        self._choose = choose
        # ctypes structures do not keep the callbacks alive that they point to
        self._callbacks = CCallback(self._select), CCallback(self._reweight) if reweight else CCallback(0)
        self.struct = CHook.of(*self._callbacks)

    def _select(self, _user_data: int, event: Any) -> None:
        e = event.contents
        self._choose(e)
        scores, probs = (matrix(p, e.n_tokens, e.n_expert).copy() for p in (e.scores, e.probs))
        self.events.append(Event(e.il, e.gating, scores, probs, matrix(e.ids, e.n_tokens, e.n_used).copy()))

    def _reweight(self, _user_data: int, event: Any) -> None:
        e = event.contents
        self.events[-1].weights = matrix(e.weights, e.n_tokens, e.n_used).copy()

    @contextlib.contextmanager
    def attached(self, llm: llama_cpp.Llama) -> Iterator[PythonHook]:
        """Set on a context within the block."""
        set_hook = llama_cpp.llama_cpp._lib.llama_set_expert_hook
        set_hook.argtypes, set_hook.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_bool
        assert set_hook(llm._ctx.ctx, ctypes.addressof(self.struct))
        try:
            yield self
        finally:
            set_hook(llm._ctx.ctx, None)


def best(scores: Floats, n: int) -> npt.NDArray[np.int64]:
    """The n best experts of each token, best first, ties to the lower index."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :n]


def original(e: Any) -> None:
    """The model's own choice."""
    matrix(e.ids, e.n_tokens, e.n_used)[:] = best(matrix(e.scores, e.n_tokens, e.n_expert), e.n_used)


def reordered(e: Any) -> None:
    """The model's own choice, the slots in another order."""
    original(e)
    ids = matrix(e.ids, e.n_tokens, e.n_used)
    ids[:] = np.roll(ids, 1, axis=1)


def without_the_best(e: Any) -> None:
    """Ranks 1..K instead of 0..K-1."""
    matrix(e.ids, e.n_tokens, e.n_used)[:] = best(matrix(e.scores, e.n_tokens, e.n_expert), e.n_used + 1)[:, 1:]


def plain(path: Path, **options: Any) -> llama_cpp.Llama:
    """llama-cpp-python itself, loaded as cacheroute.Llama loads it."""
    return llama_cpp.Llama(str(path), lazy_mode=3, use_mmap=False, **{**SIZES, **ONE_THREAD, **options})


# ---- the patch alone ------------------------------------------------------------------------------


def test_hook_is_called_once_per_layer_and_micro_batch(case: Case) -> None:
    llm = plain(case.path)
    with PythonHook(original).attached(llm) as hook:
        run(llm)
    batches = [N_UBATCH, N_UBATCH, N_PROMPT - 2 * N_UBATCH] + [1] * N_DECODE
    calls = [(e.il, len(e.ids)) for e in hook.events]
    *inner, last = case.layers
    assert [c for c in calls if c[0] != last] == [(il, n) for n in batches for il in inner]
    # llama.cpp computes the last layer of a prompt only for tokens with logits that it must return; not so for gpt-oss
    in_last = batches if case.name == "gpt-oss" else [1] * (1 + N_DECODE)
    assert [n for il, n in calls if il == last] == in_last


def test_original_in_python_gives_the_same_bits(case: Case) -> None:
    llm = plain(case.path)
    unhooked = run(llm)
    for reweight in (False, True):
        with PythonHook(original, reweight=reweight).attached(llm):
            assert_same_bits(run(llm), unhooked)
    assert_same_bits(run(llm), unhooked)  # and the hook leaves nothing behind


def test_events_show_what_the_model_ranks(case: Case) -> None:
    llm = plain(case.path)
    with PythonHook(original).attached(llm) as hook:
        run(llm)
    softmax, sigmoid, softmax_weight = 1, 2, 3
    gating = {"deepseek2": sigmoid, "merged": sigmoid, "gpt-oss": softmax_weight}.get(case.name, softmax)
    for e in hook.events:
        assert e.gating == gating and e.il in case.layers
        assert e.probs.shape == (len(e.ids), case.shape.n_expert) and e.ids.shape[1] == case.shape.n_used
        if gating == softmax:
            np.testing.assert_allclose(e.probs.sum(axis=1), 1, rtol=1e-5)
        if gating == sigmoid:  # ranked with a bias, and half of the groups masked out
            assert ((e.probs > 0) & (e.probs < 1)).all()
            assert (np.isneginf(e.scores).sum(axis=1) == case.shape.n_expert // 2).all()
        else:
            assert_same_bits(e.scores, e.probs)


def test_router_uses_many_experts_and_never_ties(case: Case) -> None:
    """What the other tests rest on: a degenerate router would make identity cheap."""
    llm = plain(case.path, n_ctx=256, n_batch=256, logits_all=True)
    with PythonHook(original).attached(llm) as hook:
        llm.eval(np.random.default_rng(3).integers(3, llm.n_vocab(), 200).tolist())
    for il in case.layers:
        scores = np.concatenate([e.scores for e in hook.events if e.il == il])
        ids = np.concatenate([e.ids for e in hook.events if e.il == il])
        assert len(ids) == 200
        assert len(np.unique(ids)) >= 0.9 * case.shape.n_expert
        assert np.bincount(ids.ravel()).max() < 0.9 * len(ids)  # no expert is always chosen
        assert len(np.unique(np.sort(ids, axis=1), axis=0)) > min(20, case.shape.n_expert)
        steps = np.diff(np.sort(np.where(np.isneginf(scores), np.nan, scores), axis=1), axis=1)
        assert not (steps == 0).any()


def test_gate_weights_follow_the_ids(case: Case) -> None:
    """Slots in another order give the same sum but for rounding: each expert takes its own weight along."""
    llm = plain(case.path)
    unhooked = run(llm)
    with PythonHook(reordered).attached(llm):
        again = run(llm)
    np.testing.assert_allclose(again, unhooked, atol=0.02)
    assert np.abs(again - unhooked).mean() < 0.002


def test_forced_experts_get_the_routers_own_weights(case: Case) -> None:
    llm = plain(case.path)
    unhooked = run(llm)
    with PythonHook(without_the_best, reweight=True).attached(llm) as hook:
        forced = run(llm)
    for e in hook.events:
        assert e.weights is not None
        assert_same_bits(e.weights, np.take_along_axis(e.probs, e.ids, axis=1))
    with PythonHook(without_the_best).attached(llm):
        assert_same_bits(run(llm), forced)  # looking at the weights changes nothing
    assert np.abs(forced - unhooked).max() > 0.05


# ---- cacheroute.Llama -----------------------------------------------------------------------------


def engine(path: Path, **options: Any) -> Llama:
    return Llama(str(path), **{**SIZES, **ONE_THREAD, **options})


@contextlib.contextmanager
def observed(llm: Llama) -> Iterator[PythonHook]:
    """Within the block a Python hook stands before the native one, and sees its choices and the gate weights."""
    native = CHook.from_address(bindings.lib.cr_hook_address(llm._hook.handle))
    hook = PythonHook(lambda e: native.select(native.user_data, ctypes.byref(e)), reweight=True)
    with hook.attached(llm):
        yield hook


def test_original_is_the_unhooked_engine(case: Case) -> None:
    unhooked = run(engine(case.path, routing=None))
    shape = case.shape
    for budget in (shape.n_used, "50%", "all"):
        llm = engine(case.path, routing="original", budget=budget, io="direct")
        assert_same_bits(run(llm), unhooked)
        decode, prefill = llm.stats().decode, llm.stats().prefill
        assert decode.tokens == N_DECODE
        assert decode.examined == decode.hits + decode.misses == N_DECODE * shape.n_used * len(case.layers)
        assert decode.swapped == prefill.swapped == 0
        assert prefill.misses > 0
    assert decode.misses < decode.hits  # with room for all experts, only the first uses miss


def test_second_run_on_a_loaded_model_is_the_first(case: Case) -> None:
    llm = engine(case.path, routing="cache-prior:lambda=0.3", budget="50%")
    assert_same_bits(run(llm), run(llm))


def test_every_prompt_token_is_identical(case: Case) -> None:
    """With logits_all the last layer runs for the whole prompt too."""
    tokens = np.random.default_rng(7).integers(3, 256, N_PROMPT).tolist()
    rows = []
    for options in ({"routing": None}, {"routing": "original", "budget": case.shape.n_used}):
        llm = engine(case.path, logits_all=True, **options)
        llm.eval(tokens)
        rows.append(np.array(llm.scores[:N_PROMPT]))
    assert_same_bits(rows[0], rows[1])
    assert llm.stats().prefill.tokens == N_PROMPT


def test_with_two_threads_the_hook_still_runs_once(tmp_path: Path) -> None:
    """ggml runs a custom op on every thread; all but one must stay out of the hook."""
    # few tokens: on a busy machine each of a graph's barriers may cost a time slice
    path, n_tokens = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_layer=1), 4
    logits = []
    for routing in (None, "original"):
        llm = engine(path, routing=routing, n_threads=2, n_threads_batch=2)
        with observed(llm) if routing else contextlib.nullcontext() as hook, llm.decoding():
            for token in range(n_tokens):
                llm.eval([token])
        logits.append(last_logits(llm))
        if hook:
            assert len(hook.events) == n_tokens
            assert llm.stats().decode.examined == n_tokens * tiny_models.shape_of("qwen3moe").n_used
    assert_same_bits(logits[0], logits[1])


@pytest.mark.parametrize("budget", ["least", "50%"])
def test_lambda_zero_is_original(case: Case, budget: str) -> None:
    experts = case.shape.n_used if budget == "least" else budget
    llm = engine(case.path, routing="cache-prior:lambda=0", budget=experts)
    assert_same_bits(run(llm), run(engine(case.path, routing="original", budget=experts)))
    assert llm.stats().decode.swapped == 0


def test_large_lambda_swaps_experts_and_keeps_their_weights(case: Case) -> None:
    shape = case.shape
    llm = engine(case.path, routing="cache-prior:lambda=1", budget=shape.n_used + 1)
    unobserved, before = run(llm), llm.stats().decode
    with observed(llm) as hook:
        assert_same_bits(run(llm), unobserved)
    counted = llm.stats().decode - before

    swapped = 0
    for n, e in enumerate(hook.events):
        top = best(e.scores, shape.n_used)
        for chosen, wanted in zip(e.ids, top, strict=True):
            assert len(set(chosen)) == shape.n_used
            swapped += len(set(chosen) - set(wanted))
        if n < len(hook.events) - N_DECODE * len(case.layers):
            np.testing.assert_array_equal(e.ids, top)  # the prompt is routed by `original`
        assert np.isfinite(np.take_along_axis(e.scores, e.ids, axis=1)).all()  # nothing out of a masked group
        assert e.weights is not None
        assert_same_bits(e.weights, np.take_along_axis(e.probs, e.ids, axis=1))
    assert counted.swapped == before.swapped == swapped > 0

    plainly = engine(case.path, routing="original", budget=shape.n_used + 1)
    logits = run(plainly)
    assert_same_bits(logits[:1], unobserved[:1])  # after the prompt
    assert not np.array_equal(logits[1:], unobserved[1:])
    assert counted.misses < plainly.stats().decode.misses


def test_a_model_without_references_is_freed_at_once(tmp_path: Path) -> None:
    """Not when the garbage collector gets to it: then llama.cpp's context may be freed before the hook is unset."""
    llm = engine(tiny_models.write("llama", tmp_path / "m.gguf"), routing="original")
    llm.eval([5])
    gone = weakref.ref(llm)
    gc.disable()
    try:
        del llm
        assert gone() is None
    finally:
        gc.enable()


def test_original_on_the_demo_model_is_the_unhooked_engine(demo_model: Path) -> None:
    unhooked = run(engine(demo_model, routing=None), n_decode=8)
    for budget, routing in (("25%", "original"), ("all", "original"), ("25%", "cache-prior:lambda=0")):
        assert_same_bits(run(engine(demo_model, routing=routing, budget=budget, io="direct"), n_decode=8), unhooked)


# ---- ties -----------------------------------------------------------------------------------------


def with_equal_experts(case: Case, folder: Path) -> Path:
    """A copy of a model whose routers have each row five times: scores are equal in fives, also at the edge of the top K."""
    for shard in sorted(case.path.parent.glob("*.gguf")):
        content = bytearray(shard.read_bytes())
        for tensor in GGUFReader(shard).tensors:
            if ".ffn_gate_inp." in tensor.name or ".exp_probs_b" in tensor.name:
                rows = np.array(tensor.data, np.float32).reshape(case.shape.n_expert, -1)
                rows = rows[np.arange(case.shape.n_expert) // 5 * 5]
                at = int(tensor.data_offset)
                content[at : at + rows.nbytes] = rows.tobytes()
        (folder / shard.name).write_bytes(content)
    return folder / case.path.name


@pytest.mark.parametrize(
    "routing", ["original", "cache-prior:lambda=0", "max-rank:m={k}", "pruning:k={k}", "drop-cold:f=0", "speculate:j={k}"]
)
def test_equal_scores_are_chosen_as_upstream_does(case: Case, tmp_path: Path, routing: str) -> None:
    """At its neutral parameter every strategy returns the ids of llama.cpp's own top-k node, ties included."""
    path, name = with_equal_experts(case, tmp_path), routing.format(k=case.shape.n_used)
    expected = run(engine(path, routing=None))
    found = run(engine(path, routing=name, budget=max(case.shape.n_expert // 2, case.shape.n_used)))
    assert_same_bits(found, expected)


def as_chosen(e: Any) -> None:
    """Leaves the ids that the model chose."""


def test_the_model_with_equal_experts_has_ties(case: Case, tmp_path: Path) -> None:
    """What the test above rests on: the K-th score and the one after it are often equal."""
    llm = plain(with_equal_experts(case, tmp_path))
    with PythonHook(as_chosen).attached(llm) as hook:
        run(llm)
    tied = 0
    for e in hook.events:
        ranked = -np.sort(-e.scores, axis=1)
        at_edge = ranked[:, case.shape.n_used - 1] == ranked[:, min(case.shape.n_used, case.shape.n_expert - 1)]
        tied += int(at_edge.sum())
    assert tied > 0
