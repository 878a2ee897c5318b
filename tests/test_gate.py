"""The one gate before llama_decode(): for every caller the budget holds, prompts are the model's own, errors are raised."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LlamaRAMCache, LogitsProcessorList

from cacheroute import Llama
from cacheroute.engine import stores
from cacheroute.errors import CacherouteError, UsageError
from support import tiny_models
from support.decoding import last_logits
from support.loading import loaded

pytestmark = pytest.mark.engine
LOSSY = "cache-prior:lambda=0.5"
PROMPT, OTHER = list(range(3, 40)), list(range(60, 90))


def after_prompt(llm: Llama, prompt: list[int]) -> Any:
    """The logits of a prompt in a new sequence."""
    llm.reset()
    llm.eval(prompt)
    return last_logits(llm)


# ---- the phase belongs to the call


def suspended(llm: Llama) -> Any:
    stream = llm.generate(PROMPT, temp=0.0)
    for _ in range(4):
        next(stream)
    return stream  # not closed


def failed(llm: Llama) -> None:
    with pytest.raises(RuntimeError, match="ours"), llm.decoding():
        llm.eval([5])
        raise RuntimeError("ours")


def in_a_thread(llm: Llama) -> Any:
    streams: list[Any] = []
    thread = threading.Thread(target=lambda: streams.append(suspended(llm)))
    thread.start()
    thread.join()
    return streams


@pytest.mark.parametrize("leave", [suspended, failed, in_a_thread])
def test_a_prompt_is_the_models_own_after(tiny: Path, leave: Any) -> None:
    with loaded(tiny, routing="original") as llm:
        expected = after_prompt(llm, OTHER)
    with loaded(tiny, routing=LOSSY) as llm:
        kept = leave(llm)
        swapped = llm.stats().prefill.swapped
        np.testing.assert_array_equal(after_prompt(llm, OTHER), expected)
        assert llm.stats().prefill.swapped == swapped == 0
        del kept


def test_a_suspended_stream_decodes_when_it_goes_on(tiny: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        stream = suspended(llm)
        before = llm.stats().decode.tokens
        next(stream)
        assert llm.stats().decode.tokens == before + 1 == 4


# ---- every path that computes


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_embed_keeps_the_budget(alone: Path, io: str) -> None:
    with loaded(alone, io=io, embedding=True) as llm:
        one = llm.embed("the cat that was on the mat")
        held = llm.measure_resident()
        assert held is not None and llm.stats().resident_bytes == held <= 1.02 * llm.budget.nbytes
        assert llm.stats().prefill.misses > 0
        assert llm.embed("the cat that was on the mat") == one
        llm.reset()
        assert llm.measure_resident() == 0


def test_a_read_error_reaches_every_caller(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny, tmp_path / "m.gguf"))
    with loaded(path, io="direct", embedding=True) as llm:
        llm.embed("the")
        os.truncate(path, 200_000)
        with pytest.raises(CacherouteError):
            llm.embed("a cat that is with this and that and had it on the mat for a while")


def test_a_layer_that_does_not_ask_is_an_error(tiny: Path) -> None:
    """As a model whose graph chooses experts elsewhere: the layout has one more layer than asks."""
    with loaded(tiny) as llm:
        llm._hook.begin(0, decode=False)
        with pytest.raises(CacherouteError, match=r"MoE layer 0 computed without asking which experts to run"):
            llm._hook.finish(complete=True)
        llm.reset()
        llm.eval(PROMPT)  # the error belonged to that sequence


# ---- configure


def test_a_configure_that_fails_changes_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        expected, before = after_prompt(llm, PROMPT), llm.io

        def fail(*_: Any) -> Any:
            raise CacherouteError("no")

        monkeypatch.setattr(stores, "open_store", fail)
        with pytest.raises(CacherouteError, match="no"):
            llm.configure(budget=4, routing="original", io="direct")
        monkeypatch.undo()
        assert (llm.stats().routing, llm.stats().capacity, llm.io) == (LOSSY, 8, before)
        np.testing.assert_array_equal(after_prompt(llm, PROMPT), expected)
        for wrong in ({"io": "tape"}, {"eviction": "fifo"}, {"budget": 1}, {"routing": "max-rank:m=1"}, {"prefetch": -1}):
            with pytest.raises(UsageError):
                llm.configure(**wrong)
        assert llm.stats().routing == LOSSY


def test_configure_keeps_what_is_not_given(tiny: Path) -> None:
    asked = {"routing": LOSSY, "eviction": "lfu", "io": "buffered", "prefetch": 2, "prompt_routing": "keep:cover=0.9"}
    with contextlib.closing(Llama(str(tiny), budget=8, n_ctx=64, n_threads=1, verbose=False, **asked)) as llm:

        def now() -> tuple[object, ...]:
            return llm.budget.capacity, str(llm.routing), llm.eviction, llm.io, llm.prefetch, str(llm.prompt_routing)

        llm.configure()
        assert now() == (8, LOSSY, "lfu", "buffered", 2, "keep:cover=0.9")
        llm.configure(eviction="lru", prefetch=0)
        assert now() == (8, LOSSY, "lru", "buffered", 0, "keep:cover=0.9")
        llm.set_capacity(6)  # until the next configure()
        llm.configure(routing="original")
        assert now() == (8, "original", "lru", "buffered", 0, "keep:cover=0.9")
        with pytest.raises(UsageError, match="fifo"):
            llm.configure(budget=4, eviction="fifo")
        llm.configure(prompt_routing="original")  # nothing of a call that failed
        assert now() == (8, "original", "lru", "buffered", 0, "original")
        for capacity in (5.5, "5", None, True):
            with pytest.raises(UsageError, match="capacity is a whole number"):
                llm.set_capacity(capacity)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="scores is ForcedScores or None"):
            llm.force("x")  # type: ignore[arg-type]
        assert llm.budget.capacity == 8 and llm.forced is None


# ---- states and prefixes


def test_a_state_carries_the_routing(tiny: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        llm.eval(PROMPT)
        with llm.decoding():
            llm.eval([50])
            state = llm.save_state()
            llm.eval([51])
            expected, misses = last_logits(llm), [c.misses for c in llm.decoded_by_layer()]
        llm.reset()
        llm.eval(OTHER)
        before = [c.misses for c in llm.decoded_by_layer()]
        llm.load_state(state)
        with llm.decoding():
            llm.eval([51])
        np.testing.assert_array_equal(last_logits(llm), expected)
        again = [c.misses - b for c, b in zip(llm.decoded_by_layer(), before, strict=True)]
        assert sum(again) <= sum(misses)
        copied = pickle.loads(pickle.dumps(state))  # as a cache on disk does: it starts from an empty cache
        llm.load_state(copied)
        assert llm.measure_resident() == 0


def test_a_cache_of_prefixes_gives_the_same_text(tiny: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        llm.set_cache(LlamaRAMCache())
        texts = [llm("the cat that was", max_tokens=12, temperature=0)["choices"][0]["text"] for _ in range(3)]
    assert texts[1] == texts[2]


# ---- a model that is closed, copied, forked


def test_a_closed_model_is_one_sentence(tiny: Path) -> None:
    with loaded(tiny) as llm:
        pass
    calls = (
        lambda: llm.eval([3]), lambda: llm("the"), lambda: llm.tokenize(b"the"), lambda: llm.detokenize([3]), llm.reset,
        llm.save_state, lambda: llm.configure(budget=8), lambda: llm.embed("the"), lambda: next(llm.generate([3])),
        lambda: pickle.dumps(llm), llm.checkpoint, llm.next_logits, llm.state_bytes, llm.tokenizer, llm.pooling_type,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(CacherouteError, match=r"The model is closed; load it again\."):
            call()
    llm.close()  # twice is once


@pytest.mark.parametrize("make", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_a_copy_keeps_the_settings(tiny: Path, make: Any) -> None:
    with loaded(tiny, routing=LOSSY, eviction="lru", io="direct", prefetch=1) as llm, contextlib.closing(make(llm)) as other:
        for name in ("routing", "eviction", "io", "prefetch", "budget", "flash_mbps"):
            assert getattr(other, name) == getattr(llm, name)
        np.testing.assert_array_equal(after_prompt(other, PROMPT), after_prompt(llm, PROMPT))


def in_child(llm: Llama, use: bool, said: Any) -> None:
    if use:
        try:
            llm.eval([3])
        except CacherouteError as e:
            said.put(str(e))


@pytest.mark.parametrize("use", [False, True])
def test_a_forked_child_can_leave(tiny: Path, use: bool) -> None:
    with loaded(tiny) as llm:
        llm.eval(PROMPT)
        context = multiprocessing.get_context("fork")
        said = context.Queue()
        child = context.Process(target=in_child, args=(llm, use, said))
        child.start()
        if use:
            assert "loaded before this process was forked" in said.get(timeout=20)
        child.join(20)
        assert child.exitcode == 0
        llm.eval([3])  # and the parent goes on


def test_two_models_of_one_file_in_one_process(alone: Path) -> None:
    with loaded(alone, routing=LOSSY) as one, loaded(alone, routing="original") as two:
        expected = after_prompt(two, PROMPT)
        for _ in range(3):
            np.testing.assert_array_equal(after_prompt(one, PROMPT), expected)
            np.testing.assert_array_equal(after_prompt(two, PROMPT), expected)


# ---- the file changes


def deleted(path: Path) -> None:
    path.unlink()


def renamed_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"not a model")
    other.rename(path)


def without_rights(path: Path) -> None:
    path.chmod(0)


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("change", [deleted, renamed_over, without_rights])
def test_the_open_file_goes_on(tiny: Path, tmp_path: Path, change: Any, io: str) -> None:
    path = Path(shutil.copy(tiny, tmp_path / "m.gguf"))
    with loaded(path, io=io) as llm:
        expected = after_prompt(llm, PROMPT)
        change(path)
        np.testing.assert_array_equal(after_prompt(llm, PROMPT), expected)
        llm.configure(budget=6, io=io)
        np.testing.assert_array_equal(after_prompt(llm, PROMPT), expected)


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_a_file_that_is_overwritten_is_noticed_at_the_next_sequence(tiny: Path, tmp_path: Path, io: str) -> None:
    path = Path(shutil.copy(tiny, tmp_path / "m.gguf"))
    with loaded(path, io=io) as llm:
        llm.eval(PROMPT)
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(bytes(1000))
        os.utime(path, ns=(1, 1))
        llm.reset()
        with pytest.raises(CacherouteError, match=r"was changed after it was loaded; load the model again\."):
            llm.eval(PROMPT)


SHRINKS = """
import os, sys
from cacheroute import CacherouteError, Llama
llm = Llama(sys.argv[1], budget=4, io=sys.argv[2], n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False)
llm.eval([5, 6, 7])
os.truncate(sys.argv[1], 100_000)
try:
    with llm.decoding():
        for token in range(3, 200):
            llm.eval([token])
