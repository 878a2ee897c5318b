"""Options that were typed where nothing uses them: refused, not passed over."""

from __future__ import annotations

from faults.runner import Case


def _unused(words: str, sentence: str) -> Case:
    return Case(f"unused: {words}", words, 2, rf"{sentence}.*\.$")


CASES: list[Case] = [
    Case("a budget of all to tune for", "tune -m {tiny} --budget all", 2, r"there is nothing to tune\.$"),
    _unused("frontier {dir}/f -m {tiny} --routing pruning:k=2 --points 3", r"--points is of the grid"),
    _unused("frontier {dir}/f -m {tiny} --flash-mbps 100", r"--flash-mbps is the pace of reads; give --io"),
    _unused("frontier {dir}/f -m {tiny} --flash-mbps 100 --io none", r"--flash-mbps is the pace of reads; give --io"),
    _unused("trace -m {tiny} -o {dir}/t -n 5 --n-prompt 2 -p the", r"--n-prompt is of a text that is decoded"),
    _unused("eval perplexity -m {tiny} --column words", r"The held-out text has no columns"),
    _unused("simulate {dir}/t --seed 7", r"--seed is of --shuffle"),
    _unused("plot {tiny} --layer 3", r"--layer is of --kind residency"),
    _unused("eval perplexity -m {tiny} --io load --budget all", r"There is no io 'load' for scores; there are auto, direct"),
    _unused("bench -m {tiny} --io load --budget all,50%", r"With --io load all experts are in memory: it goes with --budget all"),
    _unused("bench -m {tiny} --control-repack on", r"--control-repack is of --control"),
]
