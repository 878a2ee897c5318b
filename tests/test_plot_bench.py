"""Bars of bench: every arm of every group is there, with what bench said of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import UsageError
from cacheroute.plot import figures
from support.cli import invoke


def row(**changed: Any) -> dict[str, Any]:
    usual = {
        "model": "tiny",
        "n_gen": 8,
        "budget": "50%",
        "budget_experts": 8,
        "io": "buffered",
        "flash_mbps": None,
        "prefetch": 0,
    }
    usual |= {"routing": "original", "eviction": "lru", "control": False, "repack": False, "miss_rate": 0.5}
    usual |= {"read_mib_per_token": 2.0, "avg_ts": 10.0, "stddev_ts": 1.0, "vs_lru": 1.0, "vs_lru_sd": 0.0}
    return usual | {"floor_ts": None, "floor_share": None} | changed


ROWS = [
    row(n_gen=0, avg_ts=99.0),
    row(floor_ts=12.5, floor_share=0.8),
    row(routing="cache-prior:lambda=0.2", eviction="soft-lfu", avg_ts=20.0, vs_lru=2.0, vs_lru_sd=0.1, prefetch=2),
    row(routing="none", eviction="none", control=True, repack=True, read_mib_per_token=None, miss_rate=None, vs_lru=0.1),
    row(budget="25%", budget_experts=4, io="direct", flash_mbps=500.0, vs_lru=None, vs_lru_sd=None),
]


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    if path.suffix == ".csv":
        with path.open("w") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_rows_of_bench_are_bars_unless_asked_otherwise(tmp_path: Path, ending: str) -> None:
    path = write(ROWS, tmp_path / f"b{ending}")
    assert figures.chart([path]).cells[1:] == [
        ["tiny", "50% buffered unpaced", "original, lru", "10.00 ± 1.00", "1.00 x", "12.50", "80%"],
        ["tiny", "50% buffered unpaced", "cache-prior:lambda=0.2, soft-lfu, prefetch 2", "20.00 ± 1.00", "2.00 ± 0.10 x", "", ""],
        ["tiny", "50% buffered unpaced", "llama.cpp's mmap, same memory, repacked", "10.00 ± 1.00", "0.10 x", "", ""],
        ["tiny", "25% direct 500 MB/s", "original, lru", "10.00 ± 1.00", "", "", ""],
    ]
    misses = figures.chart([path], "misses").cells
    assert misses[1][2:] == ["50.0%", "50.0%"] and len(misses) == 3, "a control counts no misses"


def test_prompts_alone_are_drawn(tmp_path: Path) -> None:
    assert figures.chart([write(ROWS[:1], tmp_path / "b.jsonl")]).cells[1][3] == "99.00 ± 1.00"


def drawn(rows: list[dict[str, Any]], folder: Path) -> Any:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from matplotlib.figure import Figure

    figure = Figure()
    figures.chart([write(rows, folder / "b.jsonl")]).draw(figure)
    return figure


def test_the_figure_has_all_bars(tmp_path: Path) -> None:
    figure = drawn([*ROWS, row(model="other")], tmp_path)
    first, second = figure.axes
    assert sorted(bar.get_width() for bar in first.patches) == [10, 10, 10, 20] and len(second.patches) == 1
    assert [t.get_text() for t in first.get_yticklabels()] == ["50%, buffered reads", "25%, direct reads, 500 MB/s"]
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == 4 and labels[-1].startswith("floor")
    assert "cache prior λ 0.2, soft LFU, prefetch 2" in labels
    assert len({(bar.get_hatch(), bar.get_facecolor()) for bar in first.patches}) == 3, "arms differ without colour"
    paths = [tmp_path / "1.svg", tmp_path / "2.svg"]
    for path in paths:
        assert invoke("plot", str(tmp_path / "b.jsonl"), "-o", str(path)).exit_code == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_more_arms_than_a_legend_holds_are_named_beside_their_bars(tmp_path: Path) -> None:
    figure = drawn([row(routing=f"pruning:k={k}") for k in range(1, 10)], tmp_path)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [f"pruning k {k}, LRU" for k in range(1, 10)]
    assert not figure.legends


def test_two_models_with_the_same_groups_stand_side_by_side(tmp_path: Path) -> None:
    one, two = (figures.chart([write([row(model=m) for m in names], tmp_path / "b.jsonl")]) for names in ("ab", "abc"))
    assert one.height < two.height
    left, right = drawn([row(model="a"), row(model="b")], tmp_path).axes
    assert left.get_position().y0 == right.get_position().y0 and left.get_position().x1 < right.get_position().x0
    assert left.yaxis_inverted() and right.yaxis_inverted()


def test_the_words_have_the_greatest_gain(tmp_path: Path) -> None:
    alt = figures.chart([write(ROWS, tmp_path / "b.jsonl")]).alt
    assert "at most 2.0 times" in alt and "cache prior λ 0.2" in alt
    assert figures.chart([write([row(vs_lru=None)], tmp_path / "b.jsonl")]).alt.endswith("tiny: 10.0 to 10.0.")


def test_other_rows_are_a_sentence(tmp_path: Path) -> None:
    simulated = {"routing": "original", "read_mib_per_token": 1.0, "budget_experts": 8, "lost_mass": 0.1}
    with pytest.raises(UsageError, match="not rows of bench"):
        figures.chart([write([simulated], tmp_path / "s.jsonl")], "bench")
    broken = {k: v for k, v in ROWS[1].items() if k != "stddev_ts"}
    with pytest.raises(UsageError, match="another version"):
        figures.chart([write([broken], tmp_path / "b.jsonl")])
    (tmp_path / "n.json").write_text("[1, 2]")
    with pytest.raises(UsageError, match="does not hold rows"):
        figures.chart([tmp_path / "n.json"])