except CacherouteError as e:
    print(e)
"""


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_a_file_that_shrinks_is_a_sentence(tmp_path: Path, io: str) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_embd=256, n_ff=256, n_layer=4)
    done = subprocess.run([sys.executable, "-c", SHRINKS, str(path), io], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "reading experts failed" in done.stdout, done


# ---- Ctrl-C


def test_ctrl_c_ends_a_prompt_within_a_second(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_layer=6, n_embd=512, n_ff=512)
    with loaded(path, n_ctx=8192, n_batch=8192, n_ubatch=8192, budget="all") as llm:
        asked: list[float] = []

        def ask() -> None:
            asked.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)

        threading.Timer(0.5, ask).start()
        with pytest.raises(KeyboardInterrupt):
            llm.eval(np.random.default_rng(0).integers(3, 250, 8000).tolist())
        assert time.monotonic() - asked[0] < 2.5
        llm.reset()
        llm.eval(PROMPT)  # and the model goes on


# ---- one model, one user at a time


@pytest.mark.parametrize("n_ctx", [1, 16, 20, 300])
def test_the_context_is_what_was_asked_for(tiny: Path, n_ctx: int) -> None:
    """llama.cpp rounds it up to a multiple of 256."""
    with loaded(tiny, n_ctx=n_ctx) as llm, llm.decoding():
        assert llm.n_ctx() == n_ctx
        for token in range(n_ctx):
            llm.eval([3 + token % 200])
        mark = llm.checkpoint()
        llm.return_to(mark)
        assert llm.n_tokens == n_ctx
        with pytest.raises(UsageError, match=rf"{n_ctx + 1} tokens do not fit the context of {n_ctx};"):
            llm.eval([3])


def test_two_answers_at_once_are_an_error_and_not_wrong_text(tiny: Path) -> None:
    with loaded(tiny) as llm:
        expected = [next(g) for g in [llm.generate(OTHER, temp=0.0)] for _ in range(6)]
        one = llm.generate(PROMPT, temp=0.0)
        next(one)
        two = llm.generate(OTHER, temp=0.0)
        assert [next(two) for _ in range(6)] == expected
        with pytest.raises(CacherouteError, match="Another answer was begun before this answer ended"):
            next(one)


@pytest.mark.parametrize("change", ["configure", "reset", "load_state", "eval"])
def test_an_answer_whose_sequence_was_changed_is_an_error_and_not_wrong_text(tiny: Path, change: str) -> None:
    with loaded(tiny) as llm:
        llm.eval(OTHER)
        state = llm.save_state()
        answer = llm.generate(PROMPT, temp=0.0)
        next(answer)
        arguments = {"configure": {"budget": 8}, "load_state": {"state": state}, "eval": {"tokens": [5]}}
        getattr(llm, change)(**arguments.get(change, {}))
        with pytest.raises(CacherouteError, match="The sequence was changed before this answer ended"):
            next(answer)


def test_a_call_that_is_refused_leaves_the_answer_of_another_thread_alone(tiny: Path) -> None:
    with loaded(tiny) as llm:
        expected = [t for t, _ in zip(llm.generate(PROMPT, temp=0.0), range(8), strict=False)]
        answer, refused = llm.generate(PROMPT, temp=0.0), []
        got = [next(answer)]

        def ask() -> None:
            with pytest.raises(CacherouteError, match="in use by another thread") as e:
                next(llm.generate(OTHER, temp=0.0))
            refused.append(e)

        with llm._alone():  # as while a token is computed
            other = threading.Thread(target=ask)
            other.start()
            other.join()
        got += [next(answer) for _ in range(7)]
        assert refused and got == expected


def test_two_threads_are_an_error_and_not_a_crash(tiny: Path) -> None:
    with loaded(tiny, n_ctx=2048) as llm:
        said: list[str] = []
        done: list[int] = []

        def ask() -> None:
            try:
                done.append(len(list(zip(llm.generate(PROMPT, temp=0.0), range(200), strict=False))))
            except CacherouteError as e:
                said.append(str(e))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(said) + len(done) == 4
        assert all("in use by another thread" in s or "Another answer was begun" in s for s in said)
        llm.reset()
        llm.eval(PROMPT)


@pytest.mark.parametrize("error", [ValueError("ours"), StopIteration("ours")])
def test_an_error_in_a_logits_processor_reaches_the_caller(tiny: Path, error: Exception) -> None:
    """StopIteration, which is no end of the answer, as Python has it of a generator: a RuntimeError."""

    def fail(ids: Any, scores: Any) -> Any:
        raise error

    with loaded(tiny) as llm, pytest.raises((ValueError, RuntimeError), match=r"ours|raised StopIteration"):
        llm.create_completion("the", max_tokens=4, logits_processor=LogitsProcessorList([fail]))


def test_a_grammar_that_cannot_be_parsed_is_an_error(tiny: Path) -> None:
    with loaded(tiny) as llm:
        with pytest.raises(CacherouteError, match="The grammar cannot be parsed"):
            llm.create_completion("the", max_tokens=4, grammar=LlamaGrammar.from_string("root ::= (((", verbose=False))
        good = LlamaGrammar.from_string('root ::= "a"+', verbose=False)
        assert set(llm.create_completion("the", max_tokens=4, grammar=good)["choices"][0]["text"]) <= {"a"}


@pytest.mark.parametrize("wrong", [{"n_batch": -1}, {"n_batch": 0}, {"n_ctx": -1}, {"n_ubatch": -1}, {"n_threads": -1}])
def test_sizes_that_cannot_be_are_refused_by_name(tiny: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=rf"^{next(iter(wrong))} is a whole number of at least [01] and below 2\^31, not"):
        Llama(str(tiny), verbose=False, **wrong)


# ---- token embeddings stay in the file where the output has a matrix of its own


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_token_embeddings_stay_in_the_file(tmp_path: Path, arch: str) -> None:
    """And a file that shrinks below them is a sentence: rows that are gone are not read as the end of the process."""
    path = tiny_models.write(arch, tmp_path / "m.gguf")
    code = """
import os, sys
from cacheroute import CacherouteError, Llama
from cacheroute.engine.embeddings import tensor_address
llm = Llama(sys.argv[1], budget="all", io="direct", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
at = tensor_address(llm._model.model, "token_embd.weight")
maps = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(sys.argv[1])]
print(any(int(a, 16) <= at < int(b, 16) for a, b in (m[0].split("-") for m in maps)), llm.layout.embedding_bytes > 0)
llm.eval([5, 6, 7])
os.truncate(sys.argv[1], 4096)
try:
    with llm.decoding():
        for token in range(3, 60):
            llm.eval([token])
except CacherouteError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    said = done.stdout.splitlines()
    assert said[0] == "True True" and "failed" in said[1], done
