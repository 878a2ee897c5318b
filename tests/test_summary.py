"""The line under an answer: three figures, a fourth for what is lossy, and none that nobody counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cacheroute.cli import summary
from cacheroute.native.counters import Counters
from cacheroute.routing import prompt_routing, strategies

DECODE = Counters(tokens=42, examined=10_560, hits=7_286, misses=3_274)


def run(routing: str = "original", prompts: str = "original", io: str = "direct", **changed: Any) -> Any:
    llm = SimpleNamespace(io=io, routing=strategies.parse(routing), prompt_routing=prompt_routing.parse(prompts), prefetch=0)
    usual = {"llm": llm, "n_tokens": 43, "first": 10.5, "last": 11.5, "started": 10.0, "keeping": 0.0, "finish_reason": "stop"}
    return SimpleNamespace(**usual | {"prompt": SimpleNamespace(tokens=list(range(39)))} | changed)


def test_three_figures_of_a_lossless_answer() -> None:
    assert summary.brief(run(), DECODE, Counters()) == "43 tokens, 42.0 tok/s, 31% of experts read from disk"
    assert summary.brief(run(n_tokens=1, last=10.5), Counters(), Counters()) == "1 token"
    assert summary.brief(run(n_tokens=0, first=None, last=None), Counters(), Counters()) == "0 tokens"


def test_a_first_token_that_was_waited_for_is_named() -> None:
    usual = "43 tokens, 42.0 tok/s, 31% of experts read from disk"
    assert summary.brief(run(started=8.5), DECODE, Counters()) == usual, "two seconds are no wait"
    assert summary.brief(run(started=7.5), DECODE, Counters()) == f"{usual}, first token after 3.0 s"
    assert summary.brief(run(started=-147.5), DECODE, Counters()) == f"{usual}, first token after 158 s"
    assert summary.turn(run(started=7.5), DECODE, Counters(), verbose=False) == f"{usual}, first token after 3.0 s"
    assert summary.turn(run(started=7.5), DECODE, Counters(), verbose=True).count("first token") == 1


def test_a_routing_that_has_nothing_to_do_has_no_figure() -> None:
    held = Counters(tokens=42, examined=480, hits=480)
    for routing in ("cache-prior:lambda=0.1", "max-rank:m=6", "cumsum:p=0.9", "drop-cold:f=0.5"):
        assert summary.brief(run(routing, io="load"), held, Counters()).endswith(", all experts in memory")
    assert summary.brief(run("pruning:k=6", io="load"), held, Counters()).endswith(", 0% swapped (0 of 480)")
    assert "swapped (0 of 480)" in summary.brief(run("cache-prior:lambda=0.1"), held, Counters()), "another cache may miss"


def test_what_was_not_read_is_not_called_read() -> None:
    assert summary.brief(run(io="load"), Counters(hits=9), Counters()).endswith(", all experts in memory")
    assert summary.brief(run(io="none"), DECODE, Counters()).endswith(", 31% of experts missed, and not read")


def test_a_lossy_routing_has_a_fourth_also_when_it_did_nothing() -> None:
    lossy = run("cache-prior:lambda=0.2")
    swapped = Counters(tokens=42, examined=10_560, hits=9_000, misses=1_560, swapped=1_267)
    assert summary.brief(lossy, swapped, Counters()).endswith(", 15% of experts read from disk, 12% swapped (1267 of 10560)")
    assert summary.brief(lossy, DECODE, Counters()).endswith(", 0% swapped (0 of 10560)")
    once = Counters(tokens=42, examined=10_560, swapped=1)
    assert summary.brief(lossy, once, Counters()).endswith(", <0.1% swapped (1 of 10560)")
    dropped = Counters(tokens=42, examined=100, dropped=25)
    assert summary.brief(run("pruning:k=6"), dropped, Counters()).endswith(", 0% swapped (0 of 100), 25% left out")
    of_prompt = summary.brief(run(prompts="keep:cover=0.5"), DECODE, Counters(examined=1000, swapped=42))
    assert of_prompt.endswith(", 31% of experts read from disk, prompt 4.2% swapped (42 of 1000)")


def test_a_turn_says_when_it_was_stopped_and_more_when_asked() -> None:
    prompt = Counters(tokens=12, read_bytes=2**20)
    assert summary.turn(run(finish_reason=""), DECODE, prompt, verbose=False).endswith("read from disk, stopped")
    more = summary.turn(run(), DECODE, prompt, verbose=True)
    assert more.endswith("first token 0.5 s (12 of 39 evaluated), read 1.0 MiB for the prompt and 0.00 MiB/token")
