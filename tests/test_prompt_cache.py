"""A prompt that is evaluated already is not evaluated again: within a process, and in another one that loads it from a file."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cacheroute import Llama
from cacheroute.engine import prompt_cache
from cacheroute.engine.checkpoint import MOST_POINTS
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.routing import eviction as evictions
from support import tiny_models
from support.loading import loaded

pytestmark = pytest.mark.engine
LOSSY, LOSSLESS = "cache-prior:lambda=0.5", "original"
PROMPT, MORE, OTHER = list(range(3, 40)), [50, 51, 52], list(range(60, 90))
BOTH = pytest.mark.parametrize("routing", [LOSSLESS, LOSSY])


class Answer(NamedTuple):
    """Tokens, and what was counted for them: misses and swaps of decoded tokens by layer, and tokens of the prompt evaluated."""

    tokens: list[int]
    counts: list[tuple[int, int]]
    evaluated: int


def answer(llm: Llama, prompt: Sequence[int], n: int = 12, *, keep: Path | None = None, **sampling: Any) -> Answer:
    """`keep`: where the prompt is saved before the answer goes on."""
    before, prefill = llm.decoded_by_layer(), llm.stats().prefill.tokens
    with contextlib.closing(llm.generate(prompt, **{"temp": 0.0} | sampling)) as stream:
        tokens = [next(stream)]
        if keep:
            llm.save_prompt(keep)
        tokens += [next(stream) for _ in range(n - 1)]
    gained = zip(llm.decoded_by_layer(), before, strict=True)
    return Answer(tokens, [(a.misses - b.misses, a.swapped - b.swapped) for a, b in gained], llm.stats().prefill.tokens - prefill)


# ---- in a file


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("eviction", sorted(evictions.ONLINE))
@BOTH
def test_another_model_goes_on_as_if_it_were_the_first(tiny: Path, tmp_path: Path, routing: str, eviction: str, io: str) -> None:
    with loaded(tiny, routing=routing, eviction=eviction, io=io) as llm:
        expected = answer(llm, PROMPT, 20)
    with loaded(tiny, routing=routing, eviction=eviction, io=io) as llm:
        assert answer(llm, PROMPT, 20, keep=tmp_path / "p") == expected, "saving changes nothing"
    with loaded(tiny, routing=routing, eviction=eviction, io=io) as llm:
        assert llm.load_prompt(tmp_path / "p") == PROMPT
        held = llm.stats()
        assert held.resident_bytes > 0 and held.prefill.tokens == 0
        assert answer(llm, PROMPT, 20) == Answer(expected.tokens, expected.counts, 0)
        assert sum(m for m, _ in expected.counts) > 0
        assert (sum(s for _, s in expected.counts) > 0) == (routing == LOSSY)


def test_a_budget_that_changes_is_the_one_that_is_kept(tiny: Path, tmp_path: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        llm.set_capacity(6)
        expected = answer(llm, PROMPT, keep=tmp_path / "p")
        llm.set_capacity(7)
        with pytest.raises(UsageError, match="The budget has changed since this sequence began"):
            llm.save_prompt(tmp_path / "q")
        mark = llm.checkpoint(sequence=True)
        llm.reset()
        llm.return_to(mark)
        with pytest.raises(UsageError, match="The budget has changed since this sequence began"):
            llm.save_prompt(tmp_path / "q")
        answer(llm, PROMPT, keep=tmp_path / "q")
        assert llm.stats().prefill.tokens == 2 * len(PROMPT), "a point of another budget is none to begin at"
    with loaded(tiny, routing=LOSSY, budget=6) as llm:
        with pytest.raises(UsageError, match="the budget 7, and here it is 6"):
            llm.load_prompt(tmp_path / "q")
        llm.load_prompt(tmp_path / "p")
        assert answer(llm, PROMPT) == Answer(expected.tokens, expected.counts, 0)


@pytest.mark.parametrize("arch", ["gpt-oss", "deepseek2", "llama"])
def test_other_attentions_are_kept_too(tmp_path: Path, arch: str) -> None:
    path = tiny_models.write(arch, tmp_path / "m.gguf")
    with loaded(path, budget="50%", routing=LOSSY) as llm:
        expected = answer(llm, PROMPT, keep=tmp_path / "p")
    with loaded(path, budget="50%", routing=LOSSY) as llm:
        llm.load_prompt(tmp_path / "p")
        assert answer(llm, PROMPT) == Answer(expected.tokens, expected.counts, 0)


def test_sampling_chooses_as_it_does_after_a_decode(tiny: Path, tmp_path: Path) -> None:
    sampling = {"temp": 1.3, "top_k": 30, "repeat_penalty": 1.2}
    with loaded(tiny, routing=LOSSY) as llm:
        answer(llm, PROMPT, 1, keep=tmp_path / "p")
        expected = []
        for seed in range(6):
            llm.reset()
            llm.set_seed(seed)
            expected.append(answer(llm, PROMPT, 5, **sampling).tokens)
        assert len(set(map(tuple, expected))) > 1
    with loaded(tiny, routing=LOSSY) as llm:
        for seed in range(6):
            llm.load_prompt(tmp_path / "p")
            llm.set_seed(seed)
            assert answer(llm, PROMPT, 5, **sampling).tokens == expected[seed]


@BOTH
def test_a_longer_prompt_evaluates_the_rest(tiny: Path, tmp_path: Path, routing: str) -> None:
    with loaded(tiny, routing=routing) as llm:
        answer(llm, PROMPT, keep=tmp_path / "p")
        assert answer(llm, PROMPT + MORE, keep=tmp_path / "longer").evaluated == len(MORE)
        llm.load_prompt(tmp_path / "p")
        first = answer(llm, PROMPT + MORE)
        assert first.evaluated == len(MORE)
    with loaded(tiny, routing=routing) as llm:
        llm.load_prompt(tmp_path / "longer")
        again = answer(llm, PROMPT + MORE)
        assert (again.tokens, again.evaluated) == (first.tokens, 0)
        assert routing == LOSSLESS or again.counts == first.counts
        llm.load_prompt(tmp_path / "longer")
        assert answer(llm, PROMPT).evaluated == 0, "the end of the shorter prompt is kept, too"


def test_a_part_is_kept_with_a_lossless_routing_and_with_a_lossy_one_up_to_a_point(tiny: Path, tmp_path: Path) -> None:
    apart = [*PROMPT[:30], *OTHER]
    for routing, evaluated in ((LOSSLESS, len(OTHER)), (LOSSY, len(apart))):
        with loaded(tiny, routing=routing) as llm:
            expected = answer(llm, apart)
            llm.reset()
            answer(llm, PROMPT, keep=tmp_path / "p")
        with loaded(tiny, routing=routing) as llm:
            llm.load_prompt(tmp_path / "p")
            found = answer(llm, apart)
            assert (found.tokens, found.evaluated) == (expected.tokens, evaluated)
            assert routing == LOSSLESS or found == expected
        (tmp_path / "p").unlink()


def test_a_prompt_that_is_shorter_than_the_kept_one(tiny: Path, tmp_path: Path) -> None:
    with loaded(tiny) as llm:
        expected = answer(llm, PROMPT[:20])
        llm.reset()
        answer(llm, PROMPT, keep=tmp_path / "p")
        llm.load_prompt(tmp_path / "p")
        found = answer(llm, PROMPT[:20])
        assert (found.tokens, found.evaluated) == (expected.tokens, 1), "the logits there are not kept"


def test_decoded_tokens_are_kept_as_well(tiny: Path, tmp_path: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        stream = llm.generate(PROMPT, temp=0.0)
        tokens = [next(stream) for _ in range(6)]
        llm.save_prompt(tmp_path / "p")
        expected = [next(stream) for _ in range(6)]
    with loaded(tiny, routing=LOSSY) as llm:
        kept = llm.load_prompt(tmp_path / "p")
        assert kept == PROMPT + tokens[:-1]
        assert answer(llm, kept, 7).tokens == [tokens[-1], *expected]


# ---- what is refused


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A prompt cache of `tiny` with the lossy routing."""
    path = tmp_path_factory.mktemp("kept") / "p"
    with loaded(tiny, routing=LOSSY) as llm:
        answer(llm, PROMPT, 1, keep=path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"budget": 9}, "the budget 8, and here it is 9"),
        ({"eviction": "lru"}, "the eviction soft-lfu, and here it is lru"),
        ({"routing": "original"}, "the routing cache-prior:lambda=0.5, and here it is original"),
        ({"routing": "cache-prior:lambda=0.6"}, "the routing cache-prior:lambda=0.5, and here it is cache-prior:lambda=0.6"),
        ({"routing": None}, "the eviction soft-lfu, and here it is none"),
        ({"type_k": 8}, "the type of the KV cache f16/f16, and here it is q8_0/f16"),
        ({"rope_freq_base": 5.0}, "the context .* and here it is .*rope_freq_base=5,"),
    ],
)
def test_another_setting_is_named(tiny: Path, tmp_path: Path, kept: bytes, settings: dict[str, Any], said: str) -> None:
    (tmp_path / "p").write_bytes(kept)
    with loaded(tiny, **{"routing": LOSSY} | settings) as llm:
        llm.eval(OTHER)
        with pytest.raises(UsageError, match=rf"/p was made with {said}.*; use that one, name another file, or remove this one"):
            llm.load_prompt(tmp_path / "p")
        assert llm.n_tokens == len(OTHER), "nothing has changed"


