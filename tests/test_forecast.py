"""Forecasts on machines of fixed speeds, the measured kernels and drives, and the first line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import pytest

from cacheroute.cli.plan import _text as plan_text
from cacheroute.engine import compute_threads, storage, stores
from cacheroute.engine.compute_threads import Busy
from cacheroute.errors import UsageError
from cacheroute.files import GIB, MIB, parse_size
from cacheroute.forecast import candidates, drive, forecast, kernels, line, misses, speed, timing, workload
from cacheroute.forecast.drive import Drive
from cacheroute.forecast.kernels import TypeSpeed
from cacheroute.forecast.speed import ComputeSpeed
from cacheroute.forecast.workload import Amount, Workload
from cacheroute.model import catalogue, experts, gguf_file, memory_plan
from cacheroute.routing import strategies
from cacheroute.trace import score_files
from support import tiny_models

FAST = TypeSpeed(10e9, 100e9)
SPEED = ComputeSpeed(2, 0.0, 1e-11, *({t: FAST for t in kernels.TYPES} for _ in range(3)))
SLOW_DRIVE, FAST_DRIVE = (Drive("direct", n, drive.MEASURED) for n in (0.5e9, 500e9))
# ten layers: 1 ms of dense weights, 1 ms for each expert in all layers, 2 ms to read it from the slow drive
WORK = Workload(
    name="made up", n_expert=32, n_used=4, n_layers=10, blocks=10, dense={"q4_k": Amount(10**7, 2 * 10**7)}, shared={}, output={},
    expert={"q4_k": Amount(10**7, 2 * 10**7)}, read_bytes=10**6, heads=8, head_width=64, kv_layers=10, kv_bytes=0,
)  # fmt: skip
ORIGINAL = strategies.parse("original")
FIXED = 10 * timing._HOOK_SECONDS + timing._TOKEN_SECONDS


def entry_machine(drive: Drive | None) -> forecast.Machine:
    return forecast.Machine(SPEED, drive, cores=2)


# ---- time ----


def test_a_token_takes_its_compute_where_nothing_is_missed() -> None:
    assert timing.decoding(WORK, SPEED, SLOW_DRIVE, 0.0, 0).seconds == pytest.approx(FIXED + 0.001 + 0.004)
    assert timing.decoding(WORK, SPEED, None, 0.0, 0).seconds == pytest.approx(FIXED + 0.001 + 0.004)


def test_reads_lie_beside_the_experts_that_are_there_and_behind_nothing_else() -> None:
    all_missed = timing.decoding(WORK, SPEED, SLOW_DRIVE, 1.0, 0)
    read = 4 * 0.002 / timing._READ_EFFICIENCY  # longer than the 4 ms of the experts
    last = 0.001 / 3 + 10 * timing._WAKE_SECONDS
    assert all_missed.seconds == pytest.approx(FIXED + 0.001 + read + last)
    assert all_missed.read_seconds == pytest.approx(read) and all_missed.read_bytes == 4 * 10**6
    hidden = timing.decoding(WORK, SPEED, FAST_DRIVE, 1.0, 0, spare=1)
    assert hidden.seconds == pytest.approx(hidden.compute_seconds)
    assert timing.decoding(WORK, SPEED, FAST_DRIVE, 1.0, 0, spare=0).seconds > hidden.seconds  # readers take the same cores


def test_more_misses_and_slower_drives_take_longer() -> None:
    seconds = [timing.decoding(WORK, SPEED, SLOW_DRIVE, rate, 0).seconds for rate in (0.1, 0.5, 1.0)]
    assert seconds == sorted(seconds) and seconds[0] < 0.7 * seconds[2]
    # one miss in a layer waits for a whole expert: longer than the mean of the misses would
    mean = max(0.004, 4 * 0.1 * 0.002) + 0.001
    assert seconds[0] > FIXED + mean


def test_a_prompt_reads_each_expert_once_a_pass_beside_the_layer_before() -> None:
    one = timing.prompt(WORK, SPEED, SLOW_DRIVE, 8, 512, 512, spare=1)
    assert one.passes == 1 and one.read_bytes == pytest.approx(32 * 10**6, rel=1e-6)
    compute = 512 * (2 * 10**7 + 4 * 2 * 10**7) / 100e9 + 512 * 512 / 2 * 8 * 10 * 64 * 1e-11
    assert one.seconds == pytest.approx(timing._TOKEN_SECONDS + 0.0064 + compute, rel=0.01)  # the first layer's reads stand alone
    two = timing.prompt(WORK, SPEED, SLOW_DRIVE, 8, 512, 256, spare=1)
    assert two.passes == 2 and two.read_bytes == pytest.approx((32 + 24) * 10**6, rel=1e-6)
    slow = timing.prompt(WORK, SPEED, Drive("direct", 1e6, drive.GIVEN), 8, 512, 512)
    assert slow.seconds == pytest.approx(32, rel=0.1)
    loaded = timing.prompt(WORK, SPEED, None, 32, 512, 512)
    assert loaded.read_bytes == 0 and loaded.seconds == pytest.approx(timing._TOKEN_SECONDS + compute)


# ---- misses ----


@pytest.mark.parametrize("shape, measured", [((60, 4), 0.35), ((64, 6), 0.28), ((16, 2), 0.22), ((8, 2), 0.40)])
def test_the_prior_holds_what_the_paper_measured(shape: tuple[int, int], measured: float) -> None:
    """Misses of LRU with half of the experts (arXiv 2412.00099)."""
    rate = misses.expected(*shape, shape[0] // 2, ORIGINAL, "lru")
    assert rate.tokens == 0 and rate.low - 0.01 <= measured <= rate.high + 0.01


def test_the_prior_is_the_demo_models_on_its_shape() -> None:
    """scripts/RESULTS.md, "Strategies and evictions on traces"."""
    of = {
        ("original", 8): 0.584, ("original", 16): 0.295, ("original", 24): 0.114,
        ("cache-prior:lambda=0.1", 16): 0.189, ("cache-prior:lambda=0.2", 16): 0.116,
    }  # fmt: skip
    for (routing, capacity), measured in of.items():
        rate, tokens = misses.typical(32, 8, capacity, strategies.parse(routing), "soft-lfu")
        assert rate == pytest.approx(measured, abs=0.03) and tokens == 0
    assert misses.expected(32, 8, 32, ORIGINAL, "soft-lfu") == misses.MissRate(0.0, 0.0, 0.0)


def test_what_was_scored_counts_before_the_prior(own_cache: Path, tiny: Path) -> None:
    head = {"format": score_files.FORMAT, "model": gguf_file.content_fingerprint(tiny), "text": "a"}
    cell = {"chunk": 0, "routing": "original", "budget": 16, "eviction": "soft-lfu", "selected": 4000, "misses": [300, 500]}
    other = [{**cell, "budget": 8}, {**cell, "eviction": "lru"}, {**cell, "routing": "pruning:k=2.0"}]
    scores = own_cache / "scores"
    scores.mkdir(parents=True)
    (scores / "one.jsonl").write_text("\n".join(json.dumps(x) for x in (head, cell, *other, {**cell, "chunk": 1, "selected": 0})))
    (scores / "again.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(cell)}\n")  # of another engine
    (scores / "another.jsonl").write_text(json.dumps({**head, "model": "x"}) + "\n" + json.dumps({**cell, "misses": [4000]}))
    (scores / "damaged.jsonl").write_text(json.dumps(head) + "\n{\n")
    no_count = {**cell, "chunk": 7, "misses": [float("nan"), 500]}
    (scores / "no-count.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(no_count)}\n")
    misses.recorded.cache_clear()
    rate = misses.expected(32, 4, 16, ORIGINAL, "soft-lfu", tiny)
    assert (rate.typical, rate.tokens) == (1600 / 4000, 500) and rate.low < 0.4 < rate.high
    assert misses.expected(32, 4, 17, ORIGINAL, "soft-lfu", tiny).tokens == 0
    misses.recorded.cache_clear()


# ---- what a token multiplies ----


def test_a_header_gives_the_matrices_by_what_they_are_for(tiny: Path, tmp_path: Path) -> None:
    header = gguf_file.read(tiny)
    layout = experts.layout(header)
    work = workload.of_header(header, layout)
    assert (work.n_expert, work.n_used, work.n_layers, work.blocks, work.heads, work.head_width) == (32, 4, 2, 2, 4, 16)
    assert sum(a.nbytes for a in work.expert.values()) == layout.expert_bytes and work.read_bytes == layout.resident_bytes
    matrices = sum(
        t.nbytes for t in header.tensors if len(t.shape) > 1 and t.name != "token_embd.weight" and "exps" not in t.name
    )
    assert sum(a.nbytes for part in (work.dense, work.output) for a in part.values()) == matrices
    assert work.shared == {} and work.dense["f32"].weights == 2 * 64 * 32  # the routers
    assert work.kv_bytes == 2 * 2 * 2 * 2 * 16 + 4
    shared = gguf_file.read(tiny_models.write("qwen2moe", tmp_path / "s.gguf"))
    assert workload.of_header(shared, experts.layout(shared)).shared


@pytest.mark.parametrize("name", catalogue.load_catalogue())
def test_an_entry_is_the_whole_model(name: str) -> None:
    entry = catalogue.load_catalogue()[name]
    work = workload.of_entry(entry)
    assert sum(a.nbytes for a in work.expert.values()) == pytest.approx(entry.expert_bytes, rel=1e-6)
    dense = sum(a.nbytes for part in (work.dense, work.shared, work.output) for a in part.values())
    assert 0.5 * entry.dense_bytes < dense <= entry.dense_bytes and work.assumed


def test_the_types_are_ggmls() -> None:
    assert {name: gguf.GGMLQuantizationType[name.upper()].value for name in kernels.TYPES} == kernels.TYPES


# ---- the forecast ----


def of_catalogue(name: str, free: int, drive: Drive | None, n_ctx: int = 4096) -> forecast.Forecast:
    c = candidates.of_entry(catalogue.load_catalogue()[name], n_ctx=n_ctx, free=free)
    return forecast.of(c.work, c.plan, entry_machine(drive), n_ctx=n_ctx)


def test_a_model_larger_than_memory() -> None:
    f = of_catalogue("qwen3-30b-a3b", 8 * GIB, SLOW_DRIVE)
    assert f.fits and f.refusal is None and f.capacity and 8 < f.capacity < 128
    least, suggested, full = f.budgets
    assert (least.experts, suggested.experts, full.experts) == (8, f.capacity, 128)
    assert (least.fits, suggested.fits, full.fits) == (True, True, False)
    assert least.needed < suggested.needed <= 8 * GIB < full.needed
    assert least.mib_per_token > suggested.mib_per_token > full.mib_per_token == 0
    assert least.tokens_per_s and suggested.tokens_per_s and full.tokens_per_s
    assert least.tokens_per_s < suggested.tokens_per_s < full.tokens_per_s
    assert [r.routing for r in f.routings] == list(forecast.ROUTINGS)
    for r in f.routings:
        assert r.low and r.high and r.tokens_per_s and r.low < r.tokens_per_s < r.high and r.miss_from == forecast.ASSUMED
    speeds = [r.tokens_per_s or 0 for r in f.routings]
    assert speeds == sorted(speeds)
    assert [p.tokens for p in f.prompts] == [512, 2048]
    assert f.prompts[0].seconds and f.prompts[1].seconds and f.prompts[0].seconds < f.prompts[1].seconds
    assert {d.setting: d.value for d in f.decisions} == {
        "budget": str(f.capacity), "routing": "original", "io": "direct", "threads": "2",
    }  # fmt: skip
    assert "x as fast (lossy" in next(d.reason for d in f.decisions if d.setting == "routing")
    assert {i.how for i in f.inputs} == {"measured", "read", "assumed"}


def test_a_model_that_fits_is_loaded_whole() -> None:
    f = of_catalogue("olmoe-1b-7b", 16 * GIB, SLOW_DRIVE)
    assert f.value("budget") == "all" and f.value("io") == "load" and [r.routing for r in f.routings] == ["original"]
    assert f.routings[0].miss_rate == 0 and all(p.read_mib == 0 for p in f.prompts)


def test_a_model_that_fits_nowhere_is_refused_in_the_plans_words() -> None:
    f = of_catalogue("mixtral-8x7b", 4 * GIB, SLOW_DRIVE)
    assert not f.fits and f.refusal and f.refusal.startswith("Mixtral-8x7B-Instruct-v0.1 needs at least") and not f.decisions
    assert not any(b.fits for b in f.budgets)


def test_without_a_drive_no_speed_is_made_up() -> None:
    f = of_catalogue("qwen3-30b-a3b", 8 * GIB, None)
    assert f.fits and all(r.tokens_per_s is None and r.low is None for r in f.routings) and f.prompts[0].seconds is None
    assert f.budgets[-1].tokens_per_s  # with all in memory nothing is read
    assert f.value("io") == "auto" and not any(i.name == "drive" for i in f.inputs)
    assert f.prompts[0].read_mib > 0


def test_a_drive_that_is_fast_enough_leaves_little_to_gain() -> None:
    f = of_catalogue("qwen3-30b-a3b", 12 * GIB, Drive("direct", 500e9, drive.MEASURED))
    reasons = {d.setting: d.reason for d in f.decisions}
    assert "would gain little" in reasons["routing"] and "would be nearly as fast" in reasons["budget"]


def test_a_tuned_routing_comes_with_its_price() -> None:
    c = candidates.of_entry(catalogue.load_catalogue()["qwen3-30b-a3b"], n_ctx=4096, free=8 * GIB)
    tuned = forecast.Tuned(dataclasses.replace(strategies.parse("cache-prior:lambda=0.3"), text="tuned"), "soft-lfu", 1.0)
    f = forecast.of(c.work, c.plan, entry_machine(SLOW_DRIVE), n_ctx=4096, tuned=tuned)
    assert f.routings[-1].loss == 1.0
    assert "(at 1% of perplexity)" in next(d.reason for d in f.decisions if d.setting == "routing")
    tuned = dataclasses.replace(tuned, loss=None, kl=(0.0179, 0.0168, None), reference="Q8_0")
    f = forecast.of(c.work, c.plan, entry_machine(SLOW_DRIVE), n_ctx=4096, tuned=tuned)
    said = "17.9 [16.8, ?] millinats of KL against Q8_0"
    assert f.routings[-1].price == said and f"(at {said})" in next(d.reason for d in f.decisions if d.setting == "routing")
    assert any(text.endswith(f": {said}, as `tune` measured") for text in plan_text(f, "qwen3-30b-a3b"))


# ---- what is measured ----


def test_the_kernels_are_measured_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKING_SET", 4 * MIB)
    monkeypatch.setattr(compute_threads, "busy", lambda: None)
    types = speed.Types(frozenset({"f16", "q4_K"}), frozenset({"q6_K"}), frozenset({"q4_K"}))
    found = speed.measure(types, 1)
    assert set(found.dense) == {"f16", "q4_k"} and set(found.experts) == {"q6_k"} and set(found.repacked) == {"q4_k"}
    speeds = [*found.dense.values(), *found.experts.values(), *found.repacked.values()]
    assert all(1e7 < s.bytes_per_s < 1e12 and 1e8 < s.batch_per_s < 1e14 for s in speeds)
    assert 0 < found.node_seconds < 1e-2 and 0 < found.attention_seconds < 1e-7
    monkeypatch.setattr(kernels, "Kernels", None)  # no second measurement
    assert speed.known(1) == speed.measure(types, 1) == found
    assert speed.known(2) is None
    assert found.lacks(speed.Types(frozenset({"q8_0"}))).dense == {"q8_0"}
    (own_cache / "compute.json").write_text('{"format": "cacheroute-compute-speed", "version": 1, "machines": [1]}')
    assert speed.known(1) is None


def test_what_is_measured_beside_other_programs_is_not_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKING_SET", 4 * MIB)
    looks = iter([Busy(1.0, 10.0), Busy(1.5, 1000.0)])
    monkeypatch.setattr(compute_threads, "busy", lambda: next(looks))
    found = speed.measure(speed.Types(frozenset({"f16"})), 1)
    assert found.crowded and found.dense and speed.known(1) is None


def test_a_type_that_is_not_known_is_measured_as_another() -> None:
    assert speed.measured_as("Q4_K") == "q4_k" and speed.measured_as("nvfp9") in kernels.TYPES


def test_a_processor_is_known_by_its_model(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name : Fast 3000\nstepping : 2\nflags : x\n\nprocessor : 1\n")
    assert speed._processor(tmp_path) == "Fast 3000 2"
    assert speed._processor(tmp_path / "nowhere")


def test_a_drive_is_remembered(own_cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = experts.layout(gguf_file.read(tiny))
    assert drive.known(layout) is None and drive.known(layout, 100) == Drive("direct", 1e8, drive.GIVEN)
    readings = [storage.Reading("direct", 800.0, 1.0), storage.Reading("buffered", 700.0, 1.0)]
    monkeypatch.setattr(storage, "measure", lambda _: readings)
    looks = iter([Busy(0.0, 0.0), Busy(0.0, 1000.0)])
    monkeypatch.setattr(compute_threads, "busy", lambda: next(looks, None))
    stores.remember_speeds(layout, {"direct": 1.0, "buffered": 1.0})  # by one quick measurement
    assert drive.measure(layout).bytes_per_s == 8e8 and not stores.speeds(layout, 3)  # beside other programs
    assert drive.measure(layout) == Drive("direct", 8e8, drive.MEASURED) == drive.known(layout)
    monkeypatch.setattr(storage, "measure", lambda _: pytest.fail("measured twice"))
    assert drive.measure(layout, 100) == Drive("direct", 1e8, drive.GIVEN)
    assert drive.measure(layout, 900) == Drive("direct", 9e8, drive.GIVEN)  # another drive, which may be faster
    assert drive.known(layout, 900) == Drive("direct", 8e8, drive.MEASURED)  # this one at a pace that it does not reach
    assert drive.known(layout, io="buffered") == Drive("buffered", 7e8, drive.MEASURED)
    stores.remember_speeds(layout, {"direct": 1.0, "buffered": 1.0})  # a quick one does not replace them
    assert drive.known(layout) == Drive("direct", 8e8, drive.MEASURED)
    stores.remember_speeds(layout, {"direct": 500.0, "buffered": 700.0}, 3)
    found = drive.known(layout)
    assert found and found.io == "buffered"  # as the engine would choose
    stores.remember_speeds(layout, {"buffered": 600.0}, 3)
    assert drive.measure(layout) == Drive("buffered", 6e8, drive.MEASURED)
    monkeypatch.setattr(storage, "measure", lambda _: readings)
    (file,) = own_cache.rglob("drive.json")
    whole = json.loads(file.read_text())
    for damage in (
        {"rounds": "x"},
        {"rounds": None},
        {"rounds": []},
        {"buffered": float("inf")},
        {"buffered": 1e300},
        {"buffered": "6"},
    ):
        file.write_text(json.dumps({place: {**found, **damage} for place, found in whole.items()}))
        assert drive.known(layout) is None and drive.measure(layout).bytes_per_s == 8e8  # measured again


def test_any_file_tells_of_its_filesystem(own_cache: Path, demo_model: Path) -> None:
    found = drive.measure(drive.blocks(demo_model, 2 * MIB))
    assert found.how == drive.MEASURED and found.bytes_per_s > 1e6


# ---- the first line ----


def test_the_first_line_says_what_is_known_and_no_more(own_cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf_file.read(tiny)
    layout = experts.layout(header)
    bare = line.first_line(header, layout, 16, n_threads=2)
    assert bare.endswith(" MiB of experts in memory") and " of " in bare and bare.count(";") == 0
    stores.remember_speeds(layout, {"direct": 1300.0, "buffered": 900.0})
    assert line.first_line(header, layout, 16, n_threads=2) == bare + ", direct reads at 1.3 GB/s"
    assert line.first_line(header, layout, 16, flash_mbps=100, n_threads=2) == bare + ", direct reads at 0.1 GB/s"
    monkeypatch.setattr(speed, "known", lambda n: dataclasses.replace(SPEED, n_threads=n))
    said = line.first_line(header, layout, 16, n_threads=2)
    assert said.startswith(bare + ", direct reads at 1.3 GB/s; about ") and said.endswith(" tok/s")
    tuned = forecast.Tuned(strategies.parse("cache-prior:lambda=0.3"), "soft-lfu", 1.0)
    monkeypatch.setattr(candidates, "tuned_for", lambda *_: tuned)
    assert line.first_line(header, layout, 16, n_threads=2).endswith(" at 1% loss with --routing tuned")
    assert "loss" not in line.first_line(header, layout, 16, routing="cache-prior:lambda=0.3", n_threads=2)
    by_kl = dataclasses.replace(tuned, loss=None, kl=(0.0179, None, None))
    monkeypatch.setattr(candidates, "tuned_for", lambda *_: by_kl)
    assert line.first_line(header, layout, 16, n_threads=2).endswith(" at a KL of 17.9 millinats with --routing tuned")
    whole = line.first_line(header, layout, 32, n_threads=2)
    assert ": all " in whole and "reads" not in whole and "about" in whole
    assert "tok/s" not in line.first_line(header, layout, 16, routing="speculate", n_threads=2)


# ---- memory ----


def test_the_plan_of_an_entry_is_about_that_of_its_header(demo_model: Path) -> None:
    header = gguf_file.read(demo_model)
    free = 300 * MIB
    own = memory_plan.of(header, experts.layout(header), n_ctx=512, flash_attn=True, free=free)
    entered = memory_plan.of_entry(catalogue.load_catalogue()["demo"], n_ctx=512, free=free)
    assert own.needed(8) == pytest.approx(entered.needed(8), rel=0.2)


def test_the_plan_of_an_entry_takes_the_memory_that_is_free() -> None:
    entry = catalogue.load_catalogue()["qwen3-30b-a3b"]
    plan = memory_plan.of_entry(entry, n_ctx=4096, free=8 * GIB)
    assert plan.capacity and 30 < plan.capacity < 60
    assert plan.needed(plan.capacity) <= 8 * GIB - plan.reserve < plan.needed(plan.capacity + 1)
    assert memory_plan.of_entry(entry, n_ctx=4096, free=32 * GIB).capacity == 128


@pytest.mark.parametrize(
    "text, nbytes", [("8GiB", 8 * GIB), ("8G", 8 * GIB), ("8GB", 8 * 10**9), ("512 MiB", 512 * MIB), ("1.5g", 3 * GIB // 2)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["8", "", "GiB", "-1G", "8 apples", "50%", "9" * 400 + "GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)
