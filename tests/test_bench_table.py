"""What people see of the rows of `bench`: 80 columns, the baseline, doubts with their reasons, and a last line in words."""

from __future__ import annotations

from typing import Any

from cacheroute.bench.arms import Row
from cacheroute.cli import bench_table
from cacheroute.cli.table import WIDTH, as_text

PRIOR = "cache-prior:lambda=0.2"


def row(**changed: Any) -> Row:
    """A row of decoded tokens after a prompt, of two runs."""
    usual: dict[str, Any] = {field: None for field in Row.__dataclass_fields__}
    usual |= {"model": "a model", "test": "tg8 @ d16", "n_prompt": 0, "n_gen": 8, "n_depth": 16, "n_threads": 2}
    usual |= {"routing": "original", "prompt_routing": "original", "eviction": "soft-lfu", "io": "direct", "prefetch": 0}
    usual |= {"budget": "50%", "budget_experts": 16, "budget_mib": 26.2, "cpu_s_per_token": 0.05, "major_faults": 0.0}
    usual |= {"miss_rate": 0.311, "swap_rate": 0.0, "drop_rate": 0.0, "read_mib_per_token": 2.5, "vs_lru": 1.0, "vs_lru_sd": 0.0}
    usual |= {"avg_ts": 40.11, "stddev_ts": 5.92, "samples_ts": (40.0, 40.2), "ttft_s": 0.224, "control": False, "repack": False}
    return Row(**usual | {"lossy": False, "doubts": ()} | changed)


def prompt(of: Row, **changed: Any) -> Row:
    own = {"test": "pp16", "n_prompt": 16, "n_gen": 0, "n_depth": 0, "avg_ts": 180.0}
    return Row(**vars(of) | own | changed)


BASE = row(eviction="lru")
BETTER = row(vs_lru=1.07, vs_lru_sd=0.02, avg_ts=43.0, read_mib_per_token=2.3)
LOSSY = row(routing=PRIOR, vs_lru=2.21, vs_lru_sd=0.1, avg_ts=88.2, read_mib_per_token=0.71, lossy=True, swap_rate=0.12)


def pairs(*rows: Row) -> list[Row]:
    return [part for r in rows for part in (prompt(r), r)]


def test_the_usual_run_fits_80_columns() -> None:
    view = bench_table.view(pairs(BASE, BETTER, LOSSY))
    assert view.above == ["a model: prompt of 16, 8 decoded, 2 runs, 2 threads, soft-lfu, direct"]
    lines = as_text(view.brief, WIDTH).splitlines()
    assert lines == [
        "budget  routing                      tok/s  vs LRU  miss %  MiB/token  TTFT s",
        "   50%  original, lru           40.1 ± 5.9    base    31.1       2.50    0.22",
        "   50%  original                43.0 ± 5.9    1.07    31.1       2.30    0.22",
        "   50%  cache-prior:lambda=0.2  88.2 ± 5.9    2.21    31.1       0.71    0.22",
    ]
    assert view.below == [
        f"Swapped by {PRIOR} at 50%: 12.0% of the prompt's experts, 12.0% of the answer's experts.",
        f"Best: {PRIOR} (lossy), 2.2x of LRU at 50%, reads 0.7 of 2.5 MiB a token",
        "Best without loss: original, 1.1x of LRU at 50%, reads 2.3 of 2.5 MiB a token",
    ]


def test_a_doubted_row_is_marked_with_its_reasons_and_is_not_the_best() -> None:
    doubted = Row(**vars(LOSSY) | {"doubts": ("it was hot",)})
    rows = [prompt(BASE), BASE, prompt(doubted, doubts=("another process maps the file",)), doubted]
    view = bench_table.view(rows)
    lines = as_text(view.brief, WIDTH).splitlines()
    assert [line[0] for line in lines] == [" ", " ", "!"] and max(map(len, lines)) <= WIDTH
    assert view.below[:2] == [f"! {PRIOR} at 50%: another process maps the file.", f"! {PRIOR} at 50%: it was hot."]
    assert view.below[3:] == ["Best: original, lru, 40.1 tok/s at 50%, reads 2.5 MiB a token"]
    assert view.whole[0][-1] == "not to be trusted" and view.whole[1][-1] == ""
    both = [Row(**vars(r) | {"doubts": (f"{i}.5 cores busy",)}) for i, r in enumerate((BASE, LOSSY))]
    assert bench_table.view(both).below[0] == "! 2 of 2 rows, the first of them original, lru at 50%: 0.5 cores busy."
    assert bench_table.view(both).below[-2].endswith(", but its row is marked !")


def test_one_run_has_no_spread() -> None:
    alone = bench_table.view(pairs(row(eviction="lru", samples_ts=(40.1,)), row(samples_ts=(43.0,), vs_lru=1.07)))
    assert not any("±" in cell for line in (*alone.brief, *alone.whole) for cell in line)
    assert "1 run," in alone.above[0]
    assert alone.below == ["One run of each has no spread, so none is called the best: -r 3 or more tells them apart."]
    assert bench_table.view(pairs(row(samples_ts=(40.1,)))).below == [], "one arm is compared with nothing"


def test_a_difference_within_the_spread_is_called_so() -> None:
    close = row(vs_lru=1.02, vs_lru_sd=0.05, avg_ts=41.0)
    assert (
        bench_table.view(pairs(BASE, close))
        .below[0]
        .startswith("Best: original, 1.0x of LRU at 50%, which is within the spread,")
    )


def test_what_sets_rows_apart_is_named_with_the_routing() -> None:
    rows = [row(), row(io="buffered", flash_mbps=50.0), row(prefetch=2), row(prompt_routing="keep:cover=0.4"), row()]
    names = [cells[1] for cells in bench_table.view(rows).brief[1:]]
    assert names == [
        "original",
        "original, buffered at 50 MB/s",
        "original, prefetch 2",
        "original, prompts keep:cover=0.4",
        "original",
    ]
    tuned = bench_table.view([row(routing="tuned:/a/very/long/0123456789abcdef-16.json", lossy=True)])
    assert tuned.brief[1][1] == tuned.whole[1][2] == "tuned"
    assert tuned.brief[1][1] == "tuned" and tuned.below == ["Swapped by tuned at 50%: 0.0% of the answer's experts."]


def test_a_control_shows_what_the_kernel_read_and_no_misses() -> None:
    control = row(routing="none", eviction="none", io="mmap", control=True, repack=True, miss_rate=None, avg_ts=4.2, vs_lru=0.1)
    control = Row(**vars(control) | {"read_mib_per_token": None, "device_mib_per_token": 18.78, "swap_rate": None})
    view = bench_table.view([BASE, control])
    assert view.brief[2][1:] == ["llama.cpp's mmap, repacked", "4.2 ± 5.9", "0.10", "", "18.78", "0.22"]
    assert view.below[0] == "MiB/token of llama.cpp's mmap are those that the kernel read."
    assert "soft-lfu" not in view.above[0] and "mmap" not in view.above[0]


def test_each_budget_has_its_best_and_prompts_alone_have_a_table() -> None:
    quarter = [Row(**vars(r) | {"budget": "25%"}) for r in (BASE, LOSSY)]
    below = bench_table.view([BASE, BETTER, *quarter]).below
    assert [line.partition(" at ")[2][:3] for line in below] == ["25%", "50%", "25%", "25%"]
    alone = bench_table.view([prompt(BASE, ttft_s=0.1)])
    assert alone.brief[1][2] == "180.0 ± 5.9" and alone.above[0].startswith("a model: prompt of 16, 2 runs")
