"""Figures and their tables: of every command's rows in every format, and of traces; nothing is overwritten."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from cacheroute.errors import UsageError
from cacheroute.plot import figures, misses, style, traces, words
from cacheroute.plot import rows as plot_rows
from cacheroute.plot.chart import Chart
from cacheroute.routing import tuned
from cacheroute.routing.strategies import parse_list
from cacheroute.trace import simulate, trace_file
from support.cli import invoke
from support.traces import fed

PNG, SVG = b"\x89PNG", b"<?xml"


@pytest.fixture(scope="module")
def rows() -> list[simulate.Row]:
    routings = parse_list("original,cache-prior:lambda=0.1,cache-prior:lambda=0.4,max-rank:m=8")
    arms = simulate.arms(["25%", "50%", "75%"], routings, ["lru", "belady"])
    return simulate.run(fed(False), arms, per_layer=True)


def write(rows: list[simulate.Row], path: Path) -> Path:
    dicts = [asdict(row) for row in rows]
    if path.suffix == ".json":
        path.write_text(json.dumps(dicts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(d) + "\n" for d in [{"format": "a header"}, *dicts]))
    else:
        with path.open("w") as f:
            writer = csv.DictWriter(f, list(dicts[0]))
            writer.writeheader()
            writer.writerows(dicts)
    return path


def run(*arguments: object) -> Result:
    return invoke("plot", *arguments)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_every_format_is_read_alike(rows: list[simulate.Row], tmp_path: Path, ending: str) -> None:
    path = write(rows, tmp_path / f"r{ending}")
    found = plot_rows.of(path, plot_rows.read(path))
    total = [row for row in rows if row.layer is None]
    assert [(r.routing, r.eviction, r.budget_experts, r.miss_rate, r.lost_mass) for r in found] == [
        (r.routing, r.eviction, r.budget_experts, r.miss_rate, r.lost_mass) for r in total
    ]


def test_the_tables_have_what_the_figures_draw(rows: list[simulate.Row], tmp_path: Path) -> None:
    path = write(rows, tmp_path / "r.json")
    frontier = figures.chart([path]).cells
    assert frontier[0][3:5] == ["missed MiB/token", "lost router mass, %"] and len(frontier) == 1 + 15
    missed = [float(cells[3]) for cells in frontier[1:]]
    assert missed == sorted(missed)
    for budget in ("25%", "50%", "75%"):
        own = [cells for cells in frontier[1:] if cells[0] == budget and cells[2] != "belady"]
        at = [(float(cells[3]), float(cells[4])) for cells in own]
        beaten = [any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in at) for p in at]
        assert [cells[5] for cells in own] == ["" if b else "*" for b in beaten]
    assert not any(cells[5] for cells in frontier[1:] if cells[2] == "belady"), "it needs the future"
    misses = figures.chart([path], "misses").cells
    assert misses[0][2:] == ["6 experts", "12 experts", "18 experts"]
    belady, lru = (next(c for c in misses if c[:2] == ["original", e]) for e in ("belady", "lru"))
    assert all(float(b[:-1]) <= float(a[:-1]) for b, a in zip(belady[2:], lru[2:], strict=True))


def test_rows_of_other_tokens_are_told(tmp_path: Path) -> None:
    row = {
        "eviction": "lru",
        "budget": "50%",
        "budget_experts": 8,
        "miss_rate": 0.1,
        "text": "a.txt",
        "nll": 3.0,
        "delta_nll": 0.0,
    }
    row |= {"routing": "original", "missed_mib_per_token": 2.0, "chunk": 32, "n_tokens": 60}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "b.json").write_text(json.dumps([{**row, "chunk": 128, "n_tokens": 315}]))
    assert figures.chart([tmp_path / "a.json"]).note == ""
    note = figures.chart([tmp_path / "a.json", tmp_path / "b.json"]).note
    assert note.startswith("These rows are not of the same tokens (a.txt, 60 in chunks of 32; a.txt, 315 in chunks of 128)")


def test_quality_is_the_most_exact_measure_in_the_rows(tmp_path: Path) -> None:
    base = {"eviction": "lru", "budget": "50%", "budget_experts": 8, "miss_rate": 0.1}
    rows = [
        {**base, "routing": "original", "missed_mib_per_token": 2.0, "ppl": 10.0, "delta_nll": 0.0},
        {**base, "routing": "cache-prior:lambda=0.1", "missed_mib_per_token": 1.0, "ppl": 10.1, "delta_nll": 0.01},
        {**base, "routing": "max-rank:m=9", "missed_mib_per_token": 1.5, "lost_mass": 0.5},
        {**base, "routing": "original", "missed_mib_per_token": 9.0, "n_gen": 0},  # a prompt
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    chart = figures.chart([tmp_path / "r.json"])
    assert chart.cells[0][4] == "perplexity increase, %" and "1 rows without delta_nll" in chart.note
    assert [c[1:] for c in chart.cells[1:]] == [
        ["cache-prior:lambda=0.1", "lru", "1.000", "1.005", "*"],
        ["original", "lru", "2.000", "0.000", "*"],
    ]
    for row in rows:
        row.pop("delta_nll", None), row.pop("ppl", None), row.pop("lost_mass", None)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert figures.chart([tmp_path / "b.json"]).cells[0] == ["routing", "eviction", "8 experts"]


def test_missed_and_read_are_never_on_one_axis(rows: list[simulate.Row], tmp_path: Path) -> None:
    missed = {"routing": "original", "budget_experts": 8, "miss_rate": 0.1, "missed_mib_per_token": 2.0, "lost_mass": 0.0}
    read = {k: v for k, v in missed.items() if k != "missed_mib_per_token"} | {"read_mib_per_token": 2.5}
    for name, row in (("missed", missed), ("read", read)):
        (tmp_path / name).write_text(json.dumps([row]))
        chart = figures.chart([tmp_path / name])
        assert chart.cells[0][3] == f"{name} MiB/token"
        if importlib.util.find_spec("matplotlib"):
            from matplotlib.figure import Figure

            figure = Figure()
            chart.draw(figure)
            assert figure.axes[0].get_xlabel() == f"MiB {name} per token"
    for kind in ((), ("--kind", "frontier")):
        refused = run(tmp_path / "missed", tmp_path / "read", *kind)
        assert refused.exit_code == 2 and "plot them apart" in refused.stderr and refused.stderr.count("\n") == 1
    assert run(tmp_path / "missed", tmp_path / "read", "--kind", "misses").exit_code == 0  # miss rates are the same thing in both


def test_strategies_are_compared_at_the_same_speed(tmp_path: Path) -> None:
    base = {"eviction": "lru", "budget": "50%", "budget_experts": 8, "miss_rate": 0.1, "read_mib_per_token": 1.0}
    points = [("original", 10, 0.0), ("pruning:k=7", 20, 0.04), ("pruning:k=8", 14, 0.01), ("max-rank:m=9", 13, 0.02)]
    rows = [{**base, "routing": routing, "ts": ts, "delta_nll": d} for routing, ts, d in points]
    (tmp_path / "r.json").write_text(json.dumps([*rows, {**rows[1], "ts": None}]))
    chart = figures.chart([tmp_path / "r.json"], "speed")
    assert "1 rows without tok/s" in chart.note
    seven, eight, nine = (100 * math.expm1(d) for _, _, d in points[1:])
    assert {cells[1]: [float(x) if x != "-" else None for x in cells[3:]] for cells in chart.cells[1:]} == {
        "pruning": pytest.approx([eight * 2.5 / 4, eight + (seven - eight) / 6, seven], abs=1e-3),
        "max-rank": [pytest.approx(nine * 2.5 / 3, abs=1e-3), None, None],
    }
    (tmp_path / "n.json").write_text(json.dumps([{**rows[0], "ts": None}]))
    with pytest.raises(UsageError, match="have no tok/s"):
        figures.chart([tmp_path / "n.json"], "speed")


def test_states_by_hand() -> None:
    t = fed(False)
    own = t.records[:3].copy()
    own["resident"][:] = 0b1010, 0, 0  # 1 and 3
    own["ids"][:] = [3, 5, 3, 3]
    own["n_run"] = 2
    state = traces.states(own, 24, 4)[0].tolist()
    assert (state[1], state[3], state[5]) == (1, 2, 3) and sum(state) == 6


@pytest.mark.parametrize("kind, ending", [("frontier", ".png"), ("misses", ".svg"), ("residency", ".png"), ("layers", ".svg")])
def test_figures_are_drawn_and_never_overwritten(rows: list[simulate.Row], tmp_path: Path, kind: str, ending: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    source = write(rows, tmp_path / "r.json")
    if kind in ("residency", "layers"):
        source = tmp_path / "t"
        trace_file.write(source, fed(False).header, fed(False).records)
    out = tmp_path / f"f{ending}"
    first = run(source, "--kind", kind, "-o", out)
    assert first.exit_code == 0 and first.stdout == "", first.output
    drawn = out.read_bytes()
    assert drawn.startswith(PNG if ending == ".png" else SVG) and len(drawn) > 5000
    again = run(source, "--kind", kind, "-o", out)
    assert again.exit_code == 2 and "exists; --force" in again.stderr and out.read_bytes() == drawn
    assert run(source, "--kind", kind, "-o", out, "--force").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, out.name] + ["r.json"] * (source.name == "t"))


def test_without_matplotlib_a_figure_is_refused_and_a_table_is_not(
    rows: list[simulate.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    source = write(rows, tmp_path / "r.csv")
    result = run(source, "-o", tmp_path / "f.png")
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "-m pip install matplotlib" in result.stderr and not (tmp_path / "f.png").exists()
    assert run(source).exit_code == 0


def figure_of(chart: Chart) -> Any:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(style.WIDTH, chart.height), layout="constrained")
    chart.draw(figure)
    figure.canvas.draw()
    return figure


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def result_rows(strategies: list[str], losses: list[float], **more: object) -> list[dict[str, object]]:
    base = {"model": "m", "eviction": "lru", "budget": "50%", "budget_experts": 8, "miss_rate": 0.1}
    return [
        {**base, "routing": r, "missed_mib_per_token": 5.0 - 0.1 * i, "delta_nll": d, **more}
        for i, (r, d) in enumerate(zip(strategies, losses, strict=True))
    ]


def drawn(found: list[dict[str, object]], folder: Path, kind: str = "") -> Any:
    (folder / "r.json").write_text(json.dumps(found))
    return figure_of(figures.chart([folder / "r.json"], kind))


def test_series_differ_without_colour_and_have_words(rows: list[simulate.Row], tmp_path: Path) -> None:
    figure = figure_of(figures.chart([write(rows, tmp_path / "r.json")], "misses"))
    lines = [line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")]
    looks = {(str(line.get_linestyle()), line.get_marker()) for line in lines}
    assert len(lines) == len(looks) == 5
    assert {"original (lossless), LRU", "cache prior λ 0.1, LRU", "original (lossless), optimum (Belady)"} <= {*legend_of(figure)}
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["6\n(25%)", "12\n(50%)", "18\n(75%)"]


def test_a_legend_has_at_most_eight_entries(tmp_path: Path) -> None:
    many = [f"own{i}:a={i}" for i in range(12)]
    for kind in ("frontier", "misses"):
        figure = drawn(result_rows(["original", *many], [0.0, *(0.01 + i / 1000 for i in range(12))]), tmp_path, kind)
        assert len(legend_of(figure)) == style.MOST and any(text.endswith(" others") for text in legend_of(figure))
    found = result_rows(["original", *many], [0.0] * 13)
    for i, row in enumerate(found):
        row["miss_rate"] = 0.5 - 0.01 * i
    named = legend_of(drawn(found, tmp_path, "misses"))
    assert named[0] == "original (lossless), LRU" and "own11 a 11, LRU" in named and "own0 a 0, LRU" not in named
    few = drawn(result_rows(["original", *many[:6]], [0.0] * 7), tmp_path, "frontier")
    assert len(legend_of(few)) == 7 and not any("others" in text for text in legend_of(few))


def test_a_value_far_above_the_others_is_cut_with_a_mark(tmp_path: Path) -> None:
    usual = [0.0, 0.01, 0.012, 0.014, 0.016, 0.02]
    names = ["original", *(f"pruning:k={i}" for i in range(2, 7))]
    axes = drawn(result_rows([*names, "pruning:k=1"], [*usual, 1.5]), tmp_path).axes[0]
    assert axes.get_ylim()[1] < 10 and "348" in [t.get_text() for t in axes.texts]
    many = drawn(result_rows([*names, *names, *["pruning:k=1"] * 4], [*usual, *usual, 1, 1.5, 2, 3]), tmp_path).axes[0]
    assert "▲ 4 points above, up to 1.91e+03" in [t.get_text() for t in many.texts]
    whole = drawn(result_rows(names, usual), tmp_path).axes[0]
    assert not any(line.get_marker() == "^" and line.get_color() == "k" for line in whole.get_lines())


def test_several_evictions_are_told_apart_by_their_marks(rows: list[simulate.Row], tmp_path: Path) -> None:
    arms = simulate.arms(["50%"], parse_list("original,cache-prior:lambda=0.1"), ["lfu"])
    more = simulate.run(fed(False), arms, per_layer=False)
    figure = figure_of(figures.chart([write([*rows, *more], tmp_path / "r.json")]))
    assert {*legend_of(figure)} == {"cache prior", "max rank", "LRU", "LFU", "original (lossless)"}
    fills = {line.get_fillstyle() for line in figure.axes[0].get_lines() if line.get_label() in ("LRU", "LFU")}
    assert fills == {"full", "none"}
    assert {"25%", "50%", "75%"} <= {t.get_text() for t in figure.axes[0].texts}


def test_intervals_are_drawn_where_the_rows_have_them(tmp_path: Path) -> None:
    routings = ["original", "cache-prior:lambda=0.1"]
    plain = drawn(result_rows(routings, [0.0, 0.01]), tmp_path).axes[0]
    spread = drawn(result_rows(routings, [0.0, 0.01], delta_nll_low=-0.01, delta_nll_high=0.03), tmp_path).axes[0]
    assert len(plain.collections) == 0 and len(spread.collections) == 1
    (segment,) = spread.collections[0].get_segments()
    assert segment[:, 1] == pytest.approx([100 * math.expm1(-0.01), 100 * math.expm1(0.03)])


def test_what_the_paper_has_for_the_model_is_beside_it(rows: list[simulate.Row], tmp_path: Path) -> None:
    for model, n in (("Qwen1.5-MoE-A2.7B-Chat", 2), ("qwen1.5-moe-a2.7b (random weights)", 0), ("another", 0)):
        own = [replace(row, model=model) for row in rows]
        figure = figure_of(figures.chart([write(own, tmp_path / "r.json")], "misses"))
        assert sum("the paper" in text for text in legend_of(figure)) == n
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in figure_of(misses.chart(
        [plot_rows.Row("Mixtral-8x7B", "original", "lru", "50%", 4, 0.3, 1.0, "missed")]
    )).axes[0].get_lines()}  # fmt: skip
    assert points["the paper: original, LRU"] == [4, 40] and points["the paper: cache prior"] == [4, 21]


def test_a_figure_says_in_words_what_it_shows(rows: list[simulate.Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    trace_file.write(tmp_path / "t", fed(False).header, fed(False).records)
    source = write(rows, tmp_path / "r.json")
    for n, words_ in enumerate(
        ((source,), (source, "--kind", "misses"), (tmp_path / "t",), (tmp_path / "t", "--kind", "layers"))
    ):
        result = run(*words_, "-o", tmp_path / f"{n}.png")
        _, _, alt = result.stderr.strip().partition("In words: ")
        assert (
            len(alt) > 60 and alt.endswith(".") and alt.encode("latin-1", "replace")[:40] in (tmp_path / f"{n}.png").read_bytes()
        )


def test_the_words_have_the_gain_for_a_small_loss(tmp_path: Path) -> None:
    def alt(found: list[dict[str, object]], kind: str = "") -> str:
        (tmp_path / "r.json").write_text(json.dumps(found))
        return figures.chart([tmp_path / "r.json"], kind).alt

    found = result_rows(["original", "pruning:k=6", "cache-prior:lambda=0.1", "pruning:k=1"], [0.0, 0.004, 0.008, 0.9])
    assert alt(found).endswith("For 0.8%, cache prior λ 0.1 at 50% has 4.8 in place of 5 (-4%).")
    timed = [{**row, "ts": ts} for row, ts in zip(found, (10, 30, 20, 90), strict=True)]
    assert alt(timed, "speed").endswith("For 0.4%, pruning k 6 at 50% has 30 in place of 10 (+200%).")
    assert alt(found[:1]).endswith("in memory: original (lossless).")


def alt_and_marks(found: list[dict[str, object]], folder: Path) -> tuple[str, list[str]]:
    (folder / "r.json").write_text(json.dumps(found))
    chart = figures.chart([folder / "r.json"])
    return chart.alt.partition(": ")[2].partition(". ")[2], [f"{c[2]} {c[0]} {c[1]}{c[5]}" for c in chart.cells[1:]]


def test_the_words_name_no_point_that_another_beats(tmp_path: Path) -> None:
    base = {"model": "m", "budget": "75%", "budget_experts": 12, "miss_rate": 0.1}
    own = [("original", "lru", 1.03, 0), ("original", "soft-lfu", 0.85, 0), ("original", "belady", 0.5, 0)]
    own += [("cache-prior:lambda=0.1", "lru", 0.651, 0.0046), ("cache-prior:lambda=0.1", "soft-lfu", 0.568, 0.0042)]
    found = [{**base, "routing": r, "eviction": e, "missed_mib_per_token": x, "lost_mass": y} for r, e, x, y in own]
    said, marks = alt_and_marks(found, tmp_path)
    assert said == "For 0.42%, cache prior λ 0.1 with soft LFU at 75% has 0.568 in place of 0.85 (-33%)."
    assert {m for m in marks if m.endswith("*")} == {"soft-lfu 75% original*", "soft-lfu 75% cache-prior:lambda=0.1*"}
    less = {"budget": "50%", "budget_experts": 8}
    more = [{**row, **less, "missed_mib_per_token": 3 * row["missed_mib_per_token"] - 1} for row in found]  # type: ignore[operator]
    said, marks = alt_and_marks([*found, *more], tmp_path)
    assert said == "The greatest gain: for 0.42%, cache prior λ 0.1 with soft LFU at 50% has 0.704 in place of 1.55 (-55%)."
    assert sum(m.endswith("*") for m in marks) == 4, "each budget has its best"


def test_a_change_that_may_be_none_is_not_called_better(tmp_path: Path) -> None:
    found = result_rows(["original", "max-rank:m=6", "pruning:k=6"], [0.0, -0.0015, 0.004])
    found[1] |= {"delta_nll_low": -0.004, "delta_nll_high": 0.001}
    found[2] |= {"delta_nll_low": 0.002, "delta_nll_high": 0.006, "missed_mib_per_token": 4.95}
    said, marks = alt_and_marks(found, tmp_path)
    assert said == "For 0.4%, pruning k 6 at 50% has 4.95 in place of 5 (-1%)."
    assert [m[-1] for m in marks] == ["?", "*", "*"]
    said, marks = alt_and_marks(found[:2], tmp_path)
    assert said.endswith("(-2%), and its perplexity increase is not clear of 0 (95% interval -0.4% to 0.1%).")
    result = run(tmp_path / "r.json")
    assert "interval of its change includes 0" in result.stderr and "*: at its budget" in result.stderr


def test_the_fewest_misses_are_of_a_choice(rows: list[simulate.Row], tmp_path: Path) -> None:
    alt = figures.chart([write(rows, tmp_path / "r.json")], "misses").alt
    assert "the fewest, " in alt and "Belady" not in alt


def test_words_of_routings() -> None:
    assert words.routing("original") == "original (lossless)"
    assert words.routing("cache-prior:lambda=0.2:j=2") == "cache prior λ 0.2, j 2"
    for typed in ("pruning:k=2", "tuned", "tuned:/a/b.json", "tuned:/a/0123456789abcdef-16.json", f"tuned:{tuned.DEMO}"):
        assert words.short(typed) == tuned.short(typed), "figures and tables have the same names"
    assert words.routing("tuned:/home/a/b.json") == "tuned b.json" and words.routing("tuned") == "tuned"
    assert words.routing("python:my.module:Policy") == "own policy Policy" and words.routing("new:a=1") == "new a 1"
    assert (words.eviction("belady"), words.eviction("own"), words.budget("16")) == ("optimum (Belady)", "own", "16 experts")
    assert (words.listed([]), words.listed(["a"]), words.listed(["a", "b", "c"])) == ("", "a", "a, b and c")


def test_a_trace_has_a_table_too(tmp_path: Path) -> None:
    trace_file.write(tmp_path / "t", fed(False).header, fed(False).records)
    result = run(tmp_path / "t")
    assert result.exit_code == 0 and result.stdout.count("\n") == 4 and "half of all uses by" in result.stdout


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nowhere.json"], "nowhere.json cannot be read"),
        (["prose"], "does not hold rows of bench, simulate, frontier or eval"),
        (["broken.json"], "does not hold rows of bench, simulate, frontier or eval"),
        (["other.json"], "does not hold rows of bench, simulate, frontier or eval"),
        (["begun.jsonl"], "has no row yet; the same `cacheroute frontier` goes on from there"),
        (
            ["r.json", "--kind", "pie"],
            "There is no plot 'pie'; there are frontier, speed, files, bench, misses",
        ),
        (["r.json", "--kind", "layers"], "is not a trace"),
        (["r.json", "-o", "f.pdf"], "is neither a .png nor a .svg"),
        (["t", "--kind", "misses"], "A trace has no misses of its own"),
        (["t", "--layer", "7"], "The trace has no layer 7; it has 0..1"),
        (["t", "r.json"], "A trace is plotted alone"),
        (["r.json", "-o", "no/f.png"], "no/f.png cannot be written: there is no folder no; make it, or write to another one."),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    rows: list[simulate.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(rows, Path("r.json"))
    trace_file.write(Path("t"), fed(False).header, fed(False).records)
    Path("prose").write_text("It was the best of times,\nit was the worst of times")
    Path("broken.json").write_text('[{"routing": "original",')
    Path("other.json").write_text('{"text": "hello"}')
    Path("begun.jsonl").write_text('{"format": "cacheroute-frontier-files-2"}\n')
    if "cannot be written" in sentence:
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and result.stdout == ""
    assert sentence in result.stderr