def test_another_model_and_another_engine_are_named(tiny: Path, tmp_path: Path, kept: bytes, monkeypatch: Any) -> None:
    (tmp_path / "p").write_bytes(kept)
    other = tiny_models.write("qwen3moe", tmp_path / "m.gguf", seed=5)
    with loaded(other, routing=LOSSY) as llm, pytest.raises(UsageError, match=r"the model tiny qwen3moe \(\w+\), and here it is"):
        llm.load_prompt(tmp_path / "p")
    monkeypatch.setattr("cacheroute.install.engine_build.LOCAL_VERSION", "9+cacheroute.9")
    with loaded(tiny, routing=LOSSY) as llm, pytest.raises(UsageError, match=r"the engine .*, and here it is 9\+cacheroute\.9"):
        llm.load_prompt(tmp_path / "p")


def test_io_threads_and_a_larger_context_do_not_matter_and_a_smaller_does(tiny: Path, tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "p").write_bytes(kept)
    with loaded(tiny, routing=LOSSY, io="direct", n_ctx=512, n_threads=2, prefetch=1, flash_mbps=500.0) as llm:
        assert llm.load_prompt(tmp_path / "p") == PROMPT
    with loaded(tiny, routing=LOSSY, n_ctx=20) as llm, pytest.raises(UsageError, match=r"37 tokens, which do not fit .* of 20;"):
        llm.load_prompt(tmp_path / "p")


def test_damage_of_any_kind_is_a_sentence_and_the_model_goes_on(tiny: Path, tmp_path: Path, kept: bytes) -> None:
    path, rng = tmp_path / "p", random.Random(0)
    header = 48 + int.from_bytes(kept[12:16], "little")
    cuts = [0, 4, 8, 20, 47, 48, 60, header - 1, header, header + 1, len(kept) // 2, len(kept) - 1]
    flips = [*range(8, 48, 5), *(rng.randrange(48, header) for _ in range(20)), *(rng.randrange(len(kept)) for _ in range(20))]
    damaged = [kept[:n] for n in cuts] + [kept[:at] + bytes([kept[at] ^ 4]) + kept[at + 1 :] for at in flips] + [kept + b"\0"]
    with loaded(tiny, routing=LOSSY) as llm:
        for content in damaged:
            path.write_bytes(content)
            with pytest.raises(UsageError, match=r"/p is (not a prompt cache|a damaged prompt cache|a prompt cache of version)"):
                llm.load_prompt(path)
        path.write_bytes(kept)
        assert llm.load_prompt(path) == PROMPT


def test_what_the_checksums_do_not_tell_is_checked(tiny: Path, tmp_path: Path, kept: bytes) -> None:
    """As a file that was written so."""
    path = tmp_path / "p"
    path.write_bytes(kept)
    with loaded(tiny, routing=LOSSY) as llm:
        expected = answer(llm, OTHER)
        settings = llm._settings()
        whole = prompt_cache.read(path, settings)
        (n, routing, logits), state = whole.points[0], whole.sequence
        wrong = [
            prompt_cache.Kept([], [(0, routing, logits)], state),
            prompt_cache.Kept([7, 10**6], [(2, routing, logits)], state),
            prompt_cache.Kept([7, -1], [(2, routing, logits)], state),
            prompt_cache.Kept(whole.tokens, [], state),
            prompt_cache.Kept(whole.tokens, [(n - 1, routing, logits)], state),
            prompt_cache.Kept(whole.tokens, [(n, b"", logits)], state),
            prompt_cache.Kept(whole.tokens, [(n, routing[:-3], logits)], state),
            prompt_cache.Kept(whole.tokens, [(n, routing, logits[:-4])], state),
            prompt_cache.Kept(whole.tokens, [(n, routing, logits)], state[:-100]),
            prompt_cache.Kept(whole.tokens, [(n, routing, logits)], b""),
            prompt_cache.Kept(whole.tokens, [(n, routing, logits)], bytes(len(state))),
        ]
        for content in wrong:
            prompt_cache.write(path, content, settings)
            with pytest.raises(UsageError, match=r"/p is a damaged prompt cache \(.*\); remove it\.$"):
                llm.load_prompt(path)
            assert llm.n_tokens == 0
            assert answer(llm, OTHER) == expected


def test_nothing_else_is_overwritten(tiny: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    for content in (b"mine", b""):
        notes.write_bytes(content)
        with loaded(tiny) as llm:
            llm.eval(PROMPT)
            with pytest.raises(UsageError, match=r"notes\.txt is not a prompt cache, and is left as it is"):
                llm.save_prompt(notes)
        assert notes.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_the_old_file(tiny: Path, tmp_path: Path, kept: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    path.write_bytes(kept)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with loaded(tiny, routing=LOSSY) as llm:
        llm.eval(OTHER)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CacherouteError, match=r"/p cannot be written \(No space left on device\)"):
            llm.save_prompt(path)
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.save_prompt(path)
    assert path.read_bytes() == kept and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_an_empty_sequence_and_a_policy_in_python_are_not_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(tiny) as llm, pytest.raises(UsageError, match="no evaluated prompt to keep"):
        llm.save_prompt(tmp_path / "p")
    source = "def __init__(self, e, k, n):\n  self.k = k\n def choose(self, *_):\n  return list(range(self.k))\n"
    (tmp_path / "first_experts.py").write_text(f"class First:\n {source}")
    monkeypatch.syspath_prepend(tmp_path)
    with loaded(tiny, routing="python:first_experts:First") as llm:
        first = answer(llm, PROMPT)
        assert answer(llm, PROMPT) == first and first.evaluated == len(PROMPT), "its state at a point is not known"
        with pytest.raises(UsageError, match="a policy in Python has its own"):
            llm.save_prompt(tmp_path / "p")


# ---- in memory


@BOTH
def test_the_same_prompt_again_evaluates_nothing_and_answers_the_same(tiny: Path, routing: str) -> None:
    with loaded(tiny, routing=routing, io="direct") as llm:
        first = answer(llm, PROMPT)
        assert first.evaluated == len(PROMPT)
        for _ in range(3):
            before = llm.stats().decode
            again = answer(llm, PROMPT)
            assert (again.tokens, again.evaluated) == (first.tokens, 0)
            assert routing == LOSSLESS or again.counts == first.counts
            decoded = llm.stats().decode - before
            assert decoded.reads == decoded.misses == sum(misses for misses, _ in again.counts), "going back is no decoding"
        llm.reset()
        assert answer(llm, PROMPT) == first, "reset() forgets points, too"


@BOTH
def test_a_chat_whose_last_answer_is_cut_goes_on_after_the_question(tiny: Path, routing: str) -> None:
    with loaded(tiny, routing=routing) as llm:

        def chat() -> list[Answer]:
            first = answer(llm, PROMPT)
            second = [*PROMPT, *first.tokens[6:], *MORE]  # a template that drops the first part of an answer
            third = [*second, *OTHER[:9]]
            return [first, answer(llm, second), answer(llm, third), answer(llm, second)]

        answers = chat()
        assert [a.evaluated for a in answers] == [len(PROMPT), 6 + len(MORE), 9, 0]
        assert answers[3].tokens == answers[1].tokens
        llm.reset()
        again = chat()
        assert [a.tokens for a in again] == [a.tokens for a in answers]
        if routing == LOSSY:
            assert again == answers and answers[3].counts == answers[1].counts


@BOTH
def test_chats_and_completions_do_so_too(tiny: Path, routing: str) -> None:
    with loaded(tiny, routing=routing, chat_format="chatml", n_ctx=512) as llm:

        def evaluated() -> int:
            return llm.stats().prefill.tokens

        def chat(*said: str) -> str:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
            return str(llm.create_chat_completion(messages, max_tokens=12, temperature=0.0)["choices"][0]["message"]["content"])

        first, n_first = chat("the cat that was"), evaluated()
        assert chat("the cat that was") == first and evaluated() == n_first
        chat("the cat that was", "mat", "and this")
        n_second = evaluated() - n_first
        llm.reset()
        chat("the cat that was", "mat", "and this")
        assert n_first + n_second == evaluated() - n_first - n_second, "the first question was not evaluated again"
        texts = [llm("the hat of", max_tokens=8, temperature=0.0)["choices"][0]["text"] for _ in range(2)]
        assert texts[0] == texts[1]


def test_an_answer_that_is_kept_whole_goes_on_without_going_back(tiny: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        first = answer(llm, PROMPT)
        follow = [*PROMPT, *first.tokens, *MORE]
        assert answer(llm, follow).evaluated == 1 + len(MORE), "the last token of an answer is not evaluated"


def test_without_a_point_a_lossy_prompt_is_evaluated_whole(tiny: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        expected = answer(llm, [*PROMPT[:30], *OTHER])
        llm.reset()
        answer(llm, PROMPT)
        assert answer(llm, [*PROMPT[:30], *OTHER]) == expected
        assert answer(llm, PROMPT).evaluated == len(PROMPT), "the other prompt has overwritten it"


def test_tokens_that_are_evaluated_otherwise_drop_the_points_behind_them(tiny: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        first = answer(llm, PROMPT)
        llm.rewind()
        with llm.decoding():
            llm.eval([*PROMPT, *MORE])  # the same tokens, routed as decoded ones
        assert answer(llm, PROMPT) == first
        llm.load_state(llm.save_state())
        assert not list(llm._points)
        llm.configure(budget=8, routing=LOSSY)
        assert answer(llm, PROMPT) == first


def test_the_points_that_were_used_last_are_kept(tiny: Path) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        prompt = PROMPT[:5]
        for i in range(MOST_POINTS + 3):
            prompt = [*prompt, 100 + i]
            answer(llm, prompt, 1)
        assert [p.n for p in llm._points] == list(range(9, 9 + MOST_POINTS))
        assert answer(llm, [*PROMPT[:5], 100], 1).evaluated == 6, "its point was given up"


@BOTH
def test_a_batch_that_is_broken_off_leaves_no_trace(tiny: Path, monkeypatch: pytest.MonkeyPatch, routing: str) -> None:
    """Ctrl-C in a prompt of several batches, and in an answer: what was chosen for the batch is not of the sequence."""
    with loaded(tiny, routing=routing, n_batch=8) as llm:
        begin = answer(llm, PROMPT[:8])
        llm.reset()
        first, follow = answer(llm, PROMPT), answer(llm, [*PROMPT, *MORE])
        compute = llm._compute

        def check(found: Answer, expected: Answer, *, evaluated: int) -> None:
            assert (found.tokens, found.evaluated) == (expected.tokens, evaluated)
            assert routing == LOSSLESS or found.counts == expected.counts

        def stop_at(batch: int) -> None:
            left = iter(range(batch))

            def broken_off(*arguments: Any) -> None:
                compute(*arguments)
                if next(left, None) is None:
                    raise KeyboardInterrupt

            monkeypatch.setattr(llm, "_compute", broken_off)
            with pytest.raises(KeyboardInterrupt):
                answer(llm, PROMPT)
            monkeypatch.setattr(llm, "_compute", compute)

        llm.reset()
        stop_at(2)
        assert llm.n_tokens == 16
        check(answer(llm, PROMPT), first, evaluated=21 if routing == LOSSLESS else len(PROMPT))
        stop_at(3)
        assert llm.n_tokens == len(PROMPT) + 3
        check(answer(llm, [*PROMPT, *MORE]), follow, evaluated=len(MORE))
        llm.reset()
        stop_at(1)
        check(answer(llm, PROMPT[:8]), begin, evaluated=1 if routing == LOSSLESS else 8)  # the logits are of the other batch


@BOTH
def test_what_failed_is_evaluated_again(tiny: Path, routing: str) -> None:
    with loaded(tiny, routing=routing) as llm:
        first = answer(llm, PROMPT)
        llm._hook.begin(llm.n_tokens, decode=False)  # as a batch in which a layer did not ask
        with pytest.raises(CacherouteError, match="computed without asking"):
            llm._hook.finish(complete=True)
        assert answer(llm, PROMPT) == first


@pytest.mark.parametrize("leave", ["stop at once", "leave early"])
def test_an_answer_that_is_left_early_can_be_asked_for_again(tiny: Path, leave: str) -> None:
    with loaded(tiny, routing=LOSSY) as llm:
        first = answer(llm, PROMPT)
        answer(llm, OTHER, 1 if leave == "stop at once" else 3)
        assert answer(llm, OTHER) == answer(llm, OTHER)
        assert answer(llm, PROMPT) == first


def test_a_window_that_has_passed_is_evaluated_again(tmp_path: Path) -> None:
    """Attention with a window keeps the last tokens only, unless it is told to keep all."""
    path = tiny_models.write("gpt-oss", tmp_path / "m.gguf")
    long = [3 + i % 200 for i in range(700)]
    for full, evaluated in ((True, 1), (False, 351)):
        with loaded(path, n_ctx=1024, swa_full=full, n_batch=64, n_ubatch=64, budget="50%") as llm:
            expected = answer(llm, [*long[:350], 9], 4)
            llm.reset()
            answer(llm, long, 4)
            found = answer(llm, [*long[:350], 9], 4)
            assert (found.tokens, found.evaluated) == (expected.tokens, evaluated)
